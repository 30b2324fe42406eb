"""Vocabularies made elsewhere, read as plain data: OpenAI's encodings and the files of GPT-2, Llama, Qwen and others.

Two forms cover them all: ranks of byte strings with a pattern that splits text (tiktoken's), and a `tokenizer.json`
(that of the `tokenizers` library), which SentencePiece models are turned into.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Ranks(NamedTuple):
    """Byte-level BPE. Neighbours whose union has the lowest rank are joined first, and a rank is the token's id."""

    ranks: dict[bytes, int]
    pattern: str  # splits text before anything is joined
    special: dict[str, int]  # the ids after the ranks

    @property
    def size(self) -> int:
        return len(self.ranks) + len(self.special)


class TokenizerJson(NamedTuple):
    """A `tokenizer.json` whose special tokens are all marked so."""

    text: str
    special: dict[str, int]
    token_bytes: np.ndarray  # (size,) int32: UTF-8 bytes of each token, 0 for special ones

    @property
    def size(self) -> int:
        return len(self.token_bytes)


class Known(NamedTuple):
    """What a file of ranks does not say itself. Special ids without a name here are called <|reserved_ID|>."""

    ranks: int
    size: int
    pattern: str
    special: dict[int, str]

    def with_ranks(self, ranks: dict[bytes, int]) -> Ranks:
        names = {self.special.get(i, f"<|reserved_{i}|>"): i for i in range(self.ranks, self.size)}
        return Ranks(ranks, self.pattern, names)


# Written out in both cases because regex engines differ in what they match without regard to case.
CONTRACTION = r"'(?:[sſdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])"


def gpt4_pattern(digits: int) -> str:
    """GPT-4's split of text, with numbers in groups of at most `digits`."""
    return (
        CONTRACTION + rf"|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,{digits}}}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT4O_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{CONTRACTION})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{CONTRACTION})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_END, _FIM = "<|endoftext|>", ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_LLAMA3 = {
    128_000: "<|begin_of_text|>",
    128_001: "<|end_of_text|>",
    128_006: "<|start_header_id|>",
    128_007: "<|end_header_id|>",
    128_009: "<|eot_id|>",
}
_QWEN = {151_643: _END, 151_644: "<|im_start|>", 151_645: "<|im_end|>"}

ENCODINGS = {
    "gpt2": Known(50_256, 50_257, GPT2_PATTERN, {50_256: _END}),
    "cl100k_base": Known(
        100_256,
        100_277,
        gpt4_pattern(3),
        {100_257: _END, **dict(enumerate(_FIM, 100_258)), 100_276: "<|endofprompt|>"},
    ),
    "o200k_base": Known(199_998, 200_019, GPT4O_PATTERN, {199_999: _END, 200_018: "<|endofprompt|>"}),
}
GPT2_FILES = ("encoder.json", "vocab.bpe")
FILES = ENCODINGS | {
    "Llama 3": Known(128_000, 128_256, gpt4_pattern(3), _LLAMA3),
    "Qwen": Known(151_643, 151_669, gpt4_pattern(1), _QWEN),
}


def read(source: str) -> Ranks | TokenizerJson:
    """The vocabulary of a named encoding or of a file. Raises ValueError for what cannot be had or is no such thing."""
    if source in ENCODINGS:
        return _openai(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _gpt2(path)
    if not path.is_file():
        names = ", ".join(["bpe", *ENCODINGS, "chars"])
        raise ValueError(f"tokenizer {source!r} is neither one of {names} nor a file or folder here")
    data = path.read_bytes()
    try:
        if data.lstrip().startswith(b"{"):
            return parse_json(data)
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
            return _tiktoken(data)
        return _sentencepiece(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = str(error) if type(error) is ValueError else f"it is damaged, {error!r}"
        raise ValueError(
            f"{path} is no tokenizer that can be used here: {fault}. Give tiktoken ranks, a tokenizer.json, a "
            f"SentencePiece model, or a folder with encoder.json and vocab.bpe"
        ) from error


def digest_of(source: str) -> str:
    """SHA-256 of the file that `read` takes, or over those of a folder; OSError where there is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        parts = [hashlib.sha256((path / name).read_bytes()).hexdigest() for name in GPT2_FILES]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def parse_ranks(data: bytes) -> dict[bytes, int]:
    """Lines of base64 and rank, as tiktoken has them; ValueError unless ranks are 0, 1, ... and know all bytes."""
    words = data.split()
    tokens = [binascii.a2b_base64(word, strict_mode=True) for word in words[::2]]
    ranks = dict(zip(tokens, map(int, words[1::2]), strict=True))
    if sorted(ranks.values()) != list(range(len(words) // 2)) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("its ranks are not 0, 1, 2, ... with every single byte among the tokens")
    return ranks


def _openai(name: str) -> Ranks:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    try:
        ranks = getattr(openai_public, name)()["mergeable_ranks"]
    except (OSError, ValueError) as error:  # what requests raises is an OSError
        file = "folder with encoder.json and vocab.bpe" if name == "gpt2" else f"{name}.tiktoken file"
        raise ValueError(
            f"the encoding {name} could not be loaded ({type(error).__name__}): it is downloaded once, so connect to "
            f"the network, or set TIKTOKEN_CACHE_DIR to a folder that holds it, or give its {file} as the tokenizer"
        ) from error
    return ENCODINGS[name].with_ranks(ranks)


def _tiktoken(data: bytes) -> Ranks:
    ranks = parse_ranks(data)
    for known in FILES.values():
        if known.ranks == len(ranks):
            return known.with_ranks(ranks)
    sizes = ", ".join(f"{name} {known.ranks:,}" for name, known in FILES.items())
    raise ValueError(f"it has {len(ranks):,} ranks, and how these split text is known only for {sizes}")


def _gpt2(folder: Path) -> Ranks:
    for name in GPT2_FILES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing: a tokenizer's folder holds encoder.json and vocab.bpe")
    try:
        ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        ranks = {_from_byte_level(token): i for token, i in ids.items() if token != _END}
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").splitlines()
        merged = [_from_byte_level(line.replace(" ", "")) for line in lines if not line.startswith("#version")]
        same = [ranks[token] for token in merged] == list(range(256, len(ranks)))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"encoder.json or vocab.bpe in {folder} is damaged: {error!r}") from error
    if not same or len(ranks) != FILES["gpt2"].ranks:
        raise ValueError(f"encoder.json and vocab.bpe in {folder} are not GPT-2's: {len(ranks):,} tokens do not fit")
    return FILES["gpt2"].with_ranks(ranks)


def parse_json(text: str | bytes) -> TokenizerJson:
    """A tokenizer.json. Raises ValueError, KeyError, TypeError or AttributeError for what is no such thing."""
    return _tokenizer_json(json.loads(text))


def _tokenizer_json(data: dict[str, Any]) -> TokenizerJson:
    model, added = data["model"], data["added_tokens"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError(f"its model is {model.get('type')}, not BPE")
    # The library takes tokens marked special for text where asked to, but finds all others in any text. Only runs of
    # white space, by which some vocabularies write indentation, are text in truth.
    for token in added:
        token["special"] = token["special"] or not token["content"].isspace()
    # What was left in the file from someone's use of it: cutting, padding, random merges, tokens around every text.
    data["truncation"] = data["padding"] = data["post_processor"] = model["dropout"] = None
    special = {token["content"]: int(token["id"]) for token in added if token["special"]}
    if unknown := model.get("unk_token"):
        special[unknown] = model["vocab"][unknown]
    ids: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in added}
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ... without holes")
    byte_level = '"ByteLevel"' in json.dumps(data["decoder"])
    sizes = [0] * len(ids)
    for token, i in ids.items():
        if token not in special:
            sizes[i] = _size(token, byte_level)
    return TokenizerJson(json.dumps(data, ensure_ascii=False), special, np.array(sizes, dtype=np.int32))


def _size(token: str, byte_level: bool) -> int:
    """Bytes of text that a token of a tokenizer.json stands for."""
    if byte_level and all(character in _BYTES for character in token):
        return len(token)
    if not byte_level and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("▁", " ").encode())


def _sentencepiece(data: bytes) -> TokenizerJson:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    messages: Any = sentencepiece_model_pb2  # generated code, which mypy cannot read
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError:
        raise ValueError("it is of no known format") from None
    normalizer, kinds = proto.normalizer_spec, messages.ModelProto.SentencePiece
    if proto.trainer_spec.model_type != messages.TrainerSpec.BPE or not proto.pieces:
        raise ValueError("it is a SentencePiece model, but not of type BPE")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        raise ValueError("it is a SentencePiece model that changes text (normalisation), which could not be undone")

    # SentencePiece joins the neighbours whose union is the piece of the highest score, if that is a normal one.
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kinds.NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -normal[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == kinds.UNKNOWN)
    has_bytes = any(piece.type == kinds.BYTE for piece in proto.pieces)
    fast = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    prefix = [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    reserved = [piece.piece for piece in proto.pieces if piece.type not in (kinds.NORMAL, kinds.BYTE)]
    fast.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in reserved])
    return _tokenizer_json(json.loads(fast.to_str()))


def byte_level(token: bytes) -> str:
    """GPT-2's spelling of bytes as printable characters: bytes that do not print are moved up from U+0100."""
    return "".join(_CHARACTERS[byte] for byte in token)


def _from_byte_level(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token)


_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_CHARACTERS = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)}
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
