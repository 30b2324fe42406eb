"""Text to ids and back, by one interface: BPE trained here, OpenAI's encodings, others' files, or single characters.

Every tokenizer has the nine special tokens of the chat format after all ids it had before, reads nothing but text from
text, and is saved so that transformers reads it too: chats give the same ids there, whatever their messages say. Plain
text given to transformers alone is taken as what a template wrote, so a special token spelled out in it is that token
unless the call says `split_special_tokens=True`.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import rustbpe
import tiktoken
from pydantic import TypeAdapter

from corpus.chat_template import chat_template, escapes, unescapes
from corpus.own_chat import CALL, CLOSE, OPEN, RESULT, NoFormatError, OwnChat
from corpus.utf8 import valid
from corpus.vocabularies import (
    ENCODINGS,
    FILES,
    GPT2_FILES,
    Ranks,
    TokenizerJson,
    byte_level,
    gpt4_pattern,
    parse_json,
    parse_ranks,
    read,
)

__all__ = [
    "ANSWER_ENDS",
    "DOCUMENT_ENDS",
    "ENCODINGS",
    "PADDING",
    "SPECIAL_TOKENS",
    "BytePairs",
    "Tokenizer",
    "UnknownCharacterError",
    "check_size",
    "fixed_vocab_size",
    "lacking",
]

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)

# What ends a text, the first of them by name: a document ends where the next would begin, an answer with the turn or,
# until a tool has answered, with a call.
DOCUMENT_ENDS, ANSWER_ENDS = ("<|bos|>",), ("<|assistant_end|>", "<|python_end|>")
# Trainers leave padding out of the loss, so it is neither what parts documents nor what ends a turn. And transformers,
# where no attention mask is given, takes each of these for padding unless an answer ends with it.
PADDING = "<|python_end|>"

# Digits in groups of one or two: three-digit groups would eat a small vocabulary.
SPLIT_PATTERN = gpt4_pattern(digits=2)
PATTERNS = {SPLIT_PATTERN, *(known.pattern for known in FILES.values())}

# Characters given to tiktoken at once: its regex overflows its stack on a run of a few million spaces.
MAX_PIECE = 400_000

# Characters of a run of white space, or of anything else, that training is given at once: what is written of a token
# grows with the square of its length, and rustbpe's regex overflows its stack on a million spaces. No less than what is
# used of a document by default, so that only for who asks for more is anything cut.
MAX_RUN = 10_000
# From where a run begins: one that is tried from each of its characters would take the square of its length.
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{MAX_RUN + 1},}}|(?<!\s)\s{{{MAX_RUN + 1},}}")

# Of characters that an alphabet lacks, how many are named; and the longest alphabet that is written out for the user.
NAMED, WRITTEN = 10, 1_000

CONTROLS = {"\t": "TAB", "\n": "LINE FEED", "\r": "CARRIAGE RETURN"}  # to which Unicode gives no names but aliases

META_FILE, RANKS_FILE, BYTES_FILE = "tokenizer_meta.json", "ranks.tiktoken", "token_bytes.npy"
JSON_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"

Aliases = dict[str, list[str]]  # of ours, the special tokens that stand for it


def named(character: str) -> str:
    """A character for a message: as it is written in code, with its name and its value in Unicode."""
    name = unicodedata.name(character, "") or CONTROLS.get(character, "no name")
    return f"{character!r} ({name}, U+{ord(character):04X})"


class UnknownCharacterError(ValueError):
    """A text has a character that the alphabet of `chars` lacks: `character`, and its index `position` in the text."""

    def __init__(self, character: str, position: int) -> None:
        super().__init__(f"character {named(character)} at position {position} is not in the alphabet")
        self.character, self.position = character, position


def lacking(alphabet: str, found: Mapping[str, str]) -> str:
    """What to say where the alphabet of `chars` lacks characters, given with where they are `found`: which these are,
    and the ways out. The alphabet that has them too is written as a shell and --set read it."""
    shown = [f"{named(character)} in {found[character]}" for character in sorted(found)[:NAMED]]
    if len(found) > NAMED:
        shown.append(f"and {len(found) - NAMED:,} more")
    whole = alphabet + "".join(sorted(c for c in found if valid(c) == c))  # half a surrogate pair cannot be written
    plain = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in whole)
    quoted = shlex.quote(f'tokenizer.alphabet="{plain}"') if len(whole) <= WRITTEN else "tokenizer.alphabet=..."
    return (
        f"the alphabet of the tokenizer `chars` lacks {', '.join(shown)}: take another --tokenizer, such as bpe, or "
        "give all the characters there are, with a new --name or with --force tokenizer --force base, as "
        f"--set {quoted}"
    )


class Tokenizer(ABC):
    """Text to ids and back. `encode` never makes the id of a special token, and every id below `vocab_size` decodes.

    `token_bytes`, (vocab_size,) int32, is the UTF-8 bytes of each token; 0 for special ones, which stand for no text.
    `added` are the ids that were not in what it was made of. Of a model that was made elsewhere, `aliases` says which
    of its own special tokens stand for which of ours, and `own` is the chat format of its own, where it has one.
    """

    kind: ClassVar[str]
    alphabet = ""  # the only characters that it can write; of all but `chars` every text can be written
    own: OwnChat | None = None

    def __init__(self, special: dict[str, int], token_bytes: np.ndarray, aliases: Aliases | None = None) -> None:
        self._special, self.aliases = special, aliases or {}
        self.token_bytes = token_bytes

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> BytePairs:
        """Learn merges from `texts`. `vocab_size` counts the special tokens; a corpus with fewer merges gives fewer.

        Raises ValueError when `vocab_size` cannot hold the 256 bytes and the special tokens.
        """
        check_size(vocab_size)
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in _bounded(valid(text)))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        return BytePairs.of(Ranks(ranks, SPLIT_PATTERN, {}))

    @staticmethod
    def open(source: str, alphabet: str = "") -> Tokenizer:
        """A tokenizer that needs no training: an encoding's name, a file or folder, or "chars" with its `alphabet`.

        Raises ValueError when it cannot be loaded; the message says what to do.
        """
        if source == "chars":
            return _Characters(alphabet)
        vocabulary = read(source)
        if clash := vocabulary.special.keys() & set(SPECIAL_TOKENS):
            raise ValueError(f"tokenizer {source} already has the token {min(clash)}, which is added here")
        return BytePairs.of(vocabulary) if isinstance(vocabulary, Ranks) else _FromJson.of(vocabulary, source)

    @staticmethod
    def of_model(directory: Path, size: int, own_chat: bool = True) -> Tokenizer:
        """The tokenizer of a model in a Hugging Face directory, or of one made here, at least as large as the model's
        vocabulary `size`. Where the model has a chat template, and `own_chat`, that stays its format; else it learns
        ours. Raises ValueError for a tokenizer or a template that cannot be used."""
        if (directory / META_FILE).is_file():
            return Tokenizer.load(directory)
        return _of_model(directory, size, own_chat)

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError when a file is damaged."""
        try:
            meta = json.loads((directory / META_FILE).read_text(encoding="utf-8"))
            tokenizer = _KINDS[meta["kind"]].restore(directory, meta)
            known = tokenizer._special.keys() | tokenizer.aliases.keys()
            if lacks := set(SPECIAL_TOKENS[:1] + ANSWER_ENDS if tokenizer.own else SPECIAL_TOKENS) - known:
                raise ValueError(f"it lacks the token {min(lacks)}")
            return tokenizer
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is missing: {directory} holds no tokenizer; run the tokenizer stage"
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"the tokenizer in {directory} is damaged ({error}); make it again") from error

    @classmethod
    @abstractmethod
    def restore(cls, directory: Path, meta: dict[str, Any]) -> Tokenizer:
        """The tokenizer of this kind in `directory`."""

    def save(self, directory: Path, eos: str = ANSWER_ENDS[0], max_length: int | None = None) -> None:
        """Write what `load` reads, the bytes of each token, and the files transformers' AutoTokenizer reads.

        There `eos` ends a text and `max_length` tokens are the most that the model takes. Their tokenizer and template
        belong together: see `corpus.chat_template`.
        """
        directory.mkdir(parents=True, exist_ok=True)
        meta = {"kind": self.kind, **self._state(directory)}
        _write_json(directory / META_FILE, meta | ({"aliases": self.aliases} if self.aliases else {}))
        np.save(directory / BYTES_FILE, self.token_bytes)
        self._export(directory, eos, max_length)

    def _export(self, directory: Path, eos: str, max_length: int | None) -> None:
        """Writes what transformers reads."""
        bos = self.names("<|bos|>")[0]
        exported = json.dumps(_with_marks(self._fast(), self._special, bos), ensure_ascii=False, separators=(",", ":"))
        (directory / JSON_FILE).write_text(exported, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": self.names(eos)[-1],
            "pad_token": PADDING,
            "padding_side": "left",  # as generating needs it
            "clean_up_tokenization_spaces": False,
        }
        if max_length is not None:
            config["model_max_length"] = max_length
        _write_json(directory / CONFIG_FILE, config)
        (directory / TEMPLATE_FILE).write_text(chat_template(self._special), encoding="utf-8")

    @abstractmethod
    def _state(self, directory: Path) -> dict[str, Any]:
        """What `restore` needs, as JSON; large parts go into files of `directory`."""

    @abstractmethod
    def _fast(self) -> Any:
        """The same as a `tokenizers.Tokenizer`."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a special token spelled out in it is ordinary text."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as uint32, read-only; half a surrogate pair counts as U+FFFD."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def names(self, name: str) -> Sequence[str]:
        """The special tokens that stand for ours of this name, the first of them before others."""
        return self.aliases.get(name, (name,))

    def ids(self, name: str) -> list[int]:
        """Those of `names`."""
        return [self._special[own] for own in self.names(name)]

    def special(self, name: str) -> int:
        return self.ids(name)[0]

    @property
    def bos(self) -> int:
        return self.special("<|bos|>")

    @property
    def padding(self) -> int:
        own = self.own.names.get("pad_token") if self.own is not None else None
        return self.special(PADDING) if own is None else self._special[own]

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The id of every special token."""
        return self._special

    @cached_property
    def special_or_place(self) -> re.Pattern[str]:
        """Splits what `own` has rendered at special tokens and places, which are kept."""
        names = sorted(self._special, key=len, reverse=True)
        return re.compile(f"({OPEN}\\d+{CLOSE}|{'|'.join(map(re.escape, names))})")


def check_size(vocab_size: int) -> None:
    """Raises ValueError when it cannot hold the 256 bytes and the special tokens."""
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small: it holds at least {least} (bytes, special tokens)")


def fixed_vocab_size(source: str, alphabet: str) -> int | None:
    """Size of the vocabulary that `Tokenizer.open` gives; None for "bpe", where the run decides.

    Named encodings need no network for it. Raises ValueError as `open` does.
    """
    if source == "bpe":
        return None
    if source == "chars":
        return _Characters(alphabet).vocab_size
    size = ENCODINGS[source].size if source in ENCODINGS else read(source).size
    return size + len(SPECIAL_TOKENS)


class BytePairs(Tokenizer):
    """Byte-level BPE run by tiktoken, as `encoding`; the ids of special tokens follow the ranks."""

    kind = "byte_pairs"

    def __init__(self, vocabulary: Ranks, token_bytes: np.ndarray, aliases: Aliases | None = None) -> None:
        super().__init__(vocabulary.special, token_bytes, aliases)
        self._ranks, self._pattern = vocabulary.ranks, vocabulary.pattern
        self.encoding = tiktoken.Encoding(
            "fathom", pat_str=self._pattern, mergeable_ranks=self._ranks, special_tokens=self._special
        )

    @classmethod
    def of(cls, vocabulary: Ranks, aliases: Aliases | None = None, size: int = 0) -> BytePairs:
        """`vocabulary` with the chat's special tokens but those that have `aliases`, and then as many without a use
        that there are `size`."""
        special = _with_chat_tokens(vocabulary.special, vocabulary.size, aliases)
        special |= {f"<|reserved_{i}|>": i for i in range(len(vocabulary.ranks) + len(special), size)}
        sizes = np.zeros(len(vocabulary.ranks) + len(special), dtype=np.int32)
        for token, rank in vocabulary.ranks.items():
            sizes[rank] = len(token)
        return cls(vocabulary._replace(special=special), sizes, aliases)

    @classmethod
    def restore(cls, directory: Path, meta: dict[str, Any]) -> BytePairs:
        ranks = parse_ranks((directory / RANKS_FILE).read_bytes())
        special, sizes = _special_of(meta), _load_sizes(directory)
        if sorted(special.values()) != list(range(len(ranks), len(sizes))):
            raise ValueError("the ids of its special tokens do not follow its ranks")
        # one that matches nothing aborts tiktoken, one that matches little loses text, and others never end
        if meta["pattern"] not in PATTERNS:
            raise ValueError("its pattern is none that splits text here")
        return cls(Ranks(ranks, meta["pattern"], special), sizes, _aliases_of(meta))

    def _state(self, directory: Path) -> dict[str, Any]:
        in_order = sorted(self._ranks, key=self._ranks.__getitem__)
        lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(in_order))
        (directory / RANKS_FILE).write_bytes(b"".join(lines))
        return {"pattern": self._pattern, "special_tokens": self._special}

    def _fast(self) -> Any:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        # tiktoken joins the neighbours whose union has the lowest rank, so every split of a token into two known
        # tokens is a merge, in order of the union's rank.
        names = {token: byte_level(token) for token in self._ranks}
        merges = [
            (names[token[:cut]], names[token[cut:]])
            for token in sorted(self._ranks, key=self._ranks.__getitem__)
            for cut in range(1, len(token))
            if token[:cut] in self._ranks and token[cut:] in self._ranks
        ]
        vocab = {names[token]: rank for token, rank in self._ranks.items()}
        fast = FastTokenizer(models.BPE(vocab, merges, ignore_merges=True))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(self._pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        fast.decoder = decoders.ByteLevel()
        return _add_special(fast, self._special)

    def encode_array(self, text: str) -> np.ndarray:
        text = valid(text)
        pieces = [
            self.encoding.encode_to_numpy(text[start : start + MAX_PIECE], disallowed_special=())
            for start in range(0, len(text) or 1, MAX_PIECE)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)  # one is the rule: no copy

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([int(i) for i in ids])


class _FromJson(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    kind = "tokenizer_json"

    def __init__(
        self, fast: Any, special: dict[str, int], token_bytes: np.ndarray, aliases: Aliases | None = None
    ) -> None:
        super().__init__(special, token_bytes, aliases)
        fast.encode_special_tokens = True  # special tokens in text are text
        self._tokenizer = fast

    @classmethod
    def of(cls, vocabulary: TokenizerJson, source: str, aliases: Aliases | None = None, size: int = 0) -> _FromJson:
        """`vocabulary` with the chat's special tokens but those that have `aliases`, of `size` tokens at least.

        Raises ValueError where text could become a special token, or a chat's text something else in transformers.
        """
        added = _with_chat_tokens({}, vocabulary.size, aliases)
        special = vocabulary.special | added
        fast = _add_special(_parse_json(vocabulary.text), added)
        for name, i in special.items():
            if (found := fast.token_to_id(name)) != i:
                raise ValueError(f"tokenizer {source} cannot be used: its token {name} is {i} but loads as {found}")
        unused = max(len(added), size - vocabulary.size)
        tokenizer = cls(fast, special, np.pad(vocabulary.token_bytes, (0, unused)), aliases)
        for name in special:
            if not set(special.values()).isdisjoint(tokenizer.encode(f"{name} a{name}a")):
                raise ValueError(f"tokenizer {source} cannot be used: it reads its special token {name} from text")
        if (text := tokenizer._lost_in_chats()) is not None:
            raise ValueError(f"tokenizer {source} cannot be used: transformers would read {text!r} in a chat otherwise")
        return tokenizer

    def _lost_in_chats(self) -> str | None:
        """A text that the export reads otherwise within a message, if one of those that might be is.

        These are special tokens of a single character, or that could begin in a message and end in what ends it, and
        white space that is a token where only the first piece of a text is given a space.
        """
        exported = _parse_json(json.dumps(_with_marks(self._tokenizer, self._special, self.names("<|bos|>")[0])))
        start, end = "<|user_start|>", "<|user_end|>"
        added = self._tokenizer.get_added_tokens_decoder().values()
        texts = [f"a{token.content}a{token.content}" for token in added]
        texts += [name[:cut] for name in self._special for cut in range(1, len(name))]
        for text in texts:
            escaped = text
            for old, new in escapes(self._special):
                escaped = escaped.replace(old, new)
            ids = [self._special[start], *self.encode(text), self._special[end]]
            if exported.encode(start + escaped + end, add_special_tokens=False).ids != ids:
                return text
        return None

    @classmethod
    def restore(cls, directory: Path, meta: dict[str, Any]) -> _FromJson:
        exported = json.loads((directory / JSON_FILE).read_text(encoding="utf-8"))
        own = meta.get("own", {})  # before templates made marks, all of the export was
        fast, special, sizes = _parse_json(json.dumps(exported | own)), _special_of(meta), _load_sizes(directory)
        if fast.get_vocab_size() > len(sizes) or any(fast.token_to_id(name) != i for name, i in special.items()):
            raise ValueError(f"{JSON_FILE} has other tokens than {META_FILE} and {BYTES_FILE}")
        return cls(fast, special, sizes, _aliases_of(meta))

    def _state(self, directory: Path) -> dict[str, Any]:
        data = json.loads(self._tokenizer.to_str())
        own = {part: data[part] for part in ("normalizer", "pre_tokenizer", "added_tokens")}
        return {"special_tokens": self._special, "own": own}

    def _fast(self) -> Any:
        return self._tokenizer

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(valid(text), add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


class _Characters(Tokenizer):
    """Each character of a fixed alphabet is a token, for symbolic data; sized to a multiple of 32."""

    kind = "chars"

    def __init__(self, alphabet: str) -> None:
        if not alphabet:
            raise ValueError("tokenizer.alphabet is empty: it holds the characters that texts are made of")
        if twice := sorted({character for character in alphabet if alphabet.count(character) > 1}):
            raise ValueError(
                f"tokenizer.alphabet must hold every character once; more than once: {', '.join(map(named, twice))}"
            )
        special = _with_chat_tokens({}, len(alphabet))
        used = len(alphabet) + len(special)
        size = -(-used // 32) * 32
        special |= {f"<|reserved_{i}|>": i for i in range(used, size)}
        sizes = [len(character.encode()) for character in alphabet]
        super().__init__(special, np.array(sizes + [0] * len(special), dtype=np.int32))
        self.alphabet = alphabet
        self._names = [*alphabet, *special]
        codes = _code_points(alphabet)
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int64)  # the last place is for all beyond the alphabet
        self._ids[codes] = np.arange(len(alphabet))

    @classmethod
    def restore(cls, directory: Path, meta: dict[str, Any]) -> _Characters:
        if type(meta["alphabet"]) is not str:
            raise ValueError("its alphabet is no text")
        return cls(meta["alphabet"])

    def _state(self, directory: Path) -> dict[str, Any]:
        return {"alphabet": self.alphabet}

    def _fast(self) -> Any:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        # a vocabulary of whole words without one for the unknown: it refuses other characters, as `encode_array` does
        fast = FastTokenizer(models.WordLevel({character: i for i, character in enumerate(self.alphabet)}))
        fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        fast.decoder = decoders.Fuse()
        return _add_special(fast, self._special)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text` as uint32. Raises UnknownCharacterError for a character outside the alphabet."""
        ids: np.ndarray = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            raise UnknownCharacterError(text[unknown[0]], int(unknown[0]))
        return ids.astype(np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._names[int(i)] for i in ids)


class _OfModel(_FromJson):
    """A model's own tokenizer.json, with the calculator's tokens, and its own chat format."""

    kind = "own_chat"

    def __init__(self, text: str, config: dict[str, Any], own: OwnChat, aliases: Aliases, size: int) -> None:
        vocabulary = parse_json(text)
        unused = max(0, size - vocabulary.size)
        super().__init__(
            _parse_json(vocabulary.text), vocabulary.special, np.pad(vocabulary.token_bytes, (0, unused)), aliases
        )
        self._text, self._config, self.own = text, config, own

    @classmethod
    def restore(cls, directory: Path, meta: dict[str, Any]) -> _OfModel:
        text = (directory / JSON_FILE).read_text(encoding="utf-8")
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        return cls(
            text,
            config,
            TypeAdapter(OwnChat).validate_python(meta["own"]),
            _aliases_of(meta),
            len(_load_sizes(directory)),
        )

    def _state(self, directory: Path) -> dict[str, Any]:
        assert self.own is not None
        return {"own": asdict(self.own)}

    def _export(self, directory: Path, eos: str, max_length: int | None) -> None:
        """As the model's maker had it, with the tokens that were added."""
        assert self.own is not None
        (directory / JSON_FILE).write_text(self._text, encoding="utf-8")
        _write_json(directory / CONFIG_FILE, self._config)
        if _configured_template(self._config) != self.own.template:
            (directory / TEMPLATE_FILE).write_text(self.own.template, encoding="utf-8")


_KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (BytePairs, _FromJson, _Characters, _OfModel)}


def _of_model(directory: Path, size: int, own_chat: bool) -> Tokenizer:
    """`Tokenizer.of_model` of a model that was made elsewhere."""
    settings = {name: _read_object(directory / name) for name in (CONFIG_FILE, "config.json", "generation_config.json")}
    config, known = settings[CONFIG_FILE], settings["config.json"]
    vocabulary, text = _vocabulary_of(directory)
    by_id = {i: name for name, i in vocabulary.special.items()}

    def named(role: str) -> str | None:
        """The special token of this role, such as bos."""
        given = config.get(f"{role}_token")
        given = given.get("content") if isinstance(given, dict) else given
        ids = known.get(f"{role}_token_id")  # of eos there may be several
        found = [by_id[i] for i in (ids if isinstance(ids, list) else [ids]) if i in by_id]
        return given if given in vocabulary.special else next(iter(found), None)

    bos, eos = named("bos"), named("eos")
    ends = [name for name in dict.fromkeys((bos or eos, eos or bos)) if name is not None]
    aliases: Aliases = {"<|bos|>": ends} if ends else {}
    template = _template_of(directory, config) if own_chat else None
    added = SPECIAL_TOKENS if template is None else [*CALL, *RESULT, *(["<|bos|>"] if not ends else [])]
    if clash := set(added) & vocabulary.special.keys():
        raise ValueError(f"the tokenizer in {directory} already has the token {min(clash)}, which is added here")
    if template is None:
        if isinstance(vocabulary, Ranks):
            return BytePairs.of(vocabulary, aliases, size)
        return _FromJson.of(vocabulary, str(directory), aliases, size)
    data = json.loads(text or _as_json(vocabulary))
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    of_file = [{"id": vocabulary.size + i, "content": name, **flags} for i, name in enumerate(added)]
    data["added_tokens"] += of_file
    if "added_tokens_decoder" in config:  # which transformers heeds too
        config["added_tokens_decoder"] |= {str(t["id"]): {k: t[k] for k in t if k != "id"} for t in of_file}
    config.pop("auto_map", None)  # code that is not taken along
    if named("pad") is None:
        config["pad_token"] = PADDING
    names = {f"{role}_token": name for role in ("bos", "eos", "pad", "unk") if (name := named(role)) is not None}
    try:
        own = OwnChat.of(template, names, [*vocabulary.special, *added])
    except NoFormatError as error:
        raise ValueError(
            f"the chat template in {directory} cannot be followed ({error}): take our format in its place with "
            "--set init.own_chat=false"
        ) from error
    stops = settings["generation_config.json"].get("eos_token_id")
    stops = [by_id[i] for i in (stops if isinstance(stops, list) else [stops]) if i in by_id]
    aliases[ANSWER_ENDS[0]] = [*dict.fromkeys([own.end, *stops])]
    return _OfModel(json.dumps(data, ensure_ascii=False), config, own, aliases, size)


def _as_json(vocabulary: Ranks | TokenizerJson) -> str:
    """The tokenizer.json of a vocabulary that was no such file."""
    if isinstance(vocabulary, TokenizerJson):
        return vocabulary.text
    text: str = BytePairs(vocabulary, np.zeros(vocabulary.size, dtype=np.int32))._fast().to_str()
    return text


def _vocabulary_of(directory: Path) -> tuple[Ranks | TokenizerJson, str]:
    """A model's vocabulary, and its tokenizer.json as it was, where it is that."""
    path = directory / JSON_FILE
    if path.is_file():
        return read(str(path)), path.read_text(encoding="utf-8")
    others = [directory / "tokenizer.model", directory / "original" / "tokenizer.model", *directory.glob("*.tiktoken")]
    place = next((path for path in others if path.is_file()), directory)
    if place != directory or (directory / GPT2_FILES[0]).is_file():
        return read(str(place)), ""
    from transformers import AutoTokenizer  # which knows how the text of vocab.json and merges.txt is split

    try:
        text = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        ).backend_tokenizer.to_str()
        return parse_json(text), text
    except Exception as error:  # of every kind, for files that are not what transformers takes them for
        raise ValueError(
            f"{directory} has no tokenizer that can be used ({' '.join(str(error).split())}): put tokenizer.json and "
            "tokenizer_config.json of the model beside its weights"
        ) from error


def _template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """The chat template of a model."""
    path = directory / TEMPLATE_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else _configured_template(config)


def _configured_template(config: dict[str, Any]) -> str | None:
    """That of tokenizer_config.json, the default one where there are several."""
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found if isinstance(found, str) else None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no JSON object; get it again")
    return found


def _with_chat_tokens(special: dict[str, int], size: int, aliases: Aliases | None = None) -> dict[str, int]:
    names = [name for name in SPECIAL_TOKENS if name not in (aliases or {})]
    return special | {name: size + i for i, name in enumerate(names)}


def _add_special(fast: Any, special: dict[str, int]) -> Any:
    """`fast` with `special` after its vocabulary: the library gives the next free ids in the order it is told."""
    from tokenizers import AddedToken

    names = sorted(special, key=special.__getitem__)
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return fast


def _with_marks(fast: Any, special: dict[str, int], bos: str) -> dict[str, Any]:
    """The tokenizer.json of `fast`, reading chats: each message by itself, the template's marks taken out of it.

    Special tokens are cut out of a text before it is normalized, so what the marks part is never one. A text by itself
    begins with bos, as a document does in training; one from the template has it, and is read without special tokens.
    """
    data: dict[str, Any] = json.loads(fast.to_str())
    for token in data["added_tokens"]:
        token["normalized"] = token["normalized"] and not token["special"]
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in unescapes(special)]
    if data["normalizer"]:
        steps.append(data["normalizer"])
    data["normalizer"] = {"type": "Sequence", "normalizers": steps}
    pre_tokenizer = data["pre_tokenizer"] or {}
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("prepend_scheme") == "first":  # the first of a whole chat; each message is a first one here
            step["prepend_scheme"] = "always"
    texts = [[{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": "AB"[i], "type_id": i}}] for i in (0, 1)]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": texts[0],
        "pair": texts[0] + texts[1],
        "special_tokens": {bos: {"id": bos, "ids": [special[bos]], "tokens": [bos]}},
    }
    return data


def _parse_json(text: str) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    try:
        return FastTokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more exact
        raise ValueError(f"its tokenizer.json cannot be read: {error}") from error


def _bounded(text: str) -> list[str]:
    """`text`, cut wherever a run of white space, or of anything else, has come to MAX_RUN characters."""
    runs = _LONG_RUN.finditer(text)
    cuts = [cut for run in runs for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN)]
    return [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _load_sizes(directory: Path) -> np.ndarray:
    """The bytes of each token. The file is mapped: how large it says that it is may be more than there is memory."""
    path = directory / BYTES_FILE
    try:
        sizes = np.array(np.lib.format.open_memmap(path, mode="r"))  # type: ignore[no-untyped-call]
    except OSError:
        raise
    except Exception as error:  # of numpy, and of Python's parser that it reads the head with
        raise ValueError(f"{BYTES_FILE} cannot be read: {error}") from error
    if sizes.dtype != np.int32 or sizes.ndim != 1 or sizes.min(initial=0) < 0:
        raise ValueError(f"{BYTES_FILE} does not hold a number of bytes for each token")
    return sizes


def _aliases_of(meta: dict[str, Any]) -> Aliases:
    aliases = meta.get("aliases", {})
    if type(aliases) is not dict or any(type(names) is not list or not names for names in aliases.values()):
        raise ValueError("what stands for its special tokens is no names")
    return aliases


def _special_of(meta: dict[str, Any]) -> dict[str, int]:
    special = meta["special_tokens"]
    if type(special) is not dict or any(type(i) is not int for i in special.values()):
        raise ValueError("its special tokens are no names with ids")
    return special


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
