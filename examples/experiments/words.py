"""The setting of the ERC experiments: short answers of words, some of which must be right and some are free.

A prompt is a pair (a, b). Words 1, 3, 5 and 6 of the answer must be the prompt's own; words 2 and 4 may be any of eight
synonyms. The warm start imitates answers in which a word that must be right is wrong in a quarter of cases, so that a
policy starts with tokens of very different entropy and a reward between 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import erc
from erc.rlvr import group_advantages
from examples.experiments.policies import Optimizer, Policies, draw, exponential

PROMPT_VALUES, SYNONYMS, LENGTH = 8, 8, 6
KEYS = (0, 2, 4, 5)
SLIPS = 0.25
VOCABULARY = 64
FEATURES = (PROMPT_VALUES, PROMPT_VALUES, VOCABULARY + 1, LENGTH)


class Rollouts(NamedTuple):
    """`features` `[R, N, T, 4]`, `tokens` `[R, N, T]`, `rewards` `[R, N]`, `advantages` `[R, N]`."""

    features: Tensor
    tokens: Tensor
    rewards: Tensor
    advantages: Tensor


class WordTask:
    """Which words answer a prompt; the same for all runs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (LENGTH, PROMPT_VALUES, PROMPT_VALUES)
        self.right = torch.randint(VOCABULARY, shape, generator=generator)
        self.synonyms = torch.rand(LENGTH, PROMPT_VALUES, VOCABULARY, generator=generator).argsort(-1)[..., :SYNONYMS]
        self.frequencies = 1 / torch.arange(1.0, SYNONYMS + 1)

    def prompts(self, shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random pairs, each of `shape`."""
        return tuple(torch.randint(PROMPT_VALUES, shape, generator=generator) for _ in range(2))

    def reward(self, a: Tensor, b: Tensor, tokens: Tensor) -> Tensor:
        """1 where every word is right or a synonym, else 0."""
        good = torch.ones_like(a, dtype=torch.bool)
        for place in range(LENGTH):
            word = tokens[..., place]
            if place in KEYS:
                good &= word == self.right[place, a, b]
            else:
                good &= (word[..., None] == self.synonyms[place, a]).any(-1)
        return good.float()

    def examples(self, a: Tensor, b: Tensor, generator: torch.Generator) -> Tensor:
        """Answers as the warm start sees them."""
        tokens = torch.empty(*a.shape, LENGTH, dtype=torch.long)
        for place in range(LENGTH):
            if place in KEYS:
                wrong = torch.rand(a.shape, generator=generator) < (SLIPS if place != KEYS[-1] else 0.0)
                other = torch.randint(VOCABULARY, a.shape, generator=generator)
                tokens[..., place] = torch.where(wrong, other, self.right[place, a, b])
            else:
                chosen = torch.multinomial(self.frequencies, a.numel(), True, generator=generator).view_as(a)
                tokens[..., place] = self.synonyms[place, a].gather(-1, chosen[..., None])[..., 0]
        return tokens


def features_of(a: Tensor, b: Tensor, tokens: Tensor) -> Tensor:
    """What a policy sees before each word: the prompt, the word before, the place; `[R, N, T, 4]`."""
    before = torch.cat([torch.full_like(tokens[..., :1], VOCABULARY), tokens[..., :-1]], -1)
    places = torch.arange(LENGTH).expand_as(tokens)
    return torch.stack([a[..., None].expand_as(tokens), b[..., None].expand_as(tokens), before, places], -1)


def warm_start(task: WordTask, seeds: int, steps: int = 1500, batch: int = 64) -> Policies:
    """`seeds` policies, each from weights and examples of its own."""
    policies = Policies(range(100, 100 + seeds), FEATURES, VOCABULARY, hidden=(64,))
    generator = torch.Generator().manual_seed(7)
    optimizer = Optimizer(policies, torch.full((seeds,), 1e-2))
    for step in range(steps):
        optimizer.rates = torch.full((seeds,), 1e-2 * (1 - step / steps) + 1e-4)
        a, b = task.prompts((seeds, batch), generator)
        tokens = task.examples(a, b, generator)
        policies.requires_grad(True)
        stats = erc.token_stats(policies.logits(features_of(a, b, tokens).flatten(1, 2)), tokens.flatten(1))
        gradients = policies.gradients(-stats.logprob.mean(1).sum())
        policies.requires_grad(False)
        optimizer.step(gradients)
    return policies


def dropped(entropy: Tensor, old_entropy: Tensor, band: float) -> Tensor:
    """Which tokens a gate of this band drops."""
    return erc.EntropyRatioClip(band, band).dropped(entropy, old_entropy)[0]


@torch.no_grad()
def sample(task: WordTask, policies: Policies, a: Tensor, b: Tensor, noise: Tensor, group: int = 1) -> Rollouts:
    """Answers to prompts `[R, N]`, `group` rollouts of a prompt standing together; `noise` `[T, R or 1, N, V]`."""
    runs, count = a.shape
    before, tokens = torch.full((runs, count), VOCABULARY), []
    for place in range(LENGTH):
        seen = torch.stack([a, b, before, torch.full_like(a, place)], -1)
        before = draw(policies.logits(seen), noise[place])
        tokens.append(before)
    tokens = torch.stack(tokens, -1)
    rewards = task.reward(a, b, tokens)
    advantages = group_advantages(rewards.flatten(), group_size=group).view_as(rewards)
    return Rollouts(features_of(a, b, tokens), tokens, rewards, advantages)


@torch.no_grad()
def accuracy(task: WordTask, policies: Policies, count: int = 1024) -> Tensor:
    """The mean reward of sampled answers to the same `count` random prompts; `[R]`."""
    generator = torch.Generator().manual_seed(99)
    a, b = (value.expand(policies.runs, -1) for value in task.prompts((1, count), generator))
    noise = exponential((LENGTH, 1, count, VOCABULARY), generator)
    return sample(task, policies, a, b, noise).rewards.mean(1)
