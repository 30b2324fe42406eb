"""Seconds of a step of TRL's GRPOTrainer, for bench.rl; runs by itself in an environment that has `trl`.

    python trl_step.py REQUEST.json

The request holds "model" (a Hugging Face directory), "prompts" (texts), "samples", "new_tokens", "device_batch_size",
"steps" and "threads". Prints one JSON object with the seconds of each step and the length of its completions, generated
by TRL itself.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any


def reward(completions: list[Any], **_: Any) -> list[float]:
    """By chance, so that every group teaches something."""
    return [float(random.random() < 0.5) for _ in completions]


def main(request: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not ends:
                ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(request["threads"])
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            per_device_train_batch_size=request["device_batch_size"],
            gradient_accumulation_steps=len(request["prompts"]) * request["samples"] // request["device_batch_size"],
            num_generations=request["samples"],
            max_completion_length=request["new_tokens"],
            max_steps=request["steps"],
            temperature=1.0,
            beta=0.0,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(request["model"]),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": request["prompts"] * request["steps"]}),
            callbacks=[Clock()],
        )
        trainer.train()
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    seconds = [after - before for before, after in pairwise(ends)]
    print(json.dumps({"seconds": seconds, "lengths": lengths}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
