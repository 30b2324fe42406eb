"""A tokenizer gives one answer everywhere: here, after a reload, in transformers, and where it comes from."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import ROOT

from cluster import manifest as manifests
from corpus import synthetic, vocabularies
from corpus.chat_template import MARK
from corpus.conversation import render_prompt
from corpus.rows import RowWriter
from corpus.sources import read_unit, units
from corpus.tokenizers import (
    MAX_RUN,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    UnknownCharacterError,
    fixed_vocab_size,
)
from pipeline import cli
from pipeline.artifacts import RunStore
from pipeline.config import load_config
from pipeline.tokenizer import held_out, report, samples

# Special tokens of several vocabularies, and how they write bytes.
SPELLED = [
    *SPECIAL_TOKENS, "<|endoftext|>", "<|im_start|>", "<|begin_of_text|>", "<|eot_id|>", "<|fim_prefix|>", "<think>",
    "<s>", "</s>", "<unk>", "<0x41>", "[INST]", "<<SYS>>",
    "<|reserved_100256|>",
]  # fmt: skip
# Prose, runs of one character, digits, contractions, line ends, special tokens and any Unicode at all.
PIECES = st.sampled_from(
    [*SPELLED, "It's", "WE'LL", " ", "\n", "\r\n", "\t", "1234567", "aaaa", "ſ", "'ſ", "é", "日本", "x =  y\n\n  "]
)
TEXT = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), PIECES), max_size=12).map("".join)
# What is meant to end a turn from within a message: special tokens, halves of them, and how the template parts them.
HOSTILE = st.lists(
    st.one_of(
        TEXT,
        st.sampled_from([*SPELLED, "<<<SYS>>", "<<|bos|>"]),
        st.builds(lambda name, cut: name[:cut], st.sampled_from(SPELLED), st.integers(-3, 3)),
        st.builds(lambda name, marks: name[0] + MARK * marks + name[1:], st.sampled_from(SPELLED), st.integers(0, 3)),
        st.text(f"<|>[/s{MARK}"),
    ),
    max_size=4,
).map("".join)
ALPHABET = "0123456789+-*/=()., <>|bos_\né日𝔸"
LLAMA3 = "FATHOM_LLAMA3_TOKENIZER"  # names the ranks file of Llama 3, which may not be handed on


@pytest.mark.parametrize("unit", [" ", "\u3000", " \n", "x", "漢", "a-"])
def test_a_run_of_a_million_characters_is_learned_from_within_seconds(tmp_path: Path, unit: str) -> None:
    """Its tokens would be as long, and what is written of a token grows with the square of that."""
    text = f"a{unit * (1_000_000 // len(unit))}b"
    began = time.monotonic()
    tokenizer = Tokenizer.train([text, "some words"], 320)
    tokenizer.save(tmp_path)
    assert time.monotonic() - began < 30
    assert tokenizer.token_bytes.max() <= MAX_RUN * len(unit.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("run", [" " * (MAX_RUN - 2), "x" * MAX_RUN, "\n" * 200, "-" * 500, "漢字" * 4_000])
def test_what_is_learned_from_shorter_runs_does_not_depend_on_their_bound(run: str) -> None:
    texts = [f"{run} and words {run}\nmore words", f"the words {run}"]
    uncut = rustbpe.Tokenizer()
    uncut.train_from_iterator(iter(texts), 300, pattern=SPLIT_PATTERN)
    learned = Tokenizer.train(texts, 300 + len(SPECIAL_TOKENS))
    assert learned.encoding._mergeable_ranks == {bytes(token): rank for token, rank in uncut.get_mergeable_ranks()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model made as Llama 2's was, and a tokenizer.json as people leave them."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    fast_tokenizer().save(str(directory / "tokenizer.json"))
    composing = json.loads(fast_tokenizer().to_str()) | {"normalizer": {"type": "NFC"}}
    (directory / "composing").write_text(json.dumps(composing))
    (directory / "metaspace").write_text(json.dumps(metaspace(directory / "tokenizer.model")))
    return directory


def metaspace(model: Path) -> dict[str, Any]:
    """A SentencePiece model as transformers converts it now: only the first piece of a text is given a space."""
    data: dict[str, Any] = json.loads(vocabularies.read(str(model)).text)
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return data | {"normalizer": None, "pre_tokenizer": first}


def sentencepiece_model(**options: object) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    like_llama2 = {
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(synthetic.documents(0, 200, 0)),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 600, **like_llama2, **options},
    )
    return model.getvalue()


def fast_tokenizer(*texts_added: str):
    """Byte-level BPE of the `tokenizers` library that cuts texts, drops merges, and puts a token before every text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer(models.BPE(dropout=0.5))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(synthetic.documents(0, 200, 0), trainer)
    fast.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    fast.add_tokens([AddedToken(text, special=False) for text in ("<think>", "<<SYS>>", "    ", *texts_added)])
    fast.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    fast.enable_truncation(5)
    fast.enable_padding(length=9)
    return fast


KNOWN = {  # the ids of "Hello world", the size without the tokens of the chat, and the tokens of "1234567"
    "gpt2": ([15496, 995], 50_257, 3),
    "cl100k_base": ([9906, 1917], 100_277, 3),
    "o200k_base": ([13225, 2375], 200_019, 3),
    "qwen": ([9707, 1879], 151_669, 7),
    "llama3": ([9906, 1917], 128_256, 3),
}
MADE_HERE = ("bpe", "sentencepiece", "tokenizer.json")
CHANGING = ("composing", "metaspace")  # tokenizer.json files that change text before it is split


def source_of(name: str, request: pytest.FixtureRequest) -> str:
    """Where the tokenizer `name` is on this machine; skips without one."""
    if name == "llama3":
        if LLAMA3 not in os.environ:
            pytest.skip(f"set {LLAMA3} to the file tokenizer.model of Llama 3")
        return os.environ[LLAMA3]
    if name in MADE_HERE + CHANGING:
        file = "tokenizer.model" if name == "sentencepiece" else name
        return str(request.getfixturevalue("files") / file)
    folder = request.getfixturevalue("shared_data") / "tokenizers"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder / "openai")
    places = {"gpt2": str(folder / "gpt2"), "qwen": str(folder / "qwen" / "qwen.tiktoken")}
    return places.get(name, name)


@pytest.fixture(scope="module")
def opened(trained: Tokenizer, request: pytest.FixtureRequest) -> Callable[[str], Tokenizer]:
    """A tokenizer by its name here, made once."""
    made = {"bpe": trained, "chars": Tokenizer.open("chars", ALPHABET + MARK)}

    def open_once(name: str) -> Tokenizer:
        if name not in made:
            made[name] = Tokenizer.open(source_of(name, request))
        return made[name]

    return open_once


@pytest.fixture(scope="module", params=[*MADE_HERE, *KNOWN])
def tokenizer(request: pytest.FixtureRequest, opened: Callable[[str], Tokenizer]) -> Tokenizer:
    return opened(request.param)


# Between them they have every form, every pattern (but for the length of numbers), and reserved ids without a name.
@pytest.fixture(scope="module", params=[*MADE_HERE, "gpt2", "o200k_base"])
def exported(
    request: pytest.FixtureRequest, opened: Callable[[str], Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Path]:
    """A tokenizer and where it is saved."""
    directory = tmp_path_factory.mktemp("tokenizer")
    opened(request.param).save(directory)
    return opened(request.param), directory


@pytest.fixture(scope="module")
def reloaded(exported: tuple[Tokenizer, Path]) -> Tokenizer:
    return Tokenizer.load(exported[1])


@pytest.fixture(scope="module")
def fast(exported: tuple[Tokenizer, Path]):
    """What transformers runs when it is asked to take special tokens in text for text."""
    from tokenizers import Tokenizer as FastTokenizer

    fast = FastTokenizer.from_file(str(exported[1] / "tokenizer.json"))
    fast.encode_special_tokens = True
    return fast


@pytest.fixture(scope="module", params=["bpe", "sentencepiece", "tokenizer.json"])
def hf(request: pytest.FixtureRequest, opened: Callable[[str], Tokenizer], tmp_path_factory: pytest.TempPathFactory):
    """A tokenizer and the same in transformers, which takes ten seconds for a large one."""
    directory = tmp_path_factory.mktemp("hf")
    opened(request.param).save(directory)
    return opened(request.param), auto_tokenizer(directory)


@pytest.fixture(scope="module", params=[*MADE_HERE, *CHANGING, "chars", "gpt2", "cl100k_base", "qwen"])
def served(
    request: pytest.FixtureRequest, opened: Callable[[str], Tokenizer], tmp_path_factory: pytest.TempPathFactory
):
    """A tokenizer, and its export in transformers, which holds for vLLM's chats as well."""
    directory = tmp_path_factory.mktemp("served")
    opened(request.param).save(directory)
    return opened(request.param), auto_tokenizer(directory)


def auto_tokenizer(directory: Path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("name", KNOWN)
def test_known_tokenizers_give_the_known_ids(
    name: str, opened: Callable[[str], Tokenizer], request: pytest.FixtureRequest
) -> None:
    ids, size, of_number = KNOWN[name]
    assert opened(name).encode("Hello world") == ids
    assert len(opened(name).encode("1234567")) == of_number
    assert opened(name).bos == size
    assert fixed_vocab_size(source_of(name, request), "") == opened(name).vocab_size == size + 9


@settings(deadline=None)  # loads them at first
@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
@given(text=TEXT)
def test_named_encodings_are_those_of_tiktoken(name: str, opened: Callable[[str], Tokenizer], text: str) -> None:
    assert opened(name).encode(text) == tiktoken.get_encoding(name).encode_ordinary(text)


@given(text=TEXT)
def test_text_survives_and_never_becomes_a_special_token(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer.decode(tokenizer.encode("▁")) == " ":
        text = text.replace("▁", "")  # SentencePiece writes spaces with it
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    sizes = tokenizer.token_bytes[ids]
    assert (sizes > 0).all()
    before_text = tokenizer.token_bytes[tokenizer.encode("a")].sum() - 1  # SentencePiece puts a space there
    assert sizes.sum() == len(text.encode()) + (before_text if text else 0)


@given(text=TEXT)
def test_transformers_gives_the_same_ids(hf, text: str) -> None:
    tokenizer, theirs = hf
    ids = tokenizer.encode(text)
    assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    assert theirs.encode(text, split_special_tokens=True) == [tokenizer.bos, *ids], "a document begins with bos"
    assert theirs.decode(ids) == tokenizer.decode(ids)


@example(texts=["<<<SYS>>"] * 8)
@given(texts=st.lists(HOSTILE, min_size=8, max_size=8))
def test_no_message_is_read_otherwise_when_served(served, texts: list[str]) -> None:
    """Nor can it be steered out of its turn by special tokens, of the chat or of the vocabulary, that it spells."""
    tokenizer, theirs = served
    if tokenizer.kind == "chars":
        texts = ["".join(character for character in text if character in ALPHABET + MARK) for text in texts]
    types = ("text", "text", "python", "python_output", "text")
    parts = [{"type": kind, "text": text} for kind, text in zip(types, texts, strict=False)]
    messages = [
        {"role": "system", "content": texts[5]},
        {"role": "user", "content": parts[:2]},
        {"role": "assistant", "content": parts},
        {"role": "tool", "content": texts[6]},
        {"role": "assistant", "content": texts[7]},
        {"role": "user", "content": texts[7]},
    ]
    ids = render_prompt(messages, tokenizer)
    assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids


def test_a_character_that_training_refuses_is_refused_when_served(
    opened: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    """It is not dropped in silence."""
    opened("chars").save(tmp_path)
    theirs, alien = auto_tokenizer(tmp_path), "\u0e01"
    assert alien not in ALPHABET
    with pytest.raises(UnknownCharacterError):
        opened("chars").encode(f"a{alien}")
    with pytest.raises(Exception, match="vocabulary"):  # the library has no type of its own
        theirs.apply_chat_template([{"role": "user", "content": f"a{alien}"}])


def test_transformers_knows_the_special_tokens(hf) -> None:
    tokenizer, theirs = hf
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.special("<|assistant_end|>"))
    texts = ["Hello", "Hello world, hello"]
    batch = theirs(texts, padding=True)
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = [tokenizer.bos, *tokenizer.encode(text)]
        assert ids == [theirs.pad_token_id] * (len(ids) - len(alone)) + alone
        assert mask == [int(i >= len(ids) - len(alone)) for i in range(len(ids))]
    assert theirs.pad_token_id not in (theirs.bos_token_id, theirs.eos_token_id), "a trainer would leave out the end"
    assert tokenizer.decode([tokenizer.bos]) == theirs.decode([tokenizer.bos]) == "<|bos|>"


@given(text=TEXT)
def test_what_is_saved_gives_the_same_ids(
    exported: tuple[Tokenizer, Path], reloaded: Tokenizer, fast, text: str
) -> None:
    ids = exported[0].encode(text)
    array = reloaded.encode_array(text)
    assert array.dtype == np.uint32
    assert array.tolist() == reloaded.encode(text) == fast.encode(text, add_special_tokens=False).ids == ids
    assert reloaded.decode(ids) == fast.decode(ids, skip_special_tokens=False) == exported[0].decode(ids)


@given(text=HOSTILE)
def test_the_marks_of_the_template_are_text_here(
    exported: tuple[Tokenizer, Path], reloaded: Tokenizer, text: str
) -> None:
    assert reloaded.encode(text) == exported[0].encode(text)
    if exported[0].decode(exported[0].encode("▁")) != " ":  # SentencePiece writes spaces with it
        assert reloaded.decode(reloaded.encode(text)) == text


def test_artifacts_whose_template_made_no_marks_are_read(files: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(str(files / "metaspace"))
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / "tokenizer_meta.json").read_text())
    own = json.loads((tmp_path / "tokenizer.json").read_text()) | meta.pop("own")
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "tokenizer_meta.json").write_text(json.dumps(meta))
    text = f"a<{MARK}|bos|>  b"
    assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


def test_special_tokens_are_the_last_ids_and_stand_for_no_bytes(exported: tuple[Tokenizer, Path], fast) -> None:
    tokenizer, directory = exported
    size = tokenizer.vocab_size
    ids = [tokenizer.special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(size - 9, size))
    assert tokenizer.token_bytes.shape == (size,) and tokenizer.token_bytes.dtype == np.int32
    assert not tokenizer.token_bytes[-9:].any()
    assert np.array_equal(np.load(directory / "token_bytes.npy", allow_pickle=False), tokenizer.token_bytes)
    assert fast.get_vocab_size() == size
    assert [fast.token_to_id(name) for name in SPECIAL_TOKENS] == ids


def test_every_id_can_be_decoded(exported: tuple[Tokenizer, Path], fast) -> None:
    """A model not yet trained gives any id there is, reserved ones too."""
    tokenizer = exported[0]
    for i in np.flatnonzero(tokenizer.token_bytes == 0).tolist():
        assert tokenizer.decode([i]) == fast.decode([i], skip_special_tokens=False) != ""
    assert tokenizer.decode(list(range(tokenizer.vocab_size)))


def test_half_a_surrogate_pair_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud83db") == tokenizer.encode("a\ufffdb")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


@pytest.mark.parametrize("text", [" " * 3_000_000, "a" * 1_000_000, "é" * 500_000, "\n" * 3_000_000])
def test_long_runs_do_not_break_the_tokenizer(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(synthetic.documents(0, 400, 0), 700)


def test_transformers_agrees_on_novels(tmp_path: Path, shared_data: Path) -> None:
    corpus = units(str(shared_data / "novels" / "val_*.parquet"))
    novels = [document.text for unit in corpus for document in read_unit(unit)]
    tokenizer = Tokenizer.train(novels[:150], 2_000)
    tokenizer.save(tmp_path)
    hf = auto_tokenizer(tmp_path)
    for text in novels[150:180]:
        assert hf.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        Tokenizer.train(synthetic.documents(0, 400, 0), 700).save(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert [(tmp_path / "a" / n).read_bytes() for n in names] == [(tmp_path / "b" / n).read_bytes() for n in names]


def test_training_gives_the_size_asked_for_where_the_corpus_is_enough() -> None:
    assert Tokenizer.train(synthetic.documents(0, 400, 0), 700).vocab_size == 700
    assert 265 < Tokenizer.train(["hello hello", "\ud83d"] * 3, 1_000).vocab_size < 280
    with pytest.raises(ValueError, match="at least 265"):
        Tokenizer.train(["x"], 200)


def test_digits_stay_in_groups_of_one_or_two() -> None:
    tokenizer = Tokenizer.train(["123456 " * 50], 400)
    assert all(len(tokenizer.decode([i])) <= 2 for i in tokenizer.encode("123456"))


@pytest.fixture(scope="module")
def sentencepieces(files: Path):
    """The tokenizer of a SentencePiece model, and SentencePiece with that model."""
    import sentencepiece

    model = str(files / "tokenizer.model")
    return Tokenizer.open(model), sentencepiece.SentencePieceProcessor(model_file=model)


@settings(max_examples=300)
@given(text=st.one_of(TEXT, st.text("adeinort 1\n", max_size=30)))
def test_sentencepiece_itself_gives_the_same_ids(sentencepieces, text: str) -> None:
    ours, theirs = sentencepieces
    assert ours.encode(text) == theirs.encode(text)


def test_a_tokenizer_json_reads_only_text_from_text_and_all_of_it(files: Path) -> None:
    """What the file's last user set is off: cutting, padding, random merges, a token before every text."""
    from tokenizers import Tokenizer as FastTokenizer

    tokenizer = Tokenizer.open(str(files / "tokenizer.json"))
    plain = FastTokenizer.from_file(str(files / "tokenizer.json"))
    text = "Add one to twelve, and then one more:    x = 13"
    plain.no_truncation()
    plain.no_padding()
    plain.model.dropout = None
    assert tokenizer.encode(text) == plain.encode(text, add_special_tokens=False).ids
    assert plain.token_to_id("    ") in tokenizer.encode(text)  # white space is text, though an added token
    assert plain.token_to_id("<think>") not in tokenizer.encode("<think>")


@given(st.text(ALPHABET))
def test_characters_are_their_places_in_the_alphabet(characters: Tokenizer, hf_characters, text: str) -> None:
    ids = characters.encode(text)
    assert ids == [ALPHABET.index(character) for character in text]
    assert characters.encode_array(text).dtype == np.uint32
    assert hf_characters.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
    assert characters.decode(ids) == hf_characters.decode(ids) == text
    assert characters.token_bytes[ids].sum() == len(text.encode())


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.getbasetemp() / "characters"
    Tokenizer.open("chars", ALPHABET).save(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def hf_characters(characters: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    return auto_tokenizer(tmp_path_factory.getbasetemp() / "characters")


def test_the_vocabulary_of_characters_is_a_multiple_of_32(characters: Tokenizer, hf_characters) -> None:
    assert characters.vocab_size == len(hf_characters) == 64
    assert [characters.special(name) for name in SPECIAL_TOKENS] == list(range(len(ALPHABET), len(ALPHABET) + 9))
    assert characters.special("<|user_end|>") == hf_characters.convert_tokens_to_ids("<|user_end|>")
    every = list(range(characters.vocab_size))
    assert characters.decode(every) == hf_characters.decode(every)
    for count, size in ((1, 32), (23, 32), (24, 64)):
        alphabet = "".join(chr(ord("A") + i) for i in range(count))
        assert fixed_vocab_size("chars", alphabet) == Tokenizer.open("chars", alphabet).vocab_size == size


@pytest.mark.parametrize(
    ("text", "position", "name"),
    [
        ("12 + x", 5, "LATIN SMALL LETTER X"),
        ("1\r\n", 1, "CARRIAGE RETURN"),
        ("\ud83d", 0, "no name"),
        ("日1\U0010ffff", 2, "no name"),
    ],
)
def test_an_unknown_character_is_named(characters: Tokenizer, text: str, position: int, name: str) -> None:
    with pytest.raises(UnknownCharacterError) as caught:
        characters.encode(text)
    assert (caught.value.character, caught.value.position) == (text[position], position)
    assert repr(text[position]) in str(caught.value) and f"{name}, U+{ord(text[position]):04X})" in str(caught.value)


@pytest.mark.parametrize(
    ("alphabet", "message"),
    [
        ("abca", r"more than once: 'a' \(LATIN SMALL LETTER A, U\+0061\)$"),
        ("\n \n ", r"more than once: '\\n' \(LINE FEED, U\+000A\), ' ' \(SPACE, U\+0020\)$"),
        ("\x00\x00", r"'\\x00' \(no name, U\+0000\)$"),
        ("", "is empty"),
    ],
)
def test_an_alphabet_that_cannot_be_is_refused(alphabet: str, message: str) -> None:
    for make in (fixed_vocab_size, Tokenizer.open):
        with pytest.raises(ValueError, match=message):
            make("chars", alphabet)


def test_sizes_are_known_without_network(files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_network(monkeypatch, tmp_path)
    sizes = [fixed_vocab_size(name, "") for name in ("bpe", "gpt2", "cl100k_base", "o200k_base")]
    assert sizes == [None, 50_266, 100_286, 200_028]
    for name in ("tokenizer.model", "tokenizer.json"):
        assert fixed_vocab_size(str(files / name), "") == Tokenizer.open(str(files / name)).vocab_size


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_an_encoding_that_cannot_be_had_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_network(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=f"{name} could not be loaded.*TIKTOKEN_CACHE_DIR.*give its") as caught:
        Tokenizer.open(name)
    assert "\n" not in str(caught.value)


def without_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: nothing answers
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def test_sources_that_are_no_tokenizer_are_refused(tmp_path: Path, files: Path) -> None:
    ranks = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    whole = json.loads((files / "tokenizer.json").read_text())
    unigram = whole | {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}}
    with_hole = json.loads(json.dumps(whole))
    with_hole["added_tokens"][-1]["id"] += 1
    ours = fast_tokenizer("<|bos|>").to_str()
    merged = json.loads(json.dumps(whole))
    word = next(token for token in whole["model"]["vocab"] if re.fullmatch("[a-z]{2,}", token))
    merged["added_tokens"].append(whole["added_tokens"][0] | {"content": word, "id": whole["model"]["vocab"][word]})
    of_one, reaching_out = fast_tokenizer("\x00").to_str(), fast_tokenizer("[<").to_str()
    spaced = metaspace(files / "tokenizer.model")
    spaced["added_tokens"].append(
        spaced["added_tokens"][0] | {"content": "    ", "id": len(spaced["model"]["vocab"]), "special": False}
    )
    for source, message in {
        b"hello\n": "it is of no known format",
        b"\x00\x01": "it is of no known format",
        ranks: "it has 256 ranks, and how these split text is known only for gpt2 50,256",
        ranks[:-9]: "its ranks are not 0, 1, 2",
        b"IQ== 0\nIg== 2\n": "its ranks are not 0, 1, 2",
        b"{": "is no tokenizer that can be used here",
        b"{}": "is no tokenizer that can be used here",
        json.dumps(unigram).encode(): "its model is Unigram, not BPE",
        json.dumps(with_hole).encode(): "without holes",
        ours.encode(): "already has the token <|bos|>",
        json.dumps(merged).encode(): f"it reads its special token {word} from text",
        of_one.encode(): "transformers would read 'a\\x00a\\x00' in a chat otherwise",
        reaching_out.encode(): "transformers would read '[' in a chat otherwise",
        json.dumps(spaced).encode(): "transformers would read 'a    a    ' in a chat otherwise",
        sentencepiece_model(model_type="unigram", vocab_size=350): "not of type BPE",
        sentencepiece_model(normalization_rule_name="nmt_nfkc"): "normalisation",
    }.items():
        file = tmp_path / "file"
        file.write_bytes(source)
        with pytest.raises(ValueError, match=re.escape(message)):
            Tokenizer.open(str(file))
    with pytest.raises(ValueError, match="neither one of bpe, gpt2, cl100k_base, o200k_base, chars nor a file"):
        Tokenizer.open("gtp2")
    with pytest.raises(ValueError, match=r"encoder\.json is missing"):
        Tokenizer.open(str(tmp_path))


def test_a_folder_whose_files_do_not_belong_together_is_refused(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "gpt2"
    (tmp_path / "encoder.json").write_bytes((folder / "encoder.json").read_bytes())
    (tmp_path / "vocab.bpe").write_bytes((folder / "vocab.bpe").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"damaged|do not fit"):
        Tokenizer.open(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer_meta.json", "ranks.tiktoken", "token_bytes.npy"])
def test_a_damaged_artifact_is_named(trained: Tokenizer, tmp_path: Path, file: str) -> None:
    trained.save(tmp_path)
    (tmp_path / file).write_bytes(b"?? 1\n")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{file} is missing")):
        Tokenizer.load(tmp_path)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


HEAD = b"\x93NUMPY\x01\x00v\x00"  # of a file of numpy's, before 118 bytes that say what it holds
HUGE = b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000,), }"


@pytest.mark.parametrize(
    "content",
    [
        HEAD + HUGE.ljust(117) + b"\n",
        HEAD + b"{'descr': ((((((".ljust(117) + b"\n",
        b"PK\x03\x04 begins as a zip does",
        saved(np.zeros((2, 2), dtype=np.int32)),
        saved(np.zeros(300)),
        saved(np.full(300, -1, dtype=np.int32)),
        saved(np.zeros(299, dtype=np.int32)),
    ],
    ids=["huge", "no-head", "zip", "square", "floats", "negative", "short"],
)
def test_sizes_that_are_none_are_named(trained: Tokenizer, tmp_path: Path, content: bytes) -> None:
    trained.save(tmp_path)
    (tmp_path / "token_bytes.npy").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "chars", "json"])
@pytest.mark.parametrize(
    "changed",
    [
        {"special_tokens": True},
        {"special_tokens": {}},
        {"special_tokens": {"<|bos|>": 0}},
        {"special_tokens": {"<|bos|>": "0"}},
        {"special_tokens": {"<|bos|>": 10**30}},
        {"special_tokens": {name: 1 for name in SPECIAL_TOKENS}},
        {"alphabet": ["a"]},
        {"alphabet": 1},
        {"pattern": ""},
        {"pattern": "a*"},
        {"pattern": "(a+)+b"},
        {"pattern": []},
        {"kind": "none"},
        {"kind": []},
    ],
    ids=str,
)
def test_a_tokenizer_that_says_what_it_is_not_is_named(
    trained: Tokenizer, files: Path, tmp_path: Path, kind: str, changed: dict[str, Any]
) -> None:
    sources = {"chars": "chars", "json": str(files / "tokenizer.json")}
    made = Tokenizer.open(sources[kind], "ab") if kind in sources else trained
    made.save(tmp_path)
    meta = json.loads((tmp_path / "tokenizer_meta.json").read_text())
    if not changed.keys() <= meta.keys():
        pytest.skip("this kind says nothing of it")
    (tmp_path / "tokenizer_meta.json").write_text(json.dumps(meta | changed))
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_that_is_100_000_lists_deep_is_named(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    (tmp_path / "tokenizer_meta.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_damaged_tokenizer_json_is_named(files: Path, tmp_path: Path) -> None:
    Tokenizer.open(str(files / "tokenizer.json")).save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_nothing_large_is_imported() -> None:
    code = "import sys, corpus.tokenizers; print(*({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not result.stdout.strip()


@pytest.fixture
def run(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> RunStore:
    """A run whose tokenizer is made, on a machine that has cl100k_base but not gpt2."""
    without_network(monkeypatch, shared_data / "tokenizers" / "openai")
    store, config = RunStore(str(tmp_path / "runs"), "r"), load_config("demo", {"name": "r"})
    store.record(config)
    trained.save(tmp_path / "tokenizer")
    publish(store, "tokenizer", tmp_path / "tokenizer")
    return store


def publish(store: RunStore, stage: str, directory: Path) -> None:
    files = store.stage(stage).upload_tree(directory)
    manifests.write(store.stage(stage), manifests.Manifest(store.run, stage, files))


def test_the_command_compares_kinds_of_text(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tokenizer", "r", "--storage", str(Path(run.storage.uri).parent)]
    assert cli.main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    kinds = {text["kind"]: text for text in result["texts"]}
    assert {"prose", "dialogue", "Python", "LaTeX", "numbers", "JSON", "German", "Korean"} <= set(kinds)
    prose = samples()["prose"][0]
    assert kinds["prose"]["bytes"] == len(prose.encode())
    tokens = len(tiktoken.get_encoding("cl100k_base").encode(prose))
    assert kinds["prose"]["bytes_per_token"]["cl100k_base"] == pytest.approx(len(prose.encode()) / tokens)
    assert kinds["prose"]["bytes_per_token"]["gpt2"] is None
    assert ["gpt2 could not be loaded" in note for note in result["notes"]] == [True]

    assert cli.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    run_, gpt2, _, cl100k, against = next(line for line in lines if line.startswith("prose")).split()[2:]
    assert gpt2 == "-"
    assert float(against.rstrip("%")) == pytest.approx(100 * (float(run_) / float(cl100k) - 1), abs=1)
    assert "gpt2 could not be loaded" in lines[-1]


def test_the_command_measures_held_out_text(run: RunStore, trained: Tokenizer, tmp_path: Path) -> None:
    documents = [f"Document {i}: " + "words and words. " * i for i in range(1, 5)]
    row = np.concatenate([[trained.bos, *trained.encode(text)] for text in documents])
    writer = RowWriter(tmp_path / "ingest" / "base" / "val", len(row), trained.vocab_size, masked=False)
    writer.add(row)
    writer.close()
    publish(run, "ingest", tmp_path / "ingest")
    assert held_out(run, trained) == documents
    kind, count = "held-out text of the run", sum(map(len, documents))
    text = next(text for text in report(run)["texts"] if text["kind"] == kind)
    assert text["bytes"] == count
    assert text["bytes_per_token"]["run"] == pytest.approx(count / (len(row) - len(documents)))


def test_the_command_says_what_an_alphabet_lacks(run: RunStore, tmp_path: Path) -> None:
    run.remove("tokenizer")
    Tokenizer.open("chars", ALPHABET).save(tmp_path / "chars")
    publish(run, "tokenizer", tmp_path / "chars")
    result = report(run)
    prose = next(text for text in result["texts"] if text["kind"] == "prose")
    assert prose["bytes_per_token"]["run"] is None
    assert any(re.match("prose: character 'T' .* is not in the alphabet", note) for note in result["notes"])


def test_the_command_names_what_is_missing(run: RunStore, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(Path(run.storage.uri).parent)
    assert cli.main(["tokenizer", "nobody", "--storage", storage]) == 1
    assert "no run 'nobody'" in capsys.readouterr().err
    run.remove("tokenizer")
    assert cli.main(["tokenizer", "r", "--storage", storage]) == 1
    assert "the tokenizer of run r is not made" in capsys.readouterr().err
