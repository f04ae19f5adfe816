// Log-probs over the tokens that a sampler kept, and their gradient.
#include "common/support.h"

#include "cpu/isa/operators.h"
#include "cpu/isa/rows.h"

namespace erc {
namespace ERC_ISA {

void support_forward(const SupportForward& call, int64_t begin, int64_t end) {
  dispatch(call.rows.logits.dtype, false, [&](auto zero, auto) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      const T* row = call.rows.logits.row<T>(i);
      const auto load = [row](int64_t column) { return double(load_one(row + column)); };
      if (!support_statistics<stats_t<T>>(call, i, OneLane{}, load)) __atomic_store_n(call.broken, 1, __ATOMIC_RELAXED);
    }
  });
}

void support_backward(const SupportBackward& call, int64_t begin, int64_t end) {
  dispatch(call.grad_logits.dtype, false, [&](auto zero, auto) {
    using T = decltype(zero);
    for (int64_t i = begin; i < end; ++i) {
      T* grad = call.grad_logits.row<T>(i);
      const auto store = [grad](int64_t column, double x) { store_one(grad + column, stats_t<T>(x)); };
      support_gradient<stats_t<T>>(call, i, OneLane{}, store);
    }
  });
}

}  // namespace ERC_ISA
}  // namespace erc
