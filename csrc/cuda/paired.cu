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

template <class Real>
struct PairedShared {
  SegmentState<Real> states[kMaxSegments];
  GroupShared<Real> group;
  Real sums[kPairedSums][kLanes / kWarp];
};

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

// The vector at p, whatever its address; behind `columns` it holds -inf.
template <class V>
ERC_DEVICE Raw vector_of(const typename V::Element* p, int64_t columns) {
  using T = typename V::Element;
  if (columns < kVector<T>) return load_elements(p, int(columns), V::minus_infinity());
  Raw raw;
  const GlobalMemory memory{p, p + columns};
  with_reader<V::aligned, Effort::kOneCode>(memory, p, [&](const auto& reader) { raw = reader.load(p); });
  return raw;
}

// Calls visit(i, new vector, old vector) for the calling thread's vectors of a row, the last one filled up with -inf.
template <class V, class Visit>
ERC_DEVICE void for_each_vector(const typename V::Element* fresh, const typename V::Element* old, int columns, Visit&& visit) {
  using T = typename V::Element;
  for (int64_t i = threadIdx.x * kVector<T>; i < columns; i += kLanes * kVector<T>) {
    visit(int(i), vector_of<V>(fresh + i, columns - i), vector_of<V>(old + i, columns - i));
  }
}

// For every thread; ends with a barrier, since the next row's sweep writes the same memory.
template <class V>
ERC_DEVICE RowState<typename V::Real> row_state(const RowScale<typename V::Real>& scale, const Partition& partition,
                                                const typename V::Element* row, PairedShared<typename V::Real>& shared) {
  segment_states<V>(scale, partition.segments, global_segments<V>(partition, row), &shared.group, shared.states);
  const RowResult<typename V::Real> result = merge_segments(shared.states, partition.segments, scale.scale);
  __syncthreads();
  return result.state;
}

// One block a pair of rows.
template <class V>
__global__ void __launch_bounds__(kLanes, V::aligned ? 2 : 1)
    paired_forward_kernel(PairedForward call, Prepared<V> host, RowAddress old_rows) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const uint32_t row = blockIdx.x;
  const int64_t n = call.rows.num_tokens;
  const Partition& partition = host.partition;
  const RowScale<Real> scale = row_scale(call.rows, host.scale, row);
  auto& shared = *reinterpret_cast<PairedShared<Real>*>(dynamic_shared());
  const T* fresh_row = host.logits.template row<const T>(host.index(row));
  const T* old_row = old_rows.row<const T>(host.index(row));
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
    for_each_vector<V>(fresh_row, old_row, partition.vocab_size, [&](int, const Raw& fresh_raw, const Raw& old_raw) {
#pragma unroll
      for (int k = 0; k < kVector<T> / 2; ++k) {
        const Pair<Real> v_new = V::template pair<true>(scale, fresh_raw, k).value;
        const Pair<Real> v_old = V::template pair<true>(scale, old_raw, k).value;
        PairedColumn<Real>(p, q, scale.scale, v_new.a, v_old.a).add_to(sums);
        PairedColumn<Real>(p, q, scale.scale, v_new.b, v_old.b).add_to(sums);
      }
    });
  }
#pragma unroll
  for (int k = 0; k < kPairedSums; ++k) {
    const Real sum = warp_sum(sums[k]);
    if (threadIdx.x % kWarp == 0) shared.sums[k][threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const Real nan = Real(NAN);
  Real total[kPairedSums];
  for (int k = 0; k < kPairedSums; ++k) {
    total[k] = valid ? Real(0) : nan;
    for (int w = 0; w < kLanes / kWarp; ++w) total[k] += shared.sums[k][w];
  }
  const Real entropy = fresh.is_valid() ? fresh.entropy() : nan, old_entropy = old.is_valid() ? old.entropy() : nan;
  const Real ratio = (entropy + Real(kRatioEps)) / (old_entropy + Real(kRatioEps));
  const Real stats[] = {ratio, entropy, old_entropy, total[0], total[1], total[2] / 2};
  const Real saved[] = {fresh.row_max, fresh.sum_rest,   fresh.weighted_sum, old.row_max,
                        old.sum_rest,  old.weighted_sum, total[0],           total[3]};
  for (int k = 0; k < kPairedOutputs; ++k) put(call.stats, k * n + row, stats[k]);
  for (int k = 0; k < kPairedSaved; ++k) put(call.saved, k * n + row, saved[k]);
}

// d/dx_j = p_j * (g_H * (E[x - m] - (x_j - m)) + g_KL * (log p_j - log q_j - KL) + g_TV / 2 * (sign(p_j - q_j) - E_p[sign]))
//          + g_reverse * (p_j - q_j), with g_H the entropy's own gradient plus the ratio's.
template <class V>
__global__ void __launch_bounds__(kLanes, 2)
    paired_backward_kernel(PairedBackward call, Prepared<V> host, RowAddress old_rows, RowAddress grads) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const uint32_t row = blockIdx.x;
  const int64_t n = call.rows.num_tokens;
  const RowScale<Real> scale = row_scale(call.rows, host.scale, row);
  const Real* saved = static_cast<const Real*>(call.saved) + row;
  const Real* g = static_cast<const Real*>(call.grads) + row;
  const RowState<Real> fresh{saved[0], saved[n], saved[2 * n]}, old{saved[3 * n], saved[4 * n], saved[5 * n]};
  T* out = grads.row<T>(host.index(row));
  const int columns = host.partition.vocab_size;
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
  for_each_vector<V>(host.logits.template row<const T>(host.index(row)), old_rows.row<const T>(host.index(row)), columns,
                     [&](int i, const Raw& fresh_raw, const Raw& old_raw) {
                       Raw gradients;
#pragma unroll
                       for (int k = 0; k < kVector<T> / 2; ++k) {
                         const Capped<Real> z = V::template pair<true>(scale, fresh_raw, k);
                         const Pair<Real> v_new = z.value, v_old = V::template pair<true>(scale, old_raw, k).value;
                         set_pair(T{}, gradients, k,
                                  Pair<Real>{gradient(v_new.a, v_old.a, z.slope.a), gradient(v_new.b, v_old.b, z.slope.b)});
                       }
                       if (V::aligned && i + kVector<T> <= columns) {
                         store_streaming(out + i, gradients);
                       } else {
                         store_elements(out + i, gradients, columns - i);
                       }
                     });
}

cudaError_t paired_forward(const PairedForward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits, &call.old_logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    const int bytes = sizeof(PairedShared<typename V::Real>);
    return launch(paired_forward_kernel<V>, {logits.num_rows, kLanes, 1, bytes, stream}, call, Prepared<V>(call.rows),
                  RowAddress(call.old_logits, sizeof(typename V::Element)));
  });
}

cudaError_t paired_backward(const PairedBackward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits, &call.old_logits, &call.grad_logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    constexpr int kBytes = sizeof(typename V::Element);
    return launch(paired_backward_kernel<V>, {logits.num_rows, kLanes, 1, 0, stream}, call, Prepared<V>(call.rows),
                  RowAddress(call.old_logits, kBytes), RowAddress(call.grad_logits, kBytes));
  });
}

}  // namespace cuda
}  // namespace erc
