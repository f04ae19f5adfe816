// The summary of a batch of tokens: the scalar loss and every metric, summed in an order that depends on N alone.
// The same definition in PyTorch, to read first: erc/surrogate/metrics.py.
#pragma once

#include <cmath>

#include "common/token_table.h"

namespace erc {

// Sums and extremes over some tokens; of the metrics that are means, the sum stands at the metric's own position.
struct SummaryState {
  double sums[Metric::kCount] = {};
  double ratio_min = INFINITY, ratio_max = -INFINITY, log_ratio_max = -INFINITY;
  double tokens = 0;

  template <class Real>
  ERC_HOST_DEVICE void add(const TokenSummary& call, int64_t token) {
    if (call.labels[token] == call.ignore_index) return;
    const auto at = [&](const void* values) { return double(static_cast<const Real*>(values)[token]); };
    const LossParams<double>& p = call.params;
    const double logprob = at(call.logprob), entropy = at(call.entropy);
    const auto row = TokenInputs<Real>::read(call.table, token, p.present, Real(logprob));
    const double old_logprob = double(row.old_logprob), old_entropy = double(row.old_entropy);
    const int32_t flags = call.flags[token];
    tokens += 1;
    sums[Metric::kLoss] += at(call.loss);
    sums[Metric::kClipFraction] += (flags & (TokenFlag::kClipLow | TokenFlag::kClipHigh)) != 0;
    sums[Metric::kClipFractionLow] += (flags & TokenFlag::kClipLow) != 0;
    sums[Metric::kClipFractionHigh] += (flags & TokenFlag::kClipHigh) != 0;
    sums[Metric::kErcFractionLow] += (flags & TokenFlag::kErcLow) != 0;
    sums[Metric::kErcFractionHigh] += (flags & TokenFlag::kErcHigh) != 0;
    sums[Metric::kErcFraction] += (flags & TokenFlag::kErcDropped) != 0;
    sums[Metric::kFilteredFraction] += (flags & TokenFlag::kFiltered) != 0;
    sums[Metric::kEntropy] += entropy;
    if (p.present & Present::kOldEntropy) {
      const double ratio = (entropy + p.gate_eps) / (old_entropy + p.gate_eps);
      sums[Metric::kOldEntropy] += old_entropy;
      sums[Metric::kEntropyRatio] += ratio;
      ratio_min = smaller(ratio_min, ratio);
      ratio_max = larger(ratio_max, ratio);
    }
    const double difference = clamp(log_difference(logprob, old_logprob), -kMaxLogRatio, kMaxLogRatio);
    sums[Metric::kApproxKL] += std::expm1(difference) - difference;
    log_ratio_max = larger(log_ratio_max, difference);
    sums[Metric::kKL] += kl_penalty(p, logprob, old_logprob, double(row.ref_logprob)).value;
    sums[Metric::kNanInputs] += row.weight != row.weight || old_entropy != old_entropy;
  }

  ERC_HOST_DEVICE void merge(const SummaryState& other) {
    for (int i = 0; i < Metric::kCount; ++i) sums[i] += other.sums[i];
    ratio_min = smaller(ratio_min, other.ratio_min);
    ratio_max = larger(ratio_max, other.ratio_max);
    log_ratio_max = larger(log_ratio_max, other.log_ratio_max);
    tokens += other.tokens;
  }

  template <class Real>
  ERC_HOST_DEVICE void write(const TokenSummary& call) const {
    const LossParams<double>& p = call.params;
    const double count = tokens == 0 ? 1 : tokens, nan = NAN;
    for (int i = Metric::kClipFraction; i <= Metric::kKL; ++i) call.metrics[i] = sums[i] / count;
    const bool compares = p.present & Present::kOldEntropy, penalised = p.kl != 0;
    if (!compares) call.metrics[Metric::kOldEntropy] = call.metrics[Metric::kEntropyRatio] = nan;
    if (!penalised) call.metrics[Metric::kKL] = nan;
    call.metrics[Metric::kEntropyRatioMin] = compares && tokens != 0 ? ratio_min : nan;
    call.metrics[Metric::kEntropyRatioMax] = compares && tokens != 0 ? ratio_max : nan;
    call.metrics[Metric::kRatioMax] = tokens != 0 ? std::exp(log_ratio_max) : nan;
    call.metrics[Metric::kNanInputs] = sums[Metric::kNanInputs];
    const double scale = call.grad_scale_tensor.given() ? element<double>(call.grad_scale_tensor, 0) : call.grad_scale;
    call.metrics[Metric::kLoss] = sums[Metric::kLoss] / scale;
    *static_cast<Real*>(call.total) = Real(sums[Metric::kLoss] / scale);
    *call.tokens = int64_t(tokens);
  }

 private:
  // NaN wins, as in torch.min and torch.max.
  ERC_HOST_DEVICE static double smaller(double a, double b) { return a != a || a < b ? a : b; }
  ERC_HOST_DEVICE static double larger(double a, double b) { return a != a || a > b ? a : b; }
};

}  // namespace erc
