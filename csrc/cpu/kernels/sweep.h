// Sweeps over one row: statistics, and the gradient. A row is cut into segments of kSegment elements whose sums are added
// from left to right in float64, so the order of additions depends on V alone.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/row_state.h"
#include "cpu/kernels.h"
#include "cpu/kernels/simd.h"

namespace erc {
namespace ERC_ISA {

constexpr int64_t kSegment = 2048;

// The scaling of one row, and the carrier v of its centred variable (DESIGN: row algebra): v = z, or its softcapped value.
template <class Real>
struct RowScale {
  double scale;   // x = v * scale
  double chain;   // dv * scale / dz, but for the softcap's own factor
  Real softcap;   // 0: none
  Real inner;     // z * inner enters the softcap's tanh

  RowScale(const RowScaling& s, int64_t row) {
    const double temperature = s.temperature ? double(static_cast<const Real*>(s.temperature)[row]) : s.scaling.temperature;
    softcap = Real(s.scaling.softcap);
    chain = s.scaling.logit_scale / temperature;
    scale = softcap == 0 ? chain : 1 / temperature;
    inner = softcap == 0 ? Real(1) : Real(s.scaling.logit_scale / s.scaling.softcap);
  }
};

template <class T>
using vector_of = typename VectorOf<stats_t<T>>::type;
template <class T>
constexpr int width_of = VectorOf<stats_t<T>>::width;

// Softcap of finite logits; an infinite one stays infinite: -inf forbids a token, +inf makes its row NaN.
template <class Real, class V>
ERC_INLINE V softcapped(const RowScale<Real>& scale, V z) {
  const V capped = scale.softcap * vtanh(z * scale.inner);
  return select((z == INFINITY) | (z == -INFINITY), z, capped);
}

// The softcap's factor of dx/dz.
template <class Real, class V>
ERC_INLINE V softcap_slope(const RowScale<Real>& scale, V z) {
  return vtanh_slope(z * scale.inner);
}

template <bool kSoftcap, class T>
ERC_INLINE vector_of<T> load_v(const RowScale<stats_t<T>>& scale, const T* p) {
  const vector_of<T> z = load(p);
  if constexpr (kSoftcap) return softcapped<stats_t<T>>(scale, z);
  return z;
}

// The block's v, in the order of element_of.
template <bool kSoftcap, class T, class V, int kCount>
ERC_INLINE void load_block_v(const RowScale<stats_t<T>>& scale, const T* p, V (&v)[kCount]) {
  load_block(p, v);
  if constexpr (kSoftcap) {
    for (V& z : v) z = softcapped<stats_t<T>>(scale, z);
  }
}

template <bool kSoftcap, class T>
inline stats_t<T> load_v_one(const RowScale<stats_t<T>>& scale, const T* p) {
  T padded[width_of<T>] = {};
  padded[0] = *p;
  const vector_of<T> v = load_v<kSoftcap>(scale, padded);
  stats_t<T> first;
  std::memcpy(&first, &v, sizeof first);
  return first;
}

template <class T>
inline T minus_infinity() {
  T value;
  store_one(&value, -INFINITY);
  return value;
}

// Calls visit(pointer, count) for every block of kLanes elements; the last one is padded with forbidden tokens.
template <class T, class Visit>
ERC_INLINE void for_each_block(const T* p, int64_t n, Visit&& visit) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) visit(p + i, i);
  if (whole == n) return;
  T padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = whole + i < n ? p[whole + i] : minus_infinity<T>();
  visit(padded, whole);
}

// What a sweep over a segment leaves, lane by lane: its maximum, and the sums of exp((v - center) * scale) and of
// exp(..) * (v - center). The sums mean nothing where the maximum exceeds the center.
template <class Real>
struct SegmentSums {
  static constexpr int kVectors = kLanes / VectorOf<Real>::width;
  using V = typename VectorOf<Real>::type;
  V max[kVectors], sum_exp[kVectors], weighted_sum[kVectors];
};

// Sums of a row's segments in float64, still lane by lane: adding across lanes takes longer than a segment's last blocks, so
// it waits for the end of the row.
struct LaneTotals {
  double lanes[kLanes] = {};

  template <class V, int kCount>
  ERC_INLINE void add(const V (&segment)[kCount], double factor) {
    using Real = std::conditional_t<sizeof(segment) == sizeof(lanes), double, float>;
    Real values[kLanes];
    static_assert(sizeof values == sizeof segment, "");
    std::memcpy(values, segment, sizeof values);
    for (int i = 0; i < kLanes; ++i) lanes[i] += factor * double(values[i]);
  }
  // In the order of the elements, which is the same for every instruction set.
  template <class T>
  double total() const {
    double by_element[kLanes], sum = 0;
    for (int i = 0; i < kLanes; ++i) by_element[element_of<T>(i)] = lanes[i];
    for (double lane : by_element) sum += lane;
    return sum;
  }
};

template <class T, class V, int kCount>
inline double add_lanes(const V (&lanes)[kCount]) {
  LaneTotals totals;
  totals.add(lanes, 1);
  return totals.total<T>();
}

template <class V, int kCount>
inline auto max_lanes(const V (&lanes)[kCount]) {
  V best = lanes[0];
  for (int j = 1; j < kCount; ++j) best = vmax(lanes[j], best);
  if constexpr (sizeof(V) == sizeof(double)) {
    return best;
  } else {
    float widest = best[0];
    for (size_t i = 1; i < sizeof(V) / sizeof(float); ++i) widest = best[i] > widest ? best[i] : widest;
    return widest;
  }
}

template <bool kSoftcap, class T>
inline stats_t<T> segment_max(const RowScale<stats_t<T>>& scale, const T* p, int64_t n) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  V lanes[kVectors];
  for (V& lane : lanes) lane = V{} - stats_t<T>(INFINITY);
  for_each_block(p, n, [&](const T* block, int64_t) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) lanes[j] = vmax(v[j], lanes[j]);
  });
  return max_lanes(lanes);
}

template <bool kSoftcap, class T>
inline SegmentSums<stats_t<T>> segment_sums(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp,
                                            stats_t<T> center, const T* p, int64_t n) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  // Plain arrays, copied at the end: the sweep keeps them in registers.
  V sum[kVectors] = {}, weighted[kVectors] = {}, max[kVectors];
  for (V& lane : max) lane = V{} - stats_t<T>(INFINITY);
  for_each_block(p, n, [&, scale, exp](const T* block, int64_t) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) {
      max[j] = vmax(v[j], max[j]);
      const V d = exp.clamp(v[j] - center);
      const V e = exp(d);
      sum[j] = sum[j] + e;
      weighted[j] = e * d + weighted[j];
    }
  });
  SegmentSums<stats_t<T>> sums;
  std::memcpy(sums.max, max, sizeof max);
  std::memcpy(sums.sum_exp, sum, sizeof sum);
  std::memcpy(sums.weighted_sum, weighted, sizeof weighted);
  return sums;
}

// Whether any lane exceeds the center. NaN does not: it is in the sums.
template <class Real>
ERC_INLINE bool exceeds(const SegmentSums<Real>& sums, Real center) {
  auto best = sums.max[0];
  for (int j = 1; j < SegmentSums<Real>::kVectors; ++j) best = vmax(sums.max[j], best);
  return any(best > center);
}

// The segment's sum without one of its maxima: 1 + R has lost what a peaked row's entropy is made of.
template <bool kSoftcap, class T>
inline double segment_sum_rest(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp, stats_t<T> center,
                               const T* p, int64_t n) {
  using V = vector_of<T>;
  T copy[kSegment];
  std::memcpy(copy, p, n * sizeof(T));
  int64_t argmax = 0;
  for (bool found = false; !found && argmax + kLanes <= n; argmax += found ? 0 : kLanes) {
    for (int j = 0; j < kLanes; j += width_of<T>) found |= any(load_v<kSoftcap>(scale, p + argmax + j) == V{} + center);
  }
  while (argmax < n - 1 && !(load_v_one<kSoftcap>(scale, p + argmax) == center)) ++argmax;
  copy[argmax] = minus_infinity<T>();
  return add_lanes<T>(segment_sums<kSoftcap>(scale, exp, center, copy, n).sum_exp);
}

template <class T>
inline bool holds_nan(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto z = load_one(p + i);
    if (z != z) return true;
  }
  return false;
}

// Moves the center of both sums by shift <= 0, in units of x.
inline void recentre(LaneTotals& total, LaneTotals& weighted, double shift) {
  const double factor = std::exp(shift);
  for (int i = 0; i < kLanes; ++i) {
    weighted.lanes[i] = factor * (weighted.lanes[i] + total.lanes[i] * shift);
    total.lanes[i] *= factor;
  }
}

// The state of a row, or of a shard's part of it. NaN and +inf make the sums NaN; a row without any finite logit is empty.
//
// Every segment is centred at the largest logit so far, which it rarely exceeds; where it does, it is swept again from cache.
template <bool kSoftcap, class T>
inline RowState<double> row_state(const RowScale<stats_t<T>>& scale, const T* row, int64_t vocab_size) {
  using Real = stats_t<T>;
  const ScaledExp<Real> exp(scale.scale);
  RowState<double> state;
  // Sums over all segments so far but the winner, which holds the maximum and is added without it at the end.
  LaneTotals total, weighted;
  SegmentSums<Real> winner_sums;
  const T* winner = nullptr;
  int64_t winner_size = 0;
  const auto add = [&](const SegmentSums<Real>& sums) {
    total.add(sums.sum_exp, 1);
    weighted.add(sums.weighted_sum, scale.scale);
  };
  for (int64_t start = 0; start < vocab_size; start += kSegment) {
    const int64_t n = vocab_size - start < kSegment ? vocab_size - start : kSegment;
    const T* p = row + start;
    Real center = winner ? Real(state.row_max) : segment_max<kSoftcap>(scale, p, n);
    if (center == Real(-INFINITY)) {
      if (holds_nan(p, n)) return {NAN, NAN, NAN};
      continue;
    }
    SegmentSums<Real> sums = segment_sums<kSoftcap>(scale, exp, center, p, n);
    if (winner != nullptr && !exceeds(sums, center)) {
      add(sums);
      continue;
    }
    if (winner != nullptr) {
      center = max_lanes(sums.max);
      sums = segment_sums<kSoftcap>(scale, exp, center, p, n);
      add(winner_sums);
      recentre(total, weighted, (state.row_max - double(center)) * scale.scale);
    }
    state.row_max = double(center);
    winner = p, winner_size = n, winner_sums = sums;
  }
  if (winner == nullptr) return state;
  weighted.add(winner_sums.weighted_sum, scale.scale);
  state.sum_rest = total.total<T>();
  state.weighted_sum = weighted.total<T>();
  if (state.is_valid()) {
    state.sum_rest += segment_sum_rest<kSoftcap>(scale, exp, Real(state.row_max), winner, winner_size);
  }
  return state;
}

// The same state rounded to the statistics dtype, in which it is saved: forward and backward see one state.
template <class Real>
inline RowState<double> rounded(const RowState<double>& state) {
  return {double(Real(state.row_max)), double(Real(state.sum_rest)), double(Real(state.weighted_sum))};
}

template <class T>
inline void fill(T* row, int64_t vocab_size, stats_t<T> value) {
  T encoded;
  store_one(&encoded, value);
  for (int64_t i = 0; i < vocab_size; ++i) row[i] = encoded;
}

constexpr int64_t kNoColumn = -1;

// grad[j] = exp((v_j - row_max) * scale) * (constant + slope * (v_j - row_max)) * dx/dz, and the labelled column by itself.
// grad may be the row itself: every block is read before it is written.
template <bool kSoftcap, bool kStream, class T>
inline void gradient_blocks(const RowScale<stats_t<T>>& scale, stats_t<T> row_max, stats_t<T> constant, stats_t<T> slope,
                            const T* row, int64_t vocab_size, T* grad) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  const ScaledExp<stats_t<T>> exp(scale.scale);
  // Captured by value: through a reference, every store to grad could change the constants, and each block would reload them.
  const auto gradient = [=](const T* block, V (&g)[kVectors]) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) {
      const V d = exp.clamp(v[j] - row_max);
      g[j] = exp(d) * (slope * d + constant);
    }
    if constexpr (kSoftcap) {
      V z[kVectors];
      load_block(block, z);
      for (int j = 0; j < kVectors; ++j) g[j] = g[j] * softcap_slope<stats_t<T>>(scale, z[j]);
    }
  };
  for_each_block(row, vocab_size, [=](const T* block, int64_t i) {
    V g[kVectors];
    gradient(block, g);
    if (i + kLanes <= vocab_size) return store_block<kStream>(grad + i, g);
    T padded[kLanes];
    store_block<false>(padded, g);
    std::memcpy(grad + i, padded, (vocab_size - i) * sizeof(T));
  });
  if (kStream) stream_fence();
}

template <bool kSoftcap, class T>
inline void row_gradient(const RowScale<stats_t<T>>& scale, const RowState<double>& state, const StatGrads<double>& grads,
                         const T* row, int64_t vocab_size, int64_t label, T* grad) {
  using Real = stats_t<T>;
  if (!state.is_valid()) return fill(grad, vocab_size, Real(NAN));
  if (grads.logprob == 0 && grads.entropy == 0 && grads.logsumexp == 0) {
    std::memset(static_cast<void*>(grad), 0, vocab_size * sizeof(T));
    return;
  }
  const Real label_value = label == kNoColumn ? Real(0) : load_v_one<kSoftcap>(scale, row + label);
  // Read before the gradient may overwrite the row.
  double label_slope = 1;
  if (kSoftcap && label != kNoColumn) {
    label_slope = vtanh_slope(double(load_v_one<false>(scale, row + label)) * double(scale.inner));
  }
  const RowGradient<double> g(state, scale.scale, grads, double(label_value));
  const Real constant = Real(g.constant * scale.chain), slope = Real(g.slope * scale.chain), row_max = Real(state.row_max);
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 64 == 0;
  if (grad != row && aligned) {
    gradient_blocks<kSoftcap, true>(scale, row_max, constant, slope, row, vocab_size, grad);
  } else {
    gradient_blocks<kSoftcap, false>(scale, row_max, constant, slope, row, vocab_size, grad);
  }
  if (label == kNoColumn) return;
  store_one(grad + label, Real(g.label * scale.chain * label_slope));
}

// Where a row's label lies.
enum class LabelKind { kIgnored, kAbsent, kHere, kOutOfRange };

struct Label {
  LabelKind kind;
  int64_t column;  // kNoColumn unless kHere
};

inline Label row_label(const RowInputs& in, int64_t row) {
  if (in.labels == nullptr) return {LabelKind::kAbsent, kNoColumn};
  const int64_t label = in.labels[row];
  if (label == in.ignore_index) return {LabelKind::kIgnored, kNoColumn};
  if (label == kAbsentLabel) return {LabelKind::kAbsent, kNoColumn};
  const int64_t column = label - in.label_start;
  if (column >= 0 && column < in.logits.vocab_size) return {LabelKind::kHere, column};
  return {LabelKind::kOutOfRange, kNoColumn};
}

template <class T>
inline stats_t<T> optional_row(const void* values, int64_t row, stats_t<T> otherwise) {
  return values ? static_cast<const stats_t<T>*>(values)[row] : otherwise;
}

template <class Real>
inline void put(void* values, int64_t index, double x) {
  if (values) static_cast<Real*>(values)[index] = Real(x);
}

// Runs body.template operator()<T, softcap present>() for the call's dtype.
template <class Body>
inline void dispatch(DType dtype, bool softcap, Body&& body) {
  const auto with_type = [&](auto zero) {
    using T = decltype(zero);
    softcap ? body(T{}, std::true_type{}) : body(T{}, std::false_type{});
  };
  switch (dtype) {
    case DType::kFloat32: return with_type(float{});
    case DType::kBFloat16: return with_type(bfloat16{});
    case DType::kFloat16: return with_type(float16{});
    case DType::kFloat64: return with_type(double{});
  }
}

}  // namespace ERC_ISA
}  // namespace erc
