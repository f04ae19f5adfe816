// The fused loss: statistics, the token's loss, and its gradient while the row is still in cache.
// One read of the logits from memory and one write of the gradient, for forward and backward together.
#include "common/token_loss.h"
#include "cpu/isa/gradient.h"
#include "cpu/isa/operators.h"

namespace erc {
namespace ERC_ISA {

void policy_loss(const PolicyLoss& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t vocab_size = in.logits.vocab_size;
    const bool wants_grad = call.grad_logits.data != nullptr;
    with_gradient_type<T>(call.grad_logits.dtype, [&](auto grad_zero) {
      using G = decltype(grad_zero);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = in.token(i);
        const Label label = token_label(in, token);
        TokenLoss<double> result;
        FullTerms<double> full;
        double loss = 0, logprob = 0, entropy = 0, logprob_full = 0;
        if (label.kind == LabelKind::kIgnored) {
          if (wants_grad) fill(call.grad_logits.row<G>(i), vocab_size, Real(0));
          if (token < 0) continue;
        } else {
          const T* row = in.logits.row<T>(i);
          const RowScale<Real> scale(in, token);
          RowSweep sweep{{NAN, NAN, NAN}};
          // NaN where the support has no distribution over it, and then the row has none.
          const double over_support = optional_value<T>(call.support_logprob, token, INFINITY);
          if (label.kind == LabelKind::kHere && over_support == over_support) {
            sweep = rounded<Real>(row_sweep<kSoftcap>(scale, row, vocab_size));
          }
          logprob = entropy = logprob_full = NAN;
          const RowState<double>& state = sweep.state;
          const bool cut = over_support < INFINITY;
          if (state.is_valid()) {
            // Rounded as the caller sees them: an unchanged policy has a ratio of exactly 1.
            logprob_full = rounded_to<Real>(state.logprob(load_v_one<kSoftcap>(scale, row + label.column), scale.scale));
            logprob = cut ? over_support : logprob_full;
            entropy = rounded_to<Real>(state.entropy());
          }
          auto inputs =
              TokenInputs<double>::from(TokenInputs<Real>::read(call.table, token, call.params.present, Real(logprob)));
          LossParams<double> params = call.params;
          if (cut) full = FullTerms<double>::taken_from(params, inputs);
          result = token_loss(params, inputs, logprob, entropy);
          const double more = cut ? full.add_to(result, params, inputs, logprob, logprob_full) : 0;
          loss = weighted_loss(inputs, result.value, logprob, entropy);
          if (cut) loss += more;
          if (wants_grad) {
            const StatGrads<double> grads{cut ? full.d_logprob : result.d_logprob, result.d_entropy, 0};
            row_gradient<kSoftcap>(scale, sweep, grads, row, vocab_size, label.column, call.grad_logits.row<G>(i),
                                   in.logits.row<T>(i + 1 < end ? i + 1 : i));
          }
          put<Real>(call.saved, token, state.row_max);
          put<Real>(call.saved, in.num_tokens + token, state.sum_rest);
          put<Real>(call.saved, 2 * in.num_tokens + token, state.weighted_sum);
        }
        put<Real>(call.loss, token, loss);
        put<Real>(call.token_loss, token, result.value);
        put<Real>(call.logprob, token, logprob);
        put<Real>(call.entropy, token, entropy);
        put<Real>(call.logprob_full, token, logprob_full);
        put<Real>(call.d_logprob, token, result.d_logprob);
        put<Real>(call.d_logprob_full, token, full.d_logprob);
        put<Real>(call.d_entropy, token, result.d_entropy);
        call.flags[token] = result.flags;
      }
    });
  });
}

}  // namespace ERC_ISA
}  // namespace erc
