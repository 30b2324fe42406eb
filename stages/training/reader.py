"""Reads a checkpoint of torch.distributed.checkpoint as data.

Its `.metadata` is a pickle, and a pickle may run any code. Whoever can write to the storage could have it do so, as
sizes and hashes in the manifest lie beside it. So only the few plain classes that our checkpoints are made of are
admitted, and what they say of files is compared with the manifest.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import _get_layout

from cluster.manifest import Manifest
from cluster.storage import DamagedError

METADATA = ".metadata"
SHARD = ".distcp"  # how the names of the files with tensors end

# No BytesStorageMetadata: DCP would unpickle, without any limits, the values that it describes.
ADMITTED: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
        _MEM_FORMAT_ENCODING,
        _StorageInfo,
    )
} | {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,  # of a name, from a table
    # the folder that a checkpoint was written in, which nobody reads: a path that cannot touch a disk
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


PLAIN = tuple(kind for kind in ADMITTED.values() if dataclasses.is_dataclass(kind))


class _Unpickler(pickle._Unpickler):
    """In Python, as only that lets the setting of attributes be limited: on a class or a function, which a pickle can
    name like any value, it would change the whole process."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    stack: list[Any]

    def load_build(self) -> None:
        if type(self.stack[-2]) not in PLAIN:
            raise pickle.UnpicklingError(f"it sets attributes of a {type(self.stack[-2]).__name__}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ADMITTED:
            return ADMITTED[module, name]
        if module == "torch" and isinstance(kind := vars(torch).get(name), torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class CheckpointReader(FileSystemReader):
    """Reads the checkpoint in `directory`, of which `saved` is the manifest. Raises DamagedError where its `.metadata`
    is not that of a checkpoint of ours."""

    def __init__(self, directory: Path, saved: Manifest) -> None:
        super().__init__(directory)
        data = (directory / METADATA).read_bytes()
        try:
            self.metadata: Metadata = _Unpickler(io.BytesIO(data)).load()
            fault = _fault(self.metadata, {f.path: f.size for f in saved.files})
        except Exception as error:  # what a broken pickle raises has no other class in common
            fault = str(error) or repr(error)
        if fault:
            raise DamagedError(f"{directory / METADATA} is not that of a checkpoint, and was not read: {fault}")

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def files(self, plan: LoadPlan) -> set[str]:
        """The files that `plan` reads."""
        return {self.metadata.storage_data[item.storage_index].relative_path for item in plan.items}


def _fault(metadata: Any, sizes: dict[str, int]) -> str | None:
    """What is wrong with it; None when all it holds is tensors, within files of these sizes. No value is put into words
    that could be any other than a string: one of tuples within tuples could take for ever."""
    if type(metadata) is not Metadata:
        return "it is none"
    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str or type(entry) is not TensorStorageMetadata:
            return "it holds what is no tensor"
        if not all((name, chunk.offsets) in stored for chunk in entry.chunks):
            return f"it does not say where {name} lies"
    for info in metadata.storage_data.values():
        path, low, length = info.relative_path, info.offset, info.length
        if type(path) is not str or type(low) is not int or type(length) is not int:
            return "it does not say of which file and bytes"
        if path not in sizes or not path.endswith(SHARD) or "/" in path or info.transform_descriptors is not None:
            return f"it reads from {path!r}"
        if not 0 <= low <= low + length <= sizes[path]:
            return f"it reads bytes {low} to {low + length} of {path}, which has {sizes[path]}"
    return None
