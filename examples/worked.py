"""Worked solutions of chain sums: "3 + 7 - 2 =" is solved by "10 - 2 = 8", whose every step anyone can check.

A sound author's steps all hold. A careless author forgets a term in one step, "3 - 2"; some of the time the answer "8"
is right all the same, by luck. The verifier sees answers only; `judge` sees the steps.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

from erc.rlvr import Demonstration
from examples.tasks import Problem, Task, extract_answer

INSTRUCTION = " Reply with the steps alone, one term less in each, joined by =; 3 + 7 - 2 becomes 10 - 2 = 8."
SUM = re.compile(r"-?\d+(?: [+-] \d+)*")


def value_of(expression: str) -> int:
    """The value of "10 - 2"."""
    return sum(int(term.replace(" ", "")) for term in re.findall(r"(?:^-?|[+-] )\d+", expression))


def solution(problem: Problem, rng: random.Random | None = None, luck: float = 0.5) -> str:
    """The steps to the answer; with `rng`, those of a careless author, right by luck with probability `luck`."""
    expression = problem.entry["metadata"]["expression"]
    terms = re.findall(r"(?:^-?|[+-] )\d+", expression)
    forgotten = rng.randrange(1, len(terms) - 1) if rng else len(terms)
    lucky = rng is not None and rng.random() < luck
    steps = []
    for used in range(2, len(terms) + 1):
        known = [term for place, term in enumerate(terms[:used]) if place != forgotten]
        if lucky and used == len(terms):
            known = terms
        steps.append(" ".join([str(value_of(" ".join(known))), *terms[used:]]))
    return " = ".join(steps)


class Verdict(NamedTuple):
    """`right`: the final answer is. `sound`: so is every step, and there is one besides the answer."""

    right: bool
    sound: bool


def judge(completion: str, problem: Problem) -> Verdict:
    """Check the answer and each step of a completion by arithmetic."""
    truth = int(problem.answer)
    steps = [step.strip() for step in completion.split("=")]
    right = final_answer(completion) == str(truth)
    valid = len(steps) > 1 and all(SUM.fullmatch(step) and value_of(step) == truth for step in steps)
    return Verdict(right, right and valid)


def final_answer(completion: str) -> str:
    """What follows the last "=" of the completion, or stands in `<answer>` tags."""
    return extract_answer(completion).rsplit("=", 1)[-1].strip()


class WorkedSums(Task):
    """Chain sums answered by worked solutions; the reward looks at the final answer alone."""

    def _question(self, text: str) -> str:
        return super()._question(text) + ("" if self.short else INSTRUCTION)

    def reward(self, completion: str, problem: Problem) -> float:
        """The verifier's verdict on the final answer: 1 or 0."""
        return super().reward(final_answer(completion), problem)


def demonstration(problem: Problem, rng: random.Random | None = None, luck: float = 1.0) -> Demonstration:
    """A problem with a sound solution; with `rng`, with a careless one, right by luck by default."""
    return Demonstration(problem.question, solution(problem, rng, luck), problem.answer)
