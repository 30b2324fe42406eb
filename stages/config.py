"""The settings of every stage, one frozen model a stage. No torch and no ray here: planning imports this.

A field marked `environment` says how a stage is run, not what it makes; the rest is identity and enters the
artifact's fingerprint. Fields that default to None are derived from depth and data by `pipeline.scaling`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def environment(default: Any, description: str, **limits: Any) -> Any:
    """A field that may change between attempts without changing the artifact."""
    return Field(default, description=description, json_schema_extra={"environment": True}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def identity(self) -> dict[str, Any]:
        """The fields that define the artifact, as plain JSON values."""
        fields = type(self).model_fields
        keep = {n for n, f in fields.items() if not (f.json_schema_extra or {}).get("environment")}  # type: ignore[union-attr]
        return self.model_dump(mode="json", include=keep)


class DataConfig(Section):
    corpus: str = Field(
        "hub:HuggingFaceFW/fineweb-edu",
        description="text to pretrain on: glob, directory, URI, hub:<dataset>, or synthetic",
    )
    chat: str = Field(
        "hub:HuggingFaceTB/smol-smoltalk",
        description="conversations: JSONL of messages or prompt/response, hub:<dataset>, or none",
    )
    gsm8k: str = Field(
        "hub:openai/gsm8k", description="folder with train.jsonl and test.jsonl, hub:openai/gsm8k, or none"
    )
    max_documents: int | None = Field(
        None, ge=1, description="use at most this many documents, taken evenly from the corpus"
    )
    validation_documents: int = Field(512, ge=1, description="documents held out for validation")
    max_chat: int | None = Field(None, ge=1, description="use at most this many conversations")
    synthetic_documents: int = Field(20_000, ge=64, description="documents the synthetic corpus has")
    synthetic_problems: int = Field(40_000, ge=64, description="training problems the arithmetic task has")


class ModelConfig(Section):
    depth: int = Field(20, ge=1, le=64, description="the dial")
    vocab_size: int = Field(65_536, ge=300, le=1_000_000, description="tokenizer size, special tokens included")
    sequence_len: int = Field(2_048, ge=16, description="context in tokens")


class TokenizerConfig(Section):
    max_chars: int = Field(2_000_000_000, ge=1_000, description="characters of the corpus to train on")
    doc_chars: int = Field(10_000, ge=100, description="characters used of one document")


class IngestConfig(Section):
    shard_bytes: int = Field(
        64 << 20, ge=1, description="bytes of input that make one shard of rows; a larger unit is one of its own"
    )
    tasks: int = environment(0, "documents are tokenized by this many Ray tasks at once; 0: one a core", ge=0)


class TrainConfig(Section):
    """What base, mid and sft share."""

    total_batch_size: int | None = Field(None, ge=1, description="tokens a step")
    device_batch_size: int = environment(32, "rows a micro-batch on one device", ge=1)
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute precision; weights and optimizer are fp32"
    )
    matrix_lr: float = Field(0.02, gt=0, description="Muon learning rate of the block matrices")
    embedding_lr: float = Field(0.2, gt=0, description="AdamW learning rate of the embedding at width 768")
    unembedding_lr: float = Field(0.004, gt=0, description="AdamW learning rate of the output head at width 768")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of the block matrices")
    lr_scale: float = Field(1.0, gt=0, description="factor on all three learning rates")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of steps to warm up")
    warmdown_ratio: float = Field(0.2, ge=0, le=1, description="share of steps to decay linearly to zero")
    grad_clip: float = Field(1.0, gt=0, description="bound on the global gradient norm")
    eval_every: int = Field(250, ge=0, description="steps between validation passes; 0: only at the end")
    eval_rows: int = Field(512, ge=1, description="validation rows a pass")
    save_every: int = environment(250, "steps between checkpoints", ge=1)
    keep_last: int = environment(2, "checkpoints kept", ge=1)


class BaseConfig(TrainConfig):
    steps: int | None = Field(None, ge=1, description="optimizer steps; unset: from target_ratio")
    target_ratio: float = Field(20.0, gt=0, description="tokens a parameter")


class TuneConfig(TrainConfig):
    """mid and sft, which go over their rows."""

    steps: int | None = Field(None, ge=1, description="optimizer steps; unset: from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the rows")


class RLConfig(Section):
    steps: int | None = Field(None, ge=1, description="optimizer steps; unset: one pass over the prompts")
    prompts_per_step: int = Field(16, ge=1)
    samples_per_prompt: int = Field(16, ge=2)
    max_new_tokens: int = Field(256, ge=1, description="tokens a completion, tool results included")
    advantage: Literal["mean", "grpo", "rloo"] = Field("mean", description="r - mean; z-scored; leave-one-out")
    matrix_lr: float = Field(0.02, gt=0)
    embedding_lr: float = Field(0.2, gt=0)
    unembedding_lr: float = Field(0.004, gt=0)
    lr_scale: float = Field(0.05, gt=0, description="factor on all three learning rates, decayed linearly to zero")
    grad_clip: float = Field(1.0, gt=0)
    ratio_cap: float = Field(
        2.0, gt=0, description="bound of the token-level importance ratio between sampler and trainer"
    )
    require_signal: bool = Field(True, description="stop before the first step when no training prompt is ever solved")
    signal_prompts: int = Field(32, ge=1, description="training prompts sampled for that check")
    max_logprob_difference: float = Field(
        0.05, gt=0, description="mean |sampler - trainer| logprob above this stops the run"
    )
    actors: int = environment(0, "rollout actors; 0: one a device, or one a core on CPUs", ge=0)
    device_batch_size: int = environment(16, "sequences a micro-batch of the learner", ge=1)
    call_timeout: float = environment(600.0, "seconds a remote call may take", gt=0)
    save_every: int = environment(10, "steps between checkpoints", ge=1)
    keep_last: int = environment(2, "checkpoints kept", ge=1)


class EvaluateConfig(Section):
    problems: int = Field(200, ge=1, description="held-out problems")
    samples: int = Field(8, ge=1, description="samples a problem for pass@k")
    max_new_tokens: int = Field(256, ge=1)
    call_timeout: float = environment(3600.0, "seconds that sampling all problems may take", gt=0)
