"""The per-token loss in Triton: the counterpart of `csrc/common/token_loss.h`, on 0-d tensors.

Order of composition: ratio rule -> dual clip -> rollout weight -> entropy-ratio gate -> plus KL and entropy terms. A
tie on a bound takes the unclipped branch, so every comparison is strict. `RULE`, `KL` and `GATE` are feature flags;
every number that a user may change from step to step is a run-time argument.
"""

# ruff: noqa: SIM109 (Triton has no `in`)

from __future__ import annotations

import triton
import triton.language as tl

from .row_algebra import expm1

PPO_CLIP = tl.constexpr(0)
GPPO = tl.constexpr(1)
CE_GPPO = tl.constexpr(2)
CISPO = tl.constexpr(3)
SAPO = tl.constexpr(4)
DPPO_TV = tl.constexpr(5)
DPPO_KL = tl.constexpr(6)
REINFORCE = tl.constexpr(7)
DRO = tl.constexpr(8)
NO_CLIP = tl.constexpr(9)

KL_NONE = tl.constexpr(0)
KL_K1 = tl.constexpr(1)
KL_K2 = tl.constexpr(2)
KL_K3 = tl.constexpr(3)
KL_ABS = tl.constexpr(4)
KL_K3_PLUS = tl.constexpr(5)
IMPORTANCE_WEIGHTED = tl.constexpr(16)

GATE_NONE = tl.constexpr(0)
GATE_KEEP_VALUE = tl.constexpr(1)
GATE_ZERO_VALUE = tl.constexpr(2)

CLIP_LOW = tl.constexpr(1)
CLIP_HIGH = tl.constexpr(2)
ERC_LOW = tl.constexpr(4)
ERC_HIGH = tl.constexpr(8)
ERC_DROPPED = tl.constexpr(16)

MAX_LOG_RATIO = tl.constexpr(20.0)


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
def ratio_term(RULE: tl.constexpr, p0, p1, p2, p3, logprob, old_logprob, advantage):
    """(value, derivative by the log-prob, flags) of the policy term."""
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
        return tl.abs(k1), tl.where(k1 > 0.0, 1.0, 0.0) - tl.where(k1 < 0.0, 1.0, 0.0)
    else:
        x = clamp(-k1, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        slope = expm1(x)
        wide = x.to(tl.float64)  # the two cancel where policy and reference all but agree
        value = (expm1(wide) - wide).to(x.dtype)
        capped = tl.where(value > clamp_at, clamp_at, value)
        if KIND == KL_K3_PLUS:
            return capped, k1  # the value of k3, the gradient of k2
        else:
            inside = (value <= clamp_at) & (tl.abs(k1) <= MAX_LOG_RATIO)
            return capped, tl.where(inside, -slope, 0.0)


@triton.jit
def entropy_ratio_flags(beta_low, beta_high, eps, entropy, old_entropy):
    """Which side of the entropy-ratio band a token fell out of; 0 keeps it. A NaN ratio drops it."""
    rho = (entropy + eps) / (old_entropy + eps)
    keep = (rho > 1.0 - beta_low) & (rho < 1.0 + beta_high)
    keep = keep | ((entropy == 0.0) & (old_entropy == 0.0))
    sides = tl.where(rho <= 1.0 - beta_low, ERC_LOW, 0) + tl.where(rho >= 1.0 + beta_high, ERC_HIGH, 0)
    return tl.where(keep, 0, sides + ERC_DROPPED)


@triton.jit
def token_loss(
    RULE: tl.constexpr, KL: tl.constexpr, GATE: tl.constexpr,
    p0, p1, p2, p3, beta_low, beta_high, gate_eps, kl_coef, kl_clamp,
    logprob, entropy, weight, advantage, old_logprob, old_entropy, ref_logprob, policy_weight, logprob_weight,
):  # fmt: skip
    """(unweighted value, derivative of the weighted loss by the log-prob, flags) of a token."""
    value, d_logprob, flags = ratio_term(RULE, p0, p1, p2, p3, logprob, old_logprob, advantage)
    value = scaled_logprob(policy_weight, value)
    d_logprob = scaled_logprob(policy_weight, d_logprob)
    if GATE != GATE_NONE:
        dropped = entropy_ratio_flags(beta_low, beta_high, gate_eps, entropy, old_entropy)
        flags = flags | dropped
        d_logprob = tl.where(dropped != 0, 0.0, d_logprob)
        if GATE == GATE_ZERO_VALUE:
            value = tl.where(dropped != 0, 0.0, value)
    if KL != KL_NONE:
        penalty, d_penalty = kl_term(KL % 16, kl_clamp, logprob, ref_logprob)
        if KL >= IMPORTANCE_WEIGHTED:
            r, d_r = importance_ratio(logprob, old_logprob)
            d_penalty = d_penalty * r + penalty * d_r
            penalty = penalty * r
        value += scaled_logprob(kl_coef, penalty)
        d_logprob += scaled_logprob(kl_coef, d_penalty)
    d_logprob = weight * d_logprob + logprob_weight
    # A row without a distribution stays NaN, also where a clip, a zero advantage or the gate would hide it.
    valid = entropy >= 0.0
    return tl.where(valid, value, entropy), tl.where(valid, d_logprob, entropy), flags
