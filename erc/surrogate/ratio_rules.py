"""Ratio rules, what a policy gradient does with the sampled token's importance ratio. Data with their formula.

Every rule is a frozen dataclass with a `terms` method in plain PyTorch, the readable definition that the kernels are
tested against. Notation: `r = exp(clamp(logprob - old_logprob, -20, 20))`, `A` the advantage. A tie exactly on a bound
takes the unclipped branch, so every comparison is strict; `A = 0` is never clipped. The derivative outside the clamp
is 0.

A token-level rule also names its kernel (`kernel_id`, `kernel_params`), which runs it in the fused one-pass path.
Rules that need a whole sequence (`sequence_rules`) or the whole batch (`batch_rules`) run two-phase, and so does a rule
of your own: docs/custom_rules.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from erc.surrogate.sequences import Sequences
from erc.surrogate.validation import check_band

MAX_LOG_RATIO = 20.0


class RatioTerms(NamedTuple):
    """Per-token policy loss, and which tokens the rule clipped below and above (None: none); all `[N]`.

    The loss carries its graph, or is a constant whose `derivative` by the token's own log-prob stands beside it: then
    the rest of the loss is one operator, and nothing is differentiated step by step.
    """

    loss: Tensor
    clip_low: Tensor | None
    clip_high: Tensor | None
    derivative: Tensor | None = None


class RatioInputs(NamedTuple):
    """What a rule sees, all `[N]`: `logprob` and `entropy` carry the graph, the others are constants.

    `mask` is the token's weight, 0 where it is not to be read; `sequences` is None for rows without sequence structure;
    `old_divergence` is the caller's, None if not given; `generator` is what random choices draw from.
    """

    logprob: Tensor
    entropy: Tensor
    old_logprob: Tensor
    advantage: Tensor
    mask: Tensor
    sequences: Sequences | None = None
    old_divergence: Tensor | None = None
    generator: torch.Generator | None = None

    def constant(self) -> RatioInputs:
        """Without any graph."""
        return self._replace(logprob=self.logprob.detach(), entropy=self.entropy.detach())


def log_difference(a: Tensor, b: Tensor) -> Tensor:
    """`a - b`, where -inf minus -inf counts as no difference."""
    return torch.where(torch.isneginf(a) & torch.isneginf(b), 0.0, a - b)


def constant_log_ratio(inputs: RatioInputs) -> Tensor:
    """The clamped log-ratio without its graph, in as few steps as possible. For a NaN it is 0: the code that
    composes the rules makes such a token NaN."""
    difference = (inputs.logprob.detach() - inputs.old_logprob).nan_to_num(0.0, torch.inf, -torch.inf)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ratio_and_slope(inputs: RatioInputs) -> tuple[Tensor, Tensor]:
    """The importance ratio and its derivative by the log-prob, both constants."""
    difference = log_difference(inputs.logprob.detach(), inputs.old_logprob)
    ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio, ratio.masked_fill(difference.abs() > MAX_LOG_RATIO, 0.0)


def importance_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """`exp(clamp(logprob - old_logprob, -20, 20))`; differentiable inside the clamp."""
    return log_difference(logprob, old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def squared_distance(difference: Tensor) -> Tensor:
    """The squared difference of two log-probs. An infinite one has no gradient, so that a weight of 0 silences it:
    0 * inf is NaN."""
    infinite = difference.isinf()
    return difference.masked_fill(infinite, 0.0).square().masked_fill(infinite, torch.inf)


def scaled_logprob(coefficient: Tensor, logprob: Tensor) -> Tensor:
    """`coefficient * logprob`, where a zero coefficient silences an infinite log-prob, or the loss that it gives."""
    return torch.where(coefficient == 0, 0.0, coefficient * logprob)


def widened(x: Tensor) -> Tensor:
    """In float64; MPS has none."""
    return x if x.device.type == "mps" else x.double()


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 by way of float64: `torch.expm1` compiled for a CPU is that difference, which rounds small x away."""
    return torch.expm1(widened(x)).to(x.dtype)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic function, whose autograd keeps its relative accuracy in both tails: there 1 - sigmoid(x) cancels."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))


def nowhere(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.bool)


def check_value(name: str, value: Any, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def check_widths(rule: RatioRule, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        check_value(name, value, isinstance(value, (int, float)) and 0 <= value < inf, "a finite number >= 0")


def check_optional_bound(rule: RatioRule, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        check_value(name, value, value is None or 1 < value < inf, "None or a number > 1")


@dataclass(frozen=True)
class RatioRule:
    """Base of all ratio rules."""

    kernel_id: ClassVar[int | None] = None
    """The rule's number in the kernels (csrc/common/params.h), None for a rule that runs two-phase."""

    two_phase_reason: ClassVar[str | None] = "is not in the kernels"
    """Why a rule without `kernel_id` runs two-phase, as the end of a sentence."""

    needs_sequences: ClassVar[bool] = False
    needs_batch: ClassVar[bool] = False
    needs_divergence: ClassVar[bool] = False
    """Whether the caller must pass `old_divergence`."""

    def kernel_params(self) -> tuple[float, ...]:
        """Up to four numbers for the kernel, in the order that params.h gives."""
        return ()

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        raise NotImplementedError


def clip_sides(r: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return (advantage < 0) & (r < 1 - low), (advantage > 0) & (r > 1 + high)


def clipped(inputs: RatioInputs, eps_low: float, eps_high: float, cap: float = inf) -> RatioTerms:
    """PPO's clip; where A < 0 the ratio is at most `cap`, too."""
    advantage = inputs.advantage
    r = importance_ratio(inputs.logprob, inputs.old_logprob)
    low, high = clip_sides(r, advantage, eps_low, eps_high)
    capped = (advantage < 0) & (r > cap)
    loss = torch.where(low, -(1 - eps_low) * advantage, -r * advantage)
    loss = torch.where(high, -(1 + eps_high) * advantage, loss)
    if cap < inf:
        loss = torch.where(capped, -cap * advantage, loss)
    return RatioTerms(loss, low, high | capped)


@dataclass(frozen=True)
class PPOClip(RatioRule):
    """`-min(r A, clamp(r, 1-eps_low, 1+eps_high) A)` (PPO, arXiv 1707.06347; clip-higher of DAPO, arXiv 2503.14476).

    `dual_clip=c` (> 1, arXiv 1912.09729): where A < 0 the loss is at most `-c A`, without gradient beyond.
    `delta` (> 1, two-sided clipping of INTELLECT-2): r in the unclipped branch is at most delta, without gradient
    beyond.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    kernel_id: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        check_band(self, "eps_low", "eps_high")
        check_optional_bound(self, "dual_clip", "delta")
        check_value("delta", self.delta, self.delta is None or self.delta > 1 + self.eps_high, "above 1 + eps_high")

    def kernel_params(self) -> tuple[float, ...]:
        return self.eps_low, self.eps_high, self.dual_clip or inf, self.delta or inf

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        return clipped(inputs, self.eps_low, self.eps_high, min(self.dual_clip or inf, self.delta or inf))


@dataclass(frozen=True)
class GPPO(RatioRule):
    """The value of `PPOClip`, but a clipped token keeps the gradient of the bound: d loss / d logprob = `-(1-eps_low)
    A` below, `-(1+eps_high) A` above (Klear-Reasoner, arXiv 2508.07629 eq. 11-12). `dual_clip` as in `PPOClip`."""

    eps_low: float = 0.2
    eps_high: float = 0.28
    dual_clip: float | None = None
    kernel_id: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        check_band(self, "eps_low", "eps_high")
        check_optional_bound(self, "dual_clip")

    def kernel_params(self) -> tuple[float, ...]:
        return self.eps_low, self.eps_high, self.dual_clip or inf

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        return _gradient_preserving(inputs, self.eps_low, self.eps_high, 1.0, 1.0, self.dual_clip or inf)


@dataclass(frozen=True)
class CEGPPO(RatioRule):
    """GPPO whose clipped gradients are scaled: `-beta1 (1-eps_low) r/sg(r) A` below, `-beta2 (1+eps_high) r/sg(r) A`
    above, else `-r A` (arXiv 2509.20712 eq. 8; (0.5, 1) is the general pick, (0.75, 1) the one for 7B)."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    beta1: float = 0.5
    beta2: float = 1.0
    kernel_id: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        check_band(self, "eps_low", "eps_high")
        check_widths(self, "beta1", "beta2")

    def kernel_params(self) -> tuple[float, ...]:
        return self.eps_low, self.eps_high, self.beta1, self.beta2

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        return _gradient_preserving(inputs, self.eps_low, self.eps_high, self.beta1, self.beta2, inf)


def _gradient_preserving(
    inputs: RatioInputs, eps_low: float, eps_high: float, beta_low: float, beta_high: float, dual_clip: float
) -> RatioTerms:
    advantage = inputs.advantage
    r = importance_ratio(inputs.logprob, inputs.old_logprob)
    low, high = clip_sides(r, advantage, eps_low, eps_high)
    one = r / r.detach()  # value 1, the gradient of the log-prob
    loss = torch.where(low, -beta_low * (1 - eps_low) * one * advantage, -r * advantage)
    loss = torch.where(high, -beta_high * (1 + eps_high) * one * advantage, loss)
    capped = (advantage < 0) & (r > dual_clip)
    if dual_clip < inf:
        loss = torch.where(capped, -dual_clip * advantage, loss)
    return RatioTerms(loss, low, high | capped)


@dataclass(frozen=True)
class CISPO(RatioRule):
    """`-sg(clamp(r, ratio_min, ratio_max)) A logprob`: the weight is clipped, the gradient never dropped
    (MiniMax-M1, arXiv 2506.13585). Absolute bounds: (None, 5.0) is TRL's form, (1-lo, 1+hi) verl's."""

    ratio_min: float | None = None
    ratio_max: float = 5.0
    kernel_id: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        check_widths(self, "ratio_max")
        if self.ratio_max < 1:
            low = 0.0 if self.ratio_min is None else self.ratio_min
            advice = f"for widths {low:g} and {self.ratio_max:g} write CISPO({1 - low:g}, {1 + self.ratio_max:g})"
            raise ValueError(f"ratio_max must be a bound on the ratio >= 1, got {self.ratio_max!r}; {advice}")
        low_is_sane = self.ratio_min is None or 0 <= self.ratio_min <= 1
        check_value("ratio_min", self.ratio_min, low_is_sane, "None or a bound on the ratio in [0, 1]")

    def kernel_params(self) -> tuple[float, ...]:
        return self.ratio_min or 0.0, self.ratio_max

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage = inputs.advantage
        r = importance_ratio(inputs.logprob, inputs.old_logprob).detach()
        low, high = self.ratio_min or 0.0, self.ratio_max
        loss = scaled_logprob(-r.clamp(low, high) * advantage, inputs.logprob)
        return RatioTerms(loss, (advantage != 0) & (r < low), (advantage != 0) & (r > high))


@dataclass(frozen=True)
class SAPO(RatioRule):
    """`-A (4/tau) sigmoid(tau (r-1))` with tau by the sign of A: a soft gate in place of the clip (arXiv
    2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    kernel_id: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            value = getattr(self, name)
            check_value(name, value, 0 < value < inf, "a finite number > 0")

    def kernel_params(self) -> tuple[float, ...]:
        return self.tau_pos, self.tau_neg

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage = inputs.advantage
        r = importance_ratio(inputs.logprob, inputs.old_logprob)
        tau = torch.where(advantage > 0, torch.full_like(r, self.tau_pos), self.tau_neg)  # in r's dtype, not float32
        loss = -advantage * (4 / tau) * sigmoid(tau * (r - 1))
        return RatioTerms(loss, nowhere(r), nowhere(r))


_DPPO_KERNELS = {"tv": 5, "kl": 6, "full-tv": None, "full-kl": None}


@dataclass(frozen=True)
class DPPO(RatioRule):
    """`-A sg(min(r, ratio_max)) logprob` while the token's probability stays in a divergence ball (arXiv 2602.04879).

    `divergence="tv"`: blocked where A > 0 and p - p_old > high, or A < 0 and p - p_old < -low (0.15).
    `divergence="kl"`: blocked where the KL(old||new) of (token, any other) exceeds the bound (0.05) and the update
    moves further away. A blocked token has value and gradient 0.
    `divergence="full-tv"` and `"full-kl"`: the same bounds on the exact divergence over the whole vocabulary, which the
    caller passes as `old_divergence` (`total_variation` or `kl_old_new` of `erc.entropy_ratio`); blocked where it
    exceeds the bound and the update moves the token's probability further away. These run two-phase.
    """

    divergence: str = "tv"
    low: float | None = None
    high: float | None = None
    ratio_max: float = 20.0
    two_phase_reason: ClassVar[str | None] = "compares the whole vocabulary, which the kernels do not"

    def __post_init__(self) -> None:
        check_value("divergence", self.divergence, self.divergence in _DPPO_KERNELS, f"one of {tuple(_DPPO_KERNELS)}")
        bound = 0.15 if self.divergence.endswith("tv") else 0.05
        for name in ("low", "high"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, bound)
        check_widths(self, "low", "high", "ratio_max")

    @property
    def kernel_id(self) -> int | None:  # type: ignore[override]
        return _DPPO_KERNELS[self.divergence]

    @property
    def needs_divergence(self) -> bool:  # type: ignore[override]
        return self.divergence.startswith("full-")

    def bounds(self) -> tuple[float, float]:
        """`low` and `high`, with the defaults in place of None."""
        assert self.low is not None and self.high is not None  # since __post_init__
        return self.low, self.high

    def kernel_params(self) -> tuple[float, ...]:
        return *self.bounds(), self.ratio_max

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage, logprob, old_logprob = inputs.advantage, inputs.logprob.detach(), inputs.old_logprob
        r, (least, most) = importance_ratio(logprob, old_logprob), self.bounds()
        if self.divergence == "tv":
            moved = logprob.exp() - old_logprob.exp()
            above, below = moved > most, moved < -least
        else:
            distance = inputs.old_divergence if self.needs_divergence else binary_kl(old_logprob, logprob)
            assert distance is not None  # the front desk asked for it
            # The log-probs tell the direction exactly; the difference of two exponentials may round to 0.
            up, down = logprob > old_logprob, logprob < old_logprob
            above, below = up & (distance > most), down & (distance > least)
        high, low = (advantage > 0) & above, (advantage < 0) & below
        coefficient = torch.where(high | low, 0.0, -r.clamp(max=self.ratio_max) * advantage)
        if self.needs_divergence:
            return RatioTerms(scaled_logprob(coefficient, logprob), low, high, coefficient)
        return RatioTerms(scaled_logprob(coefficient, inputs.logprob), low, high)


def binary_kl(old_logprob: Tensor, logprob: Tensor) -> Tensor:
    """KL(old || new) of the two-point distributions (this token, any other)."""
    p_old, rest_old, rest = old_logprob.exp(), -expm1(old_logprob), -expm1(logprob)
    here = torch.where(p_old == 0, 0.0, p_old * log_difference(old_logprob, logprob))
    elsewhere = torch.where(rest_old == 0, 0.0, rest_old * (rest_old.log() - rest.log()))
    return here + elsewhere


@dataclass(frozen=True)
class Reinforce(RatioRule):
    """`-A logprob`: the plain policy gradient (GPG, arXiv 2504.02546)."""

    kernel_id: ClassVar[int | None] = 7

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        loss = scaled_logprob(-inputs.advantage, inputs.logprob)
        return RatioTerms(loss, nowhere(loss), nowhere(loss))


@dataclass(frozen=True)
class DRO(RatioRule):
    """`-(A logprob - beta/2 (logprob - old_logprob)^2)`: direct reward optimisation with a quadratic penalty (verl).

    With beta = 0.1 it is Kimi k1.5's policy mirror descent token by token, beta its tau (arXiv 2501.12599 eq. 3, ROLL).
    """

    beta: float = 1.0
    kernel_id: ClassVar[int | None] = 8

    def __post_init__(self) -> None:
        check_widths(self, "beta")

    def kernel_params(self) -> tuple[float, ...]:
        return (self.beta,)

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        difference = log_difference(inputs.logprob, inputs.old_logprob)
        loss = scaled_logprob(-inputs.advantage, inputs.logprob)
        if self.beta:
            loss = loss + self.beta / 2 * squared_distance(difference)
        return RatioTerms(loss, nowhere(loss), nowhere(loss))


@dataclass(frozen=True)
class NoClip(RatioRule):
    """`-r A`: importance sampling without any trust region."""

    kernel_id: ClassVar[int | None] = 9

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        r = importance_ratio(inputs.logprob, inputs.old_logprob)
        return RatioTerms(-r * inputs.advantage, nowhere(r), nowhere(r))


@dataclass(frozen=True)
class IPO(RatioRule):
    """`-r A` while `|p - p_old| <= eps`, for either sign of A, plus `tau (logprob - old_logprob)^2` on every token:
    prime-rl's loss (its pull requests 2798 and 3418; since 3586 the defaults there are 0.3 and 0).

    `old_logprob` is the log-prob that the rollout engine reports, as there. A blocked token keeps the quadratic term;
    the entropy-ratio gate drops both.
    """

    eps: float = 0.1
    tau: float = 1e-3
    kernel_id: ClassVar[int | None] = 10

    def __post_init__(self) -> None:
        check_widths(self, "eps", "tau")

    def kernel_params(self) -> tuple[float, ...]:
        return self.eps, self.tau

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage, logprob, old_logprob = inputs.advantage, inputs.logprob, inputs.old_logprob
        moved = logprob.detach().exp() - old_logprob.exp()
        high, low = (advantage != 0) & (moved > self.eps), (advantage != 0) & (moved < -self.eps)
        loss = torch.where(high | low, 0.0, -importance_ratio(logprob, old_logprob) * advantage)
        if self.tau > 0:
            loss = loss + self.tau * squared_distance(log_difference(logprob, old_logprob))
        return RatioTerms(loss, low, high)


@dataclass(frozen=True)
class TOPR(RatioRule):
    """`-A logprob` where A > 0, `-sg(min(r, 1)) A logprob` else: good samples are imitated however far the policy is,
    bad ones push only as long as the policy would sample them (tapered off-policy REINFORCE, arXiv 2503.14286 eq. 8).

    The paper and ROLL part by the sign of the reward; here the advantage's sign decides, which is the same where the
    advantage is the reward or its difference to a baseline between the two.
    """

    kernel_id: ClassVar[int | None] = 11

    def terms(self, inputs: RatioInputs) -> RatioTerms:
        advantage = inputs.advantage
        r = importance_ratio(inputs.logprob, inputs.old_logprob).detach()
        weight = torch.where(advantage > 0, 1.0, r.clamp(max=1.0))
        loss = scaled_logprob(-weight * advantage, inputs.logprob)
        return RatioTerms(loss, nowhere(r), (advantage < 0) & (r > 1))
