// What a call passes to a kernel besides tensors. Mirrors erc/ops.py (ParamIndex, TokenFlag) and erc/surrogate/ratio_rules.py (rule ids).
#pragma once

#include <cstdint>

namespace erc {

// The label of a row whose labelled column lies in another vocabulary shard.
constexpr int64_t kAbsentLabel = INT64_MIN;

// x = softcap(z * logit_scale) / temperature, with softcap(u) = c * tanh(u / c); softcap 0 means none.
struct Scaling {
  double temperature;
  double softcap;
  double logit_scale;
};

enum class RatioRule : int {
  kPPOClip = 0,    // rule: eps_low, eps_high, dual_clip (inf: none), delta (inf: none)
  kGPPO = 1,       // rule: eps_low, eps_high, dual_clip
  kCEGPPO = 2,     // rule: eps_low, eps_high, beta1, beta2
  kCISPO = 3,      // rule: ratio_min, ratio_max
  kSAPO = 4,       // rule: tau_pos, tau_neg
  kDPPOTV = 5,     // rule: low, high, ratio_max
  kDPPOKL = 6,     // rule: low, high, ratio_max
  kReinforce = 7,  // rule: none
  kDRO = 8,        // rule: beta
  kNoClip = 9,     // rule: none
  kIPO = 10,       // rule: eps, tau
  kTOPR = 11,      // rule: none
};

enum class KLKind : int { kNone = 0, kK1 = 1, kK2 = 2, kK3 = 3, kAbs = 4, kK3Plus = 5 };

// Added to the KL kind: multiply the estimate by the importance ratio, gradient through both.
constexpr int kImportanceWeightedKL = 16;

enum class Gate : int { kNone = 0, kKeepValue = 1, kZeroValue = 2 };

enum TokenFlag : int32_t {
  kClipLow = 1,
  kClipHigh = 2,
  kErcLow = 4,
  kErcHigh = 8,
  kErcDropped = 16,
};

// The objective's numbers, in the order of the params tensor after the scaling.
template <class Real>
struct LossParams {
  Real rule[4];
  Real beta_low, beta_high, gate_eps;
  Real kl_coef, kl_clamp;
};

constexpr int kNumScalingParams = 3;
constexpr int kNumParams = 12;

inline Scaling read_scaling(const double* params) { return {params[0], params[1], params[2]}; }

template <class Real>
inline LossParams<Real> read_loss_params(const double* params) {
  const double* p = params + kNumScalingParams;
  return {{Real(p[0]), Real(p[1]), Real(p[2]), Real(p[3])}, Real(p[4]), Real(p[5]), Real(p[6]), Real(p[7]), Real(p[8])};
}

}  // namespace erc
