// Row statistics, the state of a vocabulary shard, and their gradient: one sweep each.
#include "cpu/isa/gradient.h"
#include "cpu/isa/operators.h"

namespace erc {
namespace ERC_ISA {

// Of a shard (call.label_value) the states themselves are the result: a row that is not read leaves the empty one, and a label
// may lie outside.
void stats_forward(const StatsForward& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t n = in.num_tokens;
    const bool shard = call.label_value != nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = in.token(i);
      if (token < 0) continue;
      const Label label = token_label(in, token);
      double logprob = 0, entropy = 0, logsumexp = 0, label_value = -INFINITY;
      RowState<double> state{shard ? -INFINITY : 0, 0, 0};
      const bool absent = label.kind == LabelKind::kAbsent && in.labels != nullptr;  // of all columns that is nowhere
      if ((label.kind == LabelKind::kOutOfRange || absent) && !shard) {
        logprob = entropy = logsumexp = NAN;
        state = {NAN, NAN, NAN};
      } else if (label.kind != LabelKind::kIgnored) {
        const T* row = in.logits.row<T>(i);
        const RowScale<Real> scale(in, token);
        const RowSweep sweep = row_sweep<kSoftcap>(scale, row, in.logits.vocab_size);
        state = shard ? sweep.state : rounded<Real>(sweep).state;
        if (label.kind == LabelKind::kHere) label_value = load_v_one<kSoftcap>(scale, row + label.column);
        if (state.is_valid()) {
          entropy = state.entropy();
          logsumexp = state.logsumexp(scale.scale);
          if (label.kind == LabelKind::kHere) logprob = state.logprob(label_value, scale.scale);
        } else {
          logprob = entropy = logsumexp = NAN;
        }
      }
      put<Real>(call.logprob, token, logprob);
      put<Real>(call.entropy, token, entropy);
      put<Real>(call.logsumexp, token, logsumexp);
      put<Real>(call.saved, token, state.row_max);
      put<Real>(call.saved, n + token, state.sum_rest);
      put<Real>(call.saved, 2 * n + token, state.weighted_sum);
      put<Real>(call.label_value, token, label_value);
    }
  });
}

void stats_backward(const StatsBackward& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    const int64_t n = in.num_tokens, vocab_size = in.logits.vocab_size;
    const Real* saved = static_cast<const Real*>(call.saved);
    with_gradient_type<T>(call.grad_logits.dtype, [&](auto grad_zero) {
      using G = decltype(grad_zero);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = in.token(i);
        const Label label = token_label(in, token);
        G* grad = call.grad_logits.row<G>(i);
        if (label.kind == LabelKind::kIgnored) {
          fill(grad, vocab_size, Real(0));
          continue;
        }
        const RowSweep sweep{{saved[token], saved[n + token], saved[2 * n + token]}};
        const bool cut = label.kind == LabelKind::kCut;
        const StatGrads<double> grads{cut ? Real(0) : optional_value<T>(call.grad_logprob, token, 0),
                                      optional_value<T>(call.grad_entropy, token, 0),
                                      optional_value<T>(call.grad_logsumexp, token, 0)};
        row_gradient<decltype(softcap)::value>(RowScale<Real>(in, token), sweep, grads, in.logits.row<T>(i), vocab_size,
                                               label.column, grad, in.logits.row<T>(i + 1 < end ? i + 1 : i));
      }
    });
  });
}

}  // namespace ERC_ISA
}  // namespace erc
