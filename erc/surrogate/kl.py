"""Penalties towards a reference policy."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from erc.constants import IMPORTANCE_WEIGHTED_KL, KLKind
from erc.surrogate.ratio_rules import MAX_LOG_RATIO, importance_ratio, log_difference, widened
from erc.surrogate.validation import is_number, require


def k3(x: Tensor) -> Tensor:
    """`exp(x) - 1 - x >= 0` of `x = logprob_q - logprob_p`: an unbiased estimate of KL(p || q) from a sample of p
    (Schulman 2020). In float64, where small `x` keep their value, and their derivative `(expm1(x) + 1) - 1` too."""
    wide = widened(x)
    return (torch.expm1(wide) - wide).to(x.dtype)


KL_KINDS = ("k1", "k2", "k3", "abs", "k3+", "full")


@dataclass(frozen=True)
class KLPenalty:
    """`coef` times KL(policy || reference): estimated from the sampled token (Schulman 2020, "Approximating KL"), or
    exact.

    `k1 = lp - lp_ref`; `k2 = k1^2 / 2`; `k3 = expm1(x) - x` with `x = clamp(lp_ref - lp, -20, 20)`; `abs = |k1|`;
    `k3+` has the value of k3 and the gradient of k2. `clamp` limits the value of k3 from above (verl: 10).
    `importance_weighted` multiplies the estimate by the importance ratio, gradient through both (TRL's bias
    correction). `full` is the exact divergence over the vocabulary with its gradient: pass
    `ref_kl=erc.entropy_ratio(logits, ref_logits).kl_new_old` to the loss; it has no other option. `over` says which
    log-probs are compared where the loss has a `support`: those over the full vocabulary, or over the kept tokens
    ("support"); `ref_logprob` must be over the same.
    """

    kind: str = "k3"
    coef: float = 0.001
    clamp: float | None = None
    importance_weighted: bool = False
    over: str = "full"

    def __post_init__(self) -> None:
        require(self.kind in KL_KINDS, "kind", f"one of {KL_KINDS}", self.kind)
        require(is_number(self.coef) and self.coef >= 0, "coef", "a number >= 0", self.coef)
        require(self.clamp is None or self.clamp > 0, "clamp", "None or a number > 0", self.clamp)
        require(self.over in ("full", "support"), "over", '"full" or "support"', self.over)
        if self.kind == "full":
            require(self.over == "full", "over", '"full" for kind "full"', self.over)
            require(self.clamp is None, "clamp", 'None for kind "full"', self.clamp)
            require(not self.importance_weighted, "importance_weighted", 'False for kind "full"', True)

    @property
    def kernel_id(self) -> int:
        """The estimator's number in the kernels (`erc.constants.KLKind`); 0 for the exact one, which is added to their
        loss."""
        if self.kind == "full":
            return KLKind.NONE
        return 1 + KL_KINDS.index(self.kind) + (IMPORTANCE_WEIGHTED_KL if self.importance_weighted else 0)

    @classmethod
    def of_kernel(cls, kernel_id: int, clamp: float) -> KLPenalty | None:
        """The estimator that has this number, None for none; its coefficient is not in the number."""
        if kernel_id == KLKind.NONE:
            return None
        kind = KL_KINDS[kernel_id % IMPORTANCE_WEIGHTED_KL - 1]
        return cls(kind, clamp=clamp, importance_weighted=kernel_id > IMPORTANCE_WEIGHTED_KL)

    def estimate(
        self, logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor, logprob_full: Tensor | None = None
    ) -> Tensor:
        """The estimate per token, differentiable in `logprob`; `[N]`.

        `logprob_full` is the log-prob over the full vocabulary where `logprob`, whose ratio to `old_logprob` weighs, is
        over a support.
        """
        compared = logprob if logprob_full is None or self.over == "support" else logprob_full
        k1 = log_difference(compared, ref_logprob)
        if self.kind == "k1":
            value = k1
        elif self.kind == "k2":
            value = k1.square() / 2
        elif self.kind == "abs":
            value = k1.abs()
        else:
            x = (-k1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            value = k3(x).clamp(max=self.clamp or inf)
            if self.kind == "k3+":
                k2 = k1.square() / 2
                value = value.detach() + (k2 - k2.detach())
        if self.importance_weighted:
            value = value * importance_ratio(logprob, old_logprob)
        return value
