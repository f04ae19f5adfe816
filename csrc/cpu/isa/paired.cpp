// New and old rows side by side: entropies, their ratio, both Kullback-Leibler divergences and the total variation.
// The first sweep gives each row its own state; the second, from cache, adds up terms that are >= 0 one by one:
// KL(p||q) = sum p * (delta + expm1(-delta)) with delta = log p - log q, so that a small divergence is not a difference.
#include "cpu/isa/gradient.h"
#include "cpu/isa/operators.h"

namespace erc {
namespace ERC_ISA {

// delta + expm1(-delta) >= 0, by its series where the two would cancel; the argument is at least -1/2.
template <class Real, class V>
ERC_INLINE V divergence_series(V delta) {
  // sum over k >= 2 of (-delta)^k / k!, to k = 10: the rest is below 1e-10 of the sum for |delta| <= 1/2.
  const V x = -delta;
  V q = x * Real(1.0 / 3628800) + Real(1.0 / 362880);
  q = q * x + Real(1.0 / 40320);
  q = q * x + Real(1.0 / 5040);
  q = q * x + Real(1.0 / 720);
  q = q * x + Real(1.0 / 120);
  q = q * x + Real(1.0 / 24);
  q = q * x + Real(1.0 / 6);
  q = q * x + Real(0.5);
  return q * x * x;
}

template <class V>
ERC_INLINE V magnitude(V x) {
  return select(x < 0, -x, x);
}

struct PairedSums {
  double kl_new_old = 0, kl_old_new = 0, variation = 0, sign = 0;
};

// One of the two rows as the second sweep sees it.
template <class T>
struct Side {
  using Real = stats_t<T>;
  const T* row;
  Real row_max, log_sum, inverse_sum;

  Side(const T* row, const RowState<double>& state)
      : row(row), row_max(Real(state.row_max)), log_sum(Real(std::log1p(state.sum_rest))),
        inverse_sum(Real(1 / state.sum_exp())) {}
};

template <bool kSoftcap, class T>
static PairedSums paired_segment(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp, const Side<T>& p,
                                 const Side<T>& q, const T* new_row, const T* old_row, int64_t n) {
  using Real = stats_t<T>;
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  const Real rate = Real(scale.scale);
  V new_old[kVectors] = {}, old_new[kVectors] = {}, variation[kVectors] = {}, sign[kVectors] = {};
  T old_padded[kLanes];
  for_each_block(new_row, n, [&](const T* block, int64_t i, auto) {
    const T* old_block = old_row + i;
    if (i + kLanes > n) {
      for (int j = 0; j < kLanes; ++j) old_padded[j] = i + j < n ? old_row[i + j] : minus_infinity<T>();
      old_block = old_padded;
    }
    V block_new[kVectors], block_old[kVectors];
    load_block_v<kSoftcap>(scale, block, block_new);
    load_block_v<kSoftcap>(scale, old_block, block_old);
    for (int j = 0; j < kVectors; ++j) {
      const V v_new = block_new[j], v_old = block_old[j];
      const V d_new = exp.clamp(v_new - p.row_max), d_old = exp.clamp(v_old - q.row_max);
      const V prob_new = exp(d_new) * p.inverse_sum, prob_old = exp(d_old) * q.inverse_sum;
      const V difference = prob_new - prob_old;
      // The true difference of log-probs: where both tokens are forbidden it is 0, where one is, +-inf.
      const V log_new = (v_new - p.row_max) * rate - p.log_sum, log_old = (v_old - q.row_max) * rate - q.log_sum;
      const V delta = select((v_new == -INFINITY) & (v_old == -INFINITY), V{}, log_new - log_old);
      const auto small = magnitude(delta) < 0.5f;
      const V tame = select(small, delta, V{});
      const V far_new = select(prob_new == 0, V{}, prob_new * delta) - difference;
      const V far_old = difference - select(prob_old == 0, V{}, prob_old * delta);
      new_old[j] = new_old[j] + select(small, prob_new * divergence_series<Real>(tame), far_new);
      old_new[j] = old_new[j] + select(small, prob_old * divergence_series<Real>(-tame), far_old);
      variation[j] = variation[j] + magnitude(difference);
      sign[j] = sign[j] + select(difference > 0, prob_new, select(difference < 0, -prob_new, V{}));
    }
  });
  return {add_lanes<T>(new_old), add_lanes<T>(old_new), add_lanes<T>(variation), add_lanes<T>(sign)};
}

template <bool kSoftcap, class T>
static PairedSums paired_sums(const RowScale<stats_t<T>>& scale, const Side<T>& p, const Side<T>& q, int64_t vocab_size) {
  const ScaledExp<stats_t<T>> exp(scale.scale);
  PairedSums total;
  for (int64_t start = 0; start < vocab_size; start += kSegment) {
    const int64_t n = vocab_size - start < kSegment ? vocab_size - start : kSegment;
    const PairedSums part = paired_segment<kSoftcap>(scale, exp, p, q, p.row + start, q.row + start, n);
    total.kl_new_old += part.kl_new_old;
    total.kl_old_new += part.kl_old_new;
    total.variation += part.variation;
    total.sign += part.sign;
  }
  return total;
}

void paired_forward(const PairedForward& call, int64_t begin, int64_t end) {
  dispatch(call.rows.logits.dtype, call.rows.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t vocab_size = call.rows.logits.vocab_size, n = call.rows.num_tokens;
    for (int64_t i = begin; i < end; ++i) {
      const T *new_row = call.rows.logits.row<T>(i), *old_row = call.old_logits.row<T>(i);
      const RowScale<Real> scale(call.rows, i);
      const Real* known = static_cast<const Real*>(call.states);
      const auto state_of = [&](const T* row, int64_t first) -> RowState<double> {
        if (known) return {known[first * n + i], known[(first + 1) * n + i], known[(first + 2) * n + i]};
        return rounded<Real>(row_sweep<kSoftcap>(scale, row, vocab_size)).state;
      };
      const RowState<double> p = state_of(new_row, 0), q = state_of(old_row, 3);
      double entropy = p.is_valid() ? p.entropy() : NAN, old_entropy = q.is_valid() ? q.entropy() : NAN;
      PairedSums sums{NAN, NAN, NAN, NAN};
      if (p.is_valid() && q.is_valid()) {
        sums = paired_sums<kSoftcap, T>(scale, Side<T>(new_row, p), Side<T>(old_row, q), vocab_size);
      }
      const double stats[] = {(entropy + kRatioEps) / (old_entropy + kRatioEps),
                              entropy,
                              old_entropy,
                              sums.kl_new_old,
                              sums.kl_old_new,
                              sums.variation / 2};
      const double saved[] = {p.row_max,  p.sum_rest,     p.weighted_sum,  q.row_max,
                              q.sum_rest, q.weighted_sum, sums.kl_new_old, sums.sign};
      for (int64_t k = 0; k < kPairedOutputs; ++k) put<Real>(call.stats, k * n + i, stats[k]);
      for (int64_t k = 0; k < kPairedSaved; ++k) put<Real>(call.saved, k * n + i, saved[k]);
    }
  });
}

// d/dx_j = p_j * (A + B * (x_j - m) + C * (log p_j - log q_j - KL) + D * (sign(p_j - q_j) - E_p[sign]) + E) - E * q_j.
template <bool kSoftcap, class T>
static void paired_gradient(const RowScale<stats_t<T>>& scale, const Side<T>& p, const Side<T>& q,
                            const RowState<double>& state, const double (&g)[kPairedOutputs], double ratio_slope, double kl,
                            double sign, int64_t vocab_size, T* grad) {
  using Real = stats_t<T>;
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  const ScaledExp<Real> exp(scale.scale);
  const double entropy_grad = g[0] * ratio_slope + g[1];
  const double mean = state.weighted_sum / state.sum_exp();
  // An infinite divergence that nobody differentiates takes no part: 0 * inf is NaN.
  const Real constant = Real(entropy_grad * mean - (g[3] == 0 ? 0 : g[3] * kl) - g[5] / 2 * sign);
  const Real slope = Real(-entropy_grad * scale.scale), rate = Real(scale.scale), chain = Real(scale.chain);
  const Real kl_grad = Real(g[3]), reverse_grad = Real(g[4]), half_variation = Real(g[5] / 2);
  T old_padded[kLanes], out_padded[kLanes];
  for_each_block(p.row, vocab_size, [&](const T* block, int64_t i, auto) {
    const bool whole = i + kLanes <= vocab_size;
    const T* old_block = q.row + i;
    if (!whole) {
      for (int j = 0; j < kLanes; ++j) old_padded[j] = i + j < vocab_size ? q.row[i + j] : minus_infinity<T>();
      old_block = old_padded;
    }
    T* out = whole ? grad + i : out_padded;
    V block_new[kVectors], block_old[kVectors], gradient[kVectors];
    load_block_v<kSoftcap>(scale, block, block_new);
    load_block_v<kSoftcap>(scale, old_block, block_old);
    for (int j = 0; j < kVectors; ++j) {
      const V v_new = block_new[j], v_old = block_old[j];
      const V d_new = exp.clamp(v_new - p.row_max), d_old = exp.clamp(v_old - q.row_max);
      const V prob_new = exp(d_new) * p.inverse_sum, prob_old = exp(d_old) * q.inverse_sum;
      const V difference = prob_new - prob_old;
      const V log_ratio = ((v_new - p.row_max) * rate - p.log_sum) - ((v_old - q.row_max) * rate - q.log_sum);
      const V sign_term = select(difference > 0, V{} + half_variation, select(difference < 0, V{} - half_variation, V{}));
      const V kl_term = kl_grad == 0 ? V{} : select(prob_new == 0, V{}, kl_grad * log_ratio);
      V x = prob_new * (constant + slope * d_new + kl_term + sign_term) + reverse_grad * difference;
      x = select(v_new == -INFINITY, V{}, x * chain);
      gradient[j] = x;
    }
    if constexpr (kSoftcap) {
      V z[kVectors];
      load_block(block, z);
      for (int j = 0; j < kVectors; ++j) gradient[j] = gradient[j] * softcap_slope<Real>(scale, z[j]);
    }
    store_block<false, T>(out, gradient);
    if (!whole) std::memcpy(grad + i, out_padded, (vocab_size - i) * sizeof(T));
  });
}

void paired_backward(const PairedBackward& call, int64_t begin, int64_t end) {
  dispatch(call.rows.logits.dtype, call.rows.scaling.softcap != 0, [&](auto zero, auto softcap) {
    using T = decltype(zero);
    using Real = stats_t<T>;
    constexpr bool kSoftcap = decltype(softcap)::value;
    const int64_t vocab_size = call.rows.logits.vocab_size, n = call.rows.num_tokens;
    for (int64_t i = begin; i < end; ++i) {
      double saved[kPairedSaved], g[kPairedOutputs];
      for (int64_t k = 0; k < kPairedSaved; ++k) saved[k] = static_cast<const Real*>(call.saved)[k * n + i];
      for (int64_t k = 0; k < kPairedOutputs; ++k) g[k] = static_cast<const Real*>(call.grads)[k * n + i];
      const RowState<double> p{saved[0], saved[1], saved[2]}, q{saved[3], saved[4], saved[5]};
      T* grad = call.grad_logits.row<T>(i);
      if (!p.is_valid() || !q.is_valid()) {
        fill(grad, vocab_size, Real(NAN));
        continue;
      }
      const double ratio_slope = 1 / (q.entropy() + kRatioEps);
      paired_gradient<kSoftcap, T>(RowScale<Real>(call.rows, i), Side<T>(call.rows.logits.row<T>(i), p),
                                   Side<T>(call.old_logits.row<T>(i), q), p, g, ratio_slope, saved[6], saved[7], vocab_size,
                                   grad);
    }
  });
}

}  // namespace ERC_ISA
}  // namespace erc
