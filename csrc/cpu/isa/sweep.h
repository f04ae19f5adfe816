// The statistics sweep. A row is cut into segments of kSegment elements whose sums are added from left to right in float64, so
// the order of additions depends on V alone.
#pragma once

#include "common/row_state.h"
#include "cpu/isa/rows.h"

namespace erc {
namespace ERC_ISA {

constexpr int64_t kSegment = 2048;

// What a sweep over a segment leaves, lane by lane: the sums of exp((v - center) * scale) and of exp(..) * (v - center), both
// times 2^kLift, and whether a logit may exceed the center: where none does, it may still say so of NaN.
template <class Real>
struct SegmentSums {
  static constexpr int kVectors = kLanes / VectorOf<Real>::width;
  using V = typename VectorOf<Real>::type;
  V sum_exp[kVectors], weighted_sum[kVectors];
  bool may_exceed = false;

  // Whether neither -inf nor NaN took part without a clamp.
  bool finite() const {
    V zero = 0 * weighted_sum[0];
    for (int j = 1; j < kVectors; ++j) zero = 0 * weighted_sum[j] + zero;
    return !any(zero != 0);
  }
};

// The exponential of the sweeps, of type Real: 2^kLift<Real> times exp(d * scale).
#if ERC_HAS_SCALEF
template <class Real>
constexpr bool kIsLifted = std::is_same_v<Real, float>;
#else
template <class Real>
constexpr bool kIsLifted = false;
#endif

template <class Real, class V>
ERC_INLINE V swept_exp(const ScaledExp<Real>& exp, V d) {
  if constexpr (kIsLifted<Real>) {
    return exp.lifted(d);
  } else {
    return exp(d);
  }
}

template <class Real, class V>
ERC_INLINE V swept_clamp(const ScaledExp<Real>& exp, V d) {
  if constexpr (kIsLifted<Real>) {
    return exp.clamp_lifted(d);
  } else {
    return exp.clamp(d);
  }
}

template <class Real>
constexpr double lift_of() {
  if constexpr (kIsLifted<Real>) return double(1 << ScaledExp<Real>::kLift);
  return 1;
}

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

// The largest logit met, lane by lane. Of pairs of bfloat16 it is kept in 16 bits, where those above 0 order like integers:
// what exceeds a center above 0 is told by one instruction for two vectors.
template <class T, bool kPairs>
struct Largest {
  vector_of<T> max[kLanes / width_of<T>];

  Largest() {
    for (auto& lane : max) lane = vector_of<T>{} - stats_t<T>(INFINITY);
  }
  ERC_INLINE void meet(const T*, int j, vector_of<T> v) { max[j] = vmax(v, max[j]); }
  bool exceeds(stats_t<T> center) const {
    auto best = max[0];
    for (auto lane : max) best = vmax(lane, best);
    return any(best > center);
  }
};

#if ERC_HAS_SCALEF
template <>
struct Largest<bfloat16, true> {
  __m512i max = _mm512_set1_epi16(int16_t(0x8000));

  ERC_INLINE void meet(const bfloat16* block, int j, f32v) {
    static_assert(2 * kWidth == kLanes, "");
    if (j == 0) max = _mm512_max_epi16(max, _mm512_loadu_si512(block));
  }
  bool exceeds(float center) const {  // also where there is a positive NaN
    const int16_t bits = int16_t(bit_cast<uint32_t>(center) >> 16 & 0x7fff);
    return _mm512_cmpgt_epi16_mask(max, _mm512_set1_epi16(bits)) != 0;
  }
};
#endif

// kClamped: for any logits; else -inf makes the weighted sum NaN.
template <bool kSoftcap, bool kClamped, bool kPairs = false, class T>
inline SegmentSums<stats_t<T>> segment_sums(const RowScale<stats_t<T>>& scale, const ScaledExp<stats_t<T>>& exp,
                                            stats_t<T> center, const T* p, int64_t n) {
  using V = vector_of<T>;
  constexpr int kVectors = kLanes / width_of<T>;
  // A set more where there are registers: every sum is of half as many terms, whose rounding may all go one way.
  constexpr int kSets = kIsLifted<stats_t<T>> ? 2 : 1;
  // Plain arrays, copied at the end: the sweep keeps them in registers.
  V sum[kSets][kVectors] = {}, weighted[kSets][kVectors] = {};
  Largest<T, kPairs> largest;
  for_each_block_in_turns<kSets>(p, n, [&, scale, exp](const T* block, auto whole, auto set) {
    constexpr int kSet = decltype(set)::value;
    V v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    if constexpr (decltype(whole)::value) prefetch_ahead(block);
    for (int j = 0; j < kVectors; ++j) {
      largest.meet(block, j, v[j]);
      V d = v[j] - center;
      if constexpr (kClamped || !decltype(whole)::value) d = swept_clamp(exp, d);
      const V e = swept_exp(exp, d);
      sum[kSet][j] = sum[kSet][j] + e;
      weighted[kSet][j] = e * d + weighted[kSet][j];
    }
  });
  SegmentSums<stats_t<T>> sums;
  for (int j = 0; j < kVectors; ++j) {
    sums.sum_exp[j] = kSets == 1 ? sum[0][j] : sum[0][j] + sum[kSets - 1][j];
    sums.weighted_sum[j] = kSets == 1 ? weighted[0][j] : weighted[0][j] + weighted[kSets - 1][j];
  }
  sums.may_exceed = largest.exceeds(center);
  return sums;
}

// The same sums, bit for bit, but for the maximum, by fewer operations: for a segment whose whole blocks lie near below the
// center, which `distance` tells afterwards. A last block that is not whole may hold anything that does not exceed it.
template <bool kSoftcap, class T>
inline SegmentSums<float> near_segment_sums(const RowScale<float>& scale, const ScaledExp<float>& exp, float center, const T* p,
                                            int64_t n, Distance& distance) {
  constexpr int kVectors = kLanes / kWidth;
  f32v sum[kVectors] = {}, weighted[kVectors] = {};
  Distance met[kVectors] = {distance};
  for_each_block(p, n, [&, scale, exp](const T* block, int64_t, auto whole) {
    f32v v[kVectors];
    load_block_v<kSoftcap>(scale, block, v);
    if constexpr (decltype(whole)::value) prefetch_ahead(block);
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
  return segment_sums<kSoftcap, true>(scale, exp, center, copy, n);
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
    constexpr double kUnit = 1 / lift_of<Real>();
    sum_exp.add(sums.sum_exp, kUnit);
    weighted_sum.add(sums.weighted_sum, kUnit * scale);
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

// Sweeps the segments of a row: by an exponential that wants no clamp as long as it meets nothing that needs one.
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
      near_ = false;
    }
    segment.sums = sums(center, p, n);
    if (!segment.sums.may_exceed) return segment;
    const Real max = segment_range<kSoftcap>(scale_, p, n).max;
    if (!(max > center)) return segment;
    segment.exceeds = true;
    segment.max = max;
    if (!kIsLifted<Real> || !within_slack(segment)) {
      segment.center = max;
      segment.sums = sums(max, p, n);
    }
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
  static constexpr bool kHasNear = std::is_same_v<Real, float> && !kIsLifted<Real>;
  // A segment that exceeds its center by no more, in units of x, is not swept again: its terms stay numbers of a size.
  static constexpr Real kSlack = 8;

  bool within_slack(const Segment<Real>& segment) const {
    return (segment.max - segment.center) * Real(scale_.scale) <= kSlack;
  }

  SegmentSums<Real> sums(Real center, const T* p, int64_t n) {
    if constexpr (kIsLifted<Real>) {
      constexpr bool kPairs = std::is_same_v<T, bfloat16> && !kSoftcap;
      if (!clamped_) {
        const SegmentSums<Real> found = center >= 0 ? segment_sums<kSoftcap, false, kPairs>(scale_, exp_, center, p, n)
                                                    : segment_sums<kSoftcap, false>(scale_, exp_, center, p, n);
        if (found.finite()) return found;
        clamped_ = true;
      }
    }
    return segment_sums<kSoftcap, true>(scale_, exp_, center, p, n);
  }

  bool sweep_near(Segment<Real>& segment, const T* p, int64_t n) {
    if (near_sums(segment, p, n)) return true;
    const Range<Real> range = segment_range<kSoftcap>(scale_, p, n);
    if (!(range.max > segment.center)) return false;
    segment.exceeds = true;
    segment.max = range.max;
    if (within_slack(segment) && segment.center - range.min <= exp_.near_limit) {
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
  bool near_ = true, clamped_ = false;
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
  const FlushSubnormals flush;
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

// The same state rounded to the statistics dtype, in which it is saved: forward and backward see one state.
template <class Real>
inline RowSweep rounded(const RowSweep& sweep) {
  const RowState<double>& state = sweep.state;
  return {{rounded_to<Real>(state.row_max), rounded_to<Real>(state.sum_rest), rounded_to<Real>(state.weighted_sum)},
          sweep.near};
}

}  // namespace ERC_ISA
}  // namespace erc
