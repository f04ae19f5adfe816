"""Tasks with verifiable rewards: problems and verifier of the reasoning-gym package."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from typing import Any

import reasoning_gym
import torch
from reasoning_gym.factory import DATASETS

# What makes each task family fit a model of a few hundred thousand parameters; any other family runs with its own
# defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
}
SEED_STRIDE = 1 << 16
"""The problems that a seed has for itself."""


@dataclass(frozen=True)
class Problem:
    """A question, the reference answer, and the package's entry that its verifier needs."""

    question: str
    answer: str
    entry: dict[str, Any]


class Task:
    """A task family of reasoning-gym: problems in any number, and the family's own verifier."""

    def __init__(self, name: str, *, short: bool, settings: Mapping[str, Any] | None = None) -> None:
        check_family(name)
        self.name = name
        self.short = short  # only what follows the instruction's colon: "7 + 12 ="
        self.settings = {**SETTINGS.get(name, {}), **(settings or {})}

    def problems(self, count: int, seed: int, *, held_out: bool = False) -> list[Problem]:
        """`count` problems that depend on `seed` alone; held-out questions and the others never overlap.

        The package draws problem i of seed s from the random state `s + i`, so neighbouring seeds would share all but
        one: hence the stride. Small families repeat questions whatever the seed: hence the split by the question's
        checksum.

        Raises:
            ValueError: if the family has too few questions on that side of the split.
        """
        dataset = reasoning_gym.create_dataset(self.name, size=SEED_STRIDE, seed=seed * SEED_STRIDE, **self.settings)
        entries = (dataset[index] for index in range(SEED_STRIDE))
        wanted = (entry for entry in entries if (zlib.crc32(entry["question"].encode()) % 8 == 0) == held_out)
        chosen = list(islice(wanted, count))
        if len(chosen) < count:
            raise ValueError(f"count must be at most {len(chosen)} for {self.name}, got {count}")
        return [Problem(self._question(entry["question"]), str(entry["answer"]), entry) for entry in chosen]

    def _question(self, text: str) -> str:
        return text.rsplit(":", 1)[-1].strip() if self.short else text

    def reward(self, completion: str, problem: Problem) -> float:
        """The verifier's score of a completion, in [0, 1]: 1 for a right answer and 0 otherwise.

        The package gives a little credit to anything that contains the answer; a reward in RL must not.
        """
        scorer = reasoning_gym.get_score_answer_fn(self.name)
        return float(scorer(extract_answer(completion), problem.entry) >= 1.0)


def check_family(name: str) -> None:
    """Raises ValueError with the nearest names unless reasoning-gym has this task family."""
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3)
        advice = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise ValueError(f"task must be a family of reasoning-gym, got {name!r}; {advice}")


def extract_answer(completion: str) -> str:
    """The answer in a completion: what `<answer>` tags enclose, or the whole of it."""
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return (tagged[-1] if tagged else completion).strip()


def slip(answer: str) -> str:
    """The answer with one digit wrong by one or two, from the global random state; text without digits stays as it
    is."""
    places = [index for index, character in enumerate(answer) if character.isdigit()]
    if not places:
        return answer
    place, offset = torch.randint(len(places), ()).item(), 1 + torch.randint(2, ()).item()
    digit = (int(answer[places[place]]) + offset) % 10
    return answer[: places[place]] + str(digit) + answer[places[place] + 1 :]
