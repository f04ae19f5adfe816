"""Layer 3: ratio rules that look at a whole sequence before any of its tokens has a gradient. They run two-phase.

Each gives every token of a sequence the sequence's value, and the gradient of that value in the token's own log-prob,
so that the reductions of `reductions.py` weigh them like any token-level rule. The tokens of a sequence are expected to
share one advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erc.surrogate.ratio_rules import (
    MAX_LOG_RATIO,
    RatioInputs,
    RatioRule,
    RatioTerms,
    check_value,
    check_widths,
    clip_sides,
    log_difference,
    nowhere,
    scaled_logprob,
)
from erc.surrogate.validation import check_band


def _log_ratio(inputs: RatioInputs) -> Tensor:
    return log_difference(inputs.logprob, inputs.old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


@dataclass(frozen=True)
class SequenceRule(RatioRule):
    """Base of the rules that need `[B, T]` rows or `cu_seqlens`."""

    needs_sequences: ClassVar[bool] = True
    two_phase_reason: ClassVar[str | None] = "needs all tokens of a sequence before any gradient"


@dataclass(frozen=True)
class GSPO(SequenceRule):
    """`max(-A s, -A clamp(s, 1-eps_low, 1+eps_high))` with the sequence's geometric-mean ratio
    `s = exp(min(lp - sg(lp) + sg(mean_t d), 10))` (arXiv 2507.18071).

    Summed over the tokens of a sequence instead of averaged (reduction "seq-mean-token-sum") it is LUSPO, which
    multiplies GSPO's sequence loss by the sequence's length (arXiv 2602.05261): the preset "luspo".
    """

    eps_low: float = 3e-4
    eps_high: float = 4e-4

    def __post_init__(self) -> None:
        check_band(self, "eps_low", "eps_high")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        mean = inputs.sequences.mean(_log_ratio(inputs).detach(), inputs.mask)
        own = log_difference(inputs.logprob, inputs.logprob.detach())
        s = (own + inputs.sequences.expand(mean)).clamp(max=10.0).exp()
        advantage = inputs.advantage
        low, high = clip_sides(s, advantage, self.eps_low, self.eps_high)
        loss = torch.where(low, -(1 - self.eps_low) * advantage, -s * advantage)
        return RatioTerms(torch.where(high, -(1 + self.eps_high) * advantage, loss), low, high)


@dataclass(frozen=True)
class GMPO(SequenceRule):
    """`-A exp(mean_t u)`, where `u` is the log-ratio clipped on the side that the advantage favours:
    `sgn(A) min(sgn(A) d, sgn(A) clamp(d, -eps_low, eps_high))` (arXiv 2507.20673).

    The geometric mean of a sequence's ratios bends to no single token; a clipped token keeps its value in the mean and
    loses its gradient. The widths are of the log-ratio.
    """

    eps_low: float = 0.4
    eps_high: float = 0.4

    def __post_init__(self) -> None:
        check_widths(self, "eps_low", "eps_high")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage, d = inputs.advantage, _log_ratio(inputs)
        low, high = (advantage < 0) & (d < -self.eps_low), (advantage > 0) & (d > self.eps_high)
        u = torch.where(low, -self.eps_low, torch.where(high, self.eps_high, d))
        mean = inputs.sequences.expand(inputs.sequences.mean(u.detach(), inputs.mask))
        return RatioTerms(-advantage * (mean + (u - u.detach())).exp(), low, high)


@dataclass(frozen=True)
class VESPO(SequenceRule):
    """`-phi A logprob` with the sequence's weight `phi = sg(e^lambda W^k e^(-lambda W))`, `W = exp(sum_t d)`: soft
    where clips are hard, 1 at W = 1 (arXiv 2602.10693, as TRL writes it). (k, lambda) by the sign of A, `pos` for
    A >= 0."""

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        check_widths(self, "k_pos", "k_neg")
        for name in ("lambda_pos", "lambda_neg"):
            value = getattr(self, name)
            check_value(name, value, value > 0, "a number > 0")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage, sequences = inputs.advantage, inputs.sequences
        d = torch.where(inputs.mask == 0, 0.0, _log_ratio(inputs).detach())
        log_weight = sequences.expand(sequences.sum(d)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        k = torch.where(advantage >= 0, torch.full_like(advantage, self.k_pos), self.k_neg)
        rate = torch.where(advantage >= 0, torch.full_like(advantage, self.lambda_pos), self.lambda_neg)
        phi = (rate + k * log_weight - rate * log_weight.exp()).exp()
        loss = scaled_logprob(-phi * advantage, inputs.logprob)
        return RatioTerms(loss, nowhere(loss), nowhere(loss))
