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

// The largest raw logit of a lane's vectors, and where there is a softcap the smallest too: capped, an infinite one would look
// like any other. Of 16-bit elements both stay packed, which is exact. A softcap is monotone, so it need not be applied first.
template <class V>
struct LaneRange {
  using T = typename V::Element;
  using Real = typename V::Real;
  static constexpr bool kPacked = sizeof(T) == 2;
  using Held = std::conditional_t<kPacked, uint32_t, Real>;
  Held largest = of_infinity(-1), smallest = of_infinity(1);

  ERC_DEVICE void update(const Raw& raw) {
    if constexpr (kPacked) {
#pragma unroll
      for (int i = 0; i < 4; ++i) largest = max_packed(T{}, largest, raw.word[i]);
      if constexpr (V::softcap) {
#pragma unroll
        for (int i = 0; i < 4; ++i) smallest = min_packed(T{}, smallest, raw.word[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector<T> / 2; ++i) {
        const Pair<Real> z = pair_of(T{}, raw, i);
        const Real larger = z.a > z.b ? z.a : z.b, smaller = z.a < z.b ? z.a : z.b;
        largest = larger > largest ? larger : largest;
        if constexpr (V::softcap) smallest = smaller < smallest ? smaller : smallest;
      }
    }
  }

  // The maximum of v, and something near it.
  ERC_DEVICE Real max(const RowScale<Real>& scale) const { return V::one(scale, largest_half()).value.a; }
  ERC_DEVICE Real near_max(const RowScale<Real>& scale) const {
    const Real z = largest_half();
    return V::caps(scale) ? scale.roughly_capped(z) : z;
  }
  // Whether no logit was infinite. Without a softcap the sums say so.
  ERC_DEVICE bool is_finite() const {
    if constexpr (!V::softcap) return true;
    if constexpr (kPacked) {
      const Pair<float> halves = unpack(T{}, smallest);
      return largest_half() < INFINITY && halves.a > -INFINITY && halves.b > -INFINITY;
    } else {
      return largest < Real(INFINITY) && smallest > -Real(INFINITY);
    }
  }

 private:
  ERC_DEVICE static Held of_infinity(int sign) {
    if constexpr (kPacked) return uint32_t(from_real(T{}, sign * INFINITY).bits) * 0x10001u;
    return Held(sign * INFINITY);
  }
  ERC_DEVICE Real largest_half() const {
    if constexpr (kPacked) {
      const Pair<float> halves = unpack(T{}, largest);
      return halves.a > halves.b ? halves.a : halves.b;
    } else {
      return largest;
    }
  }
};

// Sums of 2^u and 2^u * u. The even and the odd elements of a vector have their own sums.
// Fast: u = v * rate - center, one fused multiply-add, with center = max * rate rounded once, or with a softcap a little beside it.
// Guarded: u = (v - center) * rate with center = max, which no finite logit overflows.
template <class V, bool kGuarded>
struct LaneState {
  using T = typename V::Element;
  using Real = typename V::Real;

  LaneRange<V> range;
  Real center = kGuarded ? Real(0) : kLowest<Real>;
  Pair<Real> sum{0, 0}, weighted{0, 0};

  // Moves the sums to the present maximum.
  ERC_DEVICE void recenter(const RowScale<Real>& scale) {
    const Real old = center;
    Real shift;
    if constexpr (kGuarded) {
      const Real largest = range.max(scale);
      center = largest == -Real(INFINITY) ? Real(0) : largest;
      shift = sum.a == 0 && sum.b == 0 ? Real(0) : above_floor(mul_rn(old - center, scale.rate));
    } else {
      center = mul_rn(range.near_max(scale), scale.rate);
      shift = old - center;
      shift = shift > kFloor<Real> ? shift : kFloor<Real>;
    }
    const Real factor = ex2(shift);
    weighted = mul_pair(fma_pair(sum, Pair<Real>{shift, shift}, weighted), Pair<Real>{factor, factor});
    sum = mul_pair(sum, Pair<Real>{factor, factor});
  }

  // kHoles: the vector may hold infinite logits, of which the sweep says nothing.
  template <bool kHoles>
  ERC_DEVICE void accumulate(const RowScale<Real>& scale, const Raw& raw) {
#pragma unroll
    for (int i = 0; i < kVector<T> / 2; ++i) {
      const Pair<Real> v = V::template pair < kGuarded || kHoles > (scale, raw, i).value;
      Pair<Real> u;
      if constexpr (kGuarded) {
        u = {mul_rn(v.a - center, scale.rate), mul_rn(v.b - center, scale.rate)};
      } else {
        u = fma_pair(v, Pair<Real>{scale.rate, scale.rate}, Pair<Real>{-center, -center});
      }
      if constexpr (kGuarded || kHoles) u = {above_floor(u.a), above_floor(u.b)};
      const Pair<Real> e{ex2(u.a), ex2(u.b)};
      sum = add_pair(sum, e);
      weighted = fma_pair(e, u, weighted);
    }
  }

  // The first `count` vectors, at least one.
  template <int kMost>
  ERC_DEVICE void add(const RowScale<Real>& scale, const Raw (&raw)[kMost], int count) {
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k < count) range.update(raw[k]);
    }
    recenter(scale);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k < count) accumulate<false>(scale, raw[k]);
    }
  }

  // The last elements of a row, filled up with -inf to a vector. Of a -inf among them the fast form must know, like of any.
  ERC_DEVICE void add_rest(const RowScale<Real>& scale, const T* p, int count) {
    const Raw raw = load_elements(p, count, V::minus_infinity()), finite = load_elements(p, count, p[0]);
    range.update(finite);
    recenter(scale);
    accumulate<true>(scale, raw);
    if constexpr (!kGuarded) {
      for (int j = 0; j < count; ++j) {
        if (to_real(p[j]) == -Real(INFINITY)) sum.a = Real(NAN);
      }
    }
  }

  // max * rate differs from the rounded center by a residual. 2^-residual needs two terms of its series where that is small;
  // where no exponent holds it, NaN asks for the guarded form.
  ERC_DEVICE LaneResult<Real> finish(const RowScale<Real>& scale) const {
    const Real largest = range.max(scale), s = sum.a + sum.b, t = weighted.a + weighted.b;
    if (!kGuarded && !range.is_finite()) return {largest, Real(NAN), t};
    if (kGuarded || largest == -Real(INFINITY)) return {largest, s, t};
    const Real residual = fma_rn(largest, scale.rate, -center), y = residual * Real(-0.69314718055994530942);
    if (!(std::fabs(residual) <= Real(32))) return {largest, Real(NAN), Real(NAN)};
    const bool small = std::fabs(residual) < (sizeof(Real) == 8 ? Real(0x1p-18) : Real(0x1p-8));
    const Real factor = small ? fma_rn(y, fma_rn(y, Real(0.5), Real(1)), Real(1)) : std::exp2(-residual);
    return {largest, factor * s, factor * fma_rn(-residual, s, t)};
  }
};

// The calling thread's share of a segment: kUnroll vectors in flight, no barrier, no shuffle.
template <bool kGuarded, class V, class Memory>
ERC_DEVICE LaneResult<typename V::Real> sweep_lane(const RowScale<typename V::Real>& scale, const Segment<V, Memory>& segment,
                                                   int lane) {
  using T = typename V::Element;
  constexpr int kStep = kLanes * kVector<T>;
  const int whole = segment.whole(), vectors = whole > lane ? (whole - lane - 1) / kLanes + 1 : 0;
  LaneState<V, kGuarded> state;
  // With a softcap, shifting is little beside the rest.
  constexpr Effort kEffort = kGuarded ? Effort::kElements : V::softcap ? Effort::kOneCode : Effort::kEveryStart;
  with_reader<V::aligned, kEffort>(segment.memory, segment.begin, [&](const auto& reader) {
    const T* p = segment.begin + lane * kVector<T>;
    int trip = 0;
#pragma unroll 1
    for (; trip < vectors / kUnroll; ++trip, p += kUnroll * kStep) {
      segment.memory.wait(trip);
      Raw raw[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) raw[k] = reader.load(p + k * kStep);
      state.add(scale, raw, kUnroll);
    }
    segment.memory.wait_from(trip);
    const int left = vectors % kUnroll;
    Raw raw[kUnroll - 1];
#pragma unroll
    for (int k = 0; k < kUnroll - 1; ++k) {
      if (k < left) raw[k] = reader.load(p + k * kStep);
    }
    if (left > 0) state.add(scale, raw, left);
  });
  if (segment.rest() != 0 && whole % kLanes == lane) state.add_rest(scale, segment.begin + whole * kVector<T>, segment.rest());
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

// Where the warps of a group of kLanes threads meet: each one's maximum and the first lane that holds it, then its sums.
template <class Real>
struct alignas(16) GroupShared {
  static constexpr int kWarps = kLanes / kWarp;
  Real max[kWarps], rest[kWarps], weighted[kWarps];
  int holder[kWarps], maxima[kWarps];
  bool again;  // whether this group must sweep its segment by the guarded form

  template <class Value>
  ERC_DEVICE static Value sum(const Value (&x)[kWarps]) {
    static_assert(kWarps == 4, "");
    return (x[0] + x[2]) + (x[1] + x[3]);
  }
};

// The lanes of a segment into its state, for every thread of the group. The lane that met the maximum has a 1 in its sum that
// would drown R, so its few elements are taken once more, by all threads, without one maximum.
template <class V, class Memory>
ERC_DEVICE SegmentState<typename V::Real> merge_lanes(const RowScale<typename V::Real>& scale,
                                                      const Segment<V, Memory>& segment,
                                                      const LaneResult<typename V::Real>& lane,
                                                      GroupShared<typename V::Real>& shared, bool guarded) {
  using T = typename V::Element;
  using Real = typename V::Real;
  using Shared = GroupShared<Real>;
  const int member = threadIdx.x % kLanes, warp = member / kWarp, thread = member % kWarp;
  const Real warp_largest = warp_max(lane.max);
  const unsigned holders = __ballot_sync(0xffffffffu, lane.max == warp_largest);
  if (thread == 0) {
    shared.max[warp] = warp_largest;
    shared.holder[warp] = warp * kWarp + __ffs(holders) - 1;
  }
  __syncthreads();
  Real row_max = shared.max[0];
  int owner = shared.holder[0];
#pragma unroll
  for (int w = 1; w < Shared::kWarps; ++w) {
    const Real other = shared.max[w];
    owner = other > row_max ? shared.holder[w] : owner;
    row_max = other > row_max ? other : row_max;
  }
  const bool empty = row_max == -Real(INFINITY);  // then the sums are 0, or NaN
  const Real shift = empty ? Real(0) : above_floor(mul_rn(lane.max - row_max, scale.rate));
  // Of the owner only a NaN counts: it says that the fast sweep met what it cannot handle.
  const Real factor = member == owner && !empty ? Real(0) : ex2(shift);
  Real rest = mul_rn(factor, lane.sum), weighted = mul_rn(factor, fma_rn(lane.sum, shift, lane.weighted));
  int maxima = 0;
  if (!empty) {
    constexpr int kStride = kLanes * kVector<T>;  // from a lane's vector to its next one
    const int first = owner * kVector<T>, count = (segment.columns - first + kStride - 1) / kStride * kVector<T>;
#pragma unroll 1
    for (int i = member; i - thread < count; i += kLanes) {
      const int column = first + i / kVector<T> * kStride + i % kVector<T>;
      const bool here = column < segment.columns;
      const Real v = here ? V::value(scale, segment.begin[column]) : -Real(INFINITY);
      const Real u = above_floor(mul_rn(v - row_max, scale.rate)), e = ex2(u);
      const bool is_max = v == row_max;
      rest += is_max ? Real(0) : e;
      weighted = fma_rn(e, u, weighted);
      maxima += __popc(__ballot_sync(0xffffffffu, is_max));
    }
  }
  rest = warp_sum(rest);
  weighted = warp_sum(weighted);
  if (thread == 0) {
    shared.rest[warp] = rest;
    shared.weighted[warp] = weighted;
    shared.maxima[warp] = maxima;
  }
  __syncthreads();
  maxima = Shared::sum(shared.maxima);
  rest = Shared::sum(shared.rest) + (maxima > 0 ? Real(maxima - 1) : Real(0));
  weighted = Shared::sum(shared.weighted) * Real(0.69314718055994530942);
  if (!(row_max < Real(INFINITY)) || !is_finite(rest) || !is_finite(weighted)) {
    const Real nan = Real(NAN);
    return {nan, nan, nan, Real(guarded)};
  }
  return {row_max, rest, weighted, Real(guarded)};
}

// The state of a segment, for every thread of the group that sweeps it. Groups of a block meet at the same barriers: if one must
// sweep again, all do. kGroups: of a block, at most.
template <int kGroups, class V, class Memory>
ERC_DEVICE SegmentState<typename V::Real> segment_state(const RowScale<typename V::Real>& scale,
                                                        const Segment<V, Memory>& segment,
                                                        GroupShared<typename V::Real>* shared) {
  const int lane = threadIdx.x % kLanes, group = kGroups == 1 ? 0 : threadIdx.x / kLanes;
  const int groups = kGroups == 1 ? 1 : blockDim.x / kLanes;
  const auto fast = merge_lanes(scale, segment, sweep_lane<false>(scale, segment, lane), shared[group], false);
  const bool is_fine = is_finite(fast.sum_rest);
  bool again = !is_fine;
  if (groups > 1) {
    if (lane == 0) shared[group].again = again;
    __syncthreads();
    for (int other = 0; other < groups; ++other) again = again || shared[other].again;
  }
  if (!again) return fast;
  const auto guarded = merge_lanes(scale, segment, sweep_lane<true>(scale, segment, lane), shared[group], true);
  return is_fine ? fast : guarded;
}

// ---- a row ---------------------------------------------------------------------------------------------------------

// The states of all segments into `states`. Groups of kLanes threads take a segment at a time, so any number of them, which divides
// that of the segments, gives the same states. segment_of(g) is segment g of the row. Ends with a barrier.
template <class V, int kGroups = 1, class SegmentOf>
ERC_DEVICE void segment_states(const RowScale<typename V::Real>& scale, int segments, const SegmentOf& segment_of,
                               GroupShared<typename V::Real>* shared, SegmentState<typename V::Real>* states) {
  const int group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  for (int g = group; g < segments; g += groups) {
    const auto state = segment_state<kGroups>(scale, segment_of(g), shared);
    if (threadIdx.x % kLanes == 0) states[g] = state;
  }
  __syncthreads();
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
  bool guarded;
};

// The states of a row's segments into one: thread i of each eight of a warp takes state i, and all get the result. The merge is
// that of RowState, with one maximum for all.
template <class Real>
ERC_DEVICE RowResult<Real> merge_segments(const SegmentState<Real>* states, int segments, Real scale) {
  const int i = threadIdx.x % kMaxSegments;
  SegmentState<Real> mine{-Real(INFINITY), 0, 0, 0};
  if (i < segments) mine = states[i];
  Real row_max = mine.row_max;
#pragma unroll
  for (int offset = kMaxSegments / 2; offset > 0; offset /= 2) {
    row_max = max_nan(row_max, __shfl_xor_sync(0xffffffffu, row_max, offset));
  }
  const unsigned eight = 0xffu << (threadIdx.x % kWarp / kMaxSegments * kMaxSegments);
  const unsigned holders = __ballot_sync(0xffffffffu, mine.row_max == row_max) & eight;
  const bool guarded = (__ballot_sync(0xffffffffu, mine.guarded != 0) & eight) != 0;
  Real rest = mine.sum_rest, weighted = mine.weighted_sum;
  if (int(threadIdx.x % kWarp) != __ffs(holders) - 1) {
    const Real sum = 1 + rest, shift = (mine.row_max - row_max) * scale, factor = std::exp(shift);
    const bool nothing = mine.row_max == -Real(INFINITY) || factor == 0;  // the shift may be infinite
    rest = nothing ? Real(0) : factor * sum;
    weighted = nothing ? Real(0) : factor * fma_rn(sum, shift, weighted);
  }
#pragma unroll
  for (int offset = kMaxSegments / 2; offset > 0; offset /= 2) {
    rest += __shfl_xor_sync(0xffffffffu, rest, offset);
    weighted += __shfl_xor_sync(0xffffffffu, weighted, offset);
  }
  return {{row_max, rest, weighted}, guarded};
}

}  // namespace cuda
}  // namespace erc
