"""The tokenizer stage: learn a byte-level BPE or an alphabet from the corpus, or take what is there."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator

from corpus.left_out import reasons
from corpus.tokenizers import Tokenizer
from corpus.vocabularies import digest_of
from stages.config import DataConfig, TokenizerConfig
from stages.context import StageContext
from stages.ingest import corpus_shards, documents_of, held_out_of


def run(
    context: StageContext, data: DataConfig, config: TokenizerConfig, shard_bytes: int, vocab_size: int, seed: int
) -> None:
    began = time.monotonic()
    read = {"documents_read": 0, "characters_read": 0}
    rejected: Counter[str] = Counter()

    def texts() -> Iterator[str]:
        for shard in corpus_shards(data, shard_bytes, seed):
            choice = held_out_of(shard, data)
            # of a corpus that is used up anyway, all of every document
            most = config.doc_chars if (shard["total"] or math.inf) > config.max_chars else None
            for document in documents_of(shard, rejected):
                if choice.takes(document):
                    continue
                text = document.text[:most]
                read["documents_read"] += 1
                read["characters_read"] += len(text)
                yield text
                if read["characters_read"] >= config.max_chars:
                    return

    def characters() -> str:
        """All that the corpus has, what is held out included, sorted."""
        found: set[str] = set()
        for shard in corpus_shards(data, shard_bytes, seed):
            for document in documents_of(shard, rejected):
                found.update(document.text)
                read["documents_read"] += 1
                read["characters_read"] += len(document.text)
        return "".join(sorted(found))

    tokenizer: Tokenizer | None = Tokenizer.train(texts(), vocab_size) if config.source == "bpe" else None
    alphabet = characters() if config.learned and tokenizer is None else config.alphabet or ""
    if config.learned and not read["documents_read"]:
        raise ValueError(f"corpus {data.corpus!r} holds no documents: all are left out, {reasons(rejected)}")
    if tokenizer is None:
        tokenizer = Tokenizer.open(config.source, alphabet)
        if config.digest is not None and (now := digest_of(config.source)) != config.digest:
            raise ValueError(
                f"tokenizer {config.source} is not what it was where the run was started, SHA-256 {now[:12]} instead "
                f"of {config.digest[:12]}: all machines need the same, and it must not change before this stage is done"
            )
    with context.scratch() as directory:
        tokenizer.save(directory)
        context.publish(directory, {"vocab_size": tokenizer.vocab_size, **read}, time.monotonic() - began)
