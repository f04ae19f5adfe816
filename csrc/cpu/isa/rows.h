// How a row is addressed, scaled and cut into blocks, and what is read and written per row.
#pragma once

#include <cmath>
#include <type_traits>

#include "common/labels.h"
#include "cpu/isa/simd.h"

namespace erc {
namespace ERC_ISA {

// The scaling of one row, and the carrier v of its centred variable: v = z, or its softcapped value.
template <class Real>
struct RowScale {
  double scale;   // x = v * scale
  double chain;   // dv * scale / dz, but for the softcap's own factor
  Real softcap;   // 0: none
  Real inner;     // z * inner enters the softcap's tanh

  RowScale(const RowInputs& s, int64_t token) {
    const double temperature = s.temperature ? double(static_cast<const Real*>(s.temperature)[token]) : s.scaling.temperature;
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

// The same, and tells each call as a constant which of kSets sets of accumulators takes the block, in turns.
template <int kSets, class T, class Visit>
ERC_INLINE void for_each_block_in_turns(const T* p, int64_t n, Visit&& visit) {
  static_assert(kSets == 1 || kSets == 2, "");
  using First = std::integral_constant<int, 0>;
  int64_t i = 0;
  if constexpr (kSets == 2) {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      visit(p + i, std::true_type{}, First{});
      visit(p + i + kLanes, std::true_type{}, std::integral_constant<int, 1>{});
    }
  }
  for_each_block(p + i, n - i, [&](const T* block, int64_t, auto whole) { visit(block, whole, First{}); });
}

template <class T>
inline void fill(T* row, int64_t vocab_size, stats_t<T> value) {
  T encoded;
  store_one(&encoded, value);
  for (int64_t i = 0; i < vocab_size; ++i) row[i] = encoded;
}

// x as the statistics dtype holds it. GCC 12 forgets a conversion there and back where two of them share a vector, so the
// value passes through memory.
template <class Real>
ERC_INLINE double rounded_to(double x) {
  Real rounded = Real(x);
  asm("" : "+m"(rounded));
  return double(rounded);
}

template <class T>
inline stats_t<T> optional_value(const void* values, int64_t token, stats_t<T> otherwise) {
  return values ? static_cast<const stats_t<T>*>(values)[token] : otherwise;
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
    default: return;  // the bindings let nothing else pass
  }
}

}  // namespace ERC_ISA
}  // namespace erc
