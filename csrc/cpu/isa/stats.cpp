// Row statistics, their gradient, and the state of a vocabulary shard: one sweep each.
#include "cpu/isa/operators.h"
#include "cpu/isa/sweep.h"

namespace erc {
namespace ERC_ISA {

void stats_forward(const StatsForward& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t n = call.num_rows;
    for (int64_t i = begin; i < end; ++i) {
      const Label label = row_label(in, i);
      double logprob = 0, entropy = 0, logsumexp = 0;
      RowState<double> state{0, 0, 0};
      const bool absent = in.labels != nullptr && label.kind == LabelKind::kAbsent;  // but these are all columns
      if (label.kind == LabelKind::kOutOfRange || absent) {
        logprob = entropy = logsumexp = NAN;
        state = {NAN, NAN, NAN};
      } else if (label.kind != LabelKind::kIgnored) {
        const T* row = in.logits.row<T>(i);
        const RowScale<Real> scale(in.scaling, i);
        state = rounded<Real>(row_sweep<kSoftcap>(scale, row, in.logits.vocab_size)).state;
        if (state.is_valid()) {
          entropy = state.entropy();
          logsumexp = state.logsumexp(scale.scale);
          if (label.kind == LabelKind::kHere) {
            logprob = state.logprob(load_v_one<kSoftcap>(scale, row + label.column), scale.scale);
          }
        } else {
          logprob = entropy = logsumexp = NAN;
        }
      }
      put<Real>(call.logprob, i, logprob);
      put<Real>(call.entropy, i, entropy);
      put<Real>(call.logsumexp, i, logsumexp);
      put<Real>(call.saved, i, state.row_max);
      put<Real>(call.saved, n + i, state.sum_rest);
      put<Real>(call.saved, 2 * n + i, state.weighted_sum);
    }
  });
}

void stats_backward(const StatsBackward& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    const int64_t n = call.num_rows, vocab_size = in.logits.vocab_size;
    const Real* saved = static_cast<const Real*>(call.saved);
    for (int64_t i = begin; i < end; ++i) {
      const Label label = row_label(in, i);
      T* grad = call.grad_logits.row<T>(i);
      if (label.kind == LabelKind::kIgnored) {
        fill(grad, vocab_size, Real(0));
        continue;
      }
      const RowSweep sweep{{saved[i], saved[n + i], saved[2 * n + i]}};
      const StatGrads<double> grads{optional_row<T>(call.grad_logprob, i, 0), optional_row<T>(call.grad_entropy, i, 0),
                                    optional_row<T>(call.grad_logsumexp, i, 0)};
      row_gradient<decltype(softcap)::value>(RowScale<Real>(in.scaling, i), sweep, grads, in.logits.row<T>(i), vocab_size,
                                             label.column, grad);
    }
  });
}

void partial_stats(const PartialStats& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t n = call.num_rows;
    for (int64_t i = begin; i < end; ++i) {
      const Label label = row_label(in, i);
      RowState<double> state{-INFINITY, 0, 0};
      double label_value = -INFINITY;
      if (label.kind != LabelKind::kIgnored) {
        const T* row = in.logits.row<T>(i);
        const RowScale<Real> scale(in.scaling, i);
        state = row_sweep<kSoftcap>(scale, row, in.logits.vocab_size).state;
        if (label.kind == LabelKind::kHere) label_value = load_v_one<kSoftcap>(scale, row + label.column);
      }
      put<Real>(call.state, i, state.row_max);
      put<Real>(call.state, n + i, state.sum_rest);
      put<Real>(call.state, 2 * n + i, state.weighted_sum);
      put<Real>(call.state, 3 * n + i, label_value);
    }
  });
}

}  // namespace ERC_ISA
}  // namespace erc
