// The summary of a batch of tokens: the scalar loss and every metric, summed in an order that depends on N alone.
// The same definition in PyTorch, to read first: erc/surrogate/metrics.py.
#pragma once

#include <cmath>

#include "common/token_table.h"

namespace erc {

// Sums and extremes over some tokens, each at its metric's position: of a metric that is a mean its sum, of the largest ratio its
// logarithm. The number of tokens comes last.
struct SummaryState {
  static constexpr int kTokens = Metric::kCount, kCount = kTokens + 1;
  double values[kCount];

  ERC_HOST_DEVICE SummaryState() {
    for (int i = 0; i < kCount; ++i) values[i] = is_least(i) ? INFINITY : is_largest(i) ? -INFINITY : 0;
  }

  template <class Real>
  ERC_HOST_DEVICE void add(const TokenSummary& call, int64_t token) {
    if (call.labels[token] == call.ignore_index) return;
    const auto at = [&](const void* values) { return double(static_cast<const Real*>(values)[token]); };
    const LossParams<double>& p = call.params;
    const double logprob = at(call.logprob), entropy = at(call.entropy);
    const auto row = TokenInputs<Real>::read(call.table, token, p.present, Real(logprob));
    const double old_logprob = double(row.old_logprob), old_entropy = double(row.old_entropy);
    const int32_t flags = call.flags[token];
    values[kTokens] += 1;
    values[Metric::kLoss] += at(call.loss);
    values[Metric::kClipFraction] += (flags & (TokenFlag::kClipLow | TokenFlag::kClipHigh)) != 0;
    values[Metric::kClipFractionLow] += (flags & TokenFlag::kClipLow) != 0;
    values[Metric::kClipFractionHigh] += (flags & TokenFlag::kClipHigh) != 0;
    values[Metric::kErcFractionLow] += (flags & TokenFlag::kErcLow) != 0;
    values[Metric::kErcFractionHigh] += (flags & TokenFlag::kErcHigh) != 0;
    values[Metric::kErcFraction] += (flags & TokenFlag::kErcDropped) != 0;
    values[Metric::kFilteredFraction] += (flags & TokenFlag::kFiltered) != 0;
    values[Metric::kEntropy] += entropy;
    if (p.present & Present::kOldEntropy) {
      const double ratio = (entropy + p.gate_eps) / (old_entropy + p.gate_eps);
      values[Metric::kOldEntropy] += old_entropy;
      values[Metric::kEntropyRatio] += ratio;
      include(Metric::kEntropyRatioMin, ratio);
      include(Metric::kEntropyRatioMax, ratio);
    }
    const double difference = clamp(log_difference(logprob, old_logprob), -kMaxLogRatio, kMaxLogRatio);
    values[Metric::kApproxKL] += std::expm1(difference) - difference;
    include(Metric::kRatioMax, difference);
    if (call.logprob_full == nullptr || !(p.present & Present::kKLOverFull)) {
      values[Metric::kKL] += kl_penalty(p, logprob, old_logprob, double(row.ref_logprob)).value;
    } else {
      const double weight = p.kl & kImportanceWeightedKL ? Ratio<double>(logprob, old_logprob).value : 1;
      values[Metric::kKL] += weight * kl_estimate(p, at(call.logprob_full), double(row.ref_logprob)).value;
    }
    if (call.logprob_full != nullptr) values[Metric::kKeptMass] += std::exp(at(call.logprob_full) - logprob);
    values[Metric::kNanInputs] += row.weight != row.weight || old_entropy != old_entropy;
  }

  // Values at position i of two disjoint sets of tokens. NaN wins, as in torch.min and torch.max.
  ERC_HOST_DEVICE static double combined(int i, double a, double b) {
    if (is_least(i)) return a != a || a < b ? a : b;
    if (is_largest(i)) return a != a || a > b ? a : b;
    return a + b;
  }

  ERC_HOST_DEVICE void merge(const SummaryState& other) {
    for (int i = 0; i < kCount; ++i) include(i, other.values[i]);
  }

  template <class Real>
  ERC_HOST_DEVICE void write(const TokenSummary& call) const {
    const LossParams<double>& p = call.params;
    const double tokens = values[kTokens], count = tokens == 0 ? 1 : tokens, nan = NAN;
    const bool compares = p.present & Present::kOldEntropy, penalised = p.kl != 0;
    for (int i = Metric::kClipFraction; i <= Metric::kKL; ++i) call.metrics[i] = values[i] / count;
    if (!compares) call.metrics[Metric::kOldEntropy] = call.metrics[Metric::kEntropyRatio] = nan;
    if (!penalised) call.metrics[Metric::kKL] = nan;
    call.metrics[Metric::kEntropyRatioMin] = compares && tokens != 0 ? values[Metric::kEntropyRatioMin] : nan;
    call.metrics[Metric::kEntropyRatioMax] = compares && tokens != 0 ? values[Metric::kEntropyRatioMax] : nan;
    call.metrics[Metric::kRatioMax] = tokens != 0 ? std::exp(values[Metric::kRatioMax]) : nan;
    call.metrics[Metric::kKeptMass] = call.logprob_full != nullptr ? values[Metric::kKeptMass] / count : 1;
    call.metrics[Metric::kNanInputs] = values[Metric::kNanInputs];
    call.metrics[Metric::kLoss] = values[Metric::kLoss];
    *static_cast<Real*>(call.total) = Real(values[Metric::kLoss]);
    *call.tokens = int64_t(tokens);
  }

 private:
  ERC_HOST_DEVICE static bool is_least(int i) { return i == Metric::kEntropyRatioMin; }
  ERC_HOST_DEVICE static bool is_largest(int i) { return i == Metric::kEntropyRatioMax || i == Metric::kRatioMax; }
  ERC_HOST_DEVICE void include(int i, double value) { values[i] = combined(i, values[i], value); }
};

}  // namespace erc
