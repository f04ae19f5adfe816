"""Hundreds of small policies trained side by side: every tensor has the run as its leading dimension."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import erc


class Policies:
    """R independent networks that map a few discrete features to logits: embeddings, tanh layers, a linear head.

    Args:
        seeds: one per run.
        features: how many values each feature has.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        features: Sequence[int],
        vocabulary: int,
        width: int = 16,
        hidden: Sequence[int] = (32,),
    ) -> None:
        sizes = list(itertools.pairwise([len(features) * width, *hidden, vocabulary]))
        runs = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            table = torch.randn(sum(features), width, generator=generator)
            runs.append([table, *(torch.randn(size, generator=generator) / math.sqrt(size[0]) for size in sizes)])
        self.features = tuple(features)
        self.parameters = [torch.stack(column) for column in zip(*runs, strict=True)]
        self.parameters += [torch.zeros(len(seeds), 1, size) for _, size in sizes]

    @property
    def runs(self) -> int:
        """R."""
        return len(self.parameters[0])

    def copies(self, count: int) -> Policies:
        """Each run `count` times in a row."""
        made = object.__new__(Policies)
        made.features = self.features
        made.parameters = [value.detach().repeat_interleave(count, 0) for value in self.parameters]
        return made

    def logits(self, features: Tensor) -> Tensor:
        """`features` `[R, N, F]` to `[R, N, V]`."""
        table, rest = self.parameters[0], self.parameters[1:]
        layers = len(rest) // 2
        offsets = (
            torch.tensor([0, *self.features[:-1]]).cumsum(0) + table.shape[1] * torch.arange(self.runs)[:, None, None]
        )
        hidden = functional.embedding(features + offsets, table.flatten(0, 1)).flatten(2)
        for index, (weight, bias) in enumerate(zip(rest[:layers], rest[layers:], strict=True)):
            hidden = torch.baddbmm(bias, hidden, weight)
            if index < layers - 1:
                hidden = hidden.tanh()
        return hidden

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of `loss`, the sum of the runs' own losses: each run's gradient is its own."""
        return list(torch.autograd.grad(loss, self.parameters))

    def requires_grad(self, wanted: bool) -> None:
        """Switch gradients of all parameters on or off."""
        for value in self.parameters:
            value.requires_grad_(wanted)


class Optimizer:
    """Adam, or SGD without momentum, with a learning rate and a bound of the gradient norm for each run."""

    def __init__(self, policies: Policies, rates: Tensor, kind: str = "adam", max_norm: float = math.inf) -> None:
        if kind not in ("adam", "sgd"):
            raise ValueError(f'kind must be "adam" or "sgd", got {kind!r}')
        self.policies, self.rates, self.kind, self.max_norm = policies, rates, kind, max_norm
        self.moments = [[torch.zeros_like(value) for value in policies.parameters] for _ in range(2)]
        self.steps = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> Tensor:
        """Update all runs; returns the norms of their gradients, `[R]`."""
        self.steps += 1
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        factor = (self.max_norm / (norms + 1e-12)).clamp(max=1.0)[:, None, None]
        rates = self.rates[:, None, None]
        for value, gradient, first, second in zip(self.policies.parameters, gradients, *self.moments, strict=True):
            gradient = gradient * factor
            if self.kind == "sgd":
                value.sub_(rates * gradient)
                continue
            first.lerp_(gradient, 0.1)
            second.lerp_(gradient.square(), 0.001)
            scale = ((second / (1 - 0.999**self.steps)).sqrt_() + 1e-8) * (1 - 0.9**self.steps)
            value.sub_(rates * first / scale)
        return norms


def policy_update(
    policies: Policies, optimizer: Optimizer, features: Tensor, labels: Tensor, **loss_arguments: Any
) -> tuple[erc.PolicyLoss, Tensor]:
    """One step of all runs by `erc.policy_loss` on `labels` `[R, N]`, each run's loss a mean over its own N tokens.

    Also returns the norms of the gradients, `[R]`.
    """
    policies.requires_grad(True)
    out = erc.policy_loss(policies.logits(features), labels, normalizer=float(labels.shape[1]), **loss_arguments)
    gradients = policies.gradients(out.loss)
    policies.requires_grad(False)
    return out, optimizer.step(gradients)


def draw(logits: Tensor, noise: Tensor) -> Tensor:
    """Sample a token of each row; `noise` is exponential, of a shape that broadcasts."""
    return (logits - noise.log()).argmax(-1)


def exponential(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise for `draw`."""
    return torch.empty(*shape).exponential_(generator=generator).clamp_(min=1e-30)
