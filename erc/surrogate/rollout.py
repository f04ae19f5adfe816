"""Corrections for rollouts that another engine sampled."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import Any

import torch
from torch import Tensor

from erc.surrogate.ratio_rules import MAX_LOG_RATIO, binary_kl, log_difference
from erc.surrogate.validation import is_number, require

_DEFAULT_BOUNDS = {
    ("truncate", "token"): (0.0, 2.0),
    ("truncate", "sequence"): (0.0, 2.0),
    ("mask", "token"): (0.5, 5.0),
    ("mask", "sequence"): (0.5, 5.0),
    ("mask", "geometric"): (0.999, 1.002),
    ("binary-kl", "token"): (0.0, 0.1),
}
"""What a kind and a level go with, and the bounds `low` and `high` where the caller leaves them out."""

_LEAST_PROBABILITY = 1e-6


@dataclass(frozen=True)
class RolloutCorrection:
    """Weights `w = exp(lp_old - lp_rollout)` on the policy term, for rollouts that another engine sampled. Where the
    policy term is dropped, the token stays in every denominator.

    `kind="truncate"` clamps w to `[low, high]` (TIS, [0, 2]). `kind="mask"` keeps w where it lies in `[low, high]` and
    drops the policy term elsewhere (IcePop, [0.5, 5]). `level="sequence"` takes the product over the sequence for w.
    `level="geometric"` (kind "mask") keeps or drops whole sequences by the geometric mean of their tokens' w, in
    [0.999, 1.002]; the tokens keep their own w, untruncated (seq-mask-tis of NeMo-RL and OpenRLHF, SkyRL's geometric
    sequence mask).
    `kind="binary-kl"` keeps w where both Kullback-Leibler divergences between old and rollout policy, as distributions
    of (this token, any other), are at most `high` (KPop of Ring-2.6, ringtech.notion.site/kpop; 0.1, and probabilities
    clamped to [1e-6, 1 - 1e-6] as in prime-rl's pull request 3283).
    """

    kind: str = "truncate"
    low: float | None = None
    high: float | None = None
    level: str = "token"

    def __post_init__(self) -> None:
        kinds, levels = (tuple(dict.fromkeys(names)) for names in zip(*_DEFAULT_BOUNDS, strict=True))
        require(self.kind in kinds, "kind", f"one of {kinds}", self.kind)
        require(self.level in levels, "level", f"one of {levels}", self.level)
        possible = [level for kind, level in _DEFAULT_BOUNDS if kind == self.kind]
        require(self.level in possible, "level", f"one of {possible} for kind {self.kind!r}", self.level)
        for name, default in zip(("low", "high"), _DEFAULT_BOUNDS[self.kind, self.level], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        low, high = self.bounds()
        require(is_number(high) and high > 0, "high", "a number > 0", high)
        require(is_number(low) and 0 <= low <= high, "low", "a number in [0, high]", low)

    def bounds(self) -> tuple[float, float]:
        """`low` and `high`, with the defaults in place of None."""
        assert self.low is not None and self.high is not None  # since __post_init__
        return self.low, self.high

    @property
    def needs_sequences(self) -> bool:
        return self.level != "token"

    def weights(self, old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor, sequences: Any) -> Tensor:
        """The weight of each token's policy term, a constant; `[N]`."""
        log_weight, (low, high) = log_difference(old_logprob, rollout_logprob).detach(), self.bounds()
        if self.level == "sequence":
            log_weight = sequences.expand(sequences.sum(torch.where(mask == 0, 0.0, log_weight)))
        weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.kind == "truncate":
            return weight.clamp(low, high)
        measured = weight
        if self.level == "geometric":
            measured = sequences.expand(sequences.mean(log_weight, mask)).exp()
        elif self.kind == "binary-kl":
            a, b = (
                values.detach().clamp(log(_LEAST_PROBABILITY), log1p(-_LEAST_PROBABILITY))
                for values in (old_logprob, rollout_logprob)
            )
            measured = torch.maximum(binary_kl(a, b), binary_kl(b, a))
        return torch.where((measured >= low) & (measured <= high), weight, 0.0)
