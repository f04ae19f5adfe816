"""What to optimise, as data: a frozen, printable, comparable description. `erc.surrogate.presets` has the named ones.

    >>> import erc
    >>> erc.objective("erc-dapo").entropy_ratio
    EntropyRatioClip(beta_low=0.05, beta_high=0.05, eps=1e-08, value='kept')
    >>> erc.objective("dapo", kl=erc.KLPenalty("k3", 0.001)).kl.coef
    0.001

Order of composition: ratio rule -> dual clip -> rollout correction -> high-entropy mask and off-policy sequence mask ->
entropy-ratio gate -> plus KL and entropy terms (never gated) -> reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.kl import KLPenalty
from erc.surrogate.ratio_rules import PPOClip, RatioRule
from erc.surrogate.reductions import REDUCTIONS
from erc.surrogate.rollout import RolloutCorrection
from erc.surrogate.token_filters import HighEntropyMask, OffPolicySequenceMask
from erc.surrogate.validation import is_number, require


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
        reduction: how tokens become one number; see `erc.surrogate.reductions`.
        max_length: the constant of "seq-mean-token-sum-norm"; None takes T of `[B, T]` rows.
        rollout_correction: weights for rollouts that another engine sampled, or None.
        high_entropy: restricts the policy term to high-entropy tokens, or None.
        off_policy_mask: drops sequences that the policy has left, or None.
        nll_coef: the loss gains `nll_coef` times the mean of `-logprob` over the tokens of `nll_mask` (the recipes of
            both papers add 0.1 for rollouts with reward 1).
        nll_over: whether that log-prob is over the "full" vocabulary or the "support", where the loss has one.
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
    nll_over: str = "full"
    numbers: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """The objective's numbers in the order of `erc.constants.Param`, after the scaling."""

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
        require(is_number(self.entropy_coef), "entropy_coef", "a finite number", self.entropy_coef)
        require(is_number(self.nll_coef), "nll_coef", "a finite number", self.nll_coef)
        require(self.nll_over in ("full", "support"), "nll_over", '"full" or "support"', self.nll_over)
        require(
            self.entropy_reduction in ("active-mean", "loss"),
            "entropy_reduction",
            '"active-mean" or "loss"',
            self.entropy_reduction,
        )
        require(self.reduction in REDUCTIONS, "reduction", f"one of {REDUCTIONS}", self.reduction)
        require(
            self.max_length is None or (isinstance(self.max_length, int) and self.max_length > 0),
            "max_length",
            "None or a positive int",
            self.max_length,
        )
        object.__setattr__(self, "numbers", self._numbers())

    def _numbers(self) -> tuple[float, ...]:
        gate, kl = self.entropy_ratio or EntropyRatioClip(), self.kl or KLPenalty(coef=0.0)
        return (
            *(self.ratio.kernel_params() + (0.0,) * 4)[:4],
            *(gate.beta_low, gate.beta_high, gate.eps, kl.coef, kl.clamp or inf),
            *(self.ratio.kernel_id or 0, self.kl.kernel_id if self.kl else 0),
            gate.gate_id if self.entropy_ratio else 0,
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
    def filters(self) -> bool:
        """Whether tokens are taken out of the policy term by more than what is known of each."""
        return self.high_entropy is not None or self.off_policy_mask is not None

    @property
    def fused(self) -> bool:
        """Whether one pass over the logits suffices."""
        return self.two_phase_reason is None

    @property
    def needs_sequences(self) -> bool:
        """Whether the rows must be `[B, T]` or packed with `cu_seqlens`."""
        correction = self.rollout_correction
        return (
            self.reduction.startswith("seq-")
            or self.ratio.needs_sequences
            or self.off_policy_mask is not None
            or (correction is not None and correction.needs_sequences)
        )

    @property
    def kl_over_full(self) -> bool:
        """Whether the KL estimate takes log-probs over the full vocabulary where the ratio's are over a support."""
        return self.kl is not None and self.kl.kind != "full" and self.kl.over == "full"

    @property
    def nll_over_full(self) -> bool:
        """Whether the NLL term does."""
        return self.nll_coef != 0 and self.nll_over == "full"

    @property
    def own_normalizers(self) -> tuple[str, ...]:
        """The arguments that replace the count of a term which does not share the loss's reduction. With reduction
        "none" no term has any: each is of its token alone."""
        bonus = self.entropy_coef and self.entropy_reduction == "active-mean"
        terms = {"entropy_normalizer": bonus, "nll_normalizer": self.nll_coef}
        return tuple(name for name, present in terms.items() if present and self.reduction != "none")

    @property
    def needs_batch(self) -> bool:
        """Whether a token's loss depends on statistics of all tokens of the call."""
        quantile = self.high_entropy is not None and self.high_entropy.threshold is None
        return self.ratio.needs_batch or quantile
