"""Ratio rules that compare a token with the whole batch (arXiv 2505.22617). They run two-phase.

The entropy of a policy falls where the covariance of log-prob and advantage is large: few tokens carry most of it.
Both rules find them by `(A - mean A) (logprob - mean logprob)`, the means over the active tokens of this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erc.surrogate.ratio_rules import (
    RatioInputs,
    RatioRule,
    RatioTerms,
    check_value,
    check_widths,
    clipped,
    log_difference,
    ratio_and_slope,
    widened,
)
from erc.surrogate.validation import check_band


def _covariance(inputs: RatioInputs) -> Tensor:
    """`(A - mean A) (logprob - mean logprob)` of each token, without graph.

    In float64, then rounded to float32: what is equal but for rounding, as for two tokens it always is, compares so.
    """
    logprob = inputs.logprob.detach()
    counted = (inputs.mask != 0) & logprob.isfinite()  # a forbidden token has no covariance
    count = counted.sum().clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(counted, widened(values), 0.0)
        return values - values.sum() / count

    return torch.where(counted, centred(inputs.advantage) * centred(logprob), -torch.inf).float()


def _largest(score: Tensor, candidates: Tensor, active: Tensor, fraction: float) -> Tensor:
    """The candidates with the largest scores, the first among equal ones: a `fraction` of the active tokens, at least
    one. Nothing is read by the host."""
    allowed = (fraction * active.sum()).floor().clamp(min=1)
    order = torch.where(candidates, score, -torch.inf).argsort(descending=True, stable=True)
    return candidates & (order.argsort() < allowed)


@dataclass(frozen=True)
class BatchRule(RatioRule):
    """Base of the rules that read statistics of the batch."""

    needs_batch: ClassVar[bool] = True
    two_phase_reason: ClassVar[str | None] = "needs statistics of the whole batch before any gradient"


@dataclass(frozen=True)
class ClipCov(BatchRule):
    """PPO's clip, and a random `fraction` of the active tokens, among the unclipped ones whose covariance lies inside
    (`low`, `high`), lose value and gradient (Clip-Cov, arXiv 2505.22617).

    The choice is drawn from the `generator` argument of the loss, else from PyTorch's global one; the drawn tokens
    count as clipped.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        check_band(self, "eps_low", "eps_high")
        check_value("fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]")
        check_value("low", self.low, self.low < self.high, "below high")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        loss, clip_low, clip_high, _ = clipped(inputs.constant(), self.eps_low, self.eps_high)
        assert clip_low is not None and clip_high is not None
        covariance, active = _covariance(inputs), inputs.mask != 0
        candidates = active & ~clip_low & ~clip_high & (covariance > self.low) & (covariance < self.high)
        # float32 whatever the dtype of the statistics: a seed then draws the same tokens.
        draw = torch.empty_like(covariance, dtype=torch.float32).uniform_(generator=inputs.generator)
        drawn = _largest(draw, candidates, active, self.fraction)
        positive = inputs.advantage > 0
        low, high = clip_low | (drawn & ~positive), clip_high | (drawn & positive)
        _, slope = ratio_and_slope(inputs)
        derivative = (-slope * inputs.advantage).masked_fill(low | high, 0.0)
        return RatioTerms(loss.masked_fill(drawn, 0.0), low, high, derivative)


@dataclass(frozen=True)
class KLCov(BatchRule):
    """`-r A`, and `+ coef |logprob - old_logprob|` on the `fraction` of the active tokens with the largest covariance
    (KL-Cov, arXiv 2505.22617)."""

    fraction: float = 2e-4
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_widths(self, "coef")
        check_value("fraction", self.fraction, 0 < self.fraction <= 1, "in (0, 1]")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        active = inputs.mask != 0
        penalised = _largest(_covariance(inputs), active, active, self.fraction)
        ratio, slope = ratio_and_slope(inputs)
        difference = log_difference(inputs.logprob.detach(), inputs.old_logprob)
        loss, derivative = -ratio * inputs.advantage, -slope * inputs.advantage
        return RatioTerms(
            torch.where(penalised, loss + self.coef * difference.abs(), loss),
            None,
            None,
            torch.where(penalised, derivative + self.coef * difference.sign(), derivative),
        )
