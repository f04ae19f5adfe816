"""Tasks with verifiable rewards: problems and verifier of the reasoning-gym package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import reasoning_gym

# What makes each task family fit a model of a few hundred thousand parameters; any other family runs with its own defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
HELD_OUT_SEED = 1_000_000_007
"""Problems of this seed are for evaluation alone."""


@dataclass(frozen=True)
class Problem:
    """A question, the reference answer, and the package's entry that its verifier needs."""

    question: str
    answer: str
    entry: dict[str, Any]


class Task:
    """A task family of reasoning-gym: problems in any number, and the family's own verifier."""

    def __init__(self, name: str, *, short: bool) -> None:
        self.name = name
        self.short = short  # only what follows the instruction's colon: "7 + 12 ="

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` problems that depend on `seed` alone."""
        dataset = reasoning_gym.create_dataset(self.name, size=count, seed=seed, **SETTINGS.get(self.name, {}))
        return [Problem(self._question(entry["question"]), str(entry["answer"]), entry) for entry in dataset]

    def _question(self, text: str) -> str:
        return text.rsplit(":", 1)[-1].strip() if self.short else text

    def reward(self, completion: str, problem: Problem) -> float:
        """The verifier's score of a completion, in [0, 1]: 1 for a right answer and 0 otherwise.

        The package gives a little credit to anything that contains the answer; a reward in RL must not.
        """
        scorer = reasoning_gym.get_score_answer_fn(self.name)
        return float(scorer(extract_answer(completion), problem.entry) >= 1.0)


def extract_answer(completion: str) -> str:
    """The answer in a completion: what `<answer>` tags enclose, or the whole of it."""
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return (tagged[-1] if tagged else completion).strip()
