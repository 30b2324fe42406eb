"""What a report says of one run, in the order in which a person asks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.hardware import Gpus
from corpus import left_out
from pipeline.config import Config, ConfigError, load_config, preset_about, preset_names
from pipeline.plan import CHOSEN, default_gpus, plan
from pipeline.reporting.blocks import (
    Block,
    Charts,
    Code,
    Document,
    Fold,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
)
from pipeline.reporting.curves import RECORDED, charts, points_each
from pipeline.reporting.facts import Answered, RunFacts, StageFacts
from pipeline.scaling import BEGUN
from pipeline.timing import Calibration
from pipeline.tracking import duration, key_metrics
from stages.config import FOUND
from stages.report import readable
from tasks.estimates import core_difference, paired

HEADLINES = ("greedy", "chatcore", "core", "val_bpb_full", "val_bpb_mid_full", "val_bpb_sft_full")
MOST_TEXT = 1_500  # characters of a sample that are shown
MOST_SETTINGS = 200
EXAMPLES = 3  # of the best, and of the worst
SAID = 5  # samples of a stage to a prompt: the first, the last, and some between


@dataclass(frozen=True)
class Known:
    """What a person adds to what storage knows: what the run was on, what that costs an hour, how fast it is."""

    gpus: Gpus | None = None
    usd_per_gpu_hour: float | None = None
    calibration: Calibration | None = None


def report(run: RunFacts, known: Known) -> Document:
    most = points_each([run])
    sections = [
        Section("At a glance", [first_screen(run, known)]),
        Section("What was trained, and what it cost", what_and_cost(run, known)),
        Section("Planned and measured", planned_and_measured(run, known)),
        Section("Evaluations", evaluations(run)),
        Section("Curves", curves(run, most)),
        Section("What the model says", samples(run)),
        Section("Data", data(run)),
        Section("Incidents", [happened(incidents(run))]),
        Section("Settings that differ from the defaults", settings(run)),
        Section("Doing it again", again(run)),
    ]
    return Document(f"Run {run.name}", f"{run.state}; {run.uri}", sections)


# --- the first screen ---


def first_screen(run: RunFacts, known: Known) -> Tiles:
    good, below = how_good(run)
    found = incidents(run)
    unfinished = [stage for stage in run.stages if stage.state != "done"]
    if failed := [stage for stage in run.stages if stage.state in ("failed", "drifted")]:
        wrong = Tile("What went wrong", f"{failed[0].name} {failed[0].state}", cut(failed[0].error or "", 200), "bad")
    elif unfinished:
        done = f"{len(run.stages) - len(unfinished)} of {len(run.stages)} stages are done"
        more = f"; {counted(found)}: {cut(found[0].line, 120)}" if found else ""
        wrong = Tile("What went wrong", f"not finished: {run.state}", done + more, "bad" if found else "plain")
    elif found:
        first = f"; the first: {cut(found[0].line, 120)}" if len(found) > 1 else f": {cut(found[0].line, 120)}"
        wrong = Tile("What went wrong", f"{len(found)} incident(s)", counted(found) + first, "bad")
    else:
        wrong = Tile("What went wrong", "nothing", "every stage is done, with no incident on record", "good")
    usd = cost(run, known)
    spent = duration(run.seconds) or "nothing yet"
    where = hardware(run, known)
    figure = f"{money(usd)} in {spent}" if usd is not None else spent
    size = parameters(run)
    tiles = [
        Tile("How good", good, below),
        Tile("What it cost", figure, f"of all stages, on {where}" if where else "of all stages; hardware not recorded"),
        wrong,
        Tile("What it is", f"{compact(size)} parameters" if size else "a model", shape(run)),
    ]
    return Tiles(tiles)


def how_good(run: RunFacts) -> tuple[str, str]:
    """The figure that matters most of the last evaluation there is, and what it is of."""
    evaluated = [stage for stage in run.stages if stage.name.startswith("evaluate_") and stage.metrics]
    for stage in reversed([stage for stage in evaluated if stage.state == "done"]):
        name = next((name for name in HEADLINES if name in stage.metrics), None)
        if name is None:
            continue
        share = name == "greedy"
        figure = percent if share else number
        before = [s for s in evaluated[: evaluated.index(stage)] if name in s.metrics]
        gain = f"; {figure(before[-1].metrics[name])} after {of(before[-1])}" if before else ""
        bounds = [stage.metrics.get(f"{name}_{end}") for end in ("low", "high")]
        interval = (
            f", 95% interval {' to '.join(figure(b) for b in bounds if b is not None)}" if None not in bounds else ""
        )
        problems = f"of {number(stage.metrics.get('problems', math.nan))} held-out problems solved"
        words = problems if share else f"{name}: {meaning(name)}"
        return figure(stage.metrics[name]), f"{words}, after {of(stage)}{interval}{gain}"
    for stage in reversed(run.stages):
        name = next((n for n in stage.columns if n.startswith("val_bpb")), None)
        name = name or ("loss" if "loss" in stage.columns else None)
        at = int(stage.columns[name][0][-1]) if name is not None else 0
        if name is not None and at > 0:  # before its first step, it is the stage before that is measured
            return (
                f"{name} {number(float(stage.columns[name][1][-1]))}",
                f"{meaning(name)}, at step {at:,} of {stage.name}",
            )
    return "not known", "nothing is evaluated yet"


def meaning(name: str) -> str:
    return "bits a byte of held-out text" if "bpb" in name else "nats a token" if name == "loss" else "mean score"


def of(stage: StageFacts) -> str:
    return stage.name.removeprefix("evaluate_")


# --- what was trained ---


def what_and_cost(run: RunFacts, known: Known) -> list[Block]:
    config = run.config
    rows = [["state", run.state], ["storage", run.uri], *trained(run)]
    rows.append(["hardware", hardware(run, known) or "not recorded"])
    if config:
        fewest, most = config.workers
        rows.append(["workers", str(most) if fewest == most else f"{fewest} to {most}"])
    usd, price = cost(run, known), price_of(run, known)
    if usd is not None and price is not None:
        rows.append(["cost", f"{money(usd)}, at {money(price)} an hour of each of {workers(run)} device(s)"])
    else:
        rows.append(["cost", "not known: --usd-per-gpu-hour says what an hour of a device costs"])
    stages = [
        [
            s.name,
            s.state,
            duration(s.seconds),
            key_metrics(s.metrics).replace("  ", ", "),
            (s.created or "").replace("T", " ").removesuffix("+00:00"),
        ]
        for s in run.stages
    ]
    total = ["all", run.state, duration(run.seconds), "", ""]
    return [
        Table(["", ""], rows),
        Table(["stage", "state", "time", "figures", "done at (UTC)"], [*stages, total]),
    ]


def trained(run: RunFacts) -> list[list[str]]:
    """Rows of a table: the model, and what its stages have seen."""
    rows = [["parameters", f"{size:,.0f}"], ["shape", shape(run)]] if (size := parameters(run)) else []
    for stage in run.stages:
        if stage.name in RECORDED and len(stage.tokens):
            what = "tokens of completions in" if stage.name == "rl" else "tokens of"
            rows.append([f"{what} {stage.name}", f"{stage.tokens[-1]:,.0f} in {len(stage.steps):,} steps"])
    return rows


def parameters(run: RunFacts) -> int | None:
    return run.config.model.spec(vocabulary(run)).parameters if run.config else None


def vocabulary(run: RunFacts) -> int | None:
    """Of the tokenizer that was made: of characters, the configuration only guesses how many there are."""
    tokenizer = run.stage("tokenizer")
    size = tokenizer.metrics.get("vocab_size") if tokenizer else None
    return int(size) if size and 0 < size < 1 << 32 else None


def shape(run: RunFacts) -> str:
    if run.config is None:
        return "its configuration cannot be read"
    spec = run.config.model.spec(vocabulary(run))
    heads = f"{spec.heads} heads" if spec.heads == spec.kv_heads else f"{spec.heads} heads, {spec.kv_heads} for keys"
    return (
        f"{spec.family}: {spec.layers} layers of width {spec.width:,}, {heads}, {spec.vocab_size:,} tokens known, "
        f"{spec.sequence_len:,} in a row"
    )


def hardware(run: RunFacts, known: Known) -> str:
    if known.gpus is not None:
        return known.gpus.name
    return "; ".join(dict.fromkeys(a.hardware for a in run.attempts if a.hardware))


def workers(run: RunFacts) -> int:
    return run.config.workers[1] if run.config else 1


def price_of(run: RunFacts, known: Known) -> float | None:
    if known.usd_per_gpu_hour is not None or run.config is None:
        return known.usd_per_gpu_hour
    if run.config.base.usd_per_worker_hour is not None:
        return run.config.base.usd_per_worker_hour
    preset = ours(run.config).preset
    return preset_about(preset).usd_per_gpu_hour if preset else None


def cost(run: RunFacts, known: Known) -> float | None:
    price = price_of(run, known)
    devices = max(workers(run), known.gpus.count if known.gpus and known.gpus.hardware else 1)
    return price * devices * run.seconds / 3600 if price is not None else None


# --- planned and measured ---


def planned_and_measured(run: RunFacts, known: Known) -> list[Block]:
    if run.config is None:
        return [Text("The configuration of this run cannot be read, so nothing can be planned again.", "bad")]
    try:
        numbers, alone = planned(run.config, known), planned(_base_alone(run.config), known)
    except (ConfigError, ValueError) as error:
        return [Text(f"No plan can be made of this configuration: {error}", "bad")]
    rows = []
    for name, stages in (*((s, [s]) for s in RECORDED), ("evaluate", _evaluations_of(run))):
        seconds = [facts.seconds for s in stages if (facts := run.stage(s)) and facts.state == "done" and facts.seconds]
        hours = numbers["hours"].get(name)
        if seconds or hours is not None:
            rows.append(_beside(f"time of {name}", hours and 3600 * hours, sum(seconds) or None, duration))
    base = run.stage("base")
    if base is not None:
        final, speed = base.last("loss"), base.middle("tokens_per_second")
        steps = float(len(base.steps)) or None
        rows.append(_beside("steps of base", numbers["steps"], steps, number))
        rows.append(
            _beside("tokens of base", numbers["tokens"], float(base.tokens[-1]) if len(base.tokens) else None, number)
        )
        memory = float(base.columns["memory_gb"][1].max()) if "memory_gb" in base.columns else None
        rows.append(_beside("memory of a worker in base, GB", alone["memory_gb"]["total"], memory, number))
        rows.append(_beside("tokens a second in base", numbers["tokens_per_second"], speed, number))
        rows.append(_beside("MFU in base", numbers["mfu"], base.middle("mfu"), number))
        rows.append(_beside("final loss of base, nats a token", numbers["expected_loss"], final, number))
    rows = [row for row in rows if row[1:3] != ["–", "–"]]
    blocks: list[Block] = [Table(["", "planned", "measured", "measured / planned"], rows)]
    unknown = []
    if numbers["tokens_per_second"] is None:
        unknown.append(
            "How fast the devices are was not known beforehand, so neither was the time: `fathom probe --json FILE` "
            "measures it, and --calibrate FILE plans with it."
        )
    elif numbers["mfu_source"]:
        unknown.append(
            f"Planned on {numbers['gpus']} (others with --gpus), at a speed that is {numbers['mfu_source']}."
        )
    if numbers["expected_loss"] is None:
        unknown.append("No scaling law says what loss to expect of such a text or so small a model.")
    return blocks + [Text(line) for line in unknown]


def planned(config: Config, known: Known) -> dict[str, Any]:
    config = ours(config)
    if any(train.total_batch_size is None for train in (config.base, config.mid, config.sft)):
        raise ConfigError("a total_batch_size is not in it, which every run fills in before it is recorded")
    gpus = known.gpus or default_gpus(config)
    return plan(config, gpus, known.usd_per_gpu_hour, calibration=known.calibration, fixed=CHOSEN)


def ours(config: Config) -> Config:
    """The configuration without a preset that is no part of Fathom: what storage names is not opened on this machine,
    where it may be another file, or gone."""
    return config if config.preset in preset_names() else config.model_copy(update={"preset": None})


def _base_alone(config: Config) -> Config:
    """The run without what follows base, whose memory may be another."""
    data = config.data.model_copy(update={"mid": {}, "sft": {}})
    return config.model_copy(update={"data": data, "with_rl": False})


def _evaluations_of(run: RunFacts) -> list[str]:
    return [stage.name for stage in run.stages if stage.name.startswith("evaluate_")]


def _beside(name: str, before: float | None, after: float | None, shown: Any) -> list[str]:
    ratio = f"{after / before:.2f}" if before and after else ""
    return [name, *("–" if value is None else shown(value) for value in (before, after)), ratio]


# --- evaluations ---


def evaluations(run: RunFacts) -> list[Block]:
    """Every figure of the evaluations from base to RL with its interval, and what each stage gained."""
    stages = [s for s in run.stages if s.name.startswith("evaluate_") and s.metrics and s.state == "done"]
    if not stages:
        return [Text("Nothing is evaluated yet.")]
    rows = []
    for name in figures_of(stages):
        row, before = [name], None
        for stage in stages:
            if name not in stage.metrics:
                row.append("")
                continue
            cell = with_interval(stage.metrics, name)
            if before is not None and compares(name):
                cell += f"\n{difference(before.metrics[name], stage.metrics[name])}{chance(name, before, stage)}"
            row.append(cell)
            before = stage
        rows.append(row)
    note = (
        "In brackets 95% intervals; below, the gain since the evaluation before, with p, how likely two equal models "
        "differ so much on the same questions (McNemar's exact test, of CORE and ChatCORE its normal approximation), "
        "where each question's outcome is kept."
    )
    return [Table(["", *(of(stage) for stage in stages)], rows), Text(note)]


def figures_of(stages: list[StageFacts]) -> list[str]:
    """Names of the figures that are shown, the headlines first; each pass@k and maj@k is there but for those between
    the first and the last."""
    names = [n for n in dict.fromkeys(n for s in stages for n in s.metrics) if not n.endswith(("_low", "_high"))]
    for kind in ("pass_at_", "maj_at_"):
        mine = sorted((n for n in names if n.startswith(kind)), key=lambda n: (len(n), n))
        names = [n for n in names if n not in mine[1:-1]]
    hidden = {"problems_left_out", "seconds", "questions"}
    return [*(n for n in HEADLINES if n in names), *(n for n in names if n not in HEADLINES and n not in hidden)]


def compares(name: str) -> bool:
    return name != "problems" and not name.endswith(("_tasks", "_labels"))


def with_interval(metrics: Mapping[str, float], name: str) -> str:
    interval = between(metrics, name)
    return number(metrics[name]) + (f" ({interval})" if interval else "")


def between(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{low:.3f}–{high:.3f}" if low is not None and high is not None else ""


def difference(before: float, after: float) -> str:
    return f"{after - before:+.3f}".replace("-", "−")


def chance(name: str, before: StageFacts, after: StageFacts) -> str:
    """How likely the difference of a share, or of a mean of several tasks' scores, is chance, where the questions'
    outcomes are kept; else nothing."""
    if name in ("core", "chatcore"):
        found = of_tasks(before, after, "core_labels" if name == "core" else "chatcore_tasks")
    else:
        found = paired(outcomes(before, name), outcomes(after, name))
    return f", {probability(found[1])}" if found else ""


def of_tasks(before: StageFacts, after: StageFacts, names: str) -> tuple[float, float] | None:
    """`core_difference` of the tasks that `names` lists, None where these are not the same of both."""
    tasks, signs = getattr(after.asked, names), dict[str, list[int]]()
    if not tasks or sorted(tasks) != sorted(getattr(before.asked, names)):
        return None
    earlier = {(e.task, e.index): e.correct for e in before.examples}
    for e in after.examples:
        if (e.task, e.index) in earlier:
            signs.setdefault(e.task, []).append(e.correct - earlier[e.task, e.index])
    if any(task not in signs or task not in after.asked.tasks for task in tasks):
        return None
    return core_difference([(after.asked.tasks[task].baseline, signs[task]) for task in tasks])


def probability(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def outcomes(stage: StageFacts, name: str) -> dict[Any, bool]:
    """By question, whether it was answered right: of `greedy` the run's own problems, else a task's."""
    if name == "greedy":
        return {problem.question: problem.greedy[0].right for problem in stage.answered if problem.greedy}
    return {e.index: e.correct for e in stage.examples if e.task.lower().replace("-", "_") == name}


# --- curves, samples, data ---


def curves(run: RunFacts, most: int) -> list[Block]:
    blocks: list[Block] = []
    for stage in run.stages:
        if found := charts(stage, most):
            blocks.append(Fold(f"{stage.name}: {len(found)} charts", [Charts(found)]))
    return blocks or [Text("No stage has a record yet.")]


def samples(run: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    spoken = [stage for stage in run.stages if stage.samples]
    for prompt in dict.fromkeys(sample.prompt for stage in spoken for sample in stage.samples):
        said = list[Block]()
        for stage in spoken:
            mine = [sample for sample in stage.samples if sample.prompt == prompt]
            for i in np.unique(np.linspace(0, len(mine) - 1, SAID).astype(int)) if mine else ():
                said.append(Code(cut(readable(mine[i].text), MOST_TEXT), f"{stage.name}, step {mine[i].step:,}"))
        blocks.append(Fold(f"Prompt: {prompt or '(nothing)'}", said))
    asked = [stage for stage in run.stages if stage.answered]
    if asked:
        ordered = sorted(asked[-1].answered, key=lambda problem: -problem.share)
        best, worst = ordered[:EXAMPLES], ordered[EXAMPLES:][-EXAMPLES:][::-1]
        for title, problems in (("Solved best", best), ("Solved worst", worst)):
            for problem in problems:
                blocks.append(_problem(title, problem, asked))
    return blocks or [Text("Nothing that the model said is kept.")]


def _problem(title: str, problem: Answered, asked: list[StageFacts]) -> Fold:
    said: list[Block] = [Code(cut(problem.answer, MOST_TEXT), "reference")]
    for stage in asked:
        same = next((p for p in stage.answered if p.question == problem.question), None)
        completion = next(iter([*same.greedy, *same.samples]), None) if same else None
        if same and completion:
            verdict = "right" if completion.right else "wrong"
            ended = "" if completion.finished else ", cut off"
            share = f"; {percent(same.share)} of {len(same.samples)} samples are right" if same.samples else ""
            said.append(Code(cut(readable(completion.text), MOST_TEXT), f"after {of(stage)}: {verdict}{ended}{share}"))
    return Fold(f"{title}: {cut(problem.question, 200)}", said)


def data(run: RunFacts) -> list[Block]:
    rows, lines = [], list[str]()
    names = {
        "documents": "documents kept",
        "tokens": "tokens of them",
        "characters": "characters of them",
        "characters_per_token": "characters a token (compression)",
        "rows": "rows to train on",
        "validation_rows": "rows held out",
        "cropped_share": "share of the tokens in no row",
    }
    ingest, spoken = run.stage("ingest"), run.stage("conversations")
    for name, title in names.items():
        if ingest and isinstance(value := ingest.stats.get(name, ingest.metrics.get(name)), int | float):
            rows.append([title, number(value)])
    if (size := vocabulary(run)) is not None:
        rows.append(["vocabulary of the tokenizer", number(size)])
    for stage in ("mid", "sft"):
        counts = spoken.stats.get(stage) if spoken else None
        if isinstance(counts, dict) and isinstance(counts.get("rows"), int):
            rows.append([f"rows of {stage}", number(counts["rows"])])
    blocks: list[Block] = [Table(["", ""], rows)] if rows else []
    read, reasons = [], list[list[str]]()
    for facts in (ingest, spoken):
        sources = facts.stats.get("read", {}) if facts else {}
        for source, counts in sources.items():
            gone = counts["left_out"]
            duplicates = number(gone.get("duplicates", 0)) if source == "corpus" else ""
            read.append([source, *(number(counts[n]) for n in ("read", "kept")), duplicates])
            reasons += [[source, left_out.REASONS.get(why, why), number(n)] for why, n in gone.items()]
        lines += left_out.lines(sources)
    if read:
        blocks.append(Table(["source", "read", "kept", "duplicates"], read, "What was read"))
    if reasons:
        blocks.append(Table(["source", "reason", "left out"], reasons, "What was left out, and why"))
    if run.config:
        parts = [
            [f"{stage}.{name}", part.source, *(_or(getattr(part, field)) for field in ("rows", "repeats", "weight"))]
            for stage in ("mid", "sft")
            for name, part in getattr(run.config.data, stage).items()
        ]
        begun = run.config.init.source
        blocks.append(Table(["", ""], [["begun from", begun] if begun else ["corpus of base", run.config.data.corpus]]))
        if parts:
            blocks.append(Table(["part", "source", "rows at most", "repeats", "weight"], parts, "Mixture"))
    return blocks or [Text("Nothing is read yet.")]


def _or(value: Any) -> str:
    return "–" if value is None else number(value)


# --- what happened ---


@dataclass(frozen=True)
class Happened:
    """What did not go as it should: when (UTC; empty where nothing says so), in which stage, of what kind."""

    at: str
    stage: str
    kind: str
    text: str

    @property
    def line(self) -> str:
        return f"{self.stage}: {self.text}" if self.stage else self.text


def incidents(run: RunFacts) -> list[Happened]:
    """All that did not go as it should, the oldest first; what has no time comes last."""
    found = []
    for i, attempt in enumerate(run.attempts):
        for name, what in attempt.actions.items():
            if what.startswith("resume"):
                found.append(Happened(attempt.began, name, "resumed", what.removeprefix("resume ")))
        found += [Happened(told.at, told.stage, told.kind, told.text) for told in attempt.incidents]
        if attempt.ended is None and (i + 1 < len(run.attempts) or run.state != "running"):
            text = "this attempt, begun then, ended without a word: killed, or its machine was lost"
            found.append(Happened(attempt.began, "", "killed", text))
        elif attempt.outcome not in (None, "done"):
            kind = "stopped" if attempt.stopped else "failed"
            found.append(Happened(attempt.ended or "", "", kind, attempt.outcome or ""))
    for stage in run.stages:
        found += [Happened(told.at, stage.name, told.kind, told.text) for told in stage.incidents]
        if stage.error and not any(stage.error in one.text for one in found):  # where its attempt has not told it
            found.append(Happened("", stage.name, stage.state, stage.error))
        found += _of_record(stage)
    found += [Happened("", "", "unread", line) for line in run.unread]
    return sorted(dict.fromkeys(found), key=lambda one: (not one.at, one.at))


def _of_record(stage: StageFacts) -> list[Happened]:
    """What a stage's record says of its steps, with how long it had trained by then."""
    lost = [(name, f"{name} was not finite", steps) for name, steps in stage.lost_values.items()]
    if "skipped" in stage.columns:
        steps = stage.columns["skipped"][0][stage.columns["skipped"][1] > 0].astype(int).tolist()
        lost.insert(0, ("skipped steps", "skipped, as the gradient was not finite", steps))
    found = []
    for kind, what, steps in lost:
        if steps:
            hours = np.interp(steps[0], stage.steps, stage.hours) if len(stage.steps) else math.nan
            after = f", the first after {duration(3600 * hours)} of steps" if math.isfinite(hours) else ""
            kind = kind if kind == "skipped steps" else "not finite"
            found.append(Happened("", stage.name, kind, f"{len(steps):,} step(s): {what}: {listed(steps)}{after}"))
    return found


def counted(found: list[Happened]) -> str:
    """How many there are of each kind."""
    kinds = [one.kind for one in found]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def happened(found: list[Happened]) -> Block:
    rows = [[one.at.replace("T", " ").removesuffix("+00:00"), one.stage, one.kind, one.text] for one in found]
    return Table(["time (UTC)", "stage", "what", ""], rows) if rows else Text("None on record.", "good")


def listed(steps: list[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps[:10]) + (", ..." if len(steps) > 10 else "")


# --- settings, and doing it again ---


def flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{where}{key}.") if isinstance(value, dict) and value else {where + key: value}
    return found


def settings_of(config: Config) -> dict[str, Any]:
    """What a person may set, by dotted name; a user's environment by its file."""
    tree = config.model_dump(mode="json")
    if config.rl.environment is not None:
        tree["rl"]["environment"] = config.rl.environment.path
    sections = {"data": config.data, "init": config.init, "model": config.model}
    fields = [(f"{name}.{key}", f) for name, c in sections.items() for key, f in type(c).model_fields.items()]
    hidden = {key for key, field in fields if field.json_schema_extra == FOUND}
    hidden |= {"preset", "name", "storage"}
    settled = flat(tree)
    return {k: v for k, v in settled.items() if k not in hidden and not any(k.startswith(f"{h}.") for h in hidden)}


def settings(run: RunFacts) -> list[Block]:
    if run.config is None:
        return [Text("The configuration of this run cannot be read.", "bad")]
    mine, defaults, preset = settings_of(run.config), defaults_of(run.config), preset_of(run.config)
    rows = [
        [key, shown(value), shown(defaults.get(key)), origin(key, value, run.config, preset)]
        for key, value in mine.items()
        if value != defaults.get(key)
    ]
    if not rows:
        return [Text("None: everything is as this depth sets it.")]
    depth, begun = run.config.model.depth, run.config.init.source
    title = f"Beside what {f'depth {depth}' if begun is None else '--init'} sets by itself"
    return [Table(["setting", "here", "default", "set by"], rows[:MOST_SETTINGS], title)]


def origin(key: str, value: Any, config: Config, preset: dict[str, Any] | None) -> str:
    if preset is None and config.preset:
        return f"you, or {config.preset}"
    return f"preset {config.preset}" if preset is not None and preset.get(key) == value else "you"


def shown(value: Any) -> str:
    return "–" if value is None else cut(value if isinstance(value, str) else str(value), 300)


def defaults_of(config: Config) -> dict[str, Any]:
    """What a run of this depth and family, or that begins from this model, would be, with nothing else said."""
    found = settings_of(load_config(None, {"model": {"depth": config.model.depth, "family": config.model.family}}))
    if config.model.found is None:
        return found
    settled = {k: v for k, v in settings_of(config).items() if _settled_by_init(k)}
    length = {"model.sequence_len": min(found["model.sequence_len"], config.model.found.places)}
    return found | settled | length | {f"{s}.{k}": v for s in ("mid", "sft", "rl") for k, v in BEGUN.items()}


def _settled_by_init(key: str) -> bool:
    """Whether `--init` settles a setting, or leaves it without a use."""
    unused = key.startswith(("model.", "base.", "tokenizer.")) and key != "model.sequence_len"
    return unused or key in ("init.source", "data.shards")


def preset_of(config: Config) -> dict[str, Any] | None:
    preset = ours(config).preset
    return settings_of(load_config(preset)) if preset else None


def again(run: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    commands = list(dict.fromkeys(shlex.join(["fathom", "run", *a.arguments]) for a in run.attempts if a.arguments))
    if commands:
        blocks.append(Code("\n".join(commands), "The command line of this run"))
    if run.config:
        blocks.append(Code(command(run.config), "The same settings, written out"))
    versions: dict[str, dict[str, list[str]]] = {}
    for stage in run.stages:
        for package, version in stage.versions.items():
            versions.setdefault(package, {}).setdefault(version, []).append(stage.name)
    rows = [
        [package, version if len(by) == 1 else f"{version} ({', '.join(stages)})"]
        for package, by in versions.items()
        for version, stages in by.items()
    ]
    if rows:
        blocks.append(Table(["package", "version"], rows))
    return blocks or [Text("Neither the command line nor the configuration is on record.")]


def command(config: Config) -> str:
    """A command line that gives this configuration: the preset, and what differs from it."""
    start = preset_of(config)
    words = ["fathom", "run", *(["--preset", config.preset] if start is not None and config.preset else [])]
    before = start if start is not None else defaults_of(config)
    if config.init.source is not None:
        words += ["--init", config.init.source]
    elif start is None:
        words += ["--depth", str(config.model.depth), "--family", config.model.family]
    words += ["--name", config.name]
    mine = settings_of(config)
    special = {"with_rl", "workers", "model.depth", "model.family"}
    if config.init.source is not None:
        special |= {key for key in mine if _settled_by_init(key)}
    if mine["with_rl"] != before["with_rl"]:
        words.append("--with-rl" if config.with_rl else "--no-with-rl")
    if mine["workers"] != before["workers"]:
        words += ["--workers", ":".join(str(n) for n in dict.fromkeys(config.workers))]
    if start is not None and mine["model.depth"] != before["model.depth"]:
        words += ["--depth", str(config.model.depth)]
    for key, value in mine.items():
        if value != before.get(key) and value is not None and value != {} and key not in special:
            text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
            words += ["--set", f"{key}={text}"]
    parts = {key.rpartition(".")[0] for key in mine if key.startswith(("data.mid.", "data.sft."))}
    for key in before:
        part = key.rpartition(".")[0]
        if key.startswith(("data.mid.", "data.sft.")) and part not in parts and f"{part}=none" not in words:
            words += ["--set", f"{part}=none"]
    return shlex.join(words)


# --- figures for people ---


def number(value: float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "–"
    whole = isinstance(value, int) or abs(value) >= 1000
    return f"{value:,.0f}" if whole and abs(value) < 1e15 else f"{value:.4g}"


def compact(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return number(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def money(usd: float) -> str:
    return f"${usd:,.2f}" if usd >= 0.01 or usd == 0 else f"${usd:.2g}"


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} …"
