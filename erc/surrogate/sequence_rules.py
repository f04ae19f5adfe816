"""Ratio rules that look at a whole sequence before any of its tokens has a gradient. They run two-phase.

Each gives every token of a sequence the sequence's value, and the gradient of that value in the token's own log-prob,
so that the reductions of `reductions.py` weigh them like any token-level rule. The tokens of a sequence are expected to
share one advantage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from erc.surrogate.ratio_rules import (
    MAX_LOG_RATIO,
    RatioInputs,
    RatioRule,
    RatioTerms,
    check_value,
    check_widths,
    clip_sides,
    constant_log_ratio,
    scaled_logprob,
)
from erc.surrogate.sequences import Sequences
from erc.surrogate.validation import check_band


@dataclass(frozen=True)
class SequenceRule(RatioRule):
    """Base of the rules that need `[B, T]` rows or `cu_seqlens`."""

    needs_sequences: ClassVar[bool] = True
    two_phase_reason: ClassVar[str | None] = "needs all tokens of a sequence before any gradient"

    @staticmethod
    def sequences(inputs: RatioInputs) -> Sequences:
        assert inputs.sequences is not None  # the front desk asked for them
        return inputs.sequences


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
        sequences, advantage = self.sequences(inputs), inputs.advantage
        mean = sequences.mean(constant_log_ratio(inputs), inputs.mask)
        s = sequences.expand(mean.clamp(max=10.0).exp())
        low, high = clip_sides(s, advantage, self.eps_low, self.eps_high)
        unclipped = -advantage * s
        loss = torch.maximum(unclipped, -advantage * s.clamp(1 - self.eps_low, 1 + self.eps_high))
        return RatioTerms(loss, low, high, unclipped.masked_fill(low | high, 0.0))


@dataclass(frozen=True)
class GMPO(SequenceRule):
    """`-A exp(mean_t u)`, where `u` is the log-ratio clipped on the side that the advantage favours:
    `sgn(A) min(sgn(A) d, sgn(A) clamp(d, -eps_low, eps_high))` (arXiv 2507.20673).

    A single token hardly moves the geometric mean of a sequence's ratios; a clipped token keeps its value in the mean
    and loses its gradient. The widths are of the log-ratio.
    """

    eps_low: float = 0.4
    eps_high: float = 0.4

    def __post_init__(self) -> None:
        check_widths(self, "eps_low", "eps_high")

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage, d = inputs.advantage, constant_log_ratio(inputs)
        low, high = (advantage < 0) & (d < -self.eps_low), (advantage > 0) & (d > self.eps_high)
        u = d.masked_fill(low, -self.eps_low).masked_fill(high, self.eps_high)
        sequences = self.sequences(inputs)
        mean = sequences.expand(sequences.mean(u, inputs.mask).exp())
        loss = -advantage * mean
        return RatioTerms(loss, low, high, loss.masked_fill(low | high, 0.0))


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
        advantage, sequences = inputs.advantage, self.sequences(inputs)
        d = constant_log_ratio(inputs).masked_fill(inputs.mask == 0, 0.0)
        log_weight = sequences.expand(sequences.sum(d).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
        positive = advantage >= 0
        k = torch.full_like(advantage, self.k_neg).masked_fill(positive, self.k_pos)
        rate = torch.full_like(advantage, self.lambda_neg).masked_fill(positive, self.lambda_pos)
        phi = (rate + k * log_weight - rate * log_weight.exp()).exp()
        coefficient = -phi * advantage
        return RatioTerms(scaled_logprob(coefficient, inputs.logprob.detach()), None, None, coefficient)
