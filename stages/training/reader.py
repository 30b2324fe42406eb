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
# what a tuple holds that is set as the attributes of a TensorProperties
PROPERTIES = (bool, torch.dtype, torch.layout, _MEM_FORMAT_ENCODING)

# the only instructions of a pickle that DCP's metadata is written with
NEEDED = (
    pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.MEMOIZE + pickle.BINGET + pickle.LONG_BINGET
    + pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1
    + pickle.SHORT_BINUNICODE + pickle.BINUNICODE + pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS
    + pickle.EMPTY_TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3 + pickle.TUPLE
    + pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS + pickle.STACK_GLOBAL + pickle.NEWOBJ + pickle.REDUCE
    + pickle.BUILD
)  # fmt: skip


class _Unpickler(pickle._Unpickler):
    """In Python, as only that lets each instruction be limited. Attributes set on a class or a function, which a pickle
    can name like any value, would change the whole process. And a tuple of a tuple twice, of a tuple twice and so on,
    is small to write but takes for ever to hash, to compare or to put into words, and one that is deep enough overflows
    the stack: so no such thing becomes a key, an argument, or the attributes of what looks into them."""

    stack: list[Any]

    def load_build(self) -> None:
        made, state = self.stack[-2:]
        if type(made) not in PLAIN or vars(made):  # twice, and a key's hash would change
            raise pickle.UnpicklingError(f"it sets attributes of a {type(made).__name__}")
        named = type(state) is dict and state.keys() <= {field.name for field in dataclasses.fields(made)}
        if not named and not (type(state) is tuple and all(type(value) in PROPERTIES for value in state)):
            raise pickle.UnpicklingError(f"the attributes of a {type(made).__name__} are none")
        super().load_build()  # type: ignore[misc]

    def load_newobj(self) -> None:
        kind, arguments = self.stack[-2:]
        if kind not in PLAIN or arguments != ():
            raise pickle.UnpicklingError("it makes what no checkpoint needs")
        super().load_newobj()  # type: ignore[misc]

    def load_reduce(self) -> None:
        called, arguments = self.stack[-2:]
        if called is torch.Size and type(arguments) is tuple and len(arguments) == 1:
            [arguments] = arguments
        if type(arguments) is not tuple or any(type(value) not in (int, str) for value in arguments):
            raise pickle.UnpicklingError("it calls something with what no checkpoint needs")
        super().load_reduce()  # type: ignore[misc]

    def load_setitem(self) -> None:
        self._check_keys([self.stack[-2]])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()  # type: ignore[misc]

    @staticmethod
    def _check_keys(keys: list[Any]) -> None:
        for key in keys:
            if type(key) is MetadataIndex and _is_size(key.offset):
                key = key.fqn
            if type(key) is not str:
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key")

    def refuse(self) -> None:
        raise pickle.UnpicklingError("it has instructions that no checkpoint needs")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), refuse),
        **{code: pickle._Unpickler.dispatch[code] for code in NEEDED},
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.REDUCE[0]: load_reduce,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }

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


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size


def _fault(metadata: Any, sizes: dict[str, int]) -> str | None:
    """What is wrong with it; None when all it holds is tensors, within files of these sizes. No value is hashed,
    compared or put into words before it is known to be flat: see `_Unpickler`."""
    if type(metadata) is not Metadata:
        return "it is none"
    tensors, places = metadata.state_dict_metadata, metadata.storage_data
    if type(tensors) is not dict or type(places) is not dict:
        return "it does not say what it holds"
    stored = {(index.fqn, index.offset) for index in places}
    for name, entry in tensors.items():
        if type(name) is not str or type(entry) is not TensorStorageMetadata or not _is_size(entry.size):
            return "it holds what is no tensor"
        if not all(_is_size(chunk.sizes) and _is_size(chunk.offsets) for chunk in entry.chunks):
            return f"it does not say which parts {name} has"
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            return f"the parts of {name} do not make it up"
        if not all((name, chunk.offsets) in stored for chunk in entry.chunks):
            return f"it does not say where {name} lies"
    for info in places.values():
        path, low, length = info.relative_path, info.offset, info.length
        if type(path) is not str or type(low) is not int or type(length) is not int:
            return "it does not say of which file and bytes"
        if path not in sizes or not path.endswith(SHARD) or "/" in path or info.transform_descriptors is not None:
            return f"it reads from {path!r}"
        if not 0 <= low <= low + length <= sizes[path]:
            return f"it reads bytes {low} to {low + length} of {path}, which has {sizes[path]}"
    return None
