// How a row is addressed, scaled and cut into pieces.
//
// A row is cut into at most eight segments, and a segment over kLanes lanes: lane l takes the 16-byte vectors l, l + kLanes, ...
// counted from the segment's first column, whatever its address. Lanes combine in a fixed order, then segments from left to
// right. Where a segment is computed (one block for a whole row, a block of a cluster, a block on its own) changes no bit.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "common/labels.h"
#include "common/row_state.h"
#include "cuda/device.cuh"

namespace erc {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kLanes = 256;         // of a segment; a thread is one lane
constexpr int kMaxSegments = 8;     // the largest portable cluster
constexpr int kSegmentBytes = 40 * 1024;  // the shared memory of an SM of sm_90 holds five such blocks of a cluster
constexpr int kUnroll = 4;          // vectors in flight a lane

template <class T>
constexpr int kVector = int(16 / sizeof(T));  // elements in a Raw

// ---- pieces of a row: a function of V and dtype alone ---------------------------------------------------------------

struct Partition {
  int64_t vocab_size;
  int64_t segment_size;  // columns, a multiple of 64
  int segments;

  ERC_DEVICE int columns(int segment) const {
    const int64_t left = vocab_size - segment * segment_size;
    return int(left < segment_size ? (left > 0 ? left : 0) : segment_size);
  }
};

inline Partition partition_of(int64_t vocab_size, int element_bytes) {
  const int most = element_bytes == 8 ? kMaxSegments / 2 : kMaxSegments;  // float64 lanes take twice the shared memory
  int segments = 1;
  while (segments < most && vocab_size * element_bytes > int64_t(segments) * kSegmentBytes) segments *= 2;
  const int64_t size = (vocab_size + segments - 1) / segments;
  return {vocab_size, (size + 63) / 64 * 64, segments};
}

// ---- addresses -----------------------------------------------------------------------------------------------------

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

// ---- where vectors come from and go to -------------------------------------------------------------------------------

// A vector whose address may be anything: element by element, so that the partition need not follow the address.
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

// Where a segment lies: `begin` is its first element, load reads the vector at p. In global memory, 16 bytes at once if kAligned.
template <class T, bool kAligned>
struct GlobalSource {
  const T* begin;
  ERC_DEVICE static Raw load(const T* p) {
    if constexpr (kAligned) return load_streaming(p);
    return load_elements(p, kVector<T>, T{});
  }
};

template <class T>
struct SharedSource {
  const T* begin;
  ERC_DEVICE static Raw load(const T* p) { return *reinterpret_cast<const Raw*>(p); }
};

// ---- scaling -------------------------------------------------------------------------------------------------------

// The scaling of one row, and the carrier v of its centred variable: v = z, or its softcapped value.
template <class Real>
struct RowScale {
  Real scale;    // x = v * scale
  Real rate;     // scale * log2(e): exp(x) = 2^(v * rate)
  Real chain;    // dx/dz but for the softcap's own factor
  Real softcap;  // 0: none
  Real inner;    // z * inner enters the softcap's tanh

  ERC_DEVICE RowScale(const RowInputs& in, int64_t token) {
    const bool has_own = in.temperature != nullptr && token >= 0;
    const double temperature = has_own ? double(static_cast<const Real*>(in.temperature)[token]) : in.scaling.temperature;
    const bool capped = in.scaling.softcap != 0;
    const double slope = in.scaling.logit_scale / temperature, s = capped ? 1 / temperature : slope;
    scale = Real(s);
    rate = Real(s * 1.4426950408889634074);
    chain = Real(slope);
    softcap = Real(in.scaling.softcap);
    inner = capped ? Real(in.scaling.logit_scale / in.scaling.softcap) : Real(1);
  }

  // Softcap of finite logits; an infinite one stays infinite: -inf forbids a token, +inf makes its row NaN.
  ERC_DEVICE Real capped(Real z) const {
    return softcap == 0 || z == Real(INFINITY) || z == -Real(INFINITY) ? z : softcap * std::tanh(mul_rn(z, inner));
  }

  // The softcap's factor of dx/dz, 1 / cosh^2: where tanh is all but 1, 1 - tanh^2 would cancel.
  ERC_DEVICE Real capped_slope(Real z) const {
    if (softcap == 0) return 1;
    const Real q = ex2(std::fabs(mul_rn(z, inner)) * Real(-2.8853900817779268147)), inverse = 1 / (1 + q);
    return 4 * q * inverse * inverse;
  }
};

// dtypes of the logits and of their gradient, softcap and alignment: what changes the machine code. The unaligned form serves
// every softcap.
template <class T, bool kSoftcap, bool kAligned, class G = T>
struct Variant {
  using Element = T;
  using Gradient = G;
  using Real = stats_t<T>;
  static constexpr bool softcap = kSoftcap;
  static constexpr bool aligned = kAligned;

  ERC_DEVICE static Pair<Real> values(const RowScale<Real>& scale, const Raw& raw, int i) {
    Pair<Real> v = pair_of(T{}, raw, i);
    if constexpr (kSoftcap) v = {scale.capped(v.a), scale.capped(v.b)};
    return v;
  }
  ERC_DEVICE static Real value(const RowScale<Real>& scale, T z) {
    if constexpr (kSoftcap) return scale.capped(to_real(z));
    return to_real(z);
  }
  ERC_DEVICE static Pair<Real> slopes(const RowScale<Real>& scale, const Raw& raw, int i) {
    if constexpr (!kSoftcap) return {1, 1};
    const Pair<Real> z = pair_of(T{}, raw, i);
    return {scale.capped_slope(z.a), scale.capped_slope(z.b)};
  }
  ERC_DEVICE static Real slope(const RowScale<Real>& scale, T z) {
    if constexpr (kSoftcap) return scale.capped_slope(to_real(z));
    return 1;
  }
  ERC_DEVICE static T minus_infinity() { return from_real(T{}, -stats_t<T>(INFINITY)); }
};

// Blocks of a statistics sweep that must fit on a multiprocessor: as many as the compiler manages without spilling.
template <class V>
constexpr int kResident = !V::aligned ? 1 : V::softcap ? 2 : std::is_same<typename V::Element, bfloat16>::value ? 4 : 3;

// Calls body(Variant) with what fits the rows, which are all of one dtype. float64 has one general form.
template <class Body>
inline cudaError_t dispatch(std::initializer_list<const Rows*> tensors, bool softcap, Body&& body) {
  const auto with_type = [&](auto tag) {
    using T = decltype(tag);
    bool aligned = true;
    for (const Rows* rows : tensors) aligned = aligned && (rows->data == nullptr || is_aligned<T>(*rows));
    if constexpr (std::is_same<T, double>::value) aligned = false;
    if (!aligned) return body(Variant<T, true, false>{});
    if constexpr (!std::is_same<T, double>::value) {
      if (softcap) return body(Variant<T, true, true>{});
      return body(Variant<T, false, true>{});
    }
    return cudaErrorInvalidValue;
  };
  switch ((*tensors.begin())->dtype) {
    case DType::kFloat32:
      return with_type(float{});
    case DType::kBFloat16:
      return with_type(bfloat16{});
    case DType::kFloat16:
      return with_type(float16{});
    case DType::kFloat64:
      return with_type(double{});
    default:
      return cudaErrorInvalidValue;
  }
}

// The same for rows and their gradient, which of float32 rows may be narrower: that has one general form.
template <class Body>
inline cudaError_t dispatch_gradient(const Rows& logits, const Rows& gradient, bool softcap, Body&& body) {
  if (gradient.data == nullptr || gradient.dtype == logits.dtype) return dispatch({&logits, &gradient}, softcap, body);
  if (logits.dtype != DType::kFloat32) return cudaErrorInvalidValue;
  if (gradient.dtype == DType::kBFloat16) return body(Variant<float, true, false, bfloat16>{});
  if (gradient.dtype == DType::kFloat16) return body(Variant<float, true, false, float16>{});
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace erc
