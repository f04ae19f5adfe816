// The per-token loss: (value, derivative) of every part of an objective, composed in the order that OBJECTIVES fixes:
// ratio rule -> dual clip -> rollout weight -> entropy-ratio gate -> plus KL and entropy terms. The same formulas stand in
// erc/surrogate (PyTorch) and erc/triton_kernels/token_loss.py (Triton); one test holds the three to the same numbers.
#pragma once

#include <cmath>

#include "common/host_device.h"
#include "common/params.h"

namespace erc {

constexpr double kMaxLogRatio = 20;  // d is clamped to +-20; outside, its derivative is 0

// What is known of a token besides its own log-prob and entropy.
template <class Real>
struct TokenInputs {
  Real advantage;
  Real old_logprob, old_entropy, ref_logprob;
  Real policy_weight;  // rollout correction: on the policy term only
  Real weight;         // of the token in the reduction
  Real entropy_weight, logprob_weight;
};

template <class Real>
struct TokenLoss {
  Real value = 0;      // unweighted
  Real d_logprob = 0;  // of the weighted loss
  Real d_entropy = 0;
  int32_t flags = 0;
};

// A term and its derivative by the log-prob.
template <class Real>
struct Term {
  Real value = 0, d_logprob = 0;
  int32_t flags = 0;
};

// a - b where both may be -inf, which counts as no difference.
template <class Real>
ERC_HOST_DEVICE Real log_difference(Real a, Real b) {
  return a == b ? Real(0) : a - b;
}

template <class Real>
ERC_HOST_DEVICE Real clamp(Real x, Real low, Real high) {
  return x < low ? low : (x > high ? high : x);
}

// coefficient * logprob where a zero coefficient silences an infinite log-prob, or the loss that it gives.
template <class Real>
ERC_HOST_DEVICE Real scaled_logprob(Real coefficient, Real logprob) {
  return coefficient == 0 ? Real(0) : coefficient * logprob;
}

template <class Real>
ERC_HOST_DEVICE Real sigmoid(Real x) {
  return 1 / (1 + std::exp(-x));
}

// KL(old || new) of the two-point distributions (this token, any other).
template <class Real>
ERC_HOST_DEVICE Real binary_kl(Real old_logprob, Real logprob) {
  const Real p_old = std::exp(old_logprob);
  const Real rest_old = -std::expm1(old_logprob), rest = -std::expm1(logprob);
  const Real here = p_old == 0 ? Real(0) : p_old * log_difference(old_logprob, logprob);
  const Real elsewhere = rest_old == 0 ? Real(0) : rest_old * (std::log(rest_old) - std::log(rest));
  return here + elsewhere;
}

template <class Real>
struct Ratio {
  Real value;       // exp(clamp(lp - lp_old))
  Real derivative;  // of value by the log-prob

  ERC_HOST_DEVICE Ratio(Real logprob, Real old_logprob) {
    const Real difference = log_difference(logprob, old_logprob);
    const Real limit = Real(kMaxLogRatio);
    value = std::exp(clamp(difference, -limit, limit));
    derivative = difference >= -limit && difference <= limit ? value : Real(0);
  }
};

// Two-sided and dual clip belong to the same question: where is the surrogate cut, and what is its gradient there.
// Ties on a bound keep the unclipped branch, so every comparison is strict.
template <class Real>
ERC_HOST_DEVICE Term<Real> ratio_term(RatioRule rule, const Real (&p)[4], Real logprob, Real old_logprob, Real advantage) {
  const Ratio<Real> ratio(logprob, old_logprob);
  const Real r = ratio.value;
  const bool inside = ratio.derivative != 0;
  Term<Real> term;
  switch (rule) {
    case RatioRule::kPPOClip:
    case RatioRule::kGPPO:
    case RatioRule::kCEGPPO: {
      const bool low = advantage < 0 && r < 1 - p[0], high = advantage > 0 && r > 1 + p[1];
      const Real bound = low ? 1 - p[0] : 1 + p[1];
      term.value = -r * advantage;
      term.d_logprob = -ratio.derivative * advantage;
      if (low || high) {
        term.flags = low ? kClipLow : kClipHigh;
        const Real kept = rule == RatioRule::kCEGPPO ? (low ? p[2] : p[3]) : Real(1);
        term.value = -kept * bound * advantage;
        term.d_logprob = rule == RatioRule::kPPOClip || !inside ? Real(0) : term.value;
      } else if (rule != RatioRule::kCEGPPO && advantage < 0) {
        const Real dual = p[2], delta = rule == RatioRule::kPPOClip ? p[3] : Real(INFINITY);
        const Real cap = dual < delta ? dual : delta;
        if (r > cap) term = {-cap * advantage, 0, kClipHigh};
      }
      break;
    }
    case RatioRule::kCISPO: {
      const Real coefficient = -clamp(r, p[0], p[1]) * advantage;
      term = {scaled_logprob(coefficient, logprob), coefficient, 0};
      if (advantage != 0) term.flags = r < p[0] ? kClipLow : (r > p[1] ? kClipHigh : 0);
      break;
    }
    case RatioRule::kSAPO: {
      const Real tau = advantage > 0 ? p[0] : p[1];
      const Real x = tau * (r - 1), gate = sigmoid(x);
      term = {-advantage * 4 / tau * gate, -advantage * 4 * gate * sigmoid(-x) * ratio.derivative, 0};  // 1 - gate cancels
      break;
    }
    case RatioRule::kDPPOTV:
    case RatioRule::kDPPOKL: {
      const bool up = advantage > 0, down = advantage < 0;
      bool blocked;
      if (rule == RatioRule::kDPPOTV) {
        const Real difference = std::exp(logprob) - std::exp(old_logprob);
        blocked = (up && difference > p[1]) || (down && difference < -p[0]);
      } else {
        const Real kl = binary_kl(old_logprob, logprob);
        // The log-probs tell the direction exactly; the difference of two exponentials may round to 0.
        blocked = (up && logprob > old_logprob && kl > p[1]) || (down && logprob < old_logprob && kl > p[0]);
      }
      const Real coefficient = blocked ? Real(0) : -(r > p[2] ? p[2] : r) * advantage;
      term = {scaled_logprob(coefficient, logprob), coefficient, blocked ? (up ? kClipHigh : kClipLow) : 0};
      break;
    }
    case RatioRule::kReinforce:
      term = {scaled_logprob(-advantage, logprob), -advantage, 0};
      break;
    case RatioRule::kDRO: {
      const Real difference = log_difference(logprob, old_logprob);
      term = {scaled_logprob(-advantage, logprob) + scaled_logprob(p[0] / 2, difference * difference),
              scaled_logprob(p[0], difference) - advantage, 0};
      break;
    }
    case RatioRule::kNoClip:
      term = {-r * advantage, -ratio.derivative * advantage, 0};
      break;
  }
  return term;
}

// Estimators of KL(policy || reference) from the sampled token (Schulman 2020).
template <class Real>
ERC_HOST_DEVICE Term<Real> kl_term(KLKind kind, Real clamp_at, Real logprob, Real ref_logprob) {
  const Real k1 = log_difference(logprob, ref_logprob);
  switch (kind) {
    case KLKind::kNone:
      return {};
    case KLKind::kK1:
      return {k1, 1, 0};
    case KLKind::kK2:
      return {k1 * k1 / 2, k1, 0};
    case KLKind::kAbs:
      return {std::fabs(k1), Real(k1 > 0) - Real(k1 < 0), 0};
    case KLKind::kK3:
    case KLKind::kK3Plus:
      break;
  }
  const Real limit = Real(kMaxLogRatio);
  const Real x = clamp(-k1, -limit, limit);
  const Real value = Real(std::expm1(double(x)) - double(x));  // the two cancel where policy and reference all but agree
  Term<Real> term{value > clamp_at ? clamp_at : value, 0, 0};
  if (kind == KLKind::kK3Plus) {
    term.d_logprob = k1;  // the value of k3, the gradient of k2
  } else if (value <= clamp_at && -k1 >= -limit && -k1 <= limit) {
    term.d_logprob = -std::expm1(x);
  }
  return term;
}

// Which side of the entropy-ratio band a token fell out of; 0 keeps it.
template <class Real>
ERC_HOST_DEVICE int32_t entropy_ratio_flags(const LossParams<Real>& params, Real entropy, Real old_entropy) {
  const Real rho = (entropy + params.gate_eps) / (old_entropy + params.gate_eps);
  if (rho > 1 - params.beta_low && rho < 1 + params.beta_high) return 0;
  if (entropy == 0 && old_entropy == 0) return 0;
  return kErcDropped | (rho <= 1 - params.beta_low ? kErcLow : 0) | (rho >= 1 + params.beta_high ? kErcHigh : 0);
}

template <class Real>
ERC_HOST_DEVICE TokenLoss<Real> token_loss(RatioRule rule, int kl, Gate gate, const LossParams<Real>& params,
                                           const TokenInputs<Real>& in, Real logprob, Real entropy) {
  TokenLoss<Real> out;
  Term<Real> policy = ratio_term(rule, params.rule, logprob, in.old_logprob, in.advantage);
  policy.value = scaled_logprob(in.policy_weight, policy.value);
  policy.d_logprob = scaled_logprob(in.policy_weight, policy.d_logprob);
  out.flags = policy.flags;
  if (gate != Gate::kNone) {
    const int32_t dropped = entropy_ratio_flags(params, entropy, in.old_entropy);
    out.flags |= dropped;
    if (dropped) {
      policy.d_logprob = 0;
      if (gate == Gate::kZeroValue) policy.value = 0;
    }
  }
  const Real clamp_at = params.kl_clamp;
  Term<Real> penalty = kl_term(KLKind(kl & (kImportanceWeightedKL - 1)), clamp_at, logprob, in.ref_logprob);
  if (kl & kImportanceWeightedKL) {
    const Ratio<Real> ratio(logprob, in.old_logprob);
    penalty.d_logprob = penalty.d_logprob * ratio.value + penalty.value * ratio.derivative;
    penalty.value *= ratio.value;
  }
  out.value = policy.value + scaled_logprob(params.kl_coef, penalty.value);
  out.d_logprob = in.weight * (policy.d_logprob + scaled_logprob(params.kl_coef, penalty.d_logprob)) + in.logprob_weight;
  out.d_entropy = in.entropy_weight;
  // A row without a distribution stays NaN, also where a clip, a zero advantage or the gate would hide it.
  if (!(entropy >= 0)) out.value = out.d_logprob = entropy;
  return out;
}

// The token's share of the scalar loss.
template <class Real>
ERC_HOST_DEVICE Real weighted_loss(const TokenInputs<Real>& in, Real token_value, Real logprob, Real entropy) {
  return in.weight * token_value + (in.entropy_weight == 0 ? Real(0) : in.entropy_weight * entropy) +
         scaled_logprob(in.logprob_weight, logprob);
}

}  // namespace erc
