// The gradient sweep: grad[j] = 2^((v_j - row_max) * rate) * (constant + slope * (v_j - row_max) * rate) * dx/dz, and the
// labelled column by itself (common/row_state.h says why).
#pragma once

#include "cuda/sweep.cuh"

namespace erc {
namespace cuda {

template <class V>
ERC_DEVICE auto global_segments(const Partition& partition, const typename V::Element* row) {
  using Source = GlobalSource<typename V::Element, V::aligned>;
  return [=](int g) { return Segment<V, Source>{Source{row + g * partition.segment_size}, partition.columns(g)}; };
}

template <class Real>
ERC_DEVICE Real optional(const void* values, int64_t row, Real otherwise) {
  return values != nullptr ? static_cast<const Real*>(values)[row] : otherwise;
}

template <class Real>
ERC_DEVICE void put(void* values, int64_t index, Real x) {
  if (values != nullptr) static_cast<Real*>(values)[index] = x;
}

enum GradientMode : int32_t { kFill, kFast, kGuarded };

// All that a row's gradient depends on: one thread computes it, every thread reads it.
template <class Real>
struct GradientPlan {
  GradientMode mode;
  Real fill;    // of kFill: 0 for a row without gradient, NaN for a row without a distribution
  Real center = 0;  // fast: row_max * rate, rounded; guarded: row_max
  Real constant = 0, slope = 0, label = 0;  // label: without the softcap's factor, which belongs to the column

  ERC_DEVICE explicit GradientPlan(Real fill) : mode(kFill), fill(fill) {}

  ERC_DEVICE GradientPlan(const RowState<Real>& state, const RowScale<Real>& scale, StatGrads<Real> grads, Real label_value,
                          bool guarded)
      : mode(kFill), fill(0) {
    if (!state.is_valid()) fill = Real(NAN);
    if (!state.is_valid() || (grads.logprob == 0 && grads.entropy == 0 && grads.logsumexp == 0)) return;
    const RowGradient<Real> gradient(state, scale.scale, grads, label_value);
    label = gradient.label * scale.chain;
    constant = gradient.constant * scale.chain;
    slope = gradient.slope * scale.chain / scale.rate;
    const Real rounded = mul_rn(state.row_max, scale.rate), residual = fma_rn(state.row_max, scale.rate, -rounded);
    // Below these bounds nothing in the fast form overflows where the fast statistics did not, and what the coefficients take
    // back of the residual leaves no rounding that a peaked row's entropy gradient would show.
    if (guarded || !(std::fabs(slope) < Real(0.5)) || !(std::fabs(constant) < Real(1e18)) ||
        !(std::fabs(residual) <= Real(0x1p-16))) {
      mode = kGuarded;
      center = state.row_max;
      return;
    }
    // u = v * rate - rounded is off by the residual of the rounding, for all columns alike: the coefficients take it back.
    const Real factor = std::exp2(-residual);
    mode = kFast;
    center = rounded;
    constant = factor * fma_rn(-slope, residual, constant);
    slope *= factor;
  }
};

// kHoles: the vector may hold -inf that the statistics did not report, as the one at the row's end.
template <bool kGuardedForm, bool kHoles, class V>
ERC_DEVICE Raw gradient_vector(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                               const Raw& raw) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Pair<Real> slope{plan.slope, plan.slope}, constant{plan.constant, plan.constant};
  Raw out;
#pragma unroll
  for (int i = 0; i < kVector<T> / 2; ++i) {
    const Pair<Real> v = V::values(scale, raw, i);
    Pair<Real> u;
    if constexpr (kGuardedForm) {
      u = {mul_rn(v.a - plan.center, scale.rate), mul_rn(v.b - plan.center, scale.rate)};
    } else {
      u = fma_pair(v, Pair<Real>{scale.rate, scale.rate}, Pair<Real>{-plan.center, -plan.center});
    }
    if constexpr (kGuardedForm || kHoles) u = {above_floor(u.a), above_floor(u.b)};
    const Pair<Real> e{ex2(u.a), ex2(u.b)};
    Pair<Real> g = mul_pair(e, fma_pair(slope, u, constant));
    if constexpr (V::softcap) {
      g = mul_pair(g, V::slopes(scale, raw, i));
    }
    set_pair(typename V::Gradient{}, out, i, g);
  }
  return out;
}

// The gradients of a vector of logits.
template <class V>
ERC_DEVICE void store_vector(typename V::Gradient* p, const Raw& raw) {
  if constexpr (V::aligned) {
    store_streaming(p, raw);
  } else {
    store_elements(p, raw, kVector<typename V::Element>);
  }
}

template <bool kGuardedForm, class V, class Source>
ERC_DEVICE void gradient_columns(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                                 const Segment<V, Source>& segment, typename V::Gradient* out) {
  using T = typename V::Element;
  constexpr int kStep = kLanes * kVector<T>;
  const int lane = threadIdx.x % kLanes, whole = segment.whole(), vectors = whole > lane ? (whole - lane - 1) / kLanes + 1 : 0;
  const T* p = segment.source.begin + lane * kVector<T>;
  typename V::Gradient* q = out + lane * kVector<T>;
#pragma unroll 1
  for (int trips = vectors / kUnroll; trips > 0; --trips, p += kUnroll * kStep, q += kUnroll * kStep) {
    Raw raw[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) raw[k] = Source::load(p + k * kStep);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      store_vector<V>(q + k * kStep, gradient_vector<kGuardedForm, false, V>(plan, scale, raw[k]));
    }
  }
#pragma unroll 1
  for (int left = vectors % kUnroll; left > 0; --left, p += kStep, q += kStep) {
    store_vector<V>(q, gradient_vector<kGuardedForm, false, V>(plan, scale, Source::load(p)));
  }
  if (segment.rest() != 0 && lane == 0) {
    const Raw raw = gradient_vector<kGuardedForm, true, V>(plan, scale, segment.tail());
    store_elements(out + int64_t(whole) * kVector<T>, raw, segment.rest());
  }
}

template <class V>
ERC_DEVICE void fill_columns(typename V::Gradient* out, int columns, typename V::Real value) {
  constexpr int kCount = kVector<typename V::Element>;
  Raw raw;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) set_pair(typename V::Gradient{}, raw, i, Pair<typename V::Real>{value, value});
  const int whole = columns / kCount, lane = threadIdx.x % kLanes;
  for (int i = lane; i < whole; i += kLanes) store_vector<V>(out + int64_t(i) * kCount, raw);
  if (lane == 0) store_elements(out + int64_t(whole) * kCount, raw, columns % kCount);
}

// The gradient of one segment by a group of kLanes threads. `label` is the labelled column counted from the segment's first, or outside.
// `out` may be what the segment reads: a thread writes only vectors that it alone has read.
template <class V, class Source>
ERC_DEVICE void gradient_segment(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                                 const Segment<V, Source>& segment, int64_t label, typename V::Gradient* out) {
  using T = typename V::Element;
  using Real = typename V::Real;
  if (plan.mode == kFill) {
    fill_columns<V>(out, segment.columns, plan.fill);
    return;
  }
  // The thread that writes the label's vector writes once more; what it reads there, it reads before.
  const int vector = int(label / kVector<T>), writer = vector < segment.whole() ? vector % kLanes : 0;
  const bool writes_label = label >= 0 && label < segment.columns && int(threadIdx.x % kLanes) == writer;
  const Real label_slope = writes_label ? V::slope(scale, segment.source.begin[label]) : Real(1);
  if (plan.mode == kFast) {
    gradient_columns<false>(plan, scale, segment, out);
  } else {
    gradient_columns<true>(plan, scale, segment, out);
  }
  if (writes_label) out[label] = from_real(typename V::Gradient{}, plan.label * label_slope);
}

}  // namespace cuda
}  // namespace erc
