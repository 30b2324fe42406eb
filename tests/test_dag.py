"""What a command decides to do with each stage, from what storage holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import fathom, one_clear_message
from test_artifacts import finish

from cluster import manifest as manifests
from cluster.resources import Devices
from pipeline import cli, dag
from pipeline.artifacts import RunStore
from pipeline.config import Config, ConfigError, identity_of, load_config, select, stage_names
from pipeline.dag import UPSTREAM, StageError, may_begin_on_part, plan, reusable, reuse, upstream_digests


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("demo", {"storage": str(tmp_path), "name": "r"})


@pytest.fixture
def store(config: Config) -> RunStore:
    """A run with every stage done; ingest holds a file a folder that others read."""
    store = RunStore(config.storage, config.name)
    for name in stage_names(config):
        digests = upstream_digests(store, config, name)
        assert digests is not None
        finish(store, name, identity_of(name, config), digests)
    return store


def actions(store: RunStore, config: Config, force: tuple[str, ...] = (), **chosen: str) -> dict[str, str]:
    names = stage_names(config)
    selected = select(names, chosen.get("only"), chosen.get("first"), chosen.get("last"), force)
    return {item.state.name: item.action for item in plan(store, config, names, selected, force)}


def changed(config: Config, setting: str) -> Config:
    return load_config("demo", {"storage": config.storage, "name": config.name}, [setting])


def contents(store: RunStore) -> dict[str, bytes]:
    """Every file of the run, save what only informs."""
    root = Path(store.storage.uri)
    informing = ("config.json", "claim.json", ".fathom-run", "traceback.txt", "attempts.json")
    files = [p for p in root.rglob("*") if p.is_file() and p.name not in informing and p.parent != root / "report"]
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


# Before Ray starts; what is given beside --force, and a word of the message.
REFUSED = {
    "no such stage": (["--force", "bass"], "no such stage"),
    "a stage that is not asked for": (["--force", "rl", "--only", "base"], "not among the stages asked for"),
    "another stage has drifted": (["--force", "mid", "--set", "base.matrix_lr=0.5"], "base: base.matrix_lr"),
    "a wrong setting": (["--force", "base", "--set", "base.total_batch_size=1000"], "total_batch_size"),
    "no environment file": (["--force", "rl", "--set", "rl.environment=/nowhere.py"], "/nowhere.py"),
    "no room": (["--force", "base", "--set", "model.width=1048576"], "GB free"),
    "no cluster": (["--force", "base"], "no connection to the Ray cluster"),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_a_refused_force_changes_nothing(
    store: RunStore, config: Config, cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    before, (arguments, said) = contents(store), REFUSED[cause]
    assert cli.main(["run", "--preset", "demo", "--name", "r", "--storage", config.storage, *arguments]) == 1
    assert said in capsys.readouterr().err
    assert contents(store) == before


def test_a_force_of_a_run_that_is_held_changes_nothing(store: RunStore, config: Config) -> None:
    before = contents(store)
    arguments = ["run", "--preset", "demo", "--name", "r", "--storage", config.storage, "--force", "base"]
    with store.claim():
        assert cli.main(arguments) == 1
    assert contents(store) == before


ASKING = [part for stage in ("evaluate_mid", "evaluate_sft", "rl", "evaluate_rl") for part in ("--force", stage)]
# With Ray; where the stage itself begins and fails, too.
FAILING = {
    "too many workers": (["--force", "base", "--workers", "16"], "--workers 16"),
    "an environment that does not work": ([*ASKING, "--set", "rl.environment={own}"], "own.py, line 1"),
    "a corpus that is not there": (["--force", "tokenizer", "--only", "tokenizer", "--corpus", "/nowhere"], "/nowhere"),
}


@pytest.mark.parametrize("cause", FAILING)
def test_a_failing_force_changes_nothing(store: RunStore, config: Config, tmp_path: Path, cause: str) -> None:
    (tmp_path / "own.py").write_text("raise RuntimeError('broken')\n")
    before, (arguments, said) = contents(store), FAILING[cause]
    arguments = [part.format(own=tmp_path / "own.py") for part in arguments]
    result = fathom("run", "--preset", "demo", "--name", "r", "--storage", config.storage, *arguments, seconds=120)
    one_clear_message(result, said)
    assert contents(store) == before


def leave_half_done(store: RunStore, config: Config, stage: str) -> None:
    """What kill -9 leaves: a checkpoint, and progress that says the stage is running."""
    store.remove(stage)
    digests = upstream_digests(store, config, stage)
    assert digests is not None
    finish(store, stage, identity_of(stage, config), digests, manifests.checkpoint_path(5))
    store.stage(stage).write_json("progress.json", {"state": "running", "step": 5, "steps": 9})


def test_what_is_done_is_skipped(store: RunStore, config: Config) -> None:
    assert set(actions(store, config).values()) == {"skip"}


def test_a_forced_stage_runs_and_what_reads_it_is_checked(store: RunStore, config: Config) -> None:
    done = actions(store, config, force=("mid",))
    assert done["base"] == done["evaluate_base"] == "skip"
    assert done["mid"] == "run"
    assert {done[name] for name in ("evaluate_mid", "sft", "evaluate_sft", "rl", "evaluate_rl")} == {"check"}


def test_a_killed_stage_is_resumed_and_what_reads_it_is_checked(store: RunStore, config: Config) -> None:
    leave_half_done(store, config, "mid")
    with store.claim():
        done = actions(store, config)
    assert done["base"] == "skip" and done["mid"] == "resume"
    assert {done[name] for name in ("evaluate_mid", "sft", "evaluate_sft", "rl", "evaluate_rl")} == {"check"}


def test_a_killed_stage_does_not_go_on_under_another_configuration(store: RunStore, config: Config) -> None:
    leave_half_done(store, config, "mid")
    with store.claim(), pytest.raises(StageError, match=r"mid: mid\.matrix_lr: 0\.02 -> 0\.5(.|\n)*--force mid"):
        actions(store, changed(config, "mid.matrix_lr=0.5"))


def test_what_is_made_again_after_what_it_reads_is_kept_until_then(
    store: RunStore, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base is another one now; the attempt to make mid of it fails."""
    store.remove("base")
    finish(store, "base", identity_of("base", config), {}, data=b"other")

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(dag, "execute", fail)
    with store.claim() as claim, pytest.raises(MemoryError):
        dag.run_stage._function("mid", config, Devices("cpu", 2, 0), claim.token)
    assert manifests.read(store.stage("mid")) is None
    assert manifests.read(store.storage.at(".set-aside/mid")) is not None


def test_a_checkpoint_that_says_nothing_of_ingest_is_of_no_part_of_it(store: RunStore) -> None:
    for name in ("ingest", "base"):
        store.remove(name)
    assert may_begin_on_part(store)
    manifests.write(store.stage("base").at("checkpoints", "step_000001"), manifests.Manifest("r", "base", []))
    assert not may_begin_on_part(store)


def test_only_the_settings_of_a_stage_make_it_drift(store: RunStore, config: Config) -> None:
    with pytest.raises(StageError) as error:
        actions(store, changed(config, "rl.lr_scale=0.5"))
    assert "rl: rl.lr_scale: 0.15 -> 0.5" in str(error.value) and "sft" not in str(error.value)
    assert set(actions(store, changed(config, "rl.save_every=1")).values()) == {"skip"}


def test_stages_are_chosen_by_name(store: RunStore, config: Config) -> None:
    for name in ("mid", "sft", "rl"):
        store.remove(name)
    assert {n for n, a in actions(store, config, only="mid").items() if a == "run"} == {"mid"}
    assert {n for n, a in actions(store, config, first="mid", last="sft").items() if a == "run"} == {"mid", "sft"}
    with pytest.raises(StageError, match="sft reads mid, which is not made yet"):
        actions(store, config, only="sft")
    with pytest.raises(ConfigError, match="no such stage"):
        actions(store, config, only="pretrain")
    with pytest.raises(ConfigError, match="nothing is left"):
        actions(store, config, first="sft", last="mid")
    with pytest.raises(ConfigError, match="--only mid contradicts --from base: give --only alone"):
        actions(store, config, only="mid", first="base")
    with pytest.raises(ConfigError, match="--only mid contradicts --from sft: give --only alone"):
        actions(store, config, only="mid", first="sft")
    with pytest.raises(ConfigError, match="--only mid contradicts --from ingest and --until base"):
        actions(store, config, only="mid", first="ingest", last="base")
    with pytest.raises(ConfigError, match="--force rl"):
        actions(store, config, force=("rl",), only="base")


def test_reuse_takes_what_would_be_made_the_same(store: RunStore, config: Config) -> None:
    other = load_config("demo", {"storage": config.storage, "name": "other"}, ["mid.matrix_lr=0.5"])
    mine = RunStore(other.storage, other.name)
    taken = reusable(mine, store, other, stage_names(other))
    assert list(taken) == ["tokenizer", "ingest", "base", "evaluate_base", "conversations"]
    reuse(mine, store, taken)
    for name in taken:
        manifest = manifests.read(mine.stage(name))
        assert manifest is not None
        manifests.verify(mine.stage(name), manifest)
    with pytest.raises(StageError, match="no such run"):
        reusable(mine, RunStore(config.storage, "nobody"), other, stage_names(other))


def table_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a dry run shows of every stage: its state and what would be done."""
    assert cli.main(["run", "--preset", "demo", "--dry-run", *arguments]) == 0
    table, _, _ = capsys.readouterr().out.partition("\n\n")  # below, how long it would take
    shown = [line.split() for line in table.splitlines()]
    return {words[0]: " ".join(words[1:]) for words in shown if words and words[0] in UPSTREAM}


@pytest.mark.parametrize("asked", [(), ("--until", "sft"), ("--force", "mid"), ("--only", "mid"), ("--from", "mid")])
def test_a_dry_run_shows_what_would_be_reused(
    store: RunStore, config: Config, asked: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """And changes nothing; once it is copied, the same command has the same left to do."""
    other = load_config("demo", {"storage": config.storage, "name": "other"}, ["mid.matrix_lr=0.5"])
    mine = RunStore(other.storage, other.name)
    arguments = ["--storage", config.storage, "--name", "other", "--set", "mid.matrix_lr=0.5", *asked]
    shown = table_of([*arguments, "--reuse-from", "r"], capsys)
    assert not Path(mine.storage.uri).exists()
    taken = [name for name, said in shown.items() if said == "fresh reuse from run r"]
    assert taken == list(reusable(mine, store, other, stage_names(other)))
    reuse(mine, store, reusable(mine, store, other, stage_names(other)))
    after = table_of(arguments, capsys)
    assert {name: said for name, said in shown.items() if name not in taken} == {
        name: said for name, said in after.items() if name not in taken
    }
    assert all(after[name].startswith("done ") for name in taken)
    assert "reuse" not in " ".join(table_of([*arguments, "--reuse-from", "r"], capsys).values())
    assert cli.main(["run", *arguments, "--dry-run", "--reuse-from", "nobody"]) == 1


def test_a_forced_stage_is_shown_as_forced(store: RunStore, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    shown = table_of(["--storage", config.storage, "--name", "r", "--force", "mid", "--force", "rl"], capsys)
    assert shown["mid"] == shown["rl"] == "forced run" and shown["base"] == "done skip"
    assert shown["sft"] == "done check"
