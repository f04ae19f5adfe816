// How a row is addressed, scaled and cut into pieces.
//
// A row is cut into at most eight segments, and a segment over kLanes lanes: lane l takes the 16-byte vectors l, l + kLanes, ...
// counted from the segment's first column, whatever its address. Lanes combine in a fixed order, then segments. Where a
// segment is computed (one block for a whole row, a block of a cluster, a block on its own) changes no bit.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/labels.h"
#include "common/row_state.h"
#include "cuda/device.cuh"

namespace erc {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kLanes = 128;  // of a segment; a thread is one lane
constexpr int kMaxSegments = 8;  // the largest portable cluster
constexpr int kSegmentBytes = 40 * 1024;  // the shared memory of a multiprocessor of sm_90 holds five such blocks of a cluster
constexpr int kUnroll = 4;  // vectors in flight a lane

template <class T>
constexpr int kVector = int(16 / sizeof(T));  // elements in a Raw

// ---- pieces of a row: a function of V and dtype alone ---------------------------------------------------------------

struct Partition {
  int vocab_size;
  int segment_size;  // columns, a multiple of 64
  int segments;  // 1 << log_segments
  int log_segments;

  ERC_DEVICE int first(int segment) const { return segment * segment_size; }
  ERC_DEVICE int columns(int segment) const {
    const int left = vocab_size - first(segment);
    return left < segment_size ? (left > 0 ? left : 0) : segment_size;
  }
};

inline Partition partition_of(int64_t vocab_size, int element_bytes) {
  const int most = element_bytes == 8 ? kMaxSegments / 2 : kMaxSegments;  // float64 lanes take twice the shared memory
  int log_segments = 0;
  while (1 << log_segments < most && vocab_size * element_bytes > (int64_t(kSegmentBytes) << log_segments)) ++log_segments;
  const int64_t size = (vocab_size + (1 << log_segments) - 1) >> log_segments;
  return {int(vocab_size), int((size + 63) / 64 * 64), 1 << log_segments, log_segments};
}

// ---- addresses -----------------------------------------------------------------------------------------------------

// n / divisor for n < 2^31 by a multiplication. With 2^(s-1) < divisor <= 2^s, the product's relative error is below 2^-31.
struct Divider {
  uint32_t factor = 1u << 31;
  int shift = 0;

  Divider() = default;
  explicit Divider(int64_t divisor) {
    while ((int64_t(1) << shift) < divisor) ++shift;
    factor = uint32_t(((uint64_t(1) << (31 + shift)) + divisor - 1) / divisor);
  }
  ERC_DEVICE uint32_t quotient(uint32_t n) const { return uint32_t((uint64_t(n) * factor) >> 31 >> shift); }
};

// A row by its two indices: launches have fewer than 2^31 rows.
struct RowIndex {
  uint32_t outer, inner;
};

struct RowAddress {
  char* data;
  int64_t outer_bytes, inner_bytes;  // N * V may exceed 2^31

  RowAddress(const Rows& rows, int element_bytes)
      : data(static_cast<char*>(rows.data)), outer_bytes(rows.outer_stride * element_bytes),
        inner_bytes(rows.inner_stride * element_bytes) {}

  template <class T>
  ERC_DEVICE T* row(RowIndex i) const {
    return reinterpret_cast<T*>(data + i.outer * outer_bytes + i.inner * inner_bytes);
  }
};

// Whether every row starts at a multiple of 16 bytes.
template <class T>
inline bool is_aligned(const Rows& rows) {
  const bool one_outer = rows.num_rows <= rows.inner, one_inner = rows.inner <= 1;
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && (one_outer || rows.outer_stride % kVector<T> == 0) &&
         (one_inner || rows.inner_stride % kVector<T> == 0);
}

// ---- elements ------------------------------------------------------------------------------------------------------

template <class T>
ERC_DEVICE Pair<float> pair_of(T tag, const Raw& raw, int i) {
  return unpack(tag, raw.word[i]);
}
ERC_DEVICE Pair<float> pair_of(float, const Raw& raw, int i) {
  return {as_float(raw.word[2 * i]), as_float(raw.word[2 * i + 1])};
}
ERC_DEVICE Pair<double> pair_of(double, const Raw& raw, int) {
  Pair<double> v;
  memcpy(&v, &raw, sizeof raw);
  return v;
}

template <class T>
ERC_DEVICE void set_pair(T tag, Raw& raw, int i, Pair<float> v) {
  raw.word[i] = pack(tag, v);
}
ERC_DEVICE void set_pair(float, Raw& raw, int i, Pair<float> v) {
  raw.word[2 * i] = as_uint(v.a);
  raw.word[2 * i + 1] = as_uint(v.b);
}
ERC_DEVICE void set_pair(double, Raw& raw, int, Pair<double> v) { memcpy(&raw, &v, sizeof raw); }

template <class T>
ERC_DEVICE stats_t<T> to_real(T x) {
  return unpack(T{}, x.bits).a;
}
ERC_DEVICE float to_real(float x) { return x; }
ERC_DEVICE double to_real(double x) { return x; }

template <class T>
ERC_DEVICE T from_real(T, float x) {
  return {uint16_t(pack(T{}, {x, x}))};
}
ERC_DEVICE float from_real(float, float x) { return x; }
ERC_DEVICE double from_real(double, double x) { return x; }

// ---- where vectors come from ----------------------------------------------------------------------------------------

// Up to a vector of elements, one by one; the others are `fill`.
template <class T>
ERC_DEVICE Raw load_elements(const T* p, int count, T fill) {
  T elements[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) elements[j] = j < count ? p[j] : fill;
  Raw raw;
  memcpy(&raw, elements, sizeof raw);
  return raw;
}

template <class T>
ERC_DEVICE void store_elements(T* p, const Raw& raw, int count) {
  T elements[kVector<T>];
  memcpy(elements, &raw, sizeof raw);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    if (j < count) p[j] = elements[j];
  }
}

// Memory that a sweep reads sixteen aligned bytes at a time. A misaligned vector needs two such chunks, whose outer bytes may
// belong to somebody else; only those in [begin, end) mean anything.
struct GlobalMemory {
  const void *begin, *end;

  ERC_DEVICE Raw chunk(const char* p) const { return load_chunk(p, begin, end); }
  ERC_DEVICE void wait(int) const {}
  ERC_DEVICE void wait_from(int) const {}
};

// A reader of the vectors that lie a multiple of 16 bytes from the start of a segment.
template <class T, class Memory>
struct AlignedReader {
  const Memory& memory;
  ERC_DEVICE Raw load(const T* p) const { return memory.chunk(reinterpret_cast<const char*>(p)); }
};

// The same for a segment that starts kWords words, and with 16-bit elements perhaps a half more, behind a multiple of 16 bytes.
template <class T, class Memory, int kWords>
struct ShiftedReader {
  const Memory& memory;
  int bytes;

  ERC_DEVICE Raw load(const T* p) const {
    const char* chunk = reinterpret_cast<const char*>(p) - bytes;
    const Raw low = memory.chunk(chunk), high = memory.chunk(chunk + 16);
    const auto word = [&](int i) { return i < 4 ? low.word[i] : high.word[i - 4]; };
    Raw out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.word[i] = sizeof(T) == 2 ? shifted_half(word(i + kWords), word(i + kWords + 1), bytes & 2) : word(i + kWords);
    }
    return out;
  }
};

// The same by one code for every start, a third slower.
template <class T, class Memory>
struct AnyReader {
  const Memory& memory;
  int bytes;

  ERC_DEVICE Raw load(const T* p) const {
    const char* chunk = reinterpret_cast<const char*>(p) - bytes;
    const Raw low = memory.chunk(chunk), high = memory.chunk(chunk + 16);
    uint32_t words[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                         high.word[0], high.word[1], high.word[2], high.word[3]};
#pragma unroll
    for (int i = 0; i < 6; ++i) words[i] = bytes & 8 ? words[i + 2] : words[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) words[i] = bytes & 4 ? words[i + 1] : words[i];
    Raw out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.word[i] = sizeof(T) == 2 ? shifted_half(words[i], words[i + 1], bytes & 2) : words[i];
    return out;
  }
};

// Element by element.
template <class T>
struct ElementReader {
  ERC_DEVICE Raw load(const T* p) const { return load_elements(p, kVector<T>, T{}); }
};

// How much code a sweep is worth where rows are not aligned.
enum class Effort { kEveryStart, kOneCode, kElements };

// Calls visit(reader) with what reads vectors that start like `p`.
template <bool kAligned, Effort kEffort, class T, class Memory, class Visit>
ERC_DEVICE void with_reader(const Memory& memory, const T* p, Visit&& visit) {
  if constexpr (kAligned) {
    visit(AlignedReader<T, Memory>{memory});
  } else if constexpr (kEffort == Effort::kElements || sizeof(T) == 8) {
    visit(ElementReader<T>{});
  } else {
    const int bytes = int(reinterpret_cast<uintptr_t>(p) % 16);
    if (bytes == 0) return visit(AlignedReader<T, Memory>{memory});
    if constexpr (kEffort == Effort::kOneCode) return visit(AnyReader<T, Memory>{memory, bytes});
    if constexpr (sizeof(T) == 2) {
      if (bytes < 4) return visit(ShiftedReader<T, Memory, 0>{memory, bytes});
    }
    if (bytes < 8) return visit(ShiftedReader<T, Memory, 1>{memory, bytes});
    if (bytes < 12) return visit(ShiftedReader<T, Memory, 2>{memory, bytes});
    visit(ShiftedReader<T, Memory, 3>{memory, bytes});
  }
}

// A segment as the sweeps see it.
template <class V, class Memory>
struct Segment {
  using T = typename V::Element;
  const T* begin;
  int columns;
  Memory memory;

  ERC_DEVICE int whole() const { return columns / kVector<T>; }  // vectors
  ERC_DEVICE int rest() const { return columns % kVector<T>; }  // elements behind them
};

template <class V>
ERC_DEVICE auto global_segments(const Partition& partition, const typename V::Element* row) {
  return [=](int g) {
    const typename V::Element* begin = row + partition.first(g);
    const int columns = partition.columns(g);
    return Segment<V, GlobalMemory>{begin, columns, {begin, begin + columns}};
  };
}

// ---- scaling -------------------------------------------------------------------------------------------------------

// An element's carrier v of the centred variable, and its derivative dv/dz.
template <class Real>
struct Capped {
  Pair<Real> value, slope;
};

// 1 / x of x in [1, 2], in float32 by a polynomial within 0.2 % and a step of third order: the pipe of special functions is
// the narrow one.
ERC_DEVICE Pair<double> inverse_pair(Pair<double> x) { return {1 / x.a, 1 / x.b}; }
ERC_DEVICE Pair<float> inverse_pair(Pair<float> x) {
  const auto both = [](float c) { return Pair<float>{c, c}; };
  Pair<float> y = fma_pair(x, both(-0.22183709f), both(1.3310225f));
  y = fma_pair(x, y, both(-2.9393413f));
  y = fma_pair(x, y, both(2.8284228f));
  const Pair<float> e = fma_pair(Pair<float>{-x.a, -x.b}, y, both(1));
  return fma_pair(y, fma_pair(e, e, e), y);
}

// The scaling of one row: v = z, or its softcapped value softcap * tanh(z * inner).
template <class Real>
struct RowScale {
  Real scale;  // x = v * scale
  Real rate;  // scale * log2(e): exp(x) = 2^(v * rate)
  Real chain;  // dx/dz but for the softcap's own factor
  Real chain_by_rate;
  Real softcap;  // 0: none
  Real inner;
  Real decay;  // exp(-2 |z| * inner) = 2^(|z| * decay)

  static ERC_HOST_DEVICE RowScale of(const Scaling& s, double temperature) {
    const bool capped = s.softcap != 0;
    const double slope = s.logit_scale / temperature, scale = capped ? 1 / temperature : slope;
    const double inner = capped ? s.logit_scale / s.softcap : 1;
    const double rate = scale * 1.4426950408889634074;
    return {Real(scale),
            Real(rate),
            Real(slope),
            Real(slope / rate),
            Real(s.softcap),
            Real(inner),
            Real(inner * -2.8853900817779268147)};
  }

  // Within 1.5 % of the softcap from softcap * tanh(z * inner), and finite: a place to centre sums at, for few instructions.
  ERC_DEVICE Real roughly_capped(Real z) const {
    const Real limit = Real(2.15), u = mul_rn(z, inner), t = u > limit ? limit : u > -limit ? u : -limit, w = mul_rn(t, t);
    return mul_rn(mul_rn(t, softcap), fma_rn(w, fma_rn(w, Real(0.0190747), Real(-0.1933164)), Real(0.9452191)));
  }

  // tanh = 1 - 2 q / (1 + q) with q = exp(-2 |u|), and by its series where that would cancel; 1 - tanh^2 = 4 g (1 - g) with
  // g = q / (1 + q). kInfinite: z may be infinite and then stays so: -inf forbids a token, +inf makes its row NaN.
  template <bool kInfinite>
  ERC_DEVICE Capped<Real> capped(Pair<Real> z) const {
    const auto both = [](Real x) { return Pair<Real>{x, x}; };
    const Pair<Real> u = mul_pair(z, both(inner)), w = mul_pair(u, u);
    const Pair<Real> q{ex2(mul_rn(std::fabs(z.a), decay)), ex2(mul_rn(std::fabs(z.b), decay))};
    const Pair<Real> g = mul_pair(q, inverse_pair(add_pair(both(1), q)));
    const Pair<Real> far = fma_pair(g, both(-2), both(1));
    Pair<Real> tanh;
    if constexpr (sizeof(Real) == 8) {
      tanh = {std::tanh(u.a), std::tanh(u.b)};
    } else {  // tanh(u) / u to 1.5e-7 for |u| < 0.35, fitted at the Chebyshev nodes of u^2
      Pair<Real> p = fma_pair(w, both(-0.050163355f), both(0.13316128f));
      p = fma_pair(w, p, both(-0.33333215f));
      const Pair<Real> near = fma_pair(mul_pair(u, w), p, u);
      tanh.a = std::fabs(u.a) < Real(0.35) ? near.a : std::copysign(far.a, u.a);
      tanh.b = std::fabs(u.b) < Real(0.35) ? near.b : std::copysign(far.b, u.b);
    }
    Capped<Real> out;
    out.value = mul_pair(tanh, both(softcap));
    const Pair<Real> fourfold = mul_pair(g, both(4));
    out.slope = fma_pair(Pair<Real>{-fourfold.a, -fourfold.b}, g, fourfold);
    if constexpr (kInfinite) {
      if (std::fabs(z.a) == Real(INFINITY)) out.value.a = z.a;
      if (std::fabs(z.b) == Real(INFINITY)) out.value.b = z.b;
    }
    return out;
  }
};

// The token's own scaling where every one has a temperature, else what the host has made for all of them.
template <class Real>
ERC_DEVICE RowScale<Real> row_scale(const RowInputs& in, const RowScale<Real>& common, int64_t token) {
  if (in.temperature == nullptr || token < 0) return common;
  return RowScale<Real>::of(in.scaling, double(static_cast<const Real*>(in.temperature)[token]));
}

// dtypes of the logits and of their gradient, softcap and alignment: what changes the machine code.
template <class T, bool kSoftcap, bool kAligned, class G = T>
struct Variant {
  using Element = T;
  using Gradient = G;
  using Real = stats_t<T>;
  static constexpr bool softcap = kSoftcap;
  static constexpr bool aligned = kAligned;
  static constexpr bool general = std::is_same<T, double>::value;  // one form with a softcap and without

  // v of the elements 2 i and 2 i + 1, and dv/dz.
  template <bool kInfinite>
  ERC_DEVICE static Capped<Real> pair(const RowScale<Real>& scale, const Raw& raw, int i) {
    return of<kInfinite>(scale, pair_of(T{}, raw, i));
  }
  ERC_DEVICE static Capped<Real> one(const RowScale<Real>& scale, Real z) { return of<true>(scale, {z, z}); }
  ERC_DEVICE static Real value(const RowScale<Real>& scale, T z) { return one(scale, to_real(z)).value.a; }
  ERC_DEVICE static Real slope(const RowScale<Real>& scale, T z) { return one(scale, to_real(z)).slope.a; }
  ERC_DEVICE static bool caps(const RowScale<Real>& scale) { return kSoftcap && (!general || scale.softcap != 0); }
  ERC_DEVICE static T minus_infinity() { return from_real(T{}, -stats_t<T>(INFINITY)); }

 private:
  template <bool kInfinite>
  ERC_DEVICE static Capped<Real> of(const RowScale<Real>& scale, Pair<Real> z) {
    if (caps(scale)) return scale.template capped<kInfinite>(z);
    return {z, {1, 1}};
  }
};

// ---- launches ------------------------------------------------------------------------------------------------------

// What the host makes of a call, so that no thread has to.
template <class V>
struct Prepared {
  using T = typename V::Element;
  using Real = typename V::Real;
  Partition partition;
  RowScale<Real> scale;
  RowAddress logits;
  uint32_t inner;
  Divider by_inner;

  explicit Prepared(const RowInputs& in)
      : partition(partition_of(in.logits.vocab_size, sizeof(T))), scale(RowScale<Real>::of(in.scaling, in.scaling.temperature)),
        logits(in.logits, sizeof(T)),
        inner(uint32_t(in.logits.inner < in.logits.num_rows ? in.logits.inner : in.logits.num_rows)), by_inner(inner) {}

  ERC_DEVICE RowIndex index(uint32_t row) const {
    const uint32_t outer = by_inner.quotient(row);
    return {outer, row - outer * inner};
  }
};

// Blocks that must fit on a multiprocessor: of bfloat16 as many as the compiler manages without spilling, of other rows so few
// that it never has to. With a softcap packed arithmetic takes more registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kCappedBlocks = 2;
#else
constexpr int kCappedBlocks = 4;
#endif
template <class V, int kUncapped>
constexpr int kBlocks = !std::is_same<typename V::Element, bfloat16>::value || (V::softcap && !V::aligned) ? 2
                        : V::softcap                                                                       ? kCappedBlocks
                                                                                                           : kUncapped;

// Calls body(Variant) with what fits the rows and, where it is another dtype, their gradient. float64 is rare, and has one form.
template <class T, class G, class Body>
inline cudaError_t dispatch_dtypes(bool aligned, bool softcap, Body&& body) {
#ifdef ERC_ONLY_SOFTCAP  // for the machine-code report, which looks at few of them
  return body(Variant<bfloat16, ERC_ONLY_SOFTCAP, ERC_ONLY_ALIGNED>{});
#else
  if constexpr (!std::is_same<T, double>::value) {
    if (aligned) return softcap ? body(Variant<T, true, true, G>{}) : body(Variant<T, false, true, G>{});
    if (!softcap) return body(Variant<T, false, false, G>{});
  }
  return body(Variant<T, true, false, G>{});
#endif
}

// Of tensors with one dtype.
template <class Body>
inline cudaError_t dispatch(std::initializer_list<const Rows*> tensors, bool softcap, Body&& body) {
  const Rows& first = **tensors.begin();
  if (first.num_rows > INT32_MAX || first.vocab_size > INT32_MAX) return cudaErrorInvalidValue;
  const auto with_type = [&](auto tag) {
    using T = decltype(tag);
    bool aligned = true;
    for (const Rows* rows : tensors) aligned = aligned && (rows->data == nullptr || is_aligned<T>(*rows));
    return dispatch_dtypes<T, T>(aligned, softcap, body);
  };
  switch (first.dtype) {
    case DType::kFloat32: return with_type(float{});
    case DType::kBFloat16: return with_type(bfloat16{});
    case DType::kFloat16: return with_type(float16{});
    case DType::kFloat64: return with_type(double{});
    default: return cudaErrorInvalidValue;
  }
}

// Of rows and their gradient, which of float32 rows may be narrower.
template <class Body>
inline cudaError_t dispatch_gradient(const Rows& logits, const Rows& gradient, bool softcap, Body&& body) {
  if (gradient.data == nullptr || gradient.dtype == logits.dtype) return dispatch({&logits, &gradient}, softcap, body);
  if (logits.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  if (logits.num_rows > INT32_MAX || logits.vocab_size > INT32_MAX) return cudaErrorInvalidValue;
  const bool aligned = is_aligned<float>(logits) && is_aligned<bfloat16>(gradient);
  if (gradient.dtype == DType::kBFloat16) return dispatch_dtypes<float, bfloat16>(aligned, softcap, body);
  if (gradient.dtype == DType::kFloat16) return dispatch_dtypes<float, float16>(aligned, softcap, body);
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace erc
