// The per-token loss: (value, derivative) of every part of an objective, composed in one order:
// ratio rule -> dual clip -> rollout weight -> entropy-ratio gate -> plus KL and entropy terms. The same formulas stand in
// erc/surrogate (PyTorch) and erc/triton_kernels/token_loss.py (Triton); one test holds the three to the same numbers.
#pragma once

#include <cmath>

#include "common/calls.h"

namespace erc {

// What is known of a token besides its own log-prob and entropy: a row of the token table (erc/constants.py, Column).
template <class Real>
struct alignas(kNumColumns * sizeof(Real)) TokenInputs {
  Real weight;  // of the token in the reduction
  Real advantage;
  Real old_logprob, old_entropy, ref_logprob;
  Real policy_weight;  // rollout correction: on the policy term only
  Real entropy_weight, logprob_weight;

  // Of an on-policy update the old log-prob is the present one: the ratio is 1 and carries the gradient.
  ERC_HOST_DEVICE static TokenInputs read(const void* table, int64_t token, int present, Real logprob) {
    TokenInputs row = static_cast<const TokenInputs*>(table)[token];
    if (!(present & Present::kOldLogprob)) row.old_logprob = logprob;
    return row;
  }

  template <class Other>
  ERC_HOST_DEVICE static TokenInputs from(const TokenInputs<Other>& row) {
    return {Real(row.weight),      Real(row.advantage),     Real(row.old_logprob),    Real(row.old_entropy),
            Real(row.ref_logprob), Real(row.policy_weight), Real(row.entropy_weight), Real(row.logprob_weight)};
  }
};
static_assert(sizeof(TokenInputs<float>) == kNumColumns * sizeof(float), "a token is one load");

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
ERC_HOST_DEVICE Term<Real> ratio_term(RuleId rule, const Real (&p)[4], Real logprob, Real old_logprob, Real advantage) {
  const Ratio<Real> ratio(logprob, old_logprob);
  const Real r = ratio.value;
  const bool inside = ratio.derivative != 0;
  Term<Real> term;
  switch (rule) {
    case RuleId::kPPOClip:
    case RuleId::kGPPO:
    case RuleId::kCEGPPO: {
      const bool low = advantage < 0 && r < 1 - p[0], high = advantage > 0 && r > 1 + p[1];
      const Real bound = low ? 1 - p[0] : 1 + p[1];
      term.value = -r * advantage;
      term.d_logprob = -ratio.derivative * advantage;
      if (low || high) {
        term.flags = low ? TokenFlag::kClipLow : TokenFlag::kClipHigh;
        const Real kept = rule == RuleId::kCEGPPO ? (low ? p[2] : p[3]) : Real(1);
        term.value = -kept * bound * advantage;
        term.d_logprob = rule == RuleId::kPPOClip || !inside ? Real(0) : term.value;
      } else if (rule != RuleId::kCEGPPO && advantage < 0) {
        const Real dual = p[2], delta = rule == RuleId::kPPOClip ? p[3] : Real(INFINITY);
        const Real cap = dual < delta ? dual : delta;
        if (r > cap) term = {-cap * advantage, 0, TokenFlag::kClipHigh};
      }
      break;
    }
    case RuleId::kCISPO: {
      const Real coefficient = -clamp(r, p[0], p[1]) * advantage;
      term = {scaled_logprob(coefficient, logprob), coefficient, 0};
      if (advantage != 0) term.flags = r < p[0] ? TokenFlag::kClipLow : (r > p[1] ? TokenFlag::kClipHigh : 0);
      break;
    }
    case RuleId::kSAPO: {
      const Real tau = advantage > 0 ? p[0] : p[1];
      const Real x = tau * (r - 1), gate = sigmoid(x);
      term = {-advantage * 4 / tau * gate, -advantage * 4 * gate * sigmoid(-x) * ratio.derivative, 0};  // 1 - gate cancels
      break;
    }
    case RuleId::kDPPOTV:
    case RuleId::kDPPOKL: {
      const bool up = advantage > 0, down = advantage < 0;
      bool blocked;
      if (rule == RuleId::kDPPOTV) {
        const Real difference = std::exp(logprob) - std::exp(old_logprob);
        blocked = (up && difference > p[1]) || (down && difference < -p[0]);
      } else {
        const Real kl = binary_kl(old_logprob, logprob);
        // The log-probs tell the direction exactly; the difference of two exponentials may round to 0.
        blocked = (up && logprob > old_logprob && kl > p[1]) || (down && logprob < old_logprob && kl > p[0]);
      }
      const Real coefficient = blocked ? Real(0) : -(r > p[2] ? p[2] : r) * advantage;
      term = {scaled_logprob(coefficient, logprob), coefficient,
              blocked ? (up ? TokenFlag::kClipHigh : TokenFlag::kClipLow) : 0};
      break;
    }
    case RuleId::kReinforce: term = {scaled_logprob(-advantage, logprob), -advantage, 0}; break;
    case RuleId::kDRO: {
      const Real difference = log_difference(logprob, old_logprob);
      term = {scaled_logprob(-advantage, logprob) + scaled_logprob(p[0] / 2, difference * difference),
              scaled_logprob(p[0], difference) - advantage, 0};
      break;
    }
    case RuleId::kNoClip: term = {-r * advantage, -ratio.derivative * advantage, 0}; break;
    case RuleId::kIPO: {
      const Real moved = std::exp(logprob) - std::exp(old_logprob);
      const bool high = advantage != 0 && moved > p[0], low = advantage != 0 && moved < -p[0];
      if (!high && !low) term = {-r * advantage, -ratio.derivative * advantage, 0};
      if (p[1] > 0) {
        const Real difference = log_difference(logprob, old_logprob);
        term.value += p[1] * difference * difference;
        term.d_logprob += 2 * p[1] * difference;
      }
      term.flags = high ? TokenFlag::kClipHigh : (low ? TokenFlag::kClipLow : 0);
      break;
    }
    case RuleId::kTOPR: {
      const bool tapered = advantage < 0 && r > 1;
      const Real coefficient = advantage > 0 || tapered ? -advantage : -r * advantage;
      term = {scaled_logprob(coefficient, logprob), coefficient, tapered ? TokenFlag::kClipHigh : 0};
      break;
    }
  }
  return term;
}

// Estimators of KL(policy || reference) from the sampled token (Schulman 2020).
template <class Real>
ERC_HOST_DEVICE Term<Real> kl_term(KLKind kind, Real clamp_at, Real logprob, Real ref_logprob) {
  const Real k1 = log_difference(logprob, ref_logprob);
  switch (kind) {
    case KLKind::kNone: return {};
    case KLKind::kK1: return {k1, 1, 0};
    case KLKind::kK2: return {k1 * k1 / 2, k1, 0};
    case KLKind::kAbs: return {std::fabs(k1), Real(k1 > 0) - Real(k1 < 0), 0};
    case KLKind::kK3:
    case KLKind::kK3Plus: break;
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

// The objective's KL estimate of a log-prob, without its coefficient and what weighs it.
template <class Real>
ERC_HOST_DEVICE Term<Real> kl_estimate(const LossParams<Real>& params, Real logprob, Real ref_logprob) {
  return kl_term(KLKind(params.kl & (kImportanceWeightedKL - 1)), params.kl_clamp, logprob, ref_logprob);
}

// The objective's KL penalty, without its coefficient.
template <class Real>
ERC_HOST_DEVICE Term<Real> kl_penalty(const LossParams<Real>& params, Real logprob, Real old_logprob, Real ref_logprob) {
  Term<Real> penalty = kl_estimate(params, logprob, ref_logprob);
  if (params.kl & kImportanceWeightedKL) {
    const Ratio<Real> ratio(logprob, old_logprob);
    penalty.d_logprob = penalty.d_logprob * ratio.value + penalty.value * ratio.derivative;
    penalty.value *= ratio.value;
  }
  return penalty;
}

// Which side of the entropy-ratio band a token fell out of; 0 keeps it.
template <class Real>
ERC_HOST_DEVICE int32_t entropy_ratio_flags(const LossParams<Real>& params, Real entropy, Real old_entropy) {
  const Real rho = (entropy + params.gate_eps) / (old_entropy + params.gate_eps);
  if (rho > 1 - params.beta_low && rho < 1 + params.beta_high) return 0;
  if (entropy == 0 && old_entropy == 0) return 0;
  return TokenFlag::kErcDropped | (rho <= 1 - params.beta_low ? TokenFlag::kErcLow : 0) |
         (rho >= 1 + params.beta_high ? TokenFlag::kErcHigh : 0);
}

// `policy` is the ratio rule's term, of a kernel's rule or of one that looked at more than this token.
template <class Real>
ERC_HOST_DEVICE TokenLoss<Real> token_loss(const LossParams<Real>& params, const TokenInputs<Real>& in, Term<Real> policy,
                                           Real logprob, Real entropy) {
  TokenLoss<Real> out;
  policy.value = scaled_logprob(in.policy_weight, policy.value);
  policy.d_logprob = scaled_logprob(in.policy_weight, policy.d_logprob);
  out.flags = policy.flags;
  if (params.gate != Gate::kNone) {
    const int32_t dropped = entropy_ratio_flags(params, entropy, in.old_entropy);
    out.flags |= dropped;
    if (dropped) {
      policy.d_logprob = 0;
      if (params.gate == Gate::kZeroValue) policy.value = 0;
    }
  }
  const Term<Real> penalty = kl_penalty(params, logprob, in.old_logprob, in.ref_logprob);
  out.value = policy.value + scaled_logprob(params.kl_coef, penalty.value);
  out.d_logprob = in.weight * (policy.d_logprob + scaled_logprob(params.kl_coef, penalty.d_logprob)) + in.logprob_weight;
  out.d_entropy = in.entropy_weight;
  // A row without a distribution stays NaN, also where a clip, a zero advantage or the gate would hide it.
  if (!(entropy >= 0)) out.value = out.d_logprob = entropy;
  return out;
}

template <class Real>
ERC_HOST_DEVICE TokenLoss<Real> token_loss(const LossParams<Real>& params, const TokenInputs<Real>& in, Real logprob,
                                           Real entropy) {
  const Term<Real> policy = ratio_term(params.rule_id, params.rule, logprob, in.old_logprob, in.advantage);
  return token_loss(params, in, policy, logprob, entropy);
}

// The token's share of the scalar loss.
template <class Real>
ERC_HOST_DEVICE Real weighted_loss(const TokenInputs<Real>& in, Real token_value, Real logprob, Real entropy) {
  return in.weight * token_value + (in.entropy_weight == 0 ? Real(0) : in.entropy_weight * entropy) +
         scaled_logprob(in.logprob_weight, logprob);
}

// The KL and NLL terms of a token that a sampler cut, where they are over the full vocabulary: their derivatives are by another
// log-prob than that of the ratio.
template <class Real>
struct FullTerms {
  Real kl_coef = 0, logprob_weight = 0;
  Real d_logprob = 0;  // of the weighted loss by the log-prob over the full vocabulary

  // Takes the terms out of what `token_loss` composes.
  ERC_HOST_DEVICE static FullTerms taken_from(LossParams<Real>& params, TokenInputs<Real>& in) {
    FullTerms terms;
    if (params.present & Present::kKLOverFull) {
      terms.kl_coef = params.kl_coef;
      params.kl_coef = 0;
    }
    if (params.present & Present::kNllOverFull) {
      terms.logprob_weight = in.logprob_weight;
      in.logprob_weight = 0;
    }
    return terms;
  }

  // Adds them to what it has composed; returns what is left to be added to the token's share of the loss.
  ERC_HOST_DEVICE Real add_to(TokenLoss<Real>& loss, const LossParams<Real>& params, const TokenInputs<Real>& in, Real logprob,
                              Real logprob_full) {
    if (kl_coef != 0) {
      const Term<Real> estimate = kl_estimate(params, logprob_full, in.ref_logprob);
      Real factor = 1, d_factor = 0;
      if (params.kl & kImportanceWeightedKL) {
        const Ratio<Real> ratio(logprob, in.old_logprob);
        factor = ratio.value;
        d_factor = ratio.derivative;
      }
      loss.value += kl_coef * estimate.value * factor;
      loss.d_logprob += in.weight * kl_coef * estimate.value * d_factor;
      d_logprob = in.weight * kl_coef * estimate.d_logprob * factor;
    }
    d_logprob += logprob_weight;
    return scaled_logprob(logprob_weight, logprob_full);
  }
};

// Loss, derivatives and flags of a token of `call`, in float64 and rounded once. An inactive one gives exactly 0.
template <class Real>
ERC_HOST_DEVICE void judge_token(const TokenLosses& call, int64_t token) {
  const auto at = [&](const void* values) { return double(static_cast<const Real*>(values)[token]); };
  const auto put = [&](void* values, double x) { static_cast<Real*>(values)[token] = Real(x); };
  TokenLoss<double> result;
  double loss = 0, logprob = 0, entropy = 0;
  if (call.labels[token] != call.ignore_index) {
    logprob = at(call.logprob);
    entropy = at(call.entropy);
    const auto in = TokenInputs<double>::from(TokenInputs<Real>::read(call.table, token, call.params.present, Real(logprob)));
    Term<double> policy;
    if (call.policy == nullptr) {
      policy = ratio_term(call.params.rule_id, call.params.rule, logprob, in.old_logprob, in.advantage);
    } else {
      policy.value = at(call.policy);
      policy.d_logprob = at(call.d_policy);
    }
    if (call.clip_low != nullptr && call.clip_low[token]) policy.flags |= TokenFlag::kClipLow;
    if (call.clip_high != nullptr && call.clip_high[token]) policy.flags |= TokenFlag::kClipHigh;
    if (call.filtered != nullptr && call.filtered[token]) {
      policy.value = policy.d_logprob = 0;
      policy.flags |= TokenFlag::kFiltered;
    }
    result = token_loss(call.params, in, policy, logprob, entropy);
    loss = weighted_loss(in, result.value, logprob, entropy);
  }
  put(call.loss, loss);
  put(call.token_loss, result.value);
  put(call.logprob_out, logprob);
  put(call.entropy_out, entropy);
  put(call.d_logprob, result.d_logprob);
  put(call.d_entropy, result.d_entropy);
  call.flags[token] = result.flags;
}

}  // namespace erc
