// The gradient sweep: grad[j] = 2^((v_j - row_max) * rate) * (constant + slope * (v_j - row_max) * rate) * dx/dz, and the
// labelled column by itself (common/row_state.h says why).
#pragma once

#include "cuda/sweep.cuh"

namespace erc {
namespace cuda {

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
    slope = gradient.slope * scale.chain_by_rate;
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

// The gradient of a vector. kHoles: it may hold -inf that the statistics did not report, as the filling at a row's ends.
template <bool kGuardedForm, bool kHoles, class V, class G>
ERC_DEVICE void gradient_vector(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                                const Raw& raw, Raw& out, int out_pair) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Pair<Real> slope{plan.slope, plan.slope}, constant{plan.constant, plan.constant};
#pragma unroll
  for (int i = 0; i < kVector<T> / 2; ++i) {
    const Capped<Real> z = V::template pair < kGuardedForm || kHoles > (scale, raw, i);
    const Pair<Real> v = z.value;
    Pair<Real> u;
    if constexpr (kGuardedForm) {
      u = {mul_rn(v.a - plan.center, scale.rate), mul_rn(v.b - plan.center, scale.rate)};
    } else {
      u = fma_pair(v, Pair<Real>{scale.rate, scale.rate}, Pair<Real>{-plan.center, -plan.center});
    }
    if constexpr (kGuardedForm || kHoles) u = {above_floor(u.a), above_floor(u.b)};
    const Pair<Real> e{ex2(u.a), ex2(u.b)};
    Pair<Real> g = mul_pair(e, fma_pair(slope, u, constant));
    if constexpr (V::softcap) g = mul_pair(g, z.slope);
    set_pair(G{}, out, out_pair + i, g);
  }
}

// The columns of a segment as its gradient is written: sixteen aligned bytes at a time, and what lies before the first and behind
// the last such chunk. Every column depends on itself alone, so the cut may follow the address.
template <class G>
struct Chunks {
  G* out;
  int head, whole, tail;  // columns, chunks, columns

  ERC_DEVICE Chunks(G* begin, int columns, bool aligned) : out(begin) {
    const int behind = aligned ? 0 : int(reinterpret_cast<uintptr_t>(begin) / sizeof(G) % kVector<G>);
    head = behind == 0 ? 0 : kVector<G> - behind;
    head = head < columns ? head : columns;
    whole = (columns - head) / kVector<G>;
    tail = columns - head - whole * kVector<G>;
  }
  ERC_DEVICE int tail_begin() const { return head + whole * kVector<G>; }

  // Which lane writes a column.
  ERC_DEVICE int lane_of(int column) const {
    const int chunk = (column - head) / kVector<G>;
    return column < head ? 0 : chunk < whole ? chunk % kLanes : kWarp;
  }
};

// kVector<G> columns as one Raw of gradients. A narrower gradient takes two vectors of logits.
template <class T, class G>
constexpr int kVectorsPerChunk = kVector<G> / kVector<T>;

template <bool kGuardedForm, bool kHoles, class V, class G>
ERC_DEVICE Raw gradient_chunk(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                              const Raw* raw) {
  using T = typename V::Element;
  Raw out;
#pragma unroll
  for (int k = 0; k < kVectorsPerChunk<T, G>; ++k) {
    gradient_vector<kGuardedForm, kHoles, V, G>(plan, scale, raw[k], out, k * kVector<T> / 2);
  }
  return out;
}

// Fewer columns than a chunk, one by one.
template <bool kGuardedForm, class V, class G>
ERC_DEVICE void gradient_rest(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                              const typename V::Element* z, G* out, int count) {
  using T = typename V::Element;
  Raw raw[kVectorsPerChunk<T, G>];
#pragma unroll
  for (int k = 0; k < kVectorsPerChunk<T, G>; ++k) {
    raw[k] = load_elements(z + k * kVector<T>, count - k * kVector<T>, V::minus_infinity());
  }
  store_elements(out, gradient_chunk<kGuardedForm, true, V, G>(plan, scale, raw), count);
}

template <bool kGuardedForm, class V, class Memory, class G>
ERC_DEVICE void gradient_columns(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                                 const Segment<V, Memory>& segment, const Chunks<G>& chunks) {
  using T = typename V::Element;
  constexpr int kPer = kVectorsPerChunk<T, G>, kTrip = kUnroll / kPer, kStep = kLanes * kVector<G>;
  const int lane = threadIdx.x % kLanes, count = chunks.whole > lane ? (chunks.whole - lane - 1) / kLanes + 1 : 0;
  const T* z = segment.begin + chunks.head;
  // Logits and gradient are mostly misaligned alike, and then not at all.
  constexpr Effort kEffort = kGuardedForm ? Effort::kElements : Effort::kOneCode;
  with_reader<V::aligned, kEffort>(segment.memory, z, [&](const auto& reader) {
    const T* p = z + lane * kVector<G>;
    G* q = chunks.out + chunks.head + lane * kVector<G>;
#pragma unroll 1
    for (int trips = count / kTrip; trips > 0; --trips, p += kTrip * kStep, q += kTrip * kStep) {
      Raw raw[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) raw[k] = reader.load(p + k / kPer * kStep + k % kPer * kVector<T>);
#pragma unroll
      for (int k = 0; k < kTrip; ++k) {
        store_streaming(q + k * kStep, gradient_chunk<kGuardedForm, false, V, G>(plan, scale, raw + k * kPer));
      }
    }
#pragma unroll 1
    for (int left = count % kTrip; left > 0; --left, p += kStep, q += kStep) {
      Raw raw[kPer];
#pragma unroll
      for (int k = 0; k < kPer; ++k) raw[k] = reader.load(p + k * kVector<T>);
      store_streaming(q, gradient_chunk<kGuardedForm, false, V, G>(plan, scale, raw));
    }
  });
  if (lane == 0 && chunks.head != 0) gradient_rest<kGuardedForm, V>(plan, scale, segment.begin, chunks.out, chunks.head);
  if (lane == kWarp && chunks.tail != 0) {
    const int begin = chunks.tail_begin();
    gradient_rest<kGuardedForm, V>(plan, scale, segment.begin + begin, chunks.out + begin, chunks.tail);
  }
}

template <class G, class Real>
ERC_DEVICE void fill_columns(const Chunks<G>& chunks, Real value) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < kVector<G> / 2; ++i) set_pair(G{}, raw, i, Pair<Real>{value, value});
  const int lane = threadIdx.x % kLanes;
  G* out = chunks.out + chunks.head;
  for (int i = lane; i < chunks.whole; i += kLanes) store_streaming(out + i * kVector<G>, raw);
  if (lane == 0) store_elements(chunks.out, raw, chunks.head);
  if (lane == kWarp) store_elements(chunks.out + chunks.tail_begin(), raw, chunks.tail);
}

// The gradient of one segment by a group of kLanes threads. `label` is the labelled column counted from the segment's first, or
// outside. `out` may be what the segment reads: a thread writes only what it alone has read.
template <class V, class Memory, class G>
ERC_DEVICE void gradient_segment(const GradientPlan<typename V::Real>& plan, const RowScale<typename V::Real>& scale,
                                 const Segment<V, Memory>& segment, int64_t label, G* out) {
  using Real = typename V::Real;
  const Chunks<G> chunks(out, segment.columns, V::aligned);
  if (plan.mode == kFill) {
    fill_columns(chunks, plan.fill);
    return;
  }
  // The thread that writes the label's chunk writes once more; what it reads there, it reads before.
  const bool here = label >= 0 && label < segment.columns;
  const bool writes_label = here && int(threadIdx.x % kLanes) == chunks.lane_of(int(label));
  const Real label_slope = writes_label ? V::slope(scale, segment.begin[label]) : Real(1);
  if (plan.mode == kFast) {
    gradient_columns<false>(plan, scale, segment, chunks);
  } else {
    gradient_columns<true>(plan, scale, segment, chunks);
  }
  if (writes_label) out[label] = from_real(G{}, plan.label * label_slope);
}

}  // namespace cuda
}  // namespace erc
