"""Byte-level BPE: trained with rustbpe, run by tiktoken, stored as plain data, and readable by transformers."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

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

# GPT-4's split, with digits in groups of one or two: three-digit groups would eat a small vocabulary.
# Contractions spell out both cases because case-insensitive matching differs between regex engines.
SPLIT_PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Characters given to tiktoken at once: its regex overflows its stack on a run of a few million spaces.
MAX_PIECE = 400_000

# Writes what `corpus.conversation.render` writes.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set state = namespace(system='') %}"
    "{% for message in messages %}"
    "{% if message.content is string %}{% set parts = [{'type': 'text', 'text': message.content}] %}"
    "{% else %}{% set parts = message.content %}{% endif %}"
    "{% if message.role == 'system' %}"
    "{% set state.system = state.system + (parts | map(attribute='text') | join) + '\\n\\n' %}"
    "{% elif message.role == 'user' %}"
    "{{ '<|user_start|>' + state.system + (parts | map(attribute='text') | join) + '<|user_end|>' }}"
    "{% set state.system = '' %}"
    "{% else %}{{ '<|assistant_start|>' }}{% for part in parts %}"
    "{% if part.type == 'python' %}{{ '<|python_start|>' + part.text + '<|python_end|>' }}"
    "{% elif part.type == 'python_output' %}{{ '<|output_start|>' + part.text + '<|output_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{{ '<|assistant_end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant_start|>' }}{% endif %}"
)


class Tokenizer:
    """Text to ids and back. The special tokens are the last nine ids."""

    def __init__(self, ranks: dict[bytes, int], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> None:
        self._ranks = ranks
        self._pattern = pattern
        self._special = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self._encoding = tiktoken.Encoding(
            "fathom", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self._special
        )

    @staticmethod
    def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn merges from `texts`. `vocab_size` counts the special tokens; a corpus with fewer merges gives fewer.

        Raises ValueError when `vocab_size` cannot hold the 256 bytes and the special tokens.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is too small: it holds at least {least} (bytes, special tokens)")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return Tokenizer({bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}, SPLIT_PATTERN)

    @staticmethod
    def load(directory: Path) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError when a file is damaged."""
        ranks_file, meta_file = directory / "ranks.tiktoken", directory / "tokenizer_meta.json"
        for file in (ranks_file, meta_file):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: {directory} holds no tokenizer; run the tokenizer stage")
        try:
            pairs = (line.split() for line in ranks_file.read_bytes().splitlines())
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            meta = json.loads(meta_file.read_text(encoding="utf-8"))
            return Tokenizer(ranks, meta["pattern"], meta["special_tokens"])
        except (binascii.Error, ValueError, KeyError) as error:
            raise ValueError(f"the tokenizer in {directory} is damaged ({error}); make it again") from error

    def save(self, directory: Path) -> None:
        """Write ranks, metadata, bytes a token, and the files transformers' AutoTokenizer reads."""
        directory.mkdir(parents=True, exist_ok=True)
        lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in self._ranks.items())
        (directory / "ranks.tiktoken").write_bytes(b"".join(lines))
        _write_json(
            directory / "tokenizer_meta.json", {"pattern": self._pattern, "special_tokens": list(self._special)}
        )
        np.save(directory / "token_bytes.npy", self.token_bytes)
        self._save_hf(directory)

    def _save_hf(self, directory: Path) -> None:
        from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as FastTokenizer

        # tiktoken joins the neighbours whose union has the lowest rank, so every split of a token into two known
        # tokens is a merge, in order of the union's rank.
        names = {token: _byte_level(token) for token in self._ranks}
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
        fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in self._special])
        fast.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|assistant_end|>",
            "clean_up_tokenization_spaces": False,
        }
        _write_json(directory / "tokenizer_config.json", config)
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a special token spelled out in it is ordinary text."""
        pieces = (text[start : start + MAX_PIECE] for start in range(0, len(text), MAX_PIECE))
        return [i for piece in pieces for i in self._encoding.encode_ordinary(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([int(i) for i in ids])

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + len(self._special)

    def special(self, name: str) -> int:
        return self._special[name]

    @property
    def bos(self) -> int:
        return self._special["<|bos|>"]

    @property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each token, (vocab_size,) int32; 0 for special tokens, which stand for no text."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self._ranks.items():
            sizes[rank] = len(token)
        return sizes


def _byte_level(token: bytes) -> str:
    """GPT-2's spelling of bytes as printable characters: bytes that do not print are moved up from U+0100."""
    return "".join(_BYTE_CHARACTERS[byte] for byte in token)


_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
