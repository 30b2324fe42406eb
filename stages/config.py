"""The settings of every stage, one frozen model a stage. No torch and no ray here: planning imports this.

A field marked `environment` says how a stage is run, not what it makes, and one marked FOUND what a file says; the rest
is identity and enters the artifact's fingerprint. Fields that default to None are derived from depth and data by
`pipeline.scaling`.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from models.spec import Family, ModelSpec
from tasks.environments import EnvironmentFile
from tasks.mixture import Part

FOUND: dict[str, Any] = {"found": True}  # marks a field that the files which are given settle, and nobody by hand


def environment(default: Any, description: str, **limits: Any) -> Any:
    """A field that may change between attempts without changing the artifact."""
    return Field(default, description=description, json_schema_extra={"environment": True}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_min_length=1)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Which pydantic would take for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind in (int, float, int | None, float | None):
            raise ValueError("must be a number")
        return value

    def identity(self) -> dict[str, Any]:
        """The fields that define the artifact, as plain JSON values."""
        keep = {name for name, field in type(self).model_fields.items() if not field.json_schema_extra}
        return self.model_dump(mode="json", include=keep)


NONE = "none"  # in place of a source


class DataConfig(Section):
    corpus: str = Field(
        "fineweb-edu-100b",
        description="text to pretrain on: a named corpus, glob, directory, URI, hub:<dataset>[:config], or synthetic",
    )
    text_column: str | None = Field(None, description="column that holds the text; unset: the named corpus's, or text")
    shards: int | None = Field(
        None,
        ge=1,
        description="use the first N files of the corpus; unset: of a named corpus as many as base needs, else all",
    )
    max_documents: int | None = Field(
        None, ge=1, description="use at most this many documents, taken evenly from the corpus"
    )
    text_documents: Literal["paragraphs", "lines", "file"] = Field(
        "paragraphs",
        description="a document of a .txt file: paragraphs, between blank lines, up to 4,000 characters together; a line; or the whole file",
    )
    validation_share: float = Field(0.05, ge=0.001, le=0.5, description="share of the corpus held out for validation")
    validation_chars: int = Field(
        8_000_000, ge=1, description="characters of the corpus held out for validation, at most"
    )
    validation_conversations: int = Field(
        512, ge=1, description="conversations held out for the validation of mid, and of sft; one in ten at most"
    )
    deduplicate: bool = Field(True, description="keep one of documents that are exactly equal")
    chat: str | None = Field(
        None,
        description="conversations for mid and sft: JSONL or Parquet, hub:<dataset>, or none; unset: the mixtures of nanochat",
    )
    gsm8k: str = Field(
        "hub:openai/gsm8k", description="folder with train.jsonl and test.jsonl, hub:openai/gsm8k, synthetic, or none"
    )
    mid: dict[str, Part] = Field(
        {}, description="sets of conversations that mid trains on, its parts, by name; unset: from chat and gsm8k"
    )
    sft: dict[str, Part] = Field({}, description="the same for sft")
    synthetic_documents: int = Field(20_000, ge=64, description="documents the synthetic corpus has")
    synthetic_problems: int = Field(40_000, ge=64, description="training problems the arithmetic task has")
    digests: dict[str, str] = Field(
        {},
        description="SHA-256 of small files that corpus, chat, gsm8k and parts name, by their place",
        json_schema_extra=FOUND,
    )

    characters: int | None = Field(
        None,
        description="about how many the corpus has on this machine, where that and not the user limits how long base trains",
        json_schema_extra=FOUND,
    )

    def sources(self) -> list[Part]:
        """All that texts, conversations and problems are read from."""
        named = [Part(source=place) for place in (self.corpus, self.chat) if place]
        return [*named, Part(source=self.gsm8k, format="gsm8k"), *self.mid.values(), *self.sft.values()]

    def identity(self) -> dict[str, Any]:
        """Small files by what they say, wherever they lie."""
        identity = super().identity()
        parts = [part for stage in ("mid", "sft") for part in identity[stage].values()]
        named = [(identity, key) for key in ("corpus", "chat", "gsm8k")]
        for tree, key in [*named, *((part, "source") for part in parts)]:
            tree[key] = self.digests.get(tree[key], tree[key])
        return identity


class InitConfig(Section):
    """A model that exists, to begin from in place of tokenizer, base and, where it has learned to chat, mid."""

    source: str | None = Field(
        None,
        description="model to begin from, in place of tokenizer and base: Hugging Face directory or hub:OWNER/NAME",
    )
    own_chat: bool = Field(
        True, description="it keeps the chat format of its own, where it has one; else it learns ours"
    )
    mid: bool | None = Field(None, description="go on with mid; unset: where the model has learned no chat format yet")
    digest: str | None = Field(None, description="of what source names", json_schema_extra=FOUND)
    revision: str | None = Field(None, description="commit of the hub's repository", json_schema_extra=FOUND)

    def identity(self) -> dict[str, Any]:
        """A directory by what it holds, wherever it lies."""
        return {"model": self.digest or self.revision, "own_chat": self.own_chat}


SHAPE = ("layers", "width", "heads", "kv_heads", "ffn_width")  # of the model, which `depth` sets by a rule


class ModelConfig(Section):
    """`depth` sets the whole shape by the family's rule; the fields below it replace single parts of that rule."""

    family: Family = Field("depth", description="depth (nanochat's architecture), gpt2, llama or qwen3")
    depth: int = Field(20, ge=1, le=64, description="layers: the dial that all sizes follow from")
    vocab_size: int = Field(65_536, ge=32, le=1_000_000, description="tokenizer size, special tokens included")
    sequence_len: int = Field(2_048, ge=16, description="context in tokens")
    layers: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=8, description="residual width")
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values, each shared by a group of queries")
    ffn_width: int | None = Field(None, ge=8, description="hidden width of the MLP")
    rope_base: float | None = Field(None, gt=1)
    tied: bool | None = Field(None, description="one matrix for embedding and output head")
    biases: bool | None = Field(None, description="biases in gpt2's linear layers and norms")
    found: ModelSpec | None = Field(
        None, description="shape of the model that init.source names", json_schema_extra=FOUND
    )

    def spec(self, vocab_size: int | None = None) -> ModelSpec:
        """The model's shape, with the vocabulary a tokenizer really has where that is known; ValueError for a shape
        that cannot be."""
        if self.found is not None:
            size, places = vocab_size or self.vocab_size, self.found.places
            return dataclasses.replace(self.found, vocab_size=size, sequence_len=self.sequence_len, positions=places)
        rule = ModelSpec.from_dial(
            self.family, self.depth, vocab_size or self.vocab_size, self.sequence_len, self.width
        )
        fields = [*(name for name in SHAPE if name != "width"), "rope_base", "tied", "biases"]
        given = {name: value for name in fields if (value := getattr(self, name)) is not None}
        if "heads" in given:
            given.setdefault("kv_heads", given["heads"])
        return dataclasses.replace(rule, head_dim=0, **given)


class TokenizerConfig(Section):
    source: str = Field(
        "bpe",
        description="bpe (trained here), gpt2, cl100k_base, o200k_base, chars, or a file: tiktoken ranks (Llama 3, Qwen), tokenizer.json, SentencePiece (Llama 2), or a folder with encoder.json and vocab.bpe",
    )
    alphabet: str | None = Field(None, description="the characters that `chars` knows; unset: those of the corpus")
    max_chars: int = Field(2_000_000_000, ge=1_000, description="characters of the corpus to train on")
    doc_chars: int = Field(
        10_000, ge=100, description="characters used of one document, where the corpus has more than max_chars"
    )
    digest: str | None = Field(
        None, description="SHA-256 of the file or folder that source names", json_schema_extra=FOUND
    )

    @property
    def learned(self) -> bool:
        """Whether the tokenizer is made from the corpus."""
        return self.source == "bpe" or (self.source == "chars" and self.alphabet is None)

    def identity(self) -> dict[str, Any]:
        """What the tokenizer is made from: a file by what it says, wherever it lies."""
        if self.source == "bpe":
            return super().identity()
        return self.model_dump(mode="json", include={"digest"} if self.digest else {"source", "alphabet"})


class IngestConfig(Section):
    packing: Literal["best_fit", "concat"] = Field(
        "best_fit",
        description="base rows: each begins with a document or a piece of one, and few are cut; or one document after the other",
    )
    shard_bytes: int = Field(
        64 << 20, ge=1, description="bytes of input that make one shard of rows, fewer in a corpus below a gigabyte"
    )
    tasks: int = environment(0, "documents are tokenized by this many Ray tasks at once; 0: one a core", ge=0)
    overlap: bool | None = environment(
        None, "base starts once there are enough rows, while ingest goes on; unset: where there are GPUs"
    )


class EngineConfig(Section):
    """How a model is laid over the devices; none of it changes what is learned."""

    parallel: Literal["ddp", "zero1", "fsdp"] = environment(
        "zero1",
        "every worker has all (ddp), its share of the optimizer state (zero1), or of weights, gradients and state (fsdp)",
    )
    checkpointing: Literal["none", "selective", "full"] = environment(
        "none", "activations computed again in the backward pass: none, the cheap ones, all of a block"
    )
    compile: bool | None = environment(None, "torch.compile every block; unset: on GPUs")
    attention: Literal["auto", "fa4", "fa3", "fa2", "cudnn", "flex", "blocked", "sdpa", "reference"] = environment(
        "auto", "attention backend; a named one that is missing is an error"
    )
    cuda_graphs: bool = environment(False, "replay each compiled block as a CUDA graph")


class OptimizerConfig(EngineConfig):
    """What the optimizer needs, in training and in RL."""

    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="Muon for the matrices of the blocks and AdamW for the rest, or AdamW for all"
    )
    matrix_lr: float = Field(0.02, gt=0, description="Muon learning rate of the block matrices")
    embedding_lr: float | None = Field(
        None,
        gt=0,
        description="AdamW learning rate of the embedding at width 768; unset: 0.2 for the depth family, else unembedding_lr",
    )
    unembedding_lr: float = Field(0.004, gt=0, description="AdamW learning rate of the output head at width 768")
    adamw_lr: float = Field(3e-4, gt=0, description="learning rate of everything under optimizer=adamw")
    beta1: float = Field(0.8, ge=0, lt=1, description="AdamW's decay of the mean gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the mean square gradient")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of the matrices")
    lr_scale: float = Field(1.0, gt=0, description="factor on all learning rates")
    grad_clip: float = Field(1.0, ge=0, description="bound on the global gradient norm; 0: none")


class TrainConfig(OptimizerConfig):
    """What base, mid and sft share."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    total_batch_size: int | None = Field(None, ge=1, description="tokens a step")
    device_batch_size: int = environment(32, "rows a micro-batch on one device; halved when memory runs out", ge=1)
    precision: Literal["auto", "bf16", "fp32", "fp8"] = Field(
        "auto",
        description="compute precision; weights and optimizer are fp32. auto: bf16 where it is native; fp8: block matrices in fp8, the rest in bf16",
    )
    max_skipped: int = Field(
        10, ge=0, description="steps in a row whose gradients may be non-finite, and are skipped, before training stops"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-sum-exp of the logits in the loss")
    schedule: Literal["wsd", "cosine"] | None = Field(
        None,
        description="warm-up, stable, linear decay; or warm-up, cosine. unset: wsd for the depth family, else cosine",
    )
    warmup_ratio: float = Field(
        0.0, ge=0, lt=1, description="share of the run to warm up; not read beside warmup_steps"
    )
    warmup_steps: int | None = Field(None, ge=0, description="steps to warm up, instead of a share")
    warmdown_ratio: float = Field(0.2, ge=0, le=1, description="share of the run to decay linearly; cosine has none")
    final_lr_ratio: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the highest")
    eval_every: int = Field(250, ge=0, description="steps between validation passes; 0: only at the end")
    eval_rows: int = Field(512, ge=1, description="validation rows a pass")
    early_stopping: int = Field(
        0, ge=0, description="stop after this many validations without fewer bits a byte of what is learned; 0: never"
    )
    keep_best: bool = Field(
        False, description="the artifact has the weights with the fewest bits a byte in validation, not the last"
    )
    save_every: int = environment(250, "steps between checkpoints", ge=1)
    save_minutes: float | None = environment(None, "minutes between checkpoints, besides save_every", gt=0)
    keep_last: int = environment(2, "checkpoints kept, besides the best", ge=1)

    @model_validator(mode="after")
    def _validations_exist(self) -> TrainConfig:
        if (self.early_stopping or self.keep_best) and not self.eval_every:
            raise ValueError("early_stopping and keep_best compare validations: set eval_every")
        return self


BUDGETS = ("steps", "tokens", "hours", "budget_usd")


class BaseConfig(TrainConfig):
    """One of BUDGETS, else target_ratio, says how long base trains."""

    target_ratio: float = Field(20.0, gt=0, le=1e6, description="tokens a parameter")
    tokens: int | None = Field(None, ge=1, description="tokens to train on")
    hours: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="hours to train, compilation and validation on the way included; the decay ends with them",
    )
    budget_usd: float | None = Field(
        None, gt=0, le=1e12, description="dollars for the stage, made into hours by usd_per_worker_hour"
    )
    usd_per_worker_hour: float | None = Field(None, gt=0, description="price of one device an hour")

    core_every: int = environment(
        0, "steps between evaluations on CORE, after the save of that step; 0: none; needs evaluate.data", ge=0
    )
    sample_every: int = environment(
        1000, "steps between samples of what the model says to a few prompts, the last besides; 0: none", ge=0
    )
    core_examples: int = environment(100, "examples a label in these evaluations", ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> BaseConfig:
        given = [n for n in BUDGETS if getattr(self, n) is not None]
        if given == ["steps", "tokens"] and self.total_batch_size:
            given = given[max(1, (self.tokens or 0) // self.total_batch_size) == self.steps :]  # the one from the other
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}: each says how long base trains")
        if self.budget_usd is not None and self.usd_per_worker_hour is None:
            raise ValueError("budget_usd needs usd_per_worker_hour, the price of one device an hour")
        return self


def base_hours(config: BaseConfig, workers: int) -> float | None:
    """Hours that base is to take on so many workers; None where steps count."""
    if config.budget_usd is not None and config.usd_per_worker_hour is not None:
        return config.budget_usd / (config.usd_per_worker_hour * workers)
    return config.hours


class TuneConfig(TrainConfig):
    """mid and sft, which go over their rows: for `steps`, or `epochs`."""

    epochs: float = Field(1.0, gt=0, description="passes over the rows")


class RLConfig(OptimizerConfig):
    steps: int | None = Field(
        None, ge=1, description="steps of sampling and learning; unset: one pass over the prompts"
    )
    prompts_per_step: int = Field(16, ge=1)
    samples_per_prompt: int = Field(16, ge=2)
    max_new_tokens: int = Field(256, ge=1, description="tokens a completion, tool results included")
    compile: bool | None = environment(False, "torch.compile every block, for every length of a micro-batch anew")
    lr_scale: float = Field(0.05, gt=0, description="factor on all learning rates, decayed linearly to zero")
    updates_per_step: int = Field(1, ge=1, description="optimizer steps a step, each on its part of the completions")

    advantage: Literal["mean", "grpo", "dr_grpo", "rloo"] = Field(
        "mean",
        description="r - mean; z-scored; r - mean and the loss over all tokens there could have been; leave-one-out",
    )
    loss: Literal["reinforce", "ppo_clip", "gspo"] = Field(
        "reinforce", description="reinforce, clipped ratio of tokens, clipped ratio of sequences"
    )
    clip_low: float = Field(0.2, ge=0, lt=1, description="how far below 1 the ratio counts; gspo's paper has 3e-4")
    clip_high: float = Field(0.28, ge=0, description="how far above 1 the ratio counts; gspo's paper has 4e-4")
    kl_coefficient: float = Field(0.0, ge=0, description="weight of the KL divergence from the SFT model; 0: none")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="how that divergence is estimated")
    ratio_cap: float = Field(
        2.0, ge=0, description="bound of the token-level importance ratio between trainer and sampler; 0: no such ratio"
    )
    mask_overlong: bool = Field(False, description="completions cut off by max_new_tokens are not learned from")
    dynamic_sampling: int = Field(
        0,
        ge=0,
        description="rounds of new prompts, at most, in place of those whose samples all earn the same; 0: none",
    )
    overlap: bool = Field(False, description="sample for the next step while this one is learned from")

    require_signal: bool = Field(True, description="stop before the first step when all samples earn the same")
    signal_prompts: int = Field(32, ge=1, description="training prompts sampled for that check")
    max_logprob_difference: float = Field(
        0.05, gt=0, description="mean |trainer - sampler| logprob above this stops the run; not asked under overlap"
    )
    eval_every: int = Field(
        0, ge=0, description="steps between evaluations on held-out problems; 0: none, not even last"
    )
    eval_problems: int = Field(64, ge=1, description="held-out problems an evaluation")
    eval_samples: int = Field(4, ge=1, description="samples a problem in an evaluation")
    keep_best: bool = Field(
        False, description="the artifact has the weights whose samples solved most in an evaluation, not the last"
    )

    engine: Literal["auto", "vllm", "torch"] = Field(
        "auto", description="what samples; auto: vllm where it is installed"
    )
    placement: Literal["auto", "shared", "split"] = environment(
        "auto",
        "sampler and learner on the same devices, or on devices of their own; auto: split where Ray has more GPUs than workers",
    )
    rollout_devices: int = environment(0, "devices that sample under split; 0: all that do not train", ge=0)
    actors: int = environment(0, "rollout actors; 0: one a device, or one a core on CPUs", ge=0)
    device_batch_size: int = environment(16, "sequences a micro-batch of the learner", ge=1)
    call_timeout: float = environment(600.0, "seconds a remote call may take", gt=0)
    health_timeout: float = environment(30.0, "seconds in which a rollout actor must say that it lives", gt=0)
    check_every: int = environment(10, "syncs between comparisons of the engine's weights with the trainer's", ge=1)
    save_every: int = environment(10, "steps between checkpoints", ge=1)
    keep_last: int = environment(2, "checkpoints kept, besides the best", ge=1)
    environment_timeout: float = environment(30.0, "seconds that a call of the environment's own code may take", gt=0)

    @model_validator(mode="after")
    def _evaluations_exist(self) -> RLConfig:
        if self.keep_best and not self.eval_every:
            raise ValueError("keep_best compares evaluations: set eval_every")
        return self

    @model_validator(mode="after")
    def _the_ratio_can_move(self) -> RLConfig:
        if self.loss != "reinforce" and self.updates_per_step == 1:
            raise ValueError(
                f"loss={self.loss} clips how far an update has moved from the policy before the step, which with "
                "updates_per_step=1 is never: set updates_per_step to 2 or more, or loss=reinforce"
            )
        return self

    # last, as it hides the function of this name
    environment: EnvironmentFile | None = Field(
        None, description="a Python file with problems and their grading; unset: the problems of data.gsm8k"
    )

    @property
    def evaluation(self) -> EvaluateConfig:
        """What is asked every `eval_every` steps."""
        tokens = self.max_new_tokens
        return EvaluateConfig(problems=self.eval_problems, samples=self.eval_samples, max_new_tokens=tokens)


class EvaluateConfig(Section):
    tasks: str = Field(
        "auto",
        description="what is asked beside the run's own problems, with commas between, as for fathom evaluate --tasks; auto: all whose data is there; none",
    )
    data: str | None = Field(
        None, description="folder, URI or hub:OWNER/NAME with a folder for each evaluation data set, or CORE bundle"
    )
    limit: int | None = Field(None, ge=1, description="examples a task, at most")
    problems: int = Field(200, ge=1, description="held-out problems")
    samples: int = Field(8, ge=1, description="samples a problem for pass@k")
    max_new_tokens: int = Field(256, ge=1)
    engine: Literal["auto", "vllm", "torch"] = Field(
        "auto", description="what samples; auto: vllm where it is installed"
    )
    call_timeout: float = environment(3600.0, "seconds that sampling all problems may take", gt=0)
    unsafe_sandbox: bool = environment(
        False, "run what models write for HumanEval with all that you may do yourself, where no sandbox can be made"
    )

    def actors(self, gpus: int, cpus: int) -> int:
        """How many sample at once: one a GPU, or one for two cores, as the stage after trains on the others, and four
        at most, as each has a model and a cache in the machine's one memory."""
        return max(1, min(gpus or cpus // 2, gpus or 4, self.problems))


TRACKERS = ("wandb", "tensorboard")


def as_names(value: Any) -> Any:
    """The list of names that "a, b" is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def as_trackers(value: Any) -> tuple[str, ...]:
    """The trackers of "wandb", "wandb,tensorboard", "both" or "none"; raises ValueError that names what is nearest."""
    names = as_names(value)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"must be one or more of {', '.join(TRACKERS)}, both or {NONE}")
    known = [*TRACKERS, "both", NONE]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise ValueError(f"there is no tracker {name!r}; did you mean {near[0]}? There are {', '.join(known)}")
    if NONE in names and len(names) > 1:
        raise ValueError("none stands alone")
    return TRACKERS if "both" in names else tuple(name for name in TRACKERS if name in names)


class TrackingConfig(Section):
    """Where a run is shown besides; none of it enters any artifact."""

    to: Annotated[tuple[str, ...], BeforeValidator(as_trackers)] | None = environment(
        None, "trackers: wandb, tensorboard, both or none; unset: wandb where WANDB_API_KEY is set, else none"
    )
    project: str = environment("fathom", "project in wandb")
    entity: str | None = environment(None, "user or team in wandb; unset: the account's own")
    tags: Annotated[tuple[str, ...], BeforeValidator(as_names)] = environment(
        (), "tags of the runs in wandb, such as first,long"
    )
    mode: Literal["auto", "online", "offline"] = environment(
        "auto", "of wandb; auto: as WANDB_MODE says, else online where there is an account's key, else offline"
    )
    folder: str | None = environment(
        None, "where trackers keep their files; unset: fathom-tracking beside the runs, or here where those are remote"
    )
