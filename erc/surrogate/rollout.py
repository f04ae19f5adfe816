"""Corrections for rollouts that another engine sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from erc.surrogate.ratio_rules import MAX_LOG_RATIO, log_difference
from erc.surrogate.validation import is_number, require


@dataclass(frozen=True)
class RolloutCorrection:
    """Weights `exp(lp_old - lp_rollout)` on the policy term, for rollouts that another engine sampled.

    `kind="truncate"` caps the weight at `high` (TIS, cap 2); `kind="mask"` keeps it inside `[low, high]` and drops the
    token's policy term outside (IcePop, [0.5, 5]; the denominator is unchanged). `level="sequence"` uses the product
    over the sequence.
    """

    kind: str = "truncate"
    low: float = 0.5
    high: float = 2.0
    level: str = "token"

    def __post_init__(self) -> None:
        require(self.kind in ("truncate", "mask"), "kind", '"truncate" or "mask"', self.kind)
        require(self.level in ("token", "sequence"), "level", '"token" or "sequence"', self.level)
        require(is_number(self.high) and self.high > 0, "high", "a number > 0", self.high)
        require(is_number(self.low) and 0 <= self.low <= self.high, "low", "a number in [0, high]", self.low)

    def weights(self, old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor, sequences: Any) -> Tensor:
        """The weight of each token's policy term, a constant; `[N]`."""
        log_weight = log_difference(old_logprob, rollout_logprob).detach()
        if self.level == "sequence":
            log_weight = sequences.expand(sequences.sum(torch.where(mask == 0, 0.0, log_weight)))
        weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.kind == "truncate":
            return weight.clamp(max=self.high)
        return torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)
