"""Layer 3: what to optimise, as data. An `Objective` is a frozen, printable, comparable description; presets have
names.

    >>> import erc
    >>> erc.objective("erc-dapo").entropy_ratio
    EntropyRatioClip(beta_low=0.05, beta_high=0.05, eps=1e-08, value='kept')
    >>> erc.objective("dapo", kl=erc.KLPenalty("k3", 0.001)).kl.coef
    0.001

Order of composition: ratio rule -> dual clip -> rollout correction -> high-entropy mask and off-policy sequence mask ->
entropy-ratio gate -> plus KL and entropy terms (never gated) -> reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from erc.batch_rules import ClipCov, KLCov
from erc.ratio_rules import (
    CEGPPO,
    CISPO,
    DPPO,
    DRO,
    GPPO,
    MAX_LOG_RATIO,
    SAPO,
    NoClip,
    PPOClip,
    RatioRule,
    Reinforce,
    importance_ratio,
    log_difference,
)
from erc.reductions import REDUCTIONS, needs_sequences
from erc.sequence_rules import GMPO, GSPO, VESPO
from erc.token_filters import HighEntropyMask, OffPolicySequenceMask


def _require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def entropy_ratio_of(entropy: Tensor, old_entropy: Tensor, eps: float) -> Tensor:
    """`(H + eps) / (H_old + eps)`."""
    return (entropy + eps) / (old_entropy + eps)


@dataclass(frozen=True)
class EntropyRatioClip:
    """The entropy-ratio gate (ERC, arXiv 2512.05591): a soft trust region over the whole distribution.

    With `rho = (H + eps) / (H_old + eps)` a token keeps its policy gradient iff `1 - beta_low < rho < 1 + beta_high`,
    strictly; a NaN rho drops it, both entropies zero keep it. A dropped token stays in the denominator. `value="kept"`
    leaves its loss value as a constant (the authors' code), `value="zero"` reports 0 (the paper's formula). No gradient
    flows through rho. It composes with every ratio rule and never touches the KL and entropy terms.
    """

    beta_low: float = 0.05
    beta_high: float = 0.05
    eps: float = 1e-8
    value: str = "kept"

    def __post_init__(self) -> None:
        _require(_is_number(self.beta_low) and 0 <= self.beta_low <= 1, "beta_low", "a number in [0, 1]", self.beta_low)
        _require(_is_number(self.beta_high) and self.beta_high >= 0, "beta_high", "a number >= 0", self.beta_high)
        _require(_is_number(self.eps) and self.eps > 0, "eps", "a number > 0", self.eps)
        _require(self.value in ("kept", "zero"), "value", '"kept" or "zero"', self.value)

    @property
    def gate_id(self) -> int:
        """The gate's number in the kernels (csrc/common/params.h)."""
        return 1 if self.value == "kept" else 2

    def dropped(self, entropy: Tensor, old_entropy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens lose their gradient, and which of them fell below and above the band; bool `[N]` each."""
        rho = entropy_ratio_of(entropy, old_entropy, self.eps)
        keep = ((rho > 1 - self.beta_low) & (rho < 1 + self.beta_high)) | ((entropy == 0) & (old_entropy == 0))
        return ~keep, ~keep & (rho <= 1 - self.beta_low), ~keep & (rho >= 1 + self.beta_high)


KL_KINDS = ("k1", "k2", "k3", "abs", "k3+", "full")


@dataclass(frozen=True)
class KLPenalty:
    """`coef` times KL(policy || reference): estimated from the sampled token (Schulman 2020, "Approximating KL"), or
    exact.

    `k1 = lp - lp_ref`; `k2 = k1^2 / 2`; `k3 = expm1(x) - x` with `x = clamp(lp_ref - lp, -20, 20)`; `abs = |k1|`;
    `k3+` has the value of k3 and the gradient of k2. `clamp` limits the value of k3 from above (verl: 10).
    `importance_weighted` multiplies the estimate by the importance ratio, gradient through both (TRL's bias
    correction). `full` is the exact divergence over the vocabulary with its gradient: pass
    `ref_kl=erc.entropy_ratio(logits, ref_logits).kl_new_old` to the loss; it has no other option.
    """

    kind: str = "k3"
    coef: float = 0.001
    clamp: float | None = None
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        _require(self.kind in KL_KINDS, "kind", f"one of {KL_KINDS}", self.kind)
        _require(_is_number(self.coef) and self.coef >= 0, "coef", "a number >= 0", self.coef)
        _require(self.clamp is None or self.clamp > 0, "clamp", "None or a number > 0", self.clamp)
        if self.kind == "full":
            _require(self.clamp is None, "clamp", 'None for kind "full"', self.clamp)
            _require(not self.importance_weighted, "importance_weighted", 'False for kind "full"', True)

    @property
    def kernel_id(self) -> int:
        """The estimator's number in the kernels (csrc/common/params.h); 0 for the exact one, which is added to their
        loss."""
        if self.kind == "full":
            return 0
        return 1 + KL_KINDS.index(self.kind) + (16 if self.importance_weighted else 0)

    def estimate(self, logprob: Tensor, old_logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """The estimate per token, differentiable in `logprob`; `[N]`."""
        k1 = log_difference(logprob, ref_logprob)
        if self.kind == "k1":
            value = k1
        elif self.kind == "k2":
            value = k1.square() / 2
        elif self.kind == "abs":
            value = k1.abs()
        else:
            x = (-k1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            value = (torch.expm1(x) - x).clamp(max=self.clamp or inf)
            if self.kind == "k3+":
                k2 = k1.square() / 2
                value = value.detach() + (k2 - k2.detach())
        if self.importance_weighted:
            value = value * importance_ratio(logprob, old_logprob)
        return value


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
        _require(self.kind in ("truncate", "mask"), "kind", '"truncate" or "mask"', self.kind)
        _require(self.level in ("token", "sequence"), "level", '"token" or "sequence"', self.level)
        _require(_is_number(self.high) and self.high > 0, "high", "a number > 0", self.high)
        _require(_is_number(self.low) and 0 <= self.low <= self.high, "low", "a number in [0, high]", self.low)

    def weights(self, old_logprob: Tensor, rollout_logprob: Tensor, mask: Tensor, sequences: Any) -> Tensor:
        """The weight of each token's policy term, a constant; `[N]`."""
        log_weight = log_difference(old_logprob, rollout_logprob).detach()
        if self.level == "sequence":
            log_weight = sequences.expand(sequences.sum(torch.where(mask == 0, 0.0, log_weight)))
        weight = log_weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.kind == "truncate":
            return weight.clamp(max=self.high)
        return torch.where((weight >= self.low) & (weight <= self.high), weight, 0.0)


@dataclass(frozen=True)
class Objective:
    """Everything that `policy_loss` optimises. Validated on construction; see the module for the order of composition.

    Attributes:
        ratio: the rule on the sampled token's importance ratio.
        entropy_ratio: the gate on the distribution's entropy ratio, or None.
        kl: a penalty towards a reference policy, or None.
        entropy_coef: the loss gains `-entropy_coef * H`.
        entropy_reduction: "active-mean" takes the bonus's mean over active tokens (TRL), "loss" the loss's own
            reduction (verl).
        reduction: how tokens become one number; see `erc.reductions.token_weights`.
        max_length: the constant of "seq-mean-token-sum-norm"; None takes T of `[B, T]` rows.
        rollout_correction: weights for rollouts that another engine sampled, or None.
        high_entropy: restricts the policy term to high-entropy tokens, or None.
        off_policy_mask: drops sequences that the policy has left, or None.
        nll_coef: the loss gains `-nll_coef * logprob` on the rows of `nll_mask`, in the loss's own reduction (ERC's
            public recipe adds 0.1 on rows with reward 1).
    """

    ratio: RatioRule = field(default_factory=PPOClip)
    entropy_ratio: EntropyRatioClip | None = None
    kl: KLPenalty | None = None
    entropy_coef: float = 0.0
    entropy_reduction: str = "active-mean"
    reduction: str = "token-mean"
    max_length: int | None = None
    rollout_correction: RolloutCorrection | None = None
    high_entropy: HighEntropyMask | None = None
    off_policy_mask: OffPolicySequenceMask | None = None
    nll_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (
            ("ratio", RatioRule),
            ("entropy_ratio", EntropyRatioClip),
            ("kl", KLPenalty),
            ("rollout_correction", RolloutCorrection),
            ("high_entropy", HighEntropyMask),
            ("off_policy_mask", OffPolicySequenceMask),
        ):
            value = getattr(self, name)
            if not (isinstance(value, kind) or (value is None and name != "ratio")):
                raise TypeError(
                    f"{name} must be a {kind.__name__}{' or None' if name != 'ratio' else ''}, got {value!r}"
                )
        _require(_is_number(self.entropy_coef), "entropy_coef", "a finite number", self.entropy_coef)
        _require(_is_number(self.nll_coef), "nll_coef", "a finite number", self.nll_coef)
        _require(
            self.entropy_reduction in ("active-mean", "loss"),
            "entropy_reduction",
            '"active-mean" or "loss"',
            self.entropy_reduction,
        )
        _require(self.reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", self.reduction)
        _require(
            self.max_length is None or (isinstance(self.max_length, int) and self.max_length > 0),
            "max_length",
            "None or a positive int",
            self.max_length,
        )

    @property
    def two_phase_reason(self) -> str | None:
        """Why the gradient of a token needs more than that token, or None: then one pass over the logits suffices."""
        if self.ratio.kernel_id is None:
            return f"{type(self.ratio).__name__} {self.ratio.two_phase_reason}"
        if self.high_entropy is not None:
            return "HighEntropyMask needs the entropies of the whole batch before any gradient"
        if self.off_policy_mask is not None:
            return "OffPolicySequenceMask needs all tokens of a sequence before any gradient"
        return None

    @property
    def fused(self) -> bool:
        """Whether one pass over the logits suffices."""
        return self.two_phase_reason is None

    @property
    def needs_sequences(self) -> bool:
        """Whether the rows must be `[B, T]` or packed with `cu_seqlens`."""
        correction = self.rollout_correction
        return (
            needs_sequences(self.reduction)
            or self.ratio.needs_sequences
            or self.off_policy_mask is not None
            or (correction is not None and correction.level == "sequence")
        )

    def kernel_params(self) -> tuple[float, ...]:
        """The objective's numbers in the order of `erc.ops.ParamIndex`, after the scaling."""
        rule = (self.ratio.kernel_params() + (0.0,) * 4)[:4]
        gate = self.entropy_ratio or EntropyRatioClip()
        kl = self.kl or KLPenalty(coef=0.0)
        return (*rule, gate.beta_low, gate.beta_high, gate.eps, kl.coef, kl.clamp or inf)


_PRESETS: dict[str, Objective] = {
    "ppo": Objective(PPOClip(0.2, 0.2)),
    "grpo": Objective(PPOClip(0.2, 0.2), reduction="seq-mean-token-mean"),
    "dr-grpo": Objective(PPOClip(0.2, 0.2), reduction="seq-mean-token-sum-norm"),
    "dapo": Objective(PPOClip(0.2, 0.28)),
    "gppo": Objective(GPPO(0.2, 0.28)),
    "ce-gppo": Objective(CEGPPO()),
    "cispo": Objective(CISPO()),
    "gspo": Objective(GSPO(), reduction="seq-mean-token-mean"),
    "luspo": Objective(GSPO(), reduction="seq-mean-token-sum"),
    "gmpo": Objective(GMPO(), reduction="seq-mean-token-mean"),
    "vespo": Objective(VESPO()),
    "sapo": Objective(SAPO(), reduction="seq-mean-token-mean"),
    "dppo-tv": Objective(DPPO("tv")),
    "dppo-kl": Objective(DPPO("kl")),
    "dppo-full-tv": Objective(DPPO("full-tv")),
    "dppo-full-kl": Objective(DPPO("full-kl")),
    "clip-cov": Objective(ClipCov()),
    "kl-cov": Objective(KLCov()),
    "reinforce": Objective(Reinforce()),
    "dro": Objective(DRO()),
    "no-clip": Objective(NoClip()),
}
_PRESETS |= {f"erc-{name}": replace(preset, entropy_ratio=EntropyRatioClip()) for name, preset in _PRESETS.items()}


def objectives() -> list[str]:
    """The names that `objective` knows."""
    return list(_PRESETS)


def objective(name: str, **overrides: Any) -> Objective:
    """The preset `name`, with any field of `Objective` replaced.

    Raises:
        ValueError: for an unknown name or a bad value.
        TypeError: for a field that `Objective` does not have.

    >>> objective("erc-dapo", entropy_ratio=EntropyRatioClip(0.1, 0.1)).entropy_ratio.beta_high
    0.1
    """
    if name not in _PRESETS:
        raise ValueError(f"objective must be one of {objectives()}, got {name!r}")
    return replace(_PRESETS[name], **overrides) if overrides else _PRESETS[name]
