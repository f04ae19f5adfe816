// New and old rows side by side: entropies, their ratio, both Kullback-Leibler divergences and the total variation, and their
// gradient in the new logits. The first sweeps give each row its state; the second, from the L2 cache where both rows stay in it,
// adds terms that are >= 0 one by one, so that a small divergence is not the difference of two large numbers.
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

constexpr int kPairedSums = 4;  // KL(new||old), KL(old||new), sum |p - q|, sum p sign(p - q)

// x + expm1(-x) >= 0 for |x| < 1/2, by its series: below 1e-10 of the sum is left out.
template <class Real>
ERC_DEVICE Real divergence_series(Real x) {
  Real term = x * x * Real(0.5), total = term;
#pragma unroll
  for (int k = 3; k <= 10; ++k) {
    term *= -x * Real(1.0 / k);
    total += term;
  }
  return total;
}

// One row as the second sweep sees it.
template <class Real>
struct Side {
  Real row_max, log_sum, inverse_sum;

  ERC_DEVICE explicit Side(const RowState<Real>& state)
      : row_max(state.row_max), log_sum(std::log1p(state.sum_rest)), inverse_sum(1 / state.sum_exp()) {}

  ERC_DEVICE Real shift(Real v, Real scale) const { return (v - row_max) * scale; }
  ERC_DEVICE Real probability(Real v, Real scale) const { return std::exp(shift(v, scale)) * inverse_sum; }
  ERC_DEVICE Real logprob(Real v, Real scale) const { return shift(v, scale) - log_sum; }
};

// A column of both rows. Where both tokens are forbidden delta = log p - log q counts as 0; where one is, it is infinite.
template <class Real>
struct PairedColumn {
  Real p, q, difference, delta;

  ERC_DEVICE PairedColumn(const Side<Real>& fresh, const Side<Real>& old, Real scale, Real v_new, Real v_old)
      : p(fresh.probability(v_new, scale)), q(old.probability(v_old, scale)), difference(p - q) {
    const bool both = v_new == -Real(INFINITY) && v_old == -Real(INFINITY);
    delta = both ? Real(0) : fresh.logprob(v_new, scale) - old.logprob(v_old, scale);
  }

  ERC_DEVICE void add_to(Real (&sums)[kPairedSums]) const {
    if (std::fabs(delta) < Real(0.5)) {
      sums[0] += p * divergence_series(delta);
      sums[1] += q * divergence_series(-delta);
    } else {
      sums[0] += (p == 0 ? Real(0) : p * delta) - difference;
      sums[1] += difference - (q == 0 ? Real(0) : q * delta);
    }
    sums[2] += std::fabs(difference);
    sums[3] += difference > 0 ? p : difference < 0 ? -p : Real(0);
  }
};

// Calls visit(i, new vector, old vector) for the calling thread's vectors of a row, the last one filled up with -inf.
template <class V, class Visit>
ERC_DEVICE void for_each_vector(const typename V::Element* fresh, const typename V::Element* old, int64_t columns, Visit&& visit) {
  using T = typename V::Element;
  for (int64_t i = int64_t(threadIdx.x) * kVector<T>; i < columns; i += kLanes * kVector<T>) {
    if (i + kVector<T> <= columns) {
      visit(i, GlobalSource<T, V::aligned>::load(fresh + i), GlobalSource<T, V::aligned>::load(old + i));
    } else {
      const int count = int(columns - i);
      visit(i, load_elements(fresh + i, count, V::minus_infinity()), load_elements(old + i, count, V::minus_infinity()));
    }
  }
}

template <class V>
ERC_DEVICE RowState<typename V::Real> row_state(const RowScale<typename V::Real>& scale, const Partition& partition,
                                                const typename V::Element* row, const StatsShared<typename V::Real>& shared) {
  segment_states<V>(scale, 0, partition.segments, global_segments<V>(partition, row), shared);
  const RowResult<typename V::Real> result(shared.states, partition.segments, scale.scale);
  __syncthreads();  // the next row's sweep writes the same memory
  return result.state;
}

// One block a pair of rows.
template <class V>
__global__ void __launch_bounds__(kLanes, V::aligned ? 2 : 1) paired_forward_kernel(PairedForward call, Partition partition) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x, n = call.rows.num_tokens;
  const RowScale<Real> scale(call.rows, row);
  const StatsShared<Real> shared(dynamic_shared(), partition.segments);
  const T* fresh_row = call.rows.logits.row<const T>(row);
  const T* old_row = call.old_logits.row<const T>(row);
  const auto state_of = [&](const T* elements, int first) -> RowState<Real> {
    const Real* known = static_cast<const Real*>(call.states) + first * n + row;
    if (call.states) return {known[0], known[n], known[2 * n]};
    return row_state<V>(scale, partition, elements, shared);
  };
  const RowState<Real> fresh = state_of(fresh_row, 0), old = state_of(old_row, 3);
  const bool valid = fresh.is_valid() && old.is_valid();

  Real sums[kPairedSums] = {};
  if (valid) {
    const Side<Real> p(fresh), q(old);
    for_each_vector<V>(fresh_row, old_row, partition.vocab_size, [&](int64_t, const Raw& fresh_raw, const Raw& old_raw) {
#pragma unroll
      for (int k = 0; k < kVector<T> / 2; ++k) {
        const Pair<Real> v_new = V::values(scale, fresh_raw, k), v_old = V::values(scale, old_raw, k);
        PairedColumn<Real>(p, q, scale.scale, v_new.a, v_old.a).add_to(sums);
        PairedColumn<Real>(p, q, scale.scale, v_new.b, v_old.b).add_to(sums);
      }
    });
  }
  constexpr int kWarps = kLanes / kWarp;
  Real* partial = shared.lanes;  // [kPairedSums, kWarps]
#pragma unroll
  for (int k = 0; k < kPairedSums; ++k) {
    const Real sum = warp_sum(sums[k]);
    if (threadIdx.x % kWarp == 0) partial[k * kWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const Real nan = Real(NAN);
  Real total[kPairedSums];
  for (int k = 0; k < kPairedSums; ++k) {
    total[k] = valid ? Real(0) : nan;
    for (int w = 0; w < kWarps; ++w) total[k] += partial[k * kWarps + w];
  }
  const Real entropy = fresh.is_valid() ? fresh.entropy() : nan, old_entropy = old.is_valid() ? old.entropy() : nan;
  const Real ratio = (entropy + Real(kRatioEps)) / (old_entropy + Real(kRatioEps));
  const Real stats[] = {ratio, entropy, old_entropy, total[0], total[1], total[2] / 2};
  const Real saved[] = {fresh.row_max, fresh.sum_rest, fresh.weighted_sum, old.row_max,
                        old.sum_rest,  old.weighted_sum, total[0],         total[3]};
  for (int k = 0; k < kPairedOutputs; ++k) put(call.stats, k * n + row, stats[k]);
  for (int k = 0; k < kPairedSaved; ++k) put(call.saved, k * n + row, saved[k]);
}

// d/dx_j = p_j * (g_H * (E[x - m] - (x_j - m)) + g_KL * (log p_j - log q_j - KL) + g_TV / 2 * (sign(p_j - q_j) - E_p[sign]))
//          + g_reverse * (p_j - q_j), with g_H the entropy's own gradient plus the ratio's.
template <class V>
__global__ void __launch_bounds__(kLanes, 2) paired_backward_kernel(PairedBackward call) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x, n = call.rows.num_tokens;
  const RowScale<Real> scale(call.rows, row);
  const Real* saved = static_cast<const Real*>(call.saved) + row;
  const Real* g = static_cast<const Real*>(call.grads) + row;
  const RowState<Real> fresh{saved[0], saved[n], saved[2 * n]}, old{saved[3 * n], saved[4 * n], saved[5 * n]};
  T* out = call.grad_logits.row<T>(row);
  const bool valid = fresh.is_valid() && old.is_valid();
  const Side<Real> p(fresh), q(old);
  const Real g_kl = g[3 * n], g_reverse = g[4 * n], half_variation = g[5 * n] / 2;
  const Real g_entropy = g[0] / (old.entropy() + Real(kRatioEps)) + g[n];
  const Real constant = g_entropy * fresh.weighted_sum / fresh.sum_exp() - (g_kl == 0 ? Real(0) : g_kl * saved[6 * n]) -
                        half_variation * saved[7 * n];
  const auto gradient = [&](Real v_new, Real v_old, Real slope) {
    if (!valid) return Real(NAN);
    if (v_new == -Real(INFINITY)) return Real(0);
    const PairedColumn<Real> at(p, q, scale.scale, v_new, v_old);
    const Real sign = at.difference > 0 ? half_variation : at.difference < 0 ? -half_variation : Real(0);
    const Real kl = g_kl == 0 || at.p == 0 ? Real(0) : g_kl * at.delta;
    const Real own = at.p == 0 ? Real(0) : at.p * (constant - g_entropy * p.shift(v_new, scale.scale) + kl + sign);
    return (own + g_reverse * at.difference) * scale.chain * slope;
  };
  for_each_vector<V>(call.rows.logits.row<const T>(row), call.old_logits.row<const T>(row),
                     call.rows.logits.vocab_size, [&](int64_t i, const Raw& fresh_raw, const Raw& old_raw) {
    Raw grads;
#pragma unroll
    for (int k = 0; k < kVector<T> / 2; ++k) {
      const Pair<Real> v_new = V::values(scale, fresh_raw, k), v_old = V::values(scale, old_raw, k);
      const Pair<Real> slope = V::slopes(scale, fresh_raw, k);
      set_pair(T{}, grads, k, Pair<Real>{gradient(v_new.a, v_old.a, slope.a), gradient(v_new.b, v_old.b, slope.b)});
    }
    const int64_t left = call.rows.logits.vocab_size - i;
    left >= kVector<T> ? store_vector<V>(out + i, grads) : store_elements(out + i, grads, int(left));
  });
}

cudaError_t paired_forward(const PairedForward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits, &call.old_logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    const Partition partition = partition_of(logits.vocab_size, sizeof(typename V::Element));
    const int bytes = stats_shared_bytes<typename V::Real>(partition.segments, partition.segments);
    return launch(paired_forward_kernel<V>, {logits.num_rows, kLanes, 1, bytes, stream}, call, partition);
  });
}

cudaError_t paired_backward(const PairedBackward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits, &call.old_logits, &call.grad_logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    return launch(paired_backward_kernel<decltype(variant)>, {logits.num_rows, kLanes, 1, 0, stream}, call);
  });
}

}  // namespace cuda
}  // namespace erc
