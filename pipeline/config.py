"""The configuration tree: defaults derived from depth < preset TOML < command line.

Imports neither torch nor ray, so that planning and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NoReturn, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from cluster.storage import EMPTY, Storage, refuse_credentials, refuse_nowhere
from corpus.sources import CORPORA, SYNTHETIC
from corpus.sources import characters as measured
from models.spec import Family
from pipeline import scaling
from stages.config import (
    BUDGETS,
    FOUND,
    NONE,
    SHAPE,
    BaseConfig,
    DataConfig,
    EvaluateConfig,
    IngestConfig,
    InitConfig,
    ModelConfig,
    RLConfig,
    Section,
    TokenizerConfig,
    TrackingConfig,
    TuneConfig,
    environment,
)
from tasks.environments import EnvironmentFile
from tasks.mixture import Part, digest_of

PRESETS = Path(__file__).parent / "presets"
MIXTURE = Path(__file__).parent / "mixtures" / "nanochat.toml"
SFT_CHATS = 10_000  # conversations of --chat in SFT, as many as nanochat takes
CORPUS_FIELDS = {
    *("corpus", "text_column", "text_documents", "shards", "max_documents", "deduplicate", "synthetic_documents"),
    *("validation_share", "validation_chars"),
}
STAGE_NAMES = (
    *("tokenizer", "ingest", "base", "evaluate_base"),
    *("conversations", "mid", "evaluate_mid", "sft", "evaluate_sft", "rl", "evaluate_rl"),
)
PLANNED_CHARACTERS = 256  # tokens, where `chars` takes them from a corpus that is not read yet
OF_PART = re.compile(r"(data\.(?:mid|sft)\.[^.]+\.)(.+)")  # a key of a part of a mixture


class ConfigError(ValueError):
    """A mistake in flags, preset or --set; the message names the key, the value and what is allowed."""


def _fewest_and_most(value: Any) -> tuple[int, int]:
    """2 → (2, 2); "1:8" → (1, 8)."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}(:\d{1,9})?", value):
        value = [int(part) for part in value.split(":")]
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not (numbers and all(type(n) is int for n in numbers) and len(numbers) <= 2 and 1 <= numbers[0] <= numbers[-1]):
        raise ValueError("must be a number from 1, or MIN:MAX with MIN not above MAX, such as 1:8")
    return numbers[0], numbers[-1]


Workers = Annotated[tuple[int, int], BeforeValidator(_fewest_and_most)]


class Config(Section):
    """Everything a run is made from; one section a stage."""

    name: str = environment("run", "name of the run, its folder in storage")
    preset: str | None = Field(None, description="preset the run started from", json_schema_extra=FOUND)
    with_rl: bool = environment(False, "go on to reinforcement learning after SFT")
    workers: Workers = environment((1, 1), "training workers, one a device; MIN:MAX for as many as there is room for")
    storage: str = environment("./runs", "directory, s3:// or gs:// URI that holds the runs")
    shared_storage: bool = environment(False, "the directory of storage is one that all nodes of the cluster share")
    seed: int = Field(0, ge=0, description="seed of data order, initial weights and sampling")
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    ingest: IngestConfig = IngestConfig()
    base: BaseConfig = BaseConfig()
    mid: TuneConfig = TuneConfig()
    sft: TuneConfig = TuneConfig()
    rl: RLConfig = RLConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tracking: TrackingConfig = TrackingConfig()


class About(Section):
    """What a preset says of itself, in its table [about], which one of your own may leave out; none of it configures a
    run."""

    purpose: str = Field("", description="what it is for, in a sentence")
    source: str = Field("", description="where its numbers come from")
    corrections: list[str] = Field([], description="where the source's claims were wrong, and what is right")
    gpus: str = Field("", description="the machine it is meant for, such as 8xH100 or cpu")
    usd_per_gpu_hour: float | None = Field(None, gt=0, description="what its source pays, or a usual rent")
    notes: list[str] = Field([], description="fall-backs and alternatives")
    # Flags and not presets of their own: they change how fast a run is, not what it learns, even between attempts.
    tiers: list[str] = Field([], description="optimisation in steps, each with its flags")


def stage_names(config: Config) -> list[str]:
    """The stages of a run in order, each evaluation after what it measures; without conversations a run only
    pretrains."""
    left_out = set() if config.with_rl else {"rl", "evaluate_rl"}
    if config.init.source is not None:
        left_out |= {"ingest", "evaluate_base", *(() if config.init.mid else ("mid", "evaluate_mid"))}
    if not (config.data.mid or config.data.sft):
        left_out |= {*STAGE_NAMES[STAGE_NAMES.index("conversations") :]}
    return [name for name in STAGE_NAMES if name not in left_out]


def select(
    names: Sequence[str], only: str | None, first: str | None, last: str | None, force: Sequence[str]
) -> list[str]:
    """The stages asked for by --only, --from and --until; raises ConfigError for a name that is not among `names`."""
    for flag, value in [("--only", only), ("--from", first), ("--until", last), *(("--force", f) for f in force)]:
        if value is not None and value not in names:
            why = ""
            if value in STAGE_NAMES:
                why = " (stages after evaluate_base need --chat or --gsm8k, RL --with-rl)"
            raise ConfigError(f"{flag} {value}: this run has no such stage; it has {', '.join(names)}{why}")
    start = names.index(first) if first else 0
    stop = names.index(last) + 1 if last else len(names)
    if start >= stop:
        raise ConfigError(f"--from {first} comes after --until {last}: nothing is left to run")
    if only and (first or last):
        others = " and ".join(f"{flag} {stage}" for flag, stage in (("--from", first), ("--until", last)) if stage)
        raise ConfigError(f"--only {only} contradicts {others}: give --only alone, or the others without it")
    selected = [only] if only else list(names[start:stop])
    if left_out := [f for f in force if f not in selected]:
        raise ConfigError(
            f"--force {left_out[0]} would remove it, but it is not among the stages asked for to run again"
        )
    return selected


def check_mixtures(config: Config, selected: Sequence[str]) -> None:
    """Raises ConfigError where mid or SFT is asked for and has nothing to learn from."""
    for stage in ("mid", "sft"):
        if stage in selected and not getattr(config.data, stage):
            raise ConfigError(
                f"{stage} has no conversations: give --chat, --gsm8k or --set data.{stage}.NAME.source=..., or stop "
                f"before it with --until {'evaluate_base' if stage == 'mid' else 'mid'}"
            )


def has_problems(config: Config) -> bool:
    """Whether there is anything to ask: the problems of --gsm8k, or an environment with its own."""
    return config.data.gsm8k != NONE or config.rl.environment is not None


def measures_text(stage: str, config: Config) -> bool:
    """Whether a stage measures bits per byte of held-out text: of the corpus, or of conversations where no problems are
    there to ask."""
    return stage == "evaluate_base" or (stage.startswith("evaluate_") and not has_problems(config))


def identity_of(stage: str, config: Config) -> dict[str, Any]:
    """The fields that define a stage's own work, nested by section; what it is fed enters as upstream digests."""
    if measures_text(stage, config):
        return {"evaluate": {name: getattr(config.evaluate, name) for name in ("tasks", "data", "limit")}}
    identity: dict[str, Any] = {"seed": config.seed}
    if config.init.source is not None and stage in ("tokenizer", "base"):
        length = {"model": {"sequence_len": config.model.sequence_len}} if stage == "base" else {}
        return {"init": config.init.identity(), **length}
    if stage == "tokenizer":
        if not config.tokenizer.learned:
            return {"tokenizer": config.tokenizer.identity()}
        corpus = CORPUS_FIELDS - {"deduplicate"}
        identity["data"] = {name: value for name, value in config.data.identity().items() if name in corpus}
        identity["tokenizer"] = config.tokenizer.identity()
        identity["ingest"] = {"shard_bytes": config.ingest.shard_bytes}
        identity["model"] = {"vocab_size": config.model.vocab_size}
    elif stage == "ingest":
        identity["data"] = {name: value for name, value in config.data.identity().items() if name in CORPUS_FIELDS}
        identity["ingest"] = config.ingest.identity()
        identity["model"] = {"sequence_len": config.model.sequence_len}
    elif stage == "conversations":
        wanted = {"chat", "gsm8k", "mid", "sft", "synthetic_problems", "validation_conversations"}
        identity["data"] = {name: value for name, value in config.data.identity().items() if name in wanted}
        identity["model"] = {"sequence_len": config.model.sequence_len}
    else:
        section = "evaluate" if stage.startswith("evaluate_") else stage
        identity[section] = getattr(config, section).identity()
        if stage == "base":
            identity["model"] = config.model.identity()
        if stage == "rl" or (section == "evaluate" and config.rl.environment):
            environment = config.rl.environment
            identity.setdefault("rl", {})["environment"] = environment and environment.digest  # wherever it lies
    return identity


def dotted_keys(model: type[BaseModel] = Config, where: str = "") -> list[str]:
    """Every key that --set and presets know, such as base.matrix_lr."""
    keys: list[str] = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += dotted_keys(info.annotation, f"{where}{name}.")
        elif info.json_schema_extra != FOUND:
            keys.append(where + name)
    return keys


def load_config(
    preset: str | None = None,
    flags: dict[str, Any] | None = None,
    sets: list[str] | None = None,
    characters: int | None = None,
) -> Config:
    """Build the tree; `preset` is a name or a file, `flags` is nested by section, `sets` holds "a.b=value" with TOML
    values or plain strings. `characters` of the corpus are measured where they are not given, see `size_before`.

    Raises ConfigError, one line a fault.
    """
    given: dict[str, Any] = {}
    layers = [flags or {}, *map(_parse_set, sets or [])]
    for layer in layers:
        given = _merge(given, layer)
    named = preset_values(preset) if preset is not None else {}
    values = _with_mixtures(_merge(_giving_way(named, given), given), [named, *layers])
    try:
        _refuse_unknown_keys(values)
        for text in _texts(values):
            refuse_credentials(text)
    except RecursionError:
        raise ConfigError("the settings are nested too deep: no setting has more than five names") from None
    values = _with_environment(values)
    for section, name in (("evaluate", "data"), ("tracking", "folder")):
        settings = values.get(section)
        if isinstance(settings, dict) and isinstance(settings.get(name), str):
            settings[name] = absolute(settings[name])
    if preset is not None:
        ours = preset in preset_names()
        values["preset"] = preset if ours else absolute(preset)
        values.setdefault("name", preset if ours else Path(preset).stem)
    checked = _validate(values)
    source = checked.init.source
    values.setdefault("name", f"d{checked.model.depth}" if source is None else run_name(source))
    values["storage"] = Storage(checked.storage if "storage" in values else default_storage()).uri
    begun = _with_init(values, checked) if checked.init.source else {}
    values = _merge(values, begun or _with_vocabulary(values, checked))
    values = _merge(values, {"data": {"digests": _digests(checked.data)}})
    of_corpus: dict[str, Any] = {}
    if not checked.init.source and not {*BUDGETS, "target_ratio"} & values.get("base", {}).keys():
        held = characters or measured(checked.data.corpus, shards=checked.data.shards)
        of_corpus = {"data": {"characters": held and round(held)}}
    if checked.with_rl and not (checked.data.mid or checked.data.sft):
        raise ConfigError("--with-rl goes on from SFT, which has no conversations: give --chat, --gsm8k or data.sft")
    if checked.with_rl and not has_problems(checked):
        raise ConfigError(
            "--with-rl needs problems to train on: give --gsm8k a folder, hub:openai/gsm8k or synthetic, "
            "or --set rl.environment=FILE.py"
        )
    try:
        config = _validate(_merge(scaling.derive(_merge(checked.model_dump(), of_corpus | begun), values), values))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.base.core_every and config.evaluate.data is None:
        raise ConfigError("base.core_every asks CORE, whose bundle is missing: give --eval-data")
    fewest, most = checked.workers
    if checked.base.budget_usd is not None and fewest != most:
        raise ConfigError("budget_usd needs a fixed number of --workers, as what an hour costs depends on it")
    if checked.with_rl and fewest == most and checked.rl.prompts_per_step % most:
        near = checked.rl.prompts_per_step // most * most
        valid = " or ".join(str(n) for n in (near, near + most) if n)
        raise ConfigError(
            f"rl.prompts_per_step = {checked.rl.prompts_per_step} does not divide among --workers {most}; "
            f"the nearest that do: {valid}"
        )
    return config


def default_storage() -> str:
    """./runs, except in a submitted Ray job: there the working directory is a copy that Ray deletes."""
    return str(Path.home() / "runs") if "_ray_pkg_" in os.getcwd() else "./runs"


def absolute(place: str) -> str:
    """A local path made absolute, as stages run in other directories than the driver; anything else as it is. Raises
    ConfigError for what names no place."""
    try:
        refuse_nowhere(place)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    named = place in ("", NONE, SYNTHETIC) or place in CORPORA or "://" in place or place.startswith("hub:")
    return place if named else os.path.abspath(os.path.expanduser(place))


def _with_mixtures(values: dict[str, Any], layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`values` with all parts of mid and sft: the mixture of nanochat where no chat is named, else that and the
    problems; parts given by hand come on top, and "none" takes one away, which one of `layers` may have brought. Places
    are made absolute."""
    given = values.get("data", {})
    if not isinstance(given, dict) or not all(isinstance(given.get(stage, {}), dict) for stage in ("mid", "sft")):
        return values  # which is told when they are validated
    data = dict(given)
    places = {name: data.get(name, DataConfig.model_fields[name].default) for name in ("corpus", "chat", "gsm8k")}
    if empty := [name for name, place in places.items() if isinstance(place, str) and not place.strip()]:
        raise ConfigError(f"data.{empty[0]} = {places[empty[0]]!r} {EMPTY}")
    data |= {name: absolute(place) for name, place in places.items() if isinstance(place, str)}
    chat, gsm8k = data.get("chat"), data["gsm8k"]
    parts = of_default = tomllib.loads(MIXTURE.read_text())
    if chat is not None:
        own = {"mid": {"source": chat}, "sft": {"source": chat, "rows": SFT_CHATS}}
        parts = {stage: {"chat": part} if chat != NONE else {} for stage, part in own.items()}
    problems = {"source": gsm8k, "format": "gsm8k"}
    if gsm8k == SYNTHETIC:
        problems["rows"] = data.get("synthetic_problems", DataConfig.model_fields["synthetic_problems"].default)
    for stage in ("mid", "sft"):
        of_stage = {"gsm8k": NONE if gsm8k == NONE else problems}
        own = data.get(stage, {})
        merged = _merge(_merge(parts[stage], of_stage), own)
        # a preset may take a part of the default away, and --chat all of them
        known = {
            *of_default[stage],
            *parts[stage],
            *of_stage,
            *(name for layer in layers for name in _parts_of(layer, stage)),
        }
        if unknown := [name for name, part in own.items() if part == NONE and name not in known]:
            there = ", ".join(name for name, part in merged.items() if part != NONE) or "none"
            raise ConfigError(f"data.{stage}.{unknown[0]}=none: {stage} has no such part; its parts are: {there}")
        data[stage] = {
            name: part | {"source": absolute(part["source"])}
            if isinstance(part, dict) and isinstance(part.get("source"), str)
            else part
            for name, part in merged.items()
            if part != NONE
        }
    return values | {"data": data}


def _parts_of(layer: dict[str, Any], stage: str) -> list[str]:
    """The names of the parts of a stage's mixture that a preset, or a flag, says something of."""
    parts = _merge({"data": {stage: {}}}, layer)["data"]
    parts = parts[stage] if isinstance(parts, dict) else {}
    return [name for name, part in parts.items() if isinstance(part, dict)] if isinstance(parts, dict) else []


def _with_environment(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the user's environment read."""
    rl = values.get("rl")
    if not isinstance(rl, dict) or not isinstance(path := rl.get("environment"), str):
        return values
    try:
        return _merge(values, {"rl": {"environment": EnvironmentFile.read(path).model_dump()}})
    except ValueError as error:
        raise ConfigError(f"rl.environment = {path!r}: {error}") from error


def run_name(source: str) -> str:
    """What a run is called that begins from this model, such as hub:Qwen/Qwen3-0.6B."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", source.rstrip("/").rpartition("/")[2]).lstrip("._-") or "run"


def _with_init(values: dict[str, Any], checked: Config) -> dict[str, Any]:
    """What the model that --init names settles: its shape, the size of its vocabulary, and whether mid is left out. Of
    all that the model could be told, only how long its texts are is left to the user."""
    if budgets := set(BUDGETS) & values.get("base", {}).keys():
        raise ConfigError(
            f"base.{min(budgets)} is how long base trains, and with --init nothing is pretrained: leave it out"
        )
    given = {name for name in values.get("model", {}) if name != "sequence_len"}
    if given or values.get("tokenizer"):
        key = f"model.{min(given)}" if given else "tokenizer"
        raise ConfigError(f"--init names a model, which has its own {key}: leave out what sets it")
    from stages.begin import look  # and with it torch, which nothing else here needs

    source = absolute(str(checked.init.source))
    try:
        found = look(checked.init.model_copy(update={"source": source}))
    except (ValueError, OSError) as error:
        raise ConfigError(f"--init {checked.init.source}: {error}") from error
    length = values.get("model", {}).get("sequence_len", min(checked.model.sequence_len, found.spec.places))
    if length > found.spec.places:
        raise ConfigError(f"model.sequence_len = {length}: the model can place {found.spec.places} tokens")
    mid = checked.init.mid if checked.init.mid is not None else not found.chats
    init = {"source": source, "mid": mid, "digest": found.digest, "revision": found.revision}
    shape = {"family": found.spec.family, "vocab_size": found.spec.vocab_size, "sequence_len": length}
    return {"init": init, "model": shape | {"found": dataclasses.asdict(found.spec)}}


def _with_vocabulary(values: dict[str, Any], checked: Config) -> dict[str, Any]:
    """What a tokenizer that is not trained here settles: its place and content, and the size of the vocabulary."""
    source, alphabet = checked.tokenizer.source, checked.tokenizer.alphabet
    if source == "bpe":
        return {}
    from corpus.tokenizers import ENCODINGS, fixed_vocab_size  # not needed where the tokenizer is trained
    from corpus.vocabularies import digest_of as digest_of_vocabulary

    named = source in (*ENCODINGS, "chars")
    source = source if named else absolute(source)
    try:
        size = PLANNED_CHARACTERS if checked.tokenizer.learned else fixed_vocab_size(source, alphabet or "")
        digest = None if named else digest_of_vocabulary(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    given = values.get("model", {}).get("vocab_size", size)
    if given != size:
        raise ConfigError(f"model.vocab_size = {given}: the tokenizer {source} has {size} tokens; leave it out")
    return {"tokenizer": {"source": source, "digest": digest}, "model": {"vocab_size": size}}


def _digests(data: DataConfig) -> dict[str, str]:
    """SHA-256 of the small files that `data` names, by their place."""
    found = {part.source: digest_of(part) for part in data.sources() if os.path.isabs(part.source)}
    return {place: digest for place, digest in found.items() if digest is not None}


def as_found(config: Config, recorded: Callable[[], Config | None]) -> Config:
    """`config` with what an earlier attempt, in `recorded`, found in files that are gone by now: what was made from
    them need not be made again."""
    places = {part.source for part in config.data.sources() if os.path.isabs(part.source)}
    gone = {place for place in places if not os.path.lexists(place)}
    before = recorded() if gone else None
    if before is None:
        return config
    kept = {place: digest for place, digest in before.data.digests.items() if place in gone}
    return config.model_copy(update={"data": config.data.model_copy(update={"digests": config.data.digests | kept})})


def size_before(config: Config, before: Config) -> int | None:
    """What an earlier attempt measured of the corpus and planned base by; None where that is another by what is known
    of it."""
    place = config.data.corpus
    known = config.data.digests.get(place)
    same = before.data.corpus == place and known in (None, before.data.digests.get(place))
    return before.data.characters if same else None


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(low.get(key), dict)
        merged[key] = _merge(low[key], value) if both else value
    return merged


def preset_names() -> list[str]:
    """Every preset there is."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_about(name: str) -> About:
    """What preset `name` is for and where its numbers come from; raises ConfigError for one that is not there."""
    return _read_preset(name)[1]


def preset_values(name: str) -> dict[str, Any]:
    """What preset `name` settles, nested by section; raises ConfigError for one that is not there."""
    return _read_preset(name)[0]


def _read_preset(name: str) -> tuple[dict[str, Any], About]:
    """The part of the tree that a preset settles, and what it says of itself. It is one of ours, or any TOML file by
    its path."""
    ours = name in preset_names()
    if not ours and "/" not in name and not name.endswith(".toml"):
        raise ConfigError(
            f"unknown preset {name!r}; there are: {', '.join(preset_names())}; one of your own is named by its path, "
            "such as ./mine.toml"
        )
    path = PRESETS / f"{name}.toml" if ours else Path(absolute(name))
    if not path.is_file():  # a pipe could not be read twice
        raise ConfigError(f"preset {name}: there is no such file")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"preset {name} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"preset {name} is not UTF-8: {error}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"preset {name} is not valid TOML: {error}") from error
    try:
        return tree, About.model_validate(tree.pop("about", {}))
    except ValidationError as error:
        raise ConfigError("\n".join(f"preset {name}: about.{_fault(e)}" for e in error.errors())) from error


def _giving_way(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The preset without what the command line says in another way: how long base trains, the vocabulary where a
    tokenizer is named, and the shape where the dial is given."""
    if wrong := [name for name in ("base", "model") if not isinstance(preset.get(name, {}), dict)]:
        raise ConfigError(f"the preset's {wrong[0]} = {preset[wrong[0]]!r} must be a table, [{wrong[0]}]")
    base, tokenizer, model = given.get("base"), given.get("tokenizer"), given.get("model")
    init = given.get("init")
    if isinstance(init, dict) and "source" in init:  # a model that exists has all that a preset says of these
        length = {k: v for k, v in preset.get("model", {}).items() if k == "sequence_len"}
        preset = {k: v for k, v in preset.items() if k not in ("tokenizer", "base")} | {"model": length}
    if isinstance(base, dict) and set(BUDGETS) & base.keys():
        preset = preset | {"base": {k: v for k, v in preset.get("base", {}).items() if k not in BUDGETS}}
    if isinstance(tokenizer, dict) and tokenizer.get("source", "bpe") != "bpe":
        preset = preset | {"model": {k: v for k, v in preset.get("model", {}).items() if k != "vocab_size"}}
    if isinstance(model, dict) and "depth" in model:
        preset = preset | {"model": {k: v for k, v in preset.get("model", {}).items() if k not in SHAPE}}
    return preset


def _parse_set(text: str) -> dict[str, Any]:
    key, mark, value = text.partition("=")
    key = key.strip()
    if not mark or not key:
        raise ConfigError(f"--set {text!r} must be KEY=VALUE, such as --set base.total_batch_size=262144")
    if not value:
        raise ConfigError(f"--set {text}: the value {EMPTY}")
    try:
        tree: dict[str, Any] = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        tree = {}
    parsed: Any = tree["value"] if len(tree) == 1 else value.strip()  # a line break may begin other keys
    if _takes_text(key) and not (tree and isinstance(parsed, str)):
        parsed = value  # not what it looks like, and with the white space around it
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def _takes_text(key: str) -> bool:
    """Whether any text is a value of this key."""
    of_part = OF_PART.fullmatch(key)
    model: Any = Part if of_part else Config
    *sections, field = of_part[2].split(".") if of_part else key.split(".")
    for section in sections:
        model = getattr(model.model_fields.get(section), "annotation", None)
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return False
    kind = getattr(model.model_fields.get(field), "annotation", None)
    return bool({str, EnvironmentFile} & set(get_args(kind) if isinstance(kind, UnionType) else [kind]))


def _texts(value: Any) -> Iterator[str]:
    """All strings in a tree of values."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _texts(inner)


def _refuse_unknown_keys(values: dict[str, Any]) -> None:
    known = dotted_keys()
    sections = {key.partition(".")[0] for key in known if "." in key}

    def given(tree: dict[str, Any], where: str = "") -> list[str]:
        keys: list[str] = []
        for name, value in tree.items():
            keys += given(value, f"{where}{name}.") if isinstance(value, dict) and value else [where + name]
        return keys

    for key in given(values):
        of_part = OF_PART.fullmatch(key)
        names = [of_part[1] + field for field in Part.model_fields] if of_part else known
        if key not in names and key not in sections:
            nearest = difflib.get_close_matches(key, names, n=3, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r}; did you mean {', '.join(nearest)}?")


def _validate(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(map(_fault, error.errors()))) from error


def _fault(error: Any) -> str:
    name, message = ".".join(map(str, error["loc"])), error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_too_short":
        return f"{name} = {error['input']!r} {EMPTY}"
    of_section = error["type"] == "value_error" and isinstance(error["input"], dict)
    return f"{name}: {message}" if of_section else f"{name} = {error['input']!r}: {message}"


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument in one line that says what to give in its place."""

    def error(self, message: str) -> NoReturn:
        wrong = message.removeprefix("unrecognized arguments: ")
        if wrong != message:
            message = (
                f"there is no {wrong.split()[0]}{_in_place_of(wrong.split()[0], list(self._option_string_actions))}"
            )
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` shows what there is\n")


def _in_place_of(argument: str, flags: Sequence[str]) -> str:
    """What may have been meant by an argument that there is not: a preset, one of `flags`, or keys for --set."""
    if argument in preset_names():
        return f": a preset is given as --preset {argument}"
    flag = argument.partition("=")[0]
    if argument.startswith("--") and (near := difflib.get_close_matches(flag, flags, n=1, cutoff=0.8)):
        return f": did you mean {near[0]}?"
    name = flag.removeprefix("--").replace("-", "_")
    keys = [key for key in dotted_keys() if name in key.rpartition(".")[2]]
    keys = keys or difflib.get_close_matches(name, dotted_keys(), n=4)
    return f": settings are given as --set KEY=VALUE; the nearest are {', '.join(keys[:4])}" if keys else ""


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `run` and `plan` share; one not given leaves the preset's or derived value."""
    parser.add_argument(
        "--preset",
        metavar="NAME|FILE",
        help="start from a preset, which `fathom presets` lists, or from a TOML file of your own, such as ./mine.toml",
    )
    parser.add_argument(
        "--depth",
        type=int,
        help="how deep the model is, in layers; its width, tokens and batch size follow from this one number",
    )
    parser.add_argument(
        "--init",
        metavar="DIR|hub:REPO",
        help="begin from this model (GPT-2, Llama, Qwen3 or an export), in place of tokenizer and base",
    )
    parser.add_argument("--family", choices=get_args(Family), help="architecture (default depth, which is nanochat's)")
    parser.add_argument("--hours", type=float, help="train base for this long, the decay ending with it")
    parser.add_argument("--budget-usd", type=float, help="train base for this much, with --usd-per-worker-hour")
    parser.add_argument("--usd-per-worker-hour", type=float, help="price of one device an hour")
    parser.add_argument("--with-rl", action=argparse.BooleanOptionalAction, help="go on to reinforcement learning")
    parser.add_argument("--name", help="name of the run (default: the preset's name, or d<depth>)")
    add_storage_flag(parser)
    parser.set_defaults(storage=None)  # a preset may name one
    parser.add_argument("--workers", help="training workers, one a device (default 1); MIN:MAX for as many as fit")
    parser.add_argument(
        "--corpus",
        help=f"text to pretrain on: glob, directory, URI, hub:<dataset>[:config], synthetic, or {', '.join(CORPORA)}",
    )
    parser.add_argument("--shards", type=int, help="use the first N files of the corpus")
    parser.add_argument(
        "--tokenizer", help="bpe (trained here), gpt2, cl100k_base, o200k_base, chars, or a tokenizer's file"
    )
    parser.add_argument(
        "--chat",
        help="conversations for mid and sft: JSONL or Parquet, hub:<dataset>, or none (default: nanochat's mixture)",
    )
    parser.add_argument("--gsm8k", help="folder with train.jsonl and test.jsonl, hub:openai/gsm8k, synthetic, or none")
    parser.add_argument(
        "--evals",
        metavar="TASKS",
        help="what models are asked beside the run's own problems, as for fathom evaluate --tasks; auto (default): all "
        "whose data is in --eval-data; none",
    )
    parser.add_argument(
        "--eval-data", help="folder, URI or hub:OWNER/NAME with a folder for each evaluation data set (core, arc, ...)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="set any key; repeatable")


def add_storage_flag(parser: argparse.ArgumentParser) -> None:
    """Where the runs are, in every command."""
    parser.add_argument(
        "--storage",
        default=default_storage(),
        help="directory, s3:// or gs:// URI that holds the runs (default ./runs; ~/runs in a Ray job)",
    )


def add_stage_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose stages, for `select`."""
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start at this stage; earlier ones must be done")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--only", metavar="STAGE", help="run just this stage")


def config_from_args(args: argparse.Namespace, characters: int | None = None) -> Config:
    """The tree of a parsed command line, as of `load_config`; raises ConfigError."""
    paths = {flag: (flag,) for flag in ("name", "storage", "shared_storage", "workers", "with_rl")}
    sections = {flag: ("data", flag) for flag in ("corpus", "shards", "chat", "gsm8k")} | {
        "tokenizer": ("tokenizer", "source"),
        "init": ("init", "source"),
        "depth": ("model", "depth"),
        "family": ("model", "family"),
        "evals": ("evaluate", "tasks"),
        "eval_data": ("evaluate", "data"),
        "track": ("tracking", "to"),
        **{flag: ("base", flag) for flag in ("hours", "budget_usd", "usd_per_worker_hour")},
    }
    flags: dict[str, Any] = {}
    for flag, path in (paths | sections).items():
        if (value := getattr(args, flag, None)) is not None:
            for part in reversed(path):
                value = {part: value}
            flags = _merge(flags, value)
    return load_config(args.preset, flags, args.set, characters)
