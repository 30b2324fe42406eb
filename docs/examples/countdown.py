"""Make a target from three numbers, such as 14 from 2, 3 and 4: an environment, complete as it stands."""

import json
import random
import re

from tasks.base import Problem
from tasks.calculator import calculate

COUNTS = {"train": 2_000, "test": 200}


def problems(split: str) -> list[Problem]:
    """What the model is asked, the same every time. `answer` is for `grade` alone: the model does not see it."""
    drawn: list[Problem] = []
    rng = random.Random(split)
    while len(drawn) < COUNTS[split]:
        a, b, c = (rng.randint(2, 20) for _ in range(3))
        solution = f"{a}{rng.choice('+-*')}{b}{rng.choice('+-*')}{c}"
        if ((a + b + c) % 10 == 0) == (split == "test"):  # no problem is in both
            x, y, z = sorted((a, b, c))
            drawn.append(Problem(f"Make {calculate(solution)} from {x}, {y} and {z}.", solution))
    return drawn


def grade(problem: Problem, completion: str) -> dict[str, float]:
    """`reward` is what RL maximises, and from 1 on a problem is solved. Any other figure is only reported."""
    tried = answer(completion) or ""
    fair = numbers(tried) == numbers(problem.answer)
    right = fair and calculate(tried) == calculate(problem.answer)
    return {"reward": 1.0 if right else 0.1 * fair, "fair": float(fair)}


def numbers(expression: str) -> list[str]:
    return sorted(re.findall("[0-9]+", expression))


# --- All that follows may be left out --------------------------------------------------------------------------------


def render(problem: Problem) -> list[dict[str, str]]:
    """The messages of the prompt. Left out, it is the question alone."""
    return [
        {"role": "system", "content": "Use every number once, and + - *. End with #### and the calculation."},
        {"role": "user", "content": problem.question},
    ]


def answer(completion: str) -> str | None:
    """What a majority is counted of (maj@k), None for no answer. Left out, there is no maj@k."""
    _, mark, last = completion.rpartition("####")
    return last.strip() if mark else None


# What the model may call in its answer, by name; None is no result. Left out, there are no tools.
tools = {"python": calculate}


if __name__ == "__main__":  # conversations for SFT, which has to bring some reward before RL can raise it
    for problem in problems("train"):
        reply = {"role": "assistant", "content": f"#### {problem.answer}"}
        print(json.dumps({"messages": [*render(problem), reply]}))
