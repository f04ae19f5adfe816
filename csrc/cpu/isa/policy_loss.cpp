// The fused loss: statistics, the token's loss, and its gradient while the row is still in cache.
// One read of the logits from memory and one write of the gradient, for forward and backward together.
#include "common/token_loss.h"

#include "cpu/isa/operators.h"
#include "cpu/isa/sweep.h"

namespace erc {
namespace ERC_ISA {

template <class Real>
static TokenInputs<double> token_inputs(const PolicyLoss& call, int64_t i, double logprob) {
  const auto at = [&](const void* values, double otherwise) {
    return values ? double(static_cast<const Real*>(values)[i]) : otherwise;
  };
  TokenInputs<double> in;
  in.advantage = at(call.advantages, 0);
  in.old_logprob = at(call.old_logprob, logprob);  // on-policy: the ratio is 1 and carries the gradient
  in.old_entropy = at(call.old_entropy, 0);
  in.ref_logprob = at(call.ref_logprob, 0);
  in.policy_weight = at(call.policy_weight, 1);
  in.weight = at(call.weight, 0);
  in.entropy_weight = at(call.entropy_weight, 0);
  in.logprob_weight = at(call.logprob_weight, 0);
  return in;
}

void policy_loss(const PolicyLoss& call, int64_t begin, int64_t end) {
  const RowInputs& in = call.rows;
  dispatch(in.logits.dtype, in.scaling.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t vocab_size = in.logits.vocab_size;
    const bool wants_grad = call.grad_logits.data != nullptr;
    for (int64_t i = begin; i < end; ++i) {
      const Label label = row_label(in, i);
      TokenLoss<double> token;
      double loss = 0, logprob = 0, entropy = 0;
      if (label.kind == LabelKind::kIgnored) {
        if (wants_grad) fill(call.grad_logits.row<T>(i), vocab_size, Real(0));
      } else {
        const T* row = in.logits.row<T>(i);
        const RowScale<Real> scale(in.scaling, i);
        RowSweep sweep{{NAN, NAN, NAN}};
        if (label.kind == LabelKind::kHere) sweep = rounded<Real>(row_sweep<kSoftcap>(scale, row, vocab_size));
        logprob = entropy = NAN;
        const RowState<double>& state = sweep.state;
        if (state.is_valid()) {
          // Rounded as the caller sees them: an unchanged policy has a ratio of exactly 1.
          logprob = rounded_to<Real>(state.logprob(load_v_one<kSoftcap>(scale, row + label.column), scale.scale));
          entropy = rounded_to<Real>(state.entropy());
        }
        const TokenInputs<double> inputs = token_inputs<Real>(call, i, logprob);
        token = token_loss(call.rule, call.kl, call.gate, call.params, inputs, logprob, entropy);
        loss = weighted_loss(inputs, token.value, logprob, entropy);
        if (wants_grad) {
          row_gradient<kSoftcap>(scale, sweep, {token.d_logprob, token.d_entropy, 0}, row, vocab_size, label.column,
                                 call.grad_logits.row<T>(i));
        }
      }
      put<Real>(call.loss, i, loss);
      put<Real>(call.token_loss, i, token.value);
      put<Real>(call.logprob, i, logprob);
      put<Real>(call.entropy, i, entropy);
      call.flags[i] = token.flags;
    }
  });
}

}  // namespace ERC_ISA
}  // namespace erc
