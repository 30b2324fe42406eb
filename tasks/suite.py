"""What can be asked of a model, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

import pyarrow.fs as pafs

from corpus.sources import below, fetched, filesystem_of
from tasks import arc, humaneval, mmlu, spelling
from tasks.choices import first_of
from tasks.core import Bundle
from tasks.generated import GeneratedTask
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.perplexity import Perplexity
from tasks.ranking import RankedTask
from tasks.spelling import Spelling

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "Spelling")
GROUPS = ("core", "chatcore", "perplexity")

FOLDERS = dict(zip(CHATCORE, ("arc", "arc", "mmlu", "gsm8k", "humaneval", "wordlist"), strict=True))

Task = RankedTask | GeneratedTask


@dataclass(frozen=True)
class Suite:
    """Tasks to be asked. `incomplete` says what is missing of CORE's labels whose data is not there or not whole."""

    tasks: list[Task]
    incomplete: dict[str, str] = field(default_factory=dict)


def suite(
    names: Sequence[str],
    data: str | None,
    documents: Callable[[], Iterator[str]] | None = None,
    stamp: str = "",
    context: int = 0,
    unsafe: bool = False,
) -> Suite:
    """The tasks of `names`: GROUPS, tasks of CHATCORE, or labels of CORE.

    `data` is a folder, URI or `hub:OWNER/NAME` with a folder for each data set (core, arc, mmlu, gsm8k, humaneval,
    wordlist), or a CORE bundle itself; of what it lacks, all but CORE comes from the data sets of these names at the
    hub. `documents` gives the text of "perplexity", for a model that sees `context` tokens, and `stamp` changes with
    it. `unsafe` lets what models write run outside of a sandbox. Raises FileNotFoundError or ValueError.
    """
    place = _place(data)
    tasks: dict[str, Task] = {}
    bundle: Bundle | None = None
    for name in names:
        if name == "perplexity":
            if documents is None:
                raise ValueError("perplexity is of a text: give --text FILE, or a run that has held some out")
            tasks[name] = Perplexity(documents, context, stamp)
        elif name == "chatcore":
            tasks |= {each: chat_task(each, place, unsafe=unsafe) for each in CHATCORE}
        elif name in CHATCORE:
            tasks[name] = chat_task(name, place, unsafe=unsafe)
        elif name == "core" and data is None:
            raise ValueError("CORE needs its bundle: give --eval-data the folder or .zip that holds core.yaml")
        else:
            bundle = bundle or (Bundle(data) if data is not None else None)
            labels = {task.name: task for task in bundle.tasks} if bundle else {}
            if name == "core":
                tasks |= labels
            elif name in labels:
                tasks[name] = labels[name]
            elif bundle and name in bundle.incomplete:
                raise FileNotFoundError(f"{bundle.source} has no data for {name}: {bundle.incomplete[name]}")
            else:
                raise _unknown(name, labels)
    return Suite([*tasks.values()], bundle.incomplete if bundle and "core" in names else {})


def _unknown(name: str, labels: Iterable[str]) -> ValueError:
    known = [*GROUPS, *CHATCORE, *labels]
    nearest = ", ".join(get_close_matches(name, known, n=3, cutoff=0.0))
    more = "" if labels else ", and with --eval-data the labels of CORE"
    return ValueError(f"there is no task {name!r}; did you mean {nearest}? There are {', '.join(known)}{more}")


def chat_task(name: str, data: str | None, hub: bool = True, unsafe: bool = False) -> Task:
    """A task of CHATCORE, from the folder of its data set in `data` where there is one, else from the hub, or where
    `hub` is false not at all. Raises FileNotFoundError."""
    folder = below(data, FOLDERS[name]) if data is not None else None
    if folder is not None and not _exists(folder):
        folder = None
    if folder is None and not hub and name != "Spelling":
        raise FileNotFoundError(f"{name} has no folder of evaluation data")
    return _chat_task(name, folder, unsafe)


def _exists(place: str) -> bool:
    filesystem, path = filesystem_of(place)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def _place(data: str | None) -> str | None:
    """Where the files of `data` are. Raises FileNotFoundError or ValueError."""
    place = fetched(data) if data is not None else None
    if place is not None and not _exists(place):
        raise FileNotFoundError(f"{data} is not there; --eval-data is a folder or URI of evaluation data, or a bundle")
    return place


def _chat_task(name: str, folder: str | None, unsafe: bool) -> Task:
    if name in arc.PARTS:
        return arc.task(name, folder or arc.HUB)
    if name == "MMLU":
        return mmlu.task(folder or mmlu.HUB)
    if name == "GSM8K":
        if folder is not None:
            first_of(folder, ("test.jsonl",))
        return GeneratedTask(name, GSM8K(folder) if folder else GSM8K())
    if name == "HumanEval":
        place = first_of(folder, ("HumanEval.jsonl*", "**/test-*.parquet")) if folder else humaneval.HUB
        return GeneratedTask(name, HumanEval(place, unsafe), max_new_tokens=512)
    return GeneratedTask(name, Spelling(spelling.word_list(folder) if folder else ""), max_new_tokens=96)


def at_hand(data: str | None, chat: bool) -> list[str]:
    """What can be asked without a network: of a model that chats, the tasks of CHATCORE whose data is in `data`, or
    needs none; of another, CORE where its bundle is there."""
    place = _place(data)
    if chat:
        folders = {name: place is not None and _exists(below(place, FOLDERS[name])) for name in CHATCORE}
        return [name for name, there in folders.items() if there or name == "Spelling"]
    try:
        return ["core"] if data is not None and Bundle(data).tasks else []
    except FileNotFoundError:
        return []


def chosen(tasks: str, data: str | None, chat: bool) -> list[str]:
    """Of the names in `tasks`, with commas between, those that are for a model that chats, or for one that does not;
    "auto" stands for all that is at hand, "none" for nothing."""
    if tasks in ("auto", "none"):
        return at_hand(data, chat) if tasks == "auto" else []
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return [name for name in names if (name in ("chatcore", *CHATCORE)) == chat]
