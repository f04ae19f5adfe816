"""Which tokens take part in the policy term at all. Both filters run two-phase and compose with every rule.

A filtered token's policy term is 0, value and gradient; it stays in every denominator, and keeps its KL and entropy
terms. Filters apply after the ratio rule and the rollout correction, before the entropy-ratio gate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erc.surrogate.ratio_rules import check_value, log_difference
from erc.surrogate.sequences import Sequences


def _quantile(values: Tensor, counted: Tensor, fraction: float) -> Tensor:
    """The quantile of the counted values, 0-d, linearly interpolated; inf without any. `torch.nanquantile` takes no
    empty tensor, and none of more than 2^24 values."""
    if not len(values):
        return values.new_full((), torch.inf)
    ascending = torch.where(counted, values, torch.inf).sort().values
    # To 2^-20: what lies on a value but for the rounding of the product is that value.
    at = ((counted.sum() - 1).clamp(min=0).double() * fraction * 2**20).round() / 2**20
    low = ascending[at.floor().long()]
    share = (at - at.floor()).to(values.dtype)
    return torch.where(share == 0, low, low + share * (ascending[at.ceil().long()] - low))


@dataclass(frozen=True)
class HighEntropyMask:
    """Only the `fraction` of the active tokens with the highest entropy keeps its policy term (0.2: arXiv 2506.01939).

    The quantile is taken over the active tokens of the call, with linear interpolation; a token exactly on it stays.
    `threshold` (nats) replaces it, for trainers that compute one quantile over all ranks and micro-batches.
    """

    fraction: float = 0.2
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_value("fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]")
        check_value("threshold", self.threshold, self.threshold is None or self.threshold >= 0, "None or >= 0 nats")

    def dropped(self, entropy: Tensor, active: Tensor) -> Tensor:
        """bool `[N]`."""
        if self.threshold is not None:
            return entropy < self.threshold
        return entropy < _quantile(entropy, active & ~entropy.isnan(), 1 - self.fraction)


@dataclass(frozen=True)
class OffPolicySequenceMask:
    """Drops the tokens with A < 0 of a sequence whose mean `old_logprob - logprob` exceeds `delta` nats: the policy
    has left what it is punished for (OPSM, DeepSeek-V3.2, arXiv 2512.02556)."""

    delta: float

    def __post_init__(self) -> None:
        check_value("delta", self.delta, self.delta >= 0, "a number >= 0")

    def dropped(
        self, logprob: Tensor, old_logprob: Tensor, advantage: Tensor, mask: Tensor, sequences: Sequences
    ) -> Tensor:
        """bool `[N]`."""
        distance = sequences.mean(log_difference(old_logprob, logprob.detach()), mask)
        return (advantage < 0) & (sequences.expand(distance) > self.delta)
