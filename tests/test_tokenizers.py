"""The tokenizer gives one answer everywhere: here, after a reload, and in transformers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import synthetic
from corpus.sources import read_unit, units
from corpus.tokenizers import SPECIAL_TOKENS, Tokenizer

# Prose, runs of one character, digits, contractions, line ends, special tokens and any Unicode at all.
PIECES = st.sampled_from(
    [*SPECIAL_TOKENS, "It's", "WE'LL", " ", "\n", "\r\n", "\t", "1234567", "aaaa", "ſ", "'ſ", "é", "日本"]
)
TEXT = st.lists(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module")
def novels(shared_data: Path) -> list[str]:
    return [text for unit in units(str(shared_data / "novels" / "val_*.parquet")) for text in read_unit(unit)]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(synthetic.documents(0, 400, 0), 700)


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    trained.save(directory)
    return directory


@pytest.fixture(scope="module")
def hf(saved: Path):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


@given(TEXT)
def test_text_survives_and_never_becomes_a_special_token(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(i < trained.special(SPECIAL_TOKENS[0]) for i in ids)
    assert int(trained.token_bytes[ids].sum()) == len(text.encode())


@settings(max_examples=400)
@given(text=TEXT)
def test_transformers_gives_the_same_ids(trained: Tokenizer, hf, text: str) -> None:
    assert hf.encode(text, add_special_tokens=False, split_special_tokens=True) == trained.encode(text)
    assert hf.decode(trained.encode(text)) == text


def test_transformers_knows_the_special_tokens(trained: Tokenizer, hf) -> None:
    assert len(hf) == trained.vocab_size
    assert [hf.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == [trained.special(n) for n in SPECIAL_TOKENS]
    assert hf.bos_token_id == trained.bos
    assert hf.eos_token_id == trained.special("<|assistant_end|>")


def test_transformers_agrees_on_novels(tmp_path: Path, novels: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.train(novels[:150], 2_000)
    tokenizer.save(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    for text in novels[150:180]:
        assert hf.encode(text, add_special_tokens=False) == tokenizer.encode(text)


@given(text=TEXT)
def test_a_reload_changes_nothing(trained: Tokenizer, saved: Path, text: str) -> None:
    assert Tokenizer.load(saved).encode(text) == trained.encode(text)


def test_special_tokens_are_the_last_ids_and_stand_for_no_bytes(trained: Tokenizer, saved: Path) -> None:
    size = trained.vocab_size
    assert size == 700
    assert [trained.special(name) for name in SPECIAL_TOKENS] == list(range(size - 9, size))
    assert not trained.token_bytes[-9:].any()
    assert (trained.token_bytes[:-9] > 0).all()
    assert np.array_equal(np.load(saved / "token_bytes.npy", allow_pickle=False), trained.token_bytes)


def test_training_twice_gives_the_same_files(trained: Tokenizer, saved: Path, tmp_path: Path) -> None:
    Tokenizer.train(synthetic.documents(0, 400, 0), 700).save(tmp_path)
    names = sorted(path.name for path in saved.iterdir())
    assert [(tmp_path / name).read_bytes() for name in names] == [(saved / name).read_bytes() for name in names]


def test_a_tiny_corpus_gives_a_smaller_vocabulary() -> None:
    assert 265 < Tokenizer.train(["hello hello"] * 3, 1_000).vocab_size < 280


def test_digits_stay_in_groups_of_one_or_two() -> None:
    tokenizer = Tokenizer.train(["123456 " * 50], 400)
    assert all(len(tokenizer.decode([i])) <= 2 for i in tokenizer.encode("123456"))


@pytest.mark.parametrize("text", [" " * 3_000_000, "a" * 1_000_000, "é" * 500_000, "\n" * 3_000_000])
def test_long_runs_do_not_break_the_tokenizer(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_faults_are_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ValueError, match="at least 265"):
        Tokenizer.train(["x"], 200)
    with pytest.raises(FileNotFoundError, match=r"ranks\.tiktoken is missing"):
        Tokenizer.load(tmp_path)
    for name in ("ranks.tiktoken", "tokenizer_meta.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    (tmp_path / "ranks.tiktoken").write_bytes(b"?? 1\n")
    with pytest.raises(ValueError, match="damaged"):
        Tokenizer.load(tmp_path)
