"""The setting of the In-Context RLVR experiment: answers of two steps and a result, by authors of two kinds.

A question has sound steps, careless steps and one right result. A verifier sees the result alone; how often it is right
after sound and after careless steps is the setting's *luck*. The warm start imitates documents of one author each, in
which a solved question may stand before the asked one: who was careless in the demonstration is careless again. So the
policy has in-context ability, and soundness is known for every answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import erc
from examples.experiments.policies import Optimizer, Policies, draw, exponential

QUESTIONS, VOCABULARY, LENGTH = 96, 64, 3
FEATURES = (QUESTIONS + 1, VOCABULARY + 1, VOCABULARY + 1, QUESTIONS, VOCABULARY + 1, LENGTH)
HELD_OUT = torch.arange(0, QUESTIONS, 6)
TRAINING = torch.tensor([question for question in range(QUESTIONS) if question % 6])


class Demonstration(NamedTuple):
    """A question and the two steps shown for it; each `[R, N]`."""

    question: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def none(cls, shape: Sequence[int]) -> Demonstration:
        """Nothing is shown."""
        return cls(torch.full(shape, QUESTIONS), *(torch.full(shape, VOCABULARY) for _ in range(2)))

    def where(self, mask: Tensor) -> Demonstration:
        """Shown where `mask` is true."""
        nothing = Demonstration.none(self.question.shape)
        return Demonstration(*(torch.where(mask, ours, none) for ours, none in zip(self, nothing, strict=True)))

    def rows(self, index: Tensor) -> Demonstration:
        """The columns of `index` of every run."""
        return Demonstration(*(value[:, index] for value in self))


class Authors:
    """Questions, their steps, and how authors write.

    Args:
        right_if_sound, right_if_careless: probabilities `[R]` of a right result: the luck of each run's setting.
        single_slips: the harder variant. Careless authors slip in one step, in 60 % of their answers, and the others
            in 10 %; by default careless authors slip in both steps always and the others never.
    """

    def __init__(self, right_if_sound: Tensor, right_if_careless: Tensor, single_slips: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.sound = torch.randint(VOCABULARY, (2, QUESTIONS), generator=generator)
        shift = torch.randint(1, VOCABULARY, (2, QUESTIONS), generator=generator)
        self.careless = (self.sound + shift) % VOCABULARY
        self.result = torch.randint(VOCABULARY, (QUESTIONS,), generator=generator)
        self.right = torch.stack([right_if_careless, right_if_sound], 1)
        self.single_slips = single_slips

    def steps(self, question: Tensor, slips: Tensor) -> Tensor:
        """The two steps `[2, *]`; `slips` `[2, *]` says which of them are careless."""
        return torch.where(slips, self.careless[:, question], self.sound[:, question])

    def slips(self, careful: Tensor, generator: torch.Generator) -> Tensor:
        """Which steps of an answer by such an author are careless, `[2, *]`."""
        if not self.single_slips:
            return (~careful).expand(2, *careful.shape)
        happens = torch.rand(careful.shape, generator=generator) < torch.where(careful, 0.1, 0.6)
        first = torch.rand(careful.shape, generator=generator) < 0.5
        return torch.stack([happens & first, happens & ~first])

    def answers(self, question: Tensor, careful: Tensor, generator: torch.Generator) -> Tensor:
        """Whole answers `[R, N, 3]` of authors `careful` `[R, N]` or not."""
        slips = self.slips(careful, generator)
        chance = self.right.gather(1, (~slips.any(0)).long())
        right = torch.rand(question.shape, generator=generator) < chance
        guess = torch.randint(VOCABULARY, question.shape, generator=generator)
        return torch.stack([*self.steps(question, slips), torch.where(right, self.result[question], guess)], -1)

    def judge(self, question: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the result is right, as the verifier sees, and whether both steps are sound, as it does not; `[R, N]`
        of 0 and 1."""
        right = answer[..., 2] == self.result[question]
        sound = (answer[..., 0] == self.sound[0, question]) & (answer[..., 1] == self.sound[1, question])
        return right.float(), sound.float()

    def demonstrations(self, question: Tensor, careful: Tensor, generator: torch.Generator) -> Demonstration:
        """Such authors' steps for `question`."""
        return Demonstration(question, *self.steps(question, self.slips(careful, generator)))


def features_of(shown: Demonstration, question: Tensor, answer: Tensor) -> Tensor:
    """What a policy sees before each token of the answers, `[R, N * 3, 6]`."""
    before = torch.cat([torch.full_like(answer[..., :1], VOCABULARY), answer[..., :-1]], -1)
    context = [value[..., None].expand_as(answer) for value in (*shown, question)]
    return torch.stack([*context, before, torch.arange(LENGTH).expand_as(answer)], -1).flatten(1, 2)


def logprobs(policies: Policies, shown: Demonstration, question: Tensor, answer: Tensor) -> Tensor:
    """Of each token; `[R, N, 3]`."""
    logits = policies.logits(features_of(shown, question, answer))
    return erc.token_stats(logits, answer.flatten(1)).logprob.view_as(answer)


@torch.no_grad()
def sample(
    policies: Policies, shown: Demonstration, question: Tensor, generator: torch.Generator, runs: int = 1
) -> Tensor:
    """An answer to each question, `[R, N, 3]`; `runs` neighbouring runs share their noise."""
    before, answer = torch.full_like(question, VOCABULARY), []
    for place in range(LENGTH):
        seen = torch.stack([*shown, question, before, torch.full_like(question, place)], -1)
        noise = exponential((len(question) // runs, question.shape[1], VOCABULARY), generator).repeat_interleave(
            runs, 0
        )
        before = draw(policies.logits(seen), noise)
        answer.append(before)
    return torch.stack(answer, -1)


def warm_start(authors: Authors, seeds: Sequence[int], steps: int = 2500, batch: int = 128) -> Policies:
    """A policy per run, from weights of its seed; half of the authors are careful, and 60 % of the questions stand
    behind a demonstration."""
    policies = Policies(seeds, FEATURES, VOCABULARY, hidden=(48, 48))
    optimizer, generator = Optimizer(policies, torch.full((len(seeds),), 1e-2)), torch.Generator().manual_seed(3)
    shape = (len(seeds), batch)
    for step in range(steps):
        optimizer.rates = torch.full((len(seeds),), 1e-2 * (1 - step / steps) + 2e-4)
        question, other = (torch.randint(QUESTIONS, shape, generator=generator) for _ in range(2))
        careful = torch.rand(shape, generator=generator) < 0.5
        shown = authors.demonstrations(other, careful, generator)
        shown = shown.where(torch.rand(shape, generator=generator) < 0.6)
        answer = authors.answers(question, careful, generator)
        policies.requires_grad(True)
        gradients = policies.gradients(-logprobs(policies, shown, question, answer).mean((1, 2)).sum())
        policies.requires_grad(False)
        optimizer.step(gradients)
    return policies


@torch.no_grad()
def evidence_gains(policies: Policies, authors: Authors, question: Tensor, answer: Tensor, experts: Tensor) -> Tensor:
    """`log pi(expert's answer | question and steps shown) - log pi(expert's answer)`: `[R, N, experts]`, sums in nats.

    The experts' answers are sound and right; `experts` are their questions.
    """
    shown = Demonstration(question, answer[..., 0], answer[..., 1])
    gains = []
    for expert in experts.tolist():
        asked = torch.full_like(question, expert)
        no_slips = torch.zeros(2, *asked.shape, dtype=torch.bool)
        sound = torch.stack([*authors.steps(asked, no_slips), authors.result[asked]], -1)
        plain = logprobs(policies, Demonstration.none((len(asked), 1)), asked[:, :1], sound[:, :1]).sum(-1)
        gains.append(logprobs(policies, shown, asked, sound).sum(-1) - plain)
    return torch.stack(gains, -1)
