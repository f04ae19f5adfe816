// The statistics sweep: a lane's running state, the lanes of a segment into one state, the segments into the row's.
//
// The fast form costs about six instructions and one exponential an element. It omits guards: a segment that holds -inf, or
// numbers whose difference overflows, comes out non-finite and is swept again by the guarded form. Each segment decides for
// itself, so the choice is as deterministic as the numbers.
#pragma once

#include "cuda/rows.cuh"

namespace erc {
namespace cuda {

// 2^x is 0 from here on down, and x * 0 is not NaN.
template <class Real>
constexpr Real kFloor = sizeof(Real) == 8 ? Real(-1100) : Real(-200);

// Where a lane's centre starts: finite, so that the first move is no inf - inf.
template <class Real>
constexpr Real kLowest = sizeof(Real) == 8 ? Real(-1e300) : Real(-3e38);

template <class Real>
ERC_DEVICE Real above_floor(Real u) {
  return max_nan(u, kFloor<Real>);
}

template <class Real>
ERC_DEVICE bool is_finite(Real x) {
  return x - x == 0;
}

// ---- one lane ------------------------------------------------------------------------------------------------------

// What a lane leaves behind, relative to its own maximum; exponents are in units of log2.
template <class Real>
struct LaneResult {
  Real max, sum, weighted;
};

// The maximum of v over a lane's vectors. 16-bit elements without softcap stay packed: the maximum of bit pairs is exact.
template <class V>
struct LaneMax {
  using T = typename V::Element;
  using Real = typename V::Real;
  static constexpr bool kPacked = sizeof(T) == 2 && !V::softcap;
  std::conditional_t<kPacked, uint32_t, Real> largest;

  ERC_DEVICE LaneMax() {
    if constexpr (kPacked) {
      largest = uint32_t(V::minus_infinity().bits) * 0x10001u;
    } else {
      largest = -Real(INFINITY);
    }
  }

  ERC_DEVICE void update(const RowScale<Real>& scale, const Raw& raw) {
    if constexpr (kPacked) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max_packed(T{}, largest, raw.word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T> / 2; ++i) {
        const Pair<Real> v = V::values(scale, raw, i);
        const Real larger = v.a > v.b ? v.a : v.b;
        largest = larger > largest ? larger : largest;
      }
    }
  }

  ERC_DEVICE Real value() const {
    if constexpr (kPacked) {
      const Pair<float> halves = unpack(T{}, largest);
      return halves.a > halves.b ? halves.a : halves.b;
    } else {
      return largest;
    }
  }
};

// Sums of 2^u and 2^u * u. The even and the odd elements of a vector have their own sums.
// Fast: u = v * rate - center, one fused multiply-add, with center = max * rate rounded once.
// Guarded: u = (v - center) * rate with center = max, which no finite logit overflows.
template <class V, bool kGuarded>
struct LaneState {
  using T = typename V::Element;
  using Real = typename V::Real;

  LaneMax<V> max;
  Real center = kGuarded ? Real(0) : kLowest<Real>;
  Pair<Real> sum{0, 0}, weighted{0, 0};

  // Moves the sums to the present maximum.
  ERC_DEVICE void recenter(const RowScale<Real>& scale) {
    const Real largest = max.value(), old = center;
    Real shift;
    if constexpr (kGuarded) {
      center = largest == -Real(INFINITY) ? Real(0) : largest;
      shift = sum.a == 0 && sum.b == 0 ? Real(0) : above_floor(mul_rn(old - center, scale.rate));
    } else {
      center = mul_rn(largest, scale.rate);
      shift = old - center;
      shift = shift > kFloor<Real> ? shift : kFloor<Real>;
    }
    const Real factor = ex2(shift);
    weighted = mul_pair(fma_pair(sum, Pair<Real>{shift, shift}, weighted), Pair<Real>{factor, factor});
    sum = mul_pair(sum, Pair<Real>{factor, factor});
  }

  template <bool kHolesFilled>
  ERC_DEVICE void accumulate(const RowScale<Real>& scale, const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVector<T> / 2; ++i) {
      const Pair<Real> v = V::values(scale, raw, i);
      Pair<Real> u;
      if constexpr (kGuarded) {
        u = {mul_rn(v.a - center, scale.rate), mul_rn(v.b - center, scale.rate)};
      } else {
        u = fma_pair(v, Pair<Real>{scale.rate, scale.rate}, Pair<Real>{-center, -center});
      }
      if constexpr (kGuarded || kHolesFilled) u = {above_floor(u.a), above_floor(u.b)};
      const Pair<Real> e{ex2(u.a), ex2(u.b)};
      sum = add_pair(sum, e);
      weighted = fma_pair(e, u, weighted);
    }
  }

  // kCount vectors; kHolesFilled: the columns behind the row's end hold -inf.
  template <bool kHolesFilled, int kCount>
  ERC_DEVICE void add(const RowScale<Real>& scale, const Raw (&raw)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) max.update(scale, raw[k]);
    recenter(scale);
#pragma unroll
    for (int k = 0; k < kCount; ++k) accumulate<kHolesFilled>(scale, raw[k]);
  }

  // max * rate differs from the rounded center by a residual. 2^-residual needs two terms of its series where that is small;
  // where no exponent holds it, NaN asks for the guarded form.
  ERC_DEVICE LaneResult<Real> finish(const RowScale<Real>& scale) const {
    const Real largest = max.value(), s = sum.a + sum.b, t = weighted.a + weighted.b;
    if (kGuarded || largest == -Real(INFINITY)) return {largest, s, t};
    const Real residual = fma_rn(largest, scale.rate, -center), y = residual * Real(-0.69314718055994530942);
    if (!(std::fabs(residual) <= Real(32))) return {largest, Real(NAN), Real(NAN)};
    const bool small = std::fabs(residual) < (sizeof(Real) == 8 ? Real(0x1p-18) : Real(0x1p-8));
    const Real factor = small ? fma_rn(y, fma_rn(y, Real(0.5), Real(1)), Real(1)) : std::exp2(-residual);
    return {largest, factor * s, factor * fma_rn(-residual, s, t)};
  }
};

// A segment as the sweeps see it: `columns` elements from a source of vectors.
template <class V, class Source>
struct Segment {
  using T = typename V::Element;
  Source source;
  int columns;

  ERC_DEVICE int whole() const { return columns / kVector<T>; }
  ERC_DEVICE int rest() const { return columns % kVector<T>; }
  ERC_DEVICE Raw tail() const {
    return load_elements(source.begin + int64_t(whole()) * kVector<T>, rest(), V::minus_infinity());
  }
};

// The calling thread's share of a segment: kUnroll vectors in flight, no barrier, no shuffle.
template <bool kGuarded, class V, class Source>
ERC_DEVICE LaneResult<typename V::Real> sweep_lane(const RowScale<typename V::Real>& scale, const Segment<V, Source>& segment,
                                                   int lane) {
  using T = typename V::Element;
  constexpr int kStep = kLanes * kVector<T>;
  const int vectors = segment.whole() > lane ? (segment.whole() - lane - 1) / kLanes + 1 : 0;
  LaneState<V, kGuarded> state;
  const T* p = segment.source.begin + lane * kVector<T>;
#pragma unroll 1
  for (int trips = vectors / kUnroll; trips > 0; --trips, p += kUnroll * kStep) {
    Raw raw[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) raw[k] = Source::load(p + k * kStep);
    state.template add<false>(scale, raw);
  }
  const int left = vectors % kUnroll;
  Raw raw[kUnroll - 1];
#pragma unroll
  for (int k = 0; k < kUnroll - 1; ++k) {
    if (k < left) raw[k] = Source::load(p + k * kStep);
  }
#pragma unroll
  for (int k = 0; k < kUnroll - 1; ++k) {
    if (k < left) state.template add<false>(scale, {raw[k]});
  }
  if (segment.rest() != 0 && segment.whole() % kLanes == lane) state.template add<true>(scale, {segment.tail()});
  return state.finish(scale);
}

// ---- one segment ---------------------------------------------------------------------------------------------------

// As it travels between blocks: through shared memory of a cluster, or through the workspace.
template <class Real>
struct SegmentState {
  Real row_max, sum_rest, weighted_sum;
  Real guarded;  // 1 if the fast sweep failed here
};

template <class Real>
ERC_DEVICE Real warp_sum(Real x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class Real>
ERC_DEVICE Real warp_max(Real x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Real other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

ERC_DEVICE int warp_min(int x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other < x ? other : x;
  }
  return x;
}

// Shared memory of the statistics: the lanes' results of `segments` segments, then the segments' states.
template <class Real>
struct StatsShared {
  Real* lanes;  // [segments, 3, kLanes]
  SegmentState<Real>* states;

  ERC_DEVICE StatsShared(char* memory, int segments)
      : lanes(reinterpret_cast<Real*>(memory)), states(reinterpret_cast<SegmentState<Real>*>(lanes + segments * 3 * kLanes)) {}

  ERC_DEVICE Real* lane_values(int segment, int which) const { return lanes + (segment * 3 + which) * kLanes; }
};

template <class Real>
ERC_HOST_DEVICE constexpr int stats_shared_bytes(int segments, int states) {
  return segments * 3 * kLanes * int(sizeof(Real)) + states * int(sizeof(SegmentState<Real>));
}

// One warp merges the lanes of a segment. The lane that met the maximum holds the 1 that would drown R; its few elements are
// read again, by all threads of the warp, without one maximum.
template <class V, class Source>
ERC_DEVICE SegmentState<typename V::Real> reduce_segment(const RowScale<typename V::Real>& scale,
                                                         const Segment<V, Source>& segment,
                                                         const StatsShared<typename V::Real>& shared, int slot, bool guarded) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Real* max = shared.lane_values(slot, 0);
  const int thread = threadIdx.x % kWarp;
  Real row_max = -Real(INFINITY);
  for (int lane = thread; lane < kLanes; lane += kWarp) row_max = max[lane] > row_max ? max[lane] : row_max;
  row_max = warp_max(row_max);
  int owner = kLanes;
  for (int lane = thread; lane < kLanes; lane += kWarp) owner = max[lane] == row_max && lane < owner ? lane : owner;
  owner = warp_min(owner);

  Real rest = 0, weighted = 0;
  for (int lane = thread; lane < kLanes; lane += kWarp) {
    const Real lane_sum = shared.lane_values(slot, 1)[lane], lane_weighted = shared.lane_values(slot, 2)[lane];
    const bool empty = row_max == -Real(INFINITY);  // then the sums are 0, or NaN
    const Real shift = empty ? Real(0) : above_floor(mul_rn(max[lane] - row_max, scale.rate));
    // Of the owner only a NaN counts: it says that the fast sweep met what it cannot handle.
    const Real factor = lane == owner && !empty ? Real(0) : ex2(shift);
    rest = fma_rn(factor, lane_sum, rest);
    weighted = fma_rn(factor, fma_rn(lane_sum, shift, lane_weighted), weighted);
  }
  Real again = 0, maxima = 0;
  const auto take = [&](const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVector<T> / 2; ++i) {
      const Pair<Real> v = V::values(scale, raw, i);
      const Pair<Real> u{above_floor(mul_rn(v.a - row_max, scale.rate)), above_floor(mul_rn(v.b - row_max, scale.rate))};
      const Pair<Real> e{ex2(u.a), ex2(u.b)};
      v.a == row_max ? maxima += 1 : again += e.a;
      v.b == row_max ? maxima += 1 : again += e.b;
      weighted = fma_rn(e.b, u.b, fma_rn(e.a, u.a, weighted));
    }
  };
  if (row_max > -Real(INFINITY)) {
    for (int64_t i = owner + int64_t(thread) * kLanes; i < segment.whole(); i += kLanes * kWarp) {
      take(Source::load(segment.source.begin + i * kVector<T>));
    }
    if (thread == 0 && segment.rest() != 0 && segment.whole() % kLanes == owner) take(segment.tail());
  }
  maxima = warp_sum(maxima);
  rest = warp_sum(rest) + warp_sum(again) + (maxima > 0 ? maxima - 1 : Real(0));
  weighted = warp_sum(weighted) * Real(0.69314718055994530942);
  if (!(row_max < Real(INFINITY)) || !is_finite(rest) || !is_finite(weighted)) {
    const Real nan = Real(NAN);
    return {nan, nan, nan, Real(guarded)};
  }
  return {row_max, rest, weighted, Real(guarded)};
}

// ---- a row, or some segments of it ---------------------------------------------------------------------------------

// The states of segments [first, last) into shared.states[0 ...]. Every thread of the block calls it; a group of kLanes threads
// takes a segment at a time, so any number of groups gives the same states. segment_of(g) is segment g of the row.
template <class V, class SegmentOf>
ERC_DEVICE void segment_states(const RowScale<typename V::Real>& scale, int first, int last, const SegmentOf& segment_of,
                               const StatsShared<typename V::Real>& shared) {
  using Real = typename V::Real;
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, count = last - first;
  for (int pass = 0; pass < 2; ++pass) {
    for (int slot = group; slot < count; slot += groups) {
      if (pass == 1 && is_finite(shared.states[slot].sum_rest)) continue;
      const auto segment = segment_of(first + slot);
      const LaneResult<Real> result =
          pass == 0 ? sweep_lane<false>(scale, segment, lane) : sweep_lane<true>(scale, segment, lane);
      shared.lane_values(slot, 0)[lane] = result.max;
      shared.lane_values(slot, 1)[lane] = result.sum;
      shared.lane_values(slot, 2)[lane] = result.weighted;
    }
    __syncthreads();
    for (int slot = warp; slot < count; slot += warps) {
      if (pass == 1 && is_finite(shared.states[slot].sum_rest)) continue;
      const SegmentState<Real> state = reduce_segment(scale, segment_of(first + slot), shared, slot, pass == 1);
      __syncwarp();
      if (threadIdx.x % kWarp == 0) shared.states[slot] = state;
    }
    __syncthreads();
    bool finite = true;
    for (int slot = 0; slot < count; ++slot) finite = finite && is_finite(shared.states[slot].sum_rest);
    if (finite) break;
    __syncthreads();
  }
}

// Where the blocks of a split row meet: the states of all segments, and the rows' label values.
template <class Real>
struct Workspace {
  SegmentState<Real>* states;  // [N, segments]
  Real* label_values;          // [N]

  ERC_HOST_DEVICE Workspace(void* memory, int64_t num_rows, const Partition& partition)
      : states(static_cast<SegmentState<Real>*>(memory)),
        label_values(reinterpret_cast<Real*>(states + num_rows * partition.segments)) {}
};

// Fills a workspace for rows that are split over blocks (stats.cu).
cudaError_t segments_to_workspace(const RowInputs& rows, void* workspace, cudaStream_t stream);

// Fewer rows than twice the multiprocessors leave some of them idle, or half busy in the last wave.
inline bool splits_rows(const Rows& logits, const Partition& partition) {
  return partition.segments > 1 && logits.num_rows < 2 * device_info().multiprocessors;
}

// A row's state, and whether its exponents need the guarded form.
template <class Real>
struct RowResult {
  RowState<Real> state;
  bool guarded = false;

  ERC_DEVICE RowResult(const SegmentState<Real>* segments, int count, Real scale) {
    for (int i = 0; i < count; ++i) {
      state.merge({segments[i].row_max, segments[i].sum_rest, segments[i].weighted_sum}, scale);
      guarded = guarded || segments[i].guarded != 0;
    }
  }
};

}  // namespace cuda
}  // namespace erc
