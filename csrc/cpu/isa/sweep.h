// Sweeps over one row: statistics, and the gradient. A row is cut into segments of kSegment elements whose sums are added
// from left to right in float64, so the order of additions depends on V alone.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/row_state.h"
#include "cpu/kernels.h"
#include "cpu/isa/simd.h"

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

// Calls visit(pointer, first element, whether whole) for every block of kLanes elements, the last of which is padded with
// forbidden tokens where it is not whole; that is a constant of the call's type.
template <class T, class Visit>
ERC_INLINE void for_each_block(const T* p, int64_t n, Visit&& visit) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) visit(p + i, i, std::true_type{});
  if (whole == n) return;
  T padded[kLanes];
  for (int i = 0; i < kLanes; ++i) padded[i] = whole + i < n ? p[whole + i] : minus_infinity<T>();
  visit(padded, whole, std::false_type{});
}

// What a sweep over a segment leaves, lane by lane: its maximum, and the sums of exp((v - center) * scale) and of
// exp(..) * (v - center). The sums mean nothing where the maximum exceeds the center.
template <class Real>
struct SegmentSums {
  static constexpr int kVectors = kLanes / VectorOf<Real>::width;
  using V = typename VectorOf<Real>::type;
  V max[kVectors], sum_exp[kVectors], weighted_sum[kVectors];
};

// How far below the center a sweep has met logits, lane by lane, as the bits of a float: these order like the distance, and
// those of a negative one or NaN are larger than any that is near.
struct Distance {
  u32v bits = {};

  ERC_INLINE void meet(f32v below) { bits = vmax((u32v)below, bits); }
  ERC_INLINE bool is_near(const ScaledExp<float>& exp) const { return !any((i32v)(bits > bit_cast<uint32_t>(exp.near_limit))); }
  float largest() const {
    uint32_t widest = 0;
    for (int i = 0; i < kWidth; ++i) widest = bits[i] > widest ? bits[i] : widest;
    return bit_cast<float>(widest);
  }
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

// Smallest and largest logit of a segment; NaN is not seen.
template <class Real>
struct Range {
  Real min, max;
};

template <bool kSoftcap, class T>
inline Range<stats_t<T>> segment_range(const RowScale<stats_t<T>>& scale, const T* p, int64_t n) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  V max[kVectors], negated_min[kVectors];
  for (V& lane : max) lane = V{} - stats_t<T>(INFINITY);
  for (V& lane : negated_min) lane = V{} - stats_t<T>(INFINITY);
  for_each_block(p, n, [&](const T* block, int64_t, auto) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) {
      max[j] = vmax(v[j], max[j]);
      negated_min[j] = vmax(-v[j], negated_min[j]);
    }
  });
  return {-max_lanes(negated_min), max_lanes(max)};
}

template <bool kSoftcap, class T>
inline SegmentSums<stats_t<T>> segment_sums(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp,
                                            stats_t<T> center, const T* p, int64_t n) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  // Plain arrays, copied at the end: the sweep keeps them in registers.
  V sum[kVectors] = {}, weighted[kVectors] = {}, max[kVectors];
  for (V& lane : max) lane = V{} - stats_t<T>(INFINITY);
  for_each_block(p, n, [&, scale, exp](const T* block, int64_t, auto) {
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

// The same sums, bit for bit, but for the maximum, by fewer operations: for a segment whose whole blocks lie near below the
// center, which `distance` tells afterwards. A last block that is not whole may hold anything that does not exceed it.
template <bool kSoftcap, class T>
inline SegmentSums<float> near_segment_sums(const RowScale<float>& scale, const ScaledExp<float>& exp, float center,
                                            const T* p, int64_t n, Distance& distance) {
  constexpr int kVectors = kLanes / kWidth;
  f32v sum[kVectors] = {}, weighted[kVectors] = {};
  Distance met[kVectors] = {distance};
  for_each_block(p, n, [&, scale, exp](const T* block, int64_t, auto whole) {
    f32v v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) {
      const f32v below = center - v[j];
      f32v d = -below, e;
      if constexpr (decltype(whole)::value) {
        met[j].meet(below);
        e = exp.near(d);
      } else {
        met[j].meet(select(v[j] == -INFINITY, f32v{}, below));
        d = exp.clamp(d);
        e = exp(d);
      }
      sum[j] = sum[j] + e;
      weighted[j] = e * d + weighted[j];
    }
  });
  for (int j = 1; j < kVectors; ++j) met[0].meet((f32v)met[j].bits);
  distance = met[0];
  SegmentSums<float> sums;
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

// The segment's sums without one of its maxima, which is the center: 1 + R has lost what a peaked row's entropy is made of.
template <bool kSoftcap, class T>
inline SegmentSums<stats_t<T>> sums_without_maximum(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp,
                                                    stats_t<T> center, const T* p, int64_t n) {
  using V = vector_of<T>;
  T copy[kSegment];
  std::memcpy(copy, p, n * sizeof(T));
  int64_t argmax = 0;
  for (bool found = false; !found && argmax + kLanes <= n; argmax += found ? 0 : kLanes) {
    for (int j = 0; j < kLanes; j += width_of<T>) found |= any(load_v<kSoftcap>(scale, p + argmax + j) == V{} + center);
  }
  while (argmax < n - 1 && !(load_v_one<kSoftcap>(scale, p + argmax) == center)) ++argmax;
  copy[argmax] = minus_infinity<T>();
  return segment_sums<kSoftcap>(scale, exp, center, copy, n);
}

template <class T>
inline bool holds_nan(const T* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const auto z = load_one(p + i);
    if (z != z) return true;
  }
  return false;
}

// Sums of segments from one center, lane by lane, in units of x.
struct RowTotals {
  LaneTotals sum_exp, weighted_sum;

  template <class Real>
  void add(const SegmentSums<Real>& sums, double scale) {
    sum_exp.add(sums.sum_exp, 1);
    weighted_sum.add(sums.weighted_sum, scale);
  }

  // Makes up for the factor of 1 + rate_error * x that every term lacks (ScaledExp). The sum of e^x x^2 is not known, but where x
  // hardly varies it is that of e^x x, squared, over that of e^x.
  void correct(double rate_error) {
    for (int i = 0; i < kLanes; ++i) {
      const double sum = sum_exp.lanes[i], weighted = weighted_sum.lanes[i], missing = rate_error * weighted;
      sum_exp.lanes[i] += missing;
      if (sum > 0) weighted_sum.lanes[i] += missing * weighted / sum;
    }
  }

  // Adds corrected sums whose center lies by shift <= 0 from this one's.
  void take(const RowTotals& other, double shift) {
    const double factor = std::exp(shift);
    for (int i = 0; i < kLanes; ++i) {
      sum_exp.lanes[i] += factor * other.sum_exp.lanes[i];
      weighted_sum.lanes[i] += factor * (other.weighted_sum.lanes[i] + other.sum_exp.lanes[i] * shift);
    }
  }
};

// A segment's sums, and from which center they are.
template <class Real>
struct Segment {
  SegmentSums<Real> sums;
  Real center;
  bool exceeds = false;  // the center that was asked for; `max` is known then
  Real max;
};

// Sweeps the segments of a row: by the near exponential as long as nothing else is met.
template <bool kSoftcap, class T>
class SegmentSweep {
 public:
  using Real = stats_t<T>;

  SegmentSweep(const RowScale<Real>& scale, const ScaledExp<Real>& exp) : scale_(scale), exp_(exp) {}

  Segment<Real> sweep(Real center, const T* p, int64_t n) {
    Segment<Real> segment;
    segment.center = center;
    if constexpr (kHasNear) {
      if (near_ && sweep_near(segment, p, n)) return segment;
    }
    segment.sums = segment_sums<kSoftcap>(scale_, exp_, segment.center, p, n);
    if (exceeds(segment.sums, segment.center)) {
      segment.exceeds = true;
      segment.center = segment.max = max_lanes(segment.sums.max);
      segment.sums = segment_sums<kSoftcap>(scale_, exp_, segment.center, p, n);
    }
    near_ = false;
    return segment;
  }
  void met_forbidden_tokens() { near_ = false; }

  // Whether everything met lies near below the row's maximum.
  bool near(Real row_max) {
    if constexpr (kHasNear) {
      move_to(row_max);
      return near_ && row_max - lowest_ <= exp_.near_limit;
    }
    return false;
  }

 private:
  static constexpr bool kHasNear = std::is_same_v<Real, float>;
  // A segment that exceeds its center by no more, in units of x, is not swept again: its terms stay numbers of a size.
  static constexpr Real kSlack = 8;

  bool sweep_near(Segment<Real>& segment, const T* p, int64_t n) {
    if (near_sums(segment, p, n)) return true;
    const Range<Real> range = segment_range<kSoftcap>(scale_, p, n);
    if (!(range.max > segment.center)) return false;
    segment.exceeds = true;
    segment.max = range.max;
    if ((range.max - segment.center) * Real(scale_.scale) <= kSlack && segment.center - range.min <= exp_.near_limit) {
      lowest_ = std::fmin(lowest_, range.min);
      return true;
    }
    segment.center = range.max;
    return near_sums(segment, p, n);
  }

  bool near_sums(Segment<Real>& segment, const T* p, int64_t n) {
    if (segment.center != center_) move_to(segment.center);
    Distance distance = distance_;
    segment.sums = near_segment_sums<kSoftcap>(scale_, exp_, segment.center, p, n, distance);
    if (!distance.is_near(exp_)) return false;
    distance_ = distance;
    return true;
  }

  void move_to(Real center) {
    lowest_ = std::fmin(lowest_, center_ - distance_.largest());
    distance_ = {};
    center_ = center;
  }

  const RowScale<Real>& scale_;
  const ScaledExp<Real>& exp_;
  bool near_ = true;
  Real center_ = INFINITY, lowest_ = INFINITY;
  Distance distance_;  // from center_
};

// What a sweep over a row, or over a shard's part of it, leaves.
struct RowSweep {
  RowState<double> state;
  bool near = false;  // every whole block lies near below the row's maximum, so that ScaledExp::near may be used
};

// NaN and +inf make the sums NaN; a row without any finite logit is empty.
//
// Every segment is centred at the largest logit so far. The winner, the segment that holds it, is kept out of the totals and
// swept without it at the end.
template <bool kSoftcap, class T>
ERC_ONE_COPY RowSweep row_sweep(const RowScale<stats_t<T>>& scale, const T* row, int64_t vocab_size) {
  using Real = stats_t<T>;
  const ScaledExp<Real> exp(scale.scale);
  SegmentSweep<kSoftcap, T> segments(scale, exp);
  RowState<double> state;
  RowTotals totals;   // of the segments since the last record, from the center row_max
  RowTotals settled;  // of those before, corrected
  Segment<Real> winner;
  const T* winner_row = nullptr;
  int64_t winner_size = 0;
  for (int64_t start = 0; start < vocab_size; start += kSegment) {
    const int64_t n = vocab_size - start < kSegment ? vocab_size - start : kSegment;
    const T* p = row + start;
    const bool first = winner_row == nullptr;
    const Real center = first ? segment_range<kSoftcap>(scale, p, n).max : Real(state.row_max);
    if (center == Real(-INFINITY)) {
      if (holds_nan(p, n)) return {{NAN, NAN, NAN}};
      segments.met_forbidden_tokens();
      continue;
    }
    const Segment<Real> segment = segments.sweep(center, p, n);
    if (!first && !segment.exceeds) {
      totals.add(segment.sums, scale.scale);
      continue;
    }
    const Real row_max = first ? center : segment.max;
    if (!first) {
      const auto shift = [&](Real from) { return (double(from) - double(row_max)) * scale.scale; };
      totals.correct(exp.rate_error);
      RowTotals displaced, moved;
      displaced.add(winner.sums, scale.scale);
      displaced.correct(exp.rate_error);
      moved.take(displaced, shift(winner.center));
      moved.take(totals, shift(center));
      moved.take(settled, shift(center));
      settled = moved;
      totals = {};
    }
    state.row_max = double(row_max);
    winner = segment, winner_row = p, winner_size = n;
  }
  if (winner_row == nullptr) return {state};
  const Real row_max = Real(state.row_max);
  totals.add(sums_without_maximum<kSoftcap>(scale, exp, row_max, winner_row, winner_size), scale.scale);
  totals.correct(exp.rate_error);
  totals.take(settled, 0);
  state.sum_rest = totals.sum_exp.template total<T>();
  state.weighted_sum = totals.weighted_sum.template total<T>();
  return {state, segments.near(row_max)};
}

// x as the statistics dtype holds it. GCC 12 forgets a conversion there and back where two of them share a vector, so the
// value passes through memory.
template <class Real>
ERC_INLINE double rounded_to(double x) {
  Real rounded = Real(x);
  asm("" : "+m"(rounded));
  return double(rounded);
}

// The same state rounded to the statistics dtype, in which it is saved: forward and backward see one state.
template <class Real>
inline RowSweep rounded(const RowSweep& sweep) {
  const RowState<double>& state = sweep.state;
  return {{rounded_to<Real>(state.row_max), rounded_to<Real>(state.sum_rest), rounded_to<Real>(state.weighted_sum)},
          sweep.near};
}

template <class T>
inline void fill(T* row, int64_t vocab_size, stats_t<T> value) {
  T encoded;
  store_one(&encoded, value);
  for (int64_t i = 0; i < vocab_size; ++i) row[i] = encoded;
}

constexpr int64_t kNoColumn = -1;

// What the exponential of a column is multiplied by: constant + slope * d + curve * d^2 with d = v - row_max.
template <class Real>
struct Factor {
  Real constant, slope, curve;
  bool varies;  // with d

  // Every exponential lacks a factor of 1 + rate_error * x, which matters to the contract from some size on.
  Factor(const RowGradient<double>& g, double chain, double scale, double rate_error) {
    constexpr double kNegligible = 3e-8;
    varies = g.slope != 0 || std::fabs(rate_error) > kNegligible;
    const double lacking = varies ? rate_error * scale : 0;
    constant = Real(g.constant * chain);
    slope = Real((g.slope + g.constant * lacking) * chain);
    curve = Real(g.slope * lacking * chain);
  }
};

// grad[j] = exp((v_j - row_max) * scale) * factor(v_j - row_max) * dx/dz, the labelled column too. grad may be the row itself:
// every block is read before it is written. kNear: every whole block is near (RowSweep). kVaries: the factor does.
template <bool kSoftcap, bool kNear, bool kVaries, bool kStream, class T>
inline void gradient_blocks(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp, stats_t<T> row_max,
                            const Factor<stats_t<T>>& factor, const T* row, int64_t vocab_size, T* grad) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  // Captured by value: through a reference, every store to grad could change the constants, and each block would reload them.
  const auto gradient = [=](const T* block, V (&g)[kVectors], auto whole) {
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    for (int j = 0; j < kVectors; ++j) {
      V d = v[j] - row_max, e;
      if constexpr (kNear && decltype(whole)::value) {
        e = exp.near(d);
      } else {
        d = exp.clamp(d);
        e = exp(d);
      }
      if constexpr (kVaries) {
        g[j] = e * ((factor.curve * d + factor.slope) * d + factor.constant);
      } else {
        g[j] = e * factor.constant;
      }
    }
    if constexpr (kSoftcap) {
      V z[kVectors];
      load_block(block, z);
      for (int j = 0; j < kVectors; ++j) g[j] = g[j] * softcap_slope<stats_t<T>>(scale, z[j]);
    }
  };
  for_each_block(row, vocab_size, [=](const T* block, int64_t i, auto whole) {
    V g[kVectors];
    gradient(block, g, whole);
    if constexpr (decltype(whole)::value) {
      store_block<kStream>(grad + i, g);
    } else {
      T padded[kLanes];
      store_block<false>(padded, g);
      std::memcpy(grad + i, padded, (vocab_size - i) * sizeof(T));
    }
  });
  if (kStream) stream_fence();
}

// visit(std::true_type or std::false_type) for each of the conditions: what runs is compiled for it.
template <class Visit>
inline void with_constants(Visit&& visit) {
  visit();
}
template <class Visit, class... Conditions>
inline void with_constants(Visit&& visit, bool first, Conditions... others) {
  const auto fixed = [&](auto value) {
    with_constants([&](auto... values) { visit(value, values...); }, others...);
  };
  first ? fixed(std::true_type{}) : fixed(std::false_type{});
}

template <bool kSoftcap, class T>
inline void row_gradient(const RowScale<stats_t<T>>& scale, const RowSweep& sweep, const StatGrads<double>& grads,
                         const T* row, int64_t vocab_size, int64_t label, T* grad) {
  using Real = stats_t<T>;
  if (!sweep.state.is_valid()) return fill(grad, vocab_size, Real(NAN));
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
  const RowGradient<double> g(sweep.state, scale.scale, grads, double(label_value));
  const ScaledExp<Real> exp(scale.scale);
  const Factor<Real> factor(g, scale.chain, scale.scale, exp.rate_error);
  const bool stream = grad != row && reinterpret_cast<uintptr_t>(grad) % 64 == 0;
  const auto blocks = [&](auto near, auto varies, auto streams) {
    gradient_blocks<kSoftcap, decltype(near)::value, decltype(varies)::value, decltype(streams)::value>(
        scale, exp, Real(sweep.state.row_max), factor, row, vocab_size, grad);
  };
  if constexpr (kSoftcap || !std::is_same_v<Real, float>) {  // one form of what is rare
    with_constants([&](auto streams) { blocks(std::false_type{}, std::true_type{}, streams); }, stream);
  } else {
    with_constants(blocks, sweep.near, factor.varies, stream);
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
