"""The RL loop: sync, sample, grade, learn.

No random number is drawn here: prompts and the seeds of samples are functions of the run's seed and the prompts drawn
before, and the checkpoint also holds what was sampled ahead. So whatever dies, the same command goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from corpus.tokenizers import Tokenizer
from models.hf import engine_state
from models.layers import LanguageModel
from stages.config import RLConfig
from stages.context import Stopped
from stages.evaluate import measure
from stages.evaluation.spoken import answered, prompts_of
from stages.rl.algorithm import advantages
from stages.rl.groups import Groups, check_drawn, rewards_of
from stages.rl.learner import divergence, learner_precision, update
from stages.rl.rollout import Completions, RolloutPool
from stages.training.metrics import Reporter, Stopwatch
from stages.training.optimizer import build_optimizer
from stages.training.parallel import World, full_weights, is_sharded, prepare
from stages.training.state import Checkpoints
from tasks.base import Environment, Problem


def reinforce(
    model: LanguageModel,
    begun_with: Callable[[], LanguageModel],
    tokenizer: Tokenizer,
    environment: Environment,
    problems: list[Problem],
    held_out: list[Problem],
    config: RLConfig,
    steps: int,
    seed: int,
    world: World,
    pool: RolloutPool,
    checkpoints: Checkpoints,
    reporter: Reporter,
) -> None:
    """Trains `model` in place for `steps` steps on `problems`, going on from the newest checkpoint.

    Every `eval_every` steps, before the first and after the last it is measured on `held_out`, always after the save of
    the same step; also how far it then is from the model that `begun_with` gives, the one the stage began with, and
    what it says to a few prompts. Where no such model is kept, it is loaded for the while and takes the room that
    gradients have in a step. With `keep_best` the model ends with those of its measured weights after a step that
    solved most. Raises NoSignal, Stopped once `reporter.stop` is set, EnvironmentFault, and RuntimeError where sampler
    and trainer do not have the same weights.
    """
    precision = learner_precision(world)

    def initial() -> LanguageModel:
        reference = begun_with()
        prepare(reference, config, precision, world)
        return reference

    reporter.note(prepare(model, config, precision, world))
    reference = initial() if config.kl_coefficient else None
    optimizer = build_optimizer(model, config, precision, world)
    progress = checkpoints.restore(model, optimizer, lambda states: check_drawn(states, config, tokenizer.vocab_size))

    def apart(prompts: list[list[int]], groups: Completions) -> dict[str, float]:
        other = initial() if reference is None else reference
        return {"kl_sft": divergence(other, prompts, groups, config.device_batch_size, world)}

    prompts = prompts_of(tokenizer, model.spec.sequence_len, chat=True)
    draws = Groups(pool, environment, problems, tokenizer, config, seed, world)
    draws.load(checkpoints.stage_state)
    start = progress.step
    while True:
        step, clock = progress.step, Stopwatch(torch.device("cpu"))  # it is the host that waits
        draws.wait(clock)
        last = step == steps
        asked, elapsed = world.agree(reporter.stop, reporter.seconds)
        stop = not last and bool(asked)
        reporter.look(world, elapsed, pool.usage)
        evaluating = not stop and config.eval_every > 0 and (last or step % config.eval_every == 0)
        if step > start and (last or stop or evaluating or step % config.save_every == 0):
            checkpoints.save(progress, model, optimizer, draws.state())
        clock.mark("save")
        if stop or (last and not evaluating):
            break
        # with overlap they change while actors sample, and those of a sharded model are copies, too large to keep
        lasting = not config.overlap and not is_sharded(model)
        weights, check = engine_state(model.spec, dict(full_weights(model))), (step - start) % config.check_every == 0
        pool.sync(weights, step, check, lasting)
        del weights
        clock.mark("sync")
        if evaluating:
            figures, _ = measure(pool, environment, held_out, tokenizer, config.evaluation, seed, world, last, apart)
            progress.evaluated(1.0 - figures["val_pass_at_1"])
            checkpoints.best_step = progress.best_step
            reporter.log(step, **figures, best_step=progress.best_step)
            reporter.say(step, answered(pool, prompts, tokenizer, world))
        if last:
            break
        if step == 0 and config.require_signal:
            draws.require_signal()
        clock.mark("evaluate")

        if not draws.pending:
            draws.begin(config.prompts_per_step)
        groups, figures = draws.take(clock)
        if config.overlap and step + 1 < steps:
            draws.begin(config.prompts_per_step)  # with the weights that this step begins with
        completions = [c for group in groups for c in group.completions]
        if any(not step - config.overlap <= c.weight_version <= step for c in completions):
            raise RuntimeError(f"step {step}: a rollout was sampled with the weights of another step")
        advantage = advantages(rewards_of(groups, config.samples_per_prompt), config.advantage).flatten()
        sequences = [group.prompt for group in groups for _ in group.completions]
        left = 1.0 - step / steps
        metrics = update(model, optimizer, sequences, completions, advantage, config, left, world, reference)
        if not (config.overlap or metrics.get("logprob_difference", 0.0) <= config.max_logprob_difference):  # or nan
            raise RuntimeError(
                f"step {step}: sampler and trainer differ by {metrics['logprob_difference']:.2g} nats a token, "
                f"more than rl.max_logprob_difference={config.max_logprob_difference}: their weights are not the same"
            )
        clock.mark("train")
        times = {f"{part}_ms": spent for part, spent in clock.spans().items()}
        times["step_ms"] = sum(times[f"{part}_ms"] for part in ("trainer_idle", "sync", "reward", "train"))
        times["sampler_idle_ms"] = max(0.0, times["step_ms"] - figures["rollout_ms"])
        times["completion_tokens_per_second"] = 1e3 * figures["completion_tokens_sum"] / times["step_ms"]
        reporter.log(step, weight_version=step, actors_replaced=pool.replaced, **figures, **metrics, **times)
        progress.step += 1
    checkpoints.wait()
    world.barrier()  # the first rank completes the checkpoint, and the first error of any ends them all
    if stop:
        raise Stopped(f"stopped as asked; everything up to step {progress.step} is saved")
    if config.keep_best and 0 <= progress.best_step != progress.step:
        reporter.log(progress.step, best_step=checkpoints.restore_best(progress, model))
