"""The per-token loss in Triton: the counterpart of `csrc/common/token_loss.h`, on 0-d tensors.

Order of composition: ratio rule -> dual clip -> rollout weight -> entropy-ratio gate -> plus KL and entropy terms. A
tie on a bound takes the unclipped branch, so every comparison is strict. `RULE`, `KL` and `GATE` are feature flags;
every number that a user may change from step to step is a run-time argument.
"""

# ruff: noqa: SIM109 (Triton has no `in`)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from erc.constants import IMPORTANCE_WEIGHTED_KL, Gate, KLKind, RuleId, TokenFlag
from erc.constants import MAX_LOG_RATIO as _MAX_LOG_RATIO

from .elementary import expm1

# Triton takes a number of Python's only as a constexpr.
PPO_CLIP = tl.constexpr(int(RuleId.PPO_CLIP))
GPPO = tl.constexpr(int(RuleId.GPPO))
CE_GPPO = tl.constexpr(int(RuleId.CEGPPO))
CISPO = tl.constexpr(int(RuleId.CISPO))
SAPO = tl.constexpr(int(RuleId.SAPO))
DPPO_TV = tl.constexpr(int(RuleId.DPPO_TV))
DPPO_KL = tl.constexpr(int(RuleId.DPPO_KL))
REINFORCE = tl.constexpr(int(RuleId.REINFORCE))
DRO = tl.constexpr(int(RuleId.DRO))
NO_CLIP = tl.constexpr(int(RuleId.NO_CLIP))
IPO = tl.constexpr(int(RuleId.IPO))
TOPR = tl.constexpr(int(RuleId.TOPR))

KL_NONE = tl.constexpr(int(KLKind.NONE))
KL_K1 = tl.constexpr(int(KLKind.K1))
KL_K2 = tl.constexpr(int(KLKind.K2))
KL_ABS = tl.constexpr(int(KLKind.ABS))
KL_K3_PLUS = tl.constexpr(int(KLKind.K3_PLUS))
IMPORTANCE_WEIGHTED = tl.constexpr(IMPORTANCE_WEIGHTED_KL)

GATE_NONE = tl.constexpr(int(Gate.NONE))
GATE_ZERO_VALUE = tl.constexpr(int(Gate.ZERO_VALUE))

CLIP_LOW = tl.constexpr(int(TokenFlag.CLIP_LOW))
CLIP_HIGH = tl.constexpr(int(TokenFlag.CLIP_HIGH))
ERC_LOW = tl.constexpr(int(TokenFlag.ERC_LOW))
ERC_HIGH = tl.constexpr(int(TokenFlag.ERC_HIGH))
ERC_DROPPED = tl.constexpr(int(TokenFlag.ERC_DROPPED))

MAX_LOG_RATIO = tl.constexpr(_MAX_LOG_RATIO)


class LossParams(NamedTuple):
    """The objective's run-time numbers, in the statistics dtype."""

    p0: tl.tensor
    p1: tl.tensor
    p2: tl.tensor
    p3: tl.tensor
    beta_low: tl.tensor
    beta_high: tl.tensor
    gate_eps: tl.tensor
    kl_coef: tl.tensor
    kl_clamp: tl.tensor


class TokenInputs(NamedTuple):
    """What is known of a token besides its own log-prob and entropy: a row of the token table."""

    weight: tl.tensor
    advantage: tl.tensor
    old_logprob: tl.tensor
    old_entropy: tl.tensor
    ref_logprob: tl.tensor
    policy_weight: tl.tensor
    entropy_weight: tl.tensor
    logprob_weight: tl.tensor


@triton.jit
def log_difference(a, b):
    """a - b where both may be -inf, which counts as no difference."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def scaled_logprob(coefficient, logprob):
    """coefficient * logprob, where a zero coefficient silences an infinite log-prob, or the loss that it gives."""
    return tl.where(coefficient == 0.0, 0.0, coefficient * logprob)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def importance_ratio(logprob, old_logprob):
    """(exp(clamp(logprob - old_logprob)), its derivative by the log-prob)."""
    difference = log_difference(logprob, old_logprob)
    ratio = tl.exp(clamp(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    inside = (difference >= -MAX_LOG_RATIO) & (difference <= MAX_LOG_RATIO)
    return ratio, tl.where(inside, ratio, 0.0)


@triton.jit
def rest_of(logprob):
    """1 - exp(logprob) without cancellation, also at logprob = -inf."""
    return -expm1(tl.maximum(logprob, -80.0))


@triton.jit
def binary_kl(old_logprob, logprob):
    """KL(old || new) of the two-point distributions (this token, any other)."""
    p_old = tl.exp(old_logprob)
    rest_old = rest_of(old_logprob)
    here = tl.where(p_old == 0.0, 0.0, p_old * log_difference(old_logprob, logprob))
    elsewhere = tl.where(rest_old == 0.0, 0.0, rest_old * (tl.log(rest_old) - tl.log(rest_of(logprob))))
    return here + elsewhere


@triton.jit
def _clipped(value, d_logprob, flags, condition, new_value, new_d_logprob, new_flag):
    return (
        tl.where(condition, new_value, value),
        tl.where(condition, new_d_logprob, d_logprob),
        tl.where(condition, new_flag, flags),
    )


@triton.jit
def ratio_term(RULE: tl.constexpr, params, logprob, old_logprob, advantage):
    """(value, derivative by the log-prob, flags) of the policy term."""
    p0, p1, p2, p3 = params.p0, params.p1, params.p2, params.p3
    r, d_r = importance_ratio(logprob, old_logprob)
    value = -r * advantage
    d_logprob = -d_r * advantage
    flags = (r != r).to(tl.int32) * 0
    if RULE == PPO_CLIP or RULE == GPPO or RULE == CE_GPPO:
        low = (advantage < 0.0) & (r < 1.0 - p0)
        high = (advantage > 0.0) & (r > 1.0 + p1)
        bound = tl.where(low, 1.0 - p0, 1.0 + p1)
        if RULE == CE_GPPO:
            bound = tl.where(low, p2, p3) * bound
        else:
            cap = p2
            if RULE == PPO_CLIP:
                cap = tl.minimum(p2, p3)  # dual clip and two-sided clip cut the same branch
            beyond = (advantage < 0.0) & (r > cap)
            value, d_logprob, flags = _clipped(value, d_logprob, flags, beyond, -cap * advantage, 0.0, CLIP_HIGH)
        kept = -bound * advantage
        if RULE == PPO_CLIP:
            d_kept = 0.0
        else:
            d_kept = tl.where(d_r != 0.0, kept, 0.0)
        flag = tl.where(low, CLIP_LOW, CLIP_HIGH)
        value, d_logprob, flags = _clipped(value, d_logprob, flags, low | high, kept, d_kept, flag)
    elif RULE == CISPO:
        d_logprob = -clamp(r, p0, p1) * advantage
        value = scaled_logprob(d_logprob, logprob)
        flag = tl.where(r < p0, CLIP_LOW, tl.where(r > p1, CLIP_HIGH, 0))
        flags = tl.where(advantage != 0.0, flag, 0)
    elif RULE == SAPO:
        tau = tl.where(advantage > 0.0, p0, p1)
        x = tau * (r - 1.0)
        gate = sigmoid(x)
        value = -advantage * 4.0 / tau * gate
        d_logprob = -advantage * 4.0 * gate * sigmoid(-x) * d_r  # 1 - gate cancels
    elif RULE == DPPO_TV or RULE == DPPO_KL:
        up = advantage > 0.0
        down = advantage < 0.0
        if RULE == DPPO_TV:
            difference = tl.exp(logprob) - tl.exp(old_logprob)
            blocked = (up & (difference > p1)) | (down & (difference < -p0))
        else:
            kl = binary_kl(old_logprob, logprob)
            # The log-probs tell the direction exactly; the difference of two exponentials may round to 0.
            blocked = (up & (logprob > old_logprob) & (kl > p1)) | (down & (logprob < old_logprob) & (kl > p0))
        d_logprob = tl.where(blocked, 0.0, -tl.where(r > p2, p2, r) * advantage)
        value = scaled_logprob(d_logprob, logprob)
        flags = tl.where(blocked, tl.where(up, CLIP_HIGH, CLIP_LOW), 0)
    elif RULE == REINFORCE:
        d_logprob = -advantage
        value = scaled_logprob(d_logprob, logprob)
    elif RULE == DRO:
        difference = log_difference(logprob, old_logprob)
        value = scaled_logprob(-advantage, logprob) + scaled_logprob(p0 / 2.0, difference * difference)
        d_logprob = scaled_logprob(p0, difference) - advantage
    elif RULE == IPO:
        moved = tl.exp(logprob) - tl.exp(old_logprob)
        flags = tl.where(moved > p0, CLIP_HIGH, tl.where(moved < -p0, CLIP_LOW, 0))
        flags = tl.where(advantage != 0.0, flags, 0)
        difference = tl.where(p1 > 0.0, log_difference(logprob, old_logprob), 0.0)
        value = tl.where(flags != 0, 0.0, value) + p1 * difference * difference
        d_logprob = tl.where(flags != 0, 0.0, d_logprob) + 2.0 * p1 * difference
    elif RULE == TOPR:
        tapered = (advantage < 0.0) & (r > 1.0)
        d_logprob = tl.where((advantage > 0.0) | tapered, -advantage, -r * advantage)
        value = scaled_logprob(d_logprob, logprob)
        flags = tl.where(tapered, CLIP_HIGH, 0)
    else:
        tl.static_assert(RULE == NO_CLIP)
    return value, d_logprob, flags


@triton.jit
def kl_term(KIND: tl.constexpr, clamp_at, logprob, ref_logprob):
    """(value, derivative) of an estimator of KL(policy || reference) from the sampled token (Schulman 2020)."""
    k1 = log_difference(logprob, ref_logprob)
    if KIND == KL_K1:
        return k1, k1 * 0.0 + 1.0
    elif KIND == KL_K2:
        return k1 * k1 / 2.0, k1
    elif KIND == KL_ABS:
        sign = tl.where(k1 > 0.0, 1.0, 0.0) - tl.where(k1 < 0.0, 1.0, 0.0)
        return tl.abs(k1), sign.to(k1.dtype)
    else:
        x = clamp(-k1, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        slope = expm1(x)
        value = slope - x
        if x.dtype != tl.float64:  # the two cancel where policy and reference all but agree
            series = 1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320)))
            series = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * series)))
            value = tl.where(tl.abs(x) < 0.5, series, value)
        capped = tl.where(value > clamp_at, clamp_at, value)
        if KIND == KL_K3_PLUS:
            return capped, k1  # the value of k3, the gradient of k2
        else:
            inside = (value <= clamp_at) & (tl.abs(k1) <= MAX_LOG_RATIO)
            return capped, tl.where(inside, -slope, 0.0)


@triton.jit
def kl_estimate(KL: tl.constexpr, clamp_at, logprob, ref_logprob):
    """(value, derivative) of the objective's KL estimate of a log-prob, without its coefficient and what weighs it."""
    return kl_term((IMPORTANCE_WEIGHTED - 1) & KL, clamp_at, logprob, ref_logprob)


@triton.jit
def kl_penalty(KL: tl.constexpr, clamp_at, logprob, old_logprob, ref_logprob):
    """(value, derivative) of the objective's KL penalty, without its coefficient."""
    penalty, d_penalty = kl_estimate(KL, clamp_at, logprob, ref_logprob)
    if KL >= IMPORTANCE_WEIGHTED:
        r, d_r = importance_ratio(logprob, old_logprob)
        d_penalty = d_penalty * r + penalty * d_r
        penalty = penalty * r
    return penalty, d_penalty


@triton.jit
def entropy_ratio_flags(params, entropy, old_entropy):
    """Which side of the entropy-ratio band a token fell out of; 0 keeps it. A NaN ratio drops it."""
    rho = (entropy + params.gate_eps) / (old_entropy + params.gate_eps)
    low, high = 1.0 - params.beta_low, 1.0 + params.beta_high
    keep = ((rho > low) & (rho < high)) | ((entropy == 0.0) & (old_entropy == 0.0))
    sides = tl.where(rho <= low, ERC_LOW, 0) + tl.where(rho >= high, ERC_HIGH, 0)
    return tl.where(keep, 0, sides + ERC_DROPPED)


@triton.jit
def token_loss_of(KL: tl.constexpr, GATE: tl.constexpr, params, inputs, value, d_logprob, flags, logprob, entropy):
    """(unweighted value, derivative of the weighted loss by the log-prob, flags) of a token with this policy term."""
    value = scaled_logprob(inputs.policy_weight, value)
    d_logprob = scaled_logprob(inputs.policy_weight, d_logprob)
    if GATE != GATE_NONE:
        dropped = entropy_ratio_flags(params, entropy, inputs.old_entropy)
        flags = flags | dropped
        d_logprob = tl.where(dropped != 0, 0.0, d_logprob)
        if GATE == GATE_ZERO_VALUE:
            value = tl.where(dropped != 0, 0.0, value)
    if KL != KL_NONE:
        penalty, d_penalty = kl_penalty(KL, params.kl_clamp, logprob, inputs.old_logprob, inputs.ref_logprob)
        value += scaled_logprob(params.kl_coef, penalty)
        d_logprob += scaled_logprob(params.kl_coef, d_penalty)
    d_logprob = inputs.weight * d_logprob + inputs.logprob_weight
    # A row without a distribution stays NaN, also where a clip, a zero advantage or the gate would hide it.
    valid = entropy >= 0.0
    return tl.where(valid, value, entropy), tl.where(valid, d_logprob, entropy), flags


@triton.jit
def token_loss(RULE: tl.constexpr, KL: tl.constexpr, GATE: tl.constexpr, params, inputs, logprob, entropy):
    """The same with the term of a kernel's rule."""
    value, d_logprob, flags = ratio_term(RULE, params, logprob, inputs.old_logprob, inputs.advantage)
    return token_loss_of(KL, GATE, params, inputs, value, d_logprob, flags, logprob, entropy)
