// The numbers of a call, as the `params` tensor holds them (erc/constants.py, Param).
#pragma once

#include <cstdint>

#include "common/constants.h"
#include "common/host_device.h"

namespace erc {

// x = softcap(z * logit_scale) / temperature, with softcap(u) = c * tanh(u / c); softcap 0 means none.
struct Scaling {
  double temperature;
  double softcap;
  double logit_scale;

  static Scaling read(const double* params) {
    return {params[Param::kTemperature], params[Param::kSoftcap], params[Param::kLogitScale]};
  }
};

// What the loss of one token depends on besides the token.
template <class Real>
struct LossParams {
  RuleId rule_id;
  int kl;  // a KLKind, perhaps plus kImportanceWeightedKL
  Gate gate;
  int present;
  Real rule[4];
  Real beta_low, beta_high, gate_eps;
  Real kl_coef, kl_clamp;

  static LossParams read(const double* p) {
    return {RuleId(int(p[Param::kRuleId])),
            int(p[Param::kKLId]),
            Gate(int(p[Param::kGateId])),
            int(p[Param::kPresent]),
            {Real(p[Param::kRule]), Real(p[Param::kRule + 1]), Real(p[Param::kRule + 2]), Real(p[Param::kRule + 3])},
            Real(p[Param::kBetaLow]),
            Real(p[Param::kBetaHigh]),
            Real(p[Param::kGateEps]),
            Real(p[Param::kKLCoef]),
            Real(p[Param::kKLClamp])};
  }

  ERC_HOST_DEVICE static LossParams from(const LossParams<double>& p) {
    return {p.rule_id,
            p.kl,
            p.gate,
            p.present,
            {Real(p.rule[0]), Real(p.rule[1]), Real(p.rule[2]), Real(p.rule[3])},
            Real(p.beta_low),
            Real(p.beta_high),
            Real(p.gate_eps),
            Real(p.kl_coef),
            Real(p.kl_clamp)};
  }
};

// What the weights of the tokens depend on. A normalizer below 0 is counted, or given as a tensor.
struct TableParams {
  Reduction reduction;
  int present;
  int64_t sequence_length, advantage_length;
  double max_length, entropy_coef, nll_coef;
  bool entropy_shares;
  double normalizer, entropy_normalizer, nll_normalizer, grad_scale;

  static TableParams read(const double* p) {
    return {Reduction(int(p[Param::kReduction])),
            int(p[Param::kPresent]),
            int64_t(p[Param::kSequenceLength]),
            int64_t(p[Param::kAdvantageLength]),
            p[Param::kMaxLength],
            p[Param::kEntropyCoef],
            p[Param::kNllCoef],
            p[Param::kEntropyShares] != 0,
            p[Param::kNormalizer],
            p[Param::kEntropyNormalizer],
            p[Param::kNllNormalizer],
            p[Param::kGradScale]};
  }
};

}  // namespace erc
