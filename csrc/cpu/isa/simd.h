// Vectors of the instruction set that this file is compiled for, and the exponential of the sweeps.
//
// Written with the compilers' vector extension, so that the sweeps read as their formulas; only what the extension lacks
// (max, half precision, streaming stores) is spelled in intrinsics. Every instruction set works in blocks of kLanes elements
// with one accumulator a lane, so the order of additions is the same on all of them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
// GCC 12's AVX-512 headers trip its own warning when their intrinsics are inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include "common/calls.h"

#ifndef ERC_ISA
#error "compile with -DERC_ISA=<name of the instruction set>"
#endif

namespace erc {
namespace ERC_ISA {

constexpr int kLanes = 32;

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

#define ERC_INLINE inline __attribute__((always_inline))
// One copy for all its callers. Inlined, a compiler may fuse another multiplication with its addition in each.
#if defined(__clang__)
#define ERC_ONE_COPY inline __attribute__((noinline))
#else
#define ERC_ONE_COPY inline __attribute__((noinline, noclone))
#endif

// Whether vectors have instructions for u - floor(u) and q * 2^floor(u).
#if defined(__AVX512DQ__)
#define ERC_HAS_SCALEF 1
#else
#define ERC_HAS_SCALEF 0
#endif

typedef float f32v __attribute__((vector_size(kWidth * 4)));
typedef int32_t i32v __attribute__((vector_size(kWidth * 4)));
typedef uint32_t u32v __attribute__((vector_size(kWidth * 4)));
typedef uint16_t u16v __attribute__((vector_size(kWidth * 2)));

// The vector that carries statistics of type Real. float64 logits are the oracle's business: one element at a time.
template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = f32v;
  static constexpr int width = kWidth;
};
template <>
struct VectorOf<double> {
  using type = double;
  static constexpr int width = 1;
};

template <class To, class From>
ERC_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

ERC_INLINE f32v broadcast(float x) { return x - f32v{}; }
ERC_INLINE f32v select(i32v mask, f32v yes, f32v no) { return mask ? yes : no; }
ERC_INLINE double select(bool mask, double yes, double no) { return mask ? yes : no; }

// Whether a comparison holds in any lane.
ERC_INLINE bool any(i32v mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  for (int i = 0; i < kWidth; ++i) {
    if (mask[i]) return true;
  }
  return false;
#endif
}
ERC_INLINE bool any(bool mask) { return mask; }

// max(a, b); b where either is NaN. A NaN that a maximum swallows poisons the sum of exponentials.
ERC_INLINE f32v vmax(f32v a, f32v b) {
#if defined(__AVX512F__)
  return (f32v)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (f32v)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (f32v)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
ERC_INLINE double vmax(double a, double b) { return a > b ? a : b; }

ERC_INLINE u32v vmax(u32v a, u32v b) {
#if defined(__AVX512F__)
  return (u32v)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (u32v)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
  return a > b ? a : b;
#endif
}

// ---- loads and stores ----------------------------------------------------------------------------------------------

ERC_INLINE float half_to_float(uint16_t h) {
  // Shift the exponent into place and let a multiplication rebias it, which normalises subnormals on the way.
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  if ((h & 0x7c00) == 0x7c00) return bit_cast<float>(sign | rest | 0x7f800000);
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f));
}

ERC_INLINE uint16_t float_to_half(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (magnitude < 0x38800000) {                       // subnormal: the addition rounds to a multiple of 2^-24
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return uint16_t(sign | (rounded >> 13));
}

ERC_INLINE uint16_t float_to_bfloat16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

ERC_INLINE f32v load(const float* p) {
  f32v v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
ERC_INLINE double load(const double* p) { return *p; }
ERC_INLINE f32v load(const bfloat16* p) {
#if defined(__AVX512F__)
  const u32v wide = (u32v)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const u32v wide = (u32v)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  u16v narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const u32v wide = __builtin_convertvector(narrow, u32v);
#endif
  return (f32v)(wide << 16);
}
ERC_INLINE f32v load(const float16* p) {
#if defined(__AVX512F__)
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  f32v v;
  for (int i = 0; i < kWidth; ++i) v[i] = half_to_float(p[i].bits);
  return v;
#endif
}

ERC_INLINE float load_one(const float* p) { return *p; }
ERC_INLINE double load_one(const double* p) { return *p; }
ERC_INLINE float load_one(const bfloat16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }
ERC_INLINE float load_one(const float16* p) { return half_to_float(p->bits); }

ERC_INLINE void store_one(float* p, float x) { *p = x; }
ERC_INLINE void store_one(double* p, double x) { *p = x; }
ERC_INLINE void store_one(bfloat16* p, float x) { p->bits = float_to_bfloat16(x); }
ERC_INLINE void store_one(float16* p, float x) { p->bits = float_to_half(x); }

// Rounded once, to nearest even. Finite values only: rows that hold NaN never come here.
ERC_INLINE f32v encode(const float*, f32v v) { return v; }
ERC_INLINE double encode(const double*, double v) { return v; }
ERC_INLINE u16v encode(const float16*, f32v v) {
#if defined(__AVX512F__)
  return (u16v)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (u16v)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  u16v h;
  for (int i = 0; i < kWidth; ++i) h[i] = float_to_half(v[i]);
  return h;
#endif
}

// A store that bypasses the caches: a gradient row is not read again soon, and a normal store would first read the line.
template <class Bits>
ERC_INLINE void stream_bits(void* p, Bits v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

template <bool kStream, class Bits>
ERC_INLINE void store_bits(void* p, Bits v) {
  if constexpr (kStream) {
    stream_bits(p, v);
  } else {
    std::memcpy(p, &v, sizeof v);
  }
}

// ---- blocks of kLanes elements -------------------------------------------------------------------------------------

// Two bfloat16 that share a 32-bit word go to two vectors, the even elements to one and the odd ones to the next: a shift and
// a mask instead of widening and narrowing. element_of says which element of the block lane `position` holds.
template <class T>
constexpr int element_of(int position) {
  if constexpr (!std::is_same_v<T, bfloat16>) return position;
  const int vector = position / kWidth, lane = position % kWidth;
  return (vector & ~1) * kWidth + 2 * lane + (vector & 1);
}

// The lines of a block. kNearest: into the first cache, else into the second.
template <bool kNearest, class T>
ERC_INLINE void prefetch_block(const T* block, int64_t bytes_ahead) {
  for (size_t line = 0; line < kLanes * sizeof(T); line += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(block) + bytes_ahead + line, 0, kNearest ? 3 : 2);
  }
}

// What a sweep over memory will read, a line for each that it reads: a core that computes on every line has fewer of them under
// way than one that only reads. Hardware prefetches within a page, and stops at its end: a line of each of eight pages in turn, to
// the second cache, keeps it busy in all of them and looks their addresses up early.
template <class T>
ERC_INLINE void prefetch_ahead(const T* block) {
  constexpr uintptr_t kLine = 64, kPage = 4096, kPages = 8, kSpan = kPages * kPage, kBlock = kLanes * sizeof(T);
  constexpr uintptr_t kLines = kBlock / kLine, kTurns = kPages / kLines;
  const uintptr_t address = reinterpret_cast<uintptr_t>(block), place = address % kSpan;
  const uintptr_t page = place / kBlock % kTurns * kLines, line = place / (kPages * kLine);
  const uintptr_t next = address - place + kSpan + page * kPage + line * kLine;
  for (uintptr_t i = 0; i < kLines; ++i) __builtin_prefetch(reinterpret_cast<const void*>(next + i * kPage), 0, 2);
  prefetch_block<true>(block, 1024);
}

template <class T, class V, int kCount>
ERC_INLINE void load_block(const T* p, V (&block)[kCount]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    for (int j = 0; j < kCount; j += 2) {
      u32v words;
      std::memcpy(&words, p + j * kWidth, sizeof words);
      block[j] = (f32v)(words << 16);
      block[j + 1] = (f32v)(words & 0xffff0000u);
    }
  } else {
    for (int j = 0; j < kCount; ++j) block[j] = load(p + j * (kLanes / kCount));
  }
}

// Two vectors of float32, each rounded once, to nearest even, as the lower and the upper halves of 32-bit words.
ERC_INLINE u32v encode_pairs(f32v even, f32v odd) {
#if defined(__AVX512BW__)
  // Both truncated; a half is rounded up where what it lost, and its own last bit beside that, exceed one half.
  const __m512i a = (__m512i)even, b = (__m512i)odd;
  const __mmask32 kUpper = 0xaaaaaaaa;
  const __m512i kept = _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(a, 16), b);
  const __m512i lost = _mm512_mask_blend_epi16(kUpper, a, _mm512_slli_epi32(b, 16));
  const __m512i sticky = _mm512_ternarylogic_epi32(lost, kept, _mm512_set1_epi16(1), 0xf8);  // lost | (kept & 1)
  const __mmask32 up = _mm512_cmpgt_epu16_mask(sticky, _mm512_set1_epi16(int16_t(0x8000)));
  return (u32v)_mm512_mask_sub_epi16(kept, up, kept, _mm512_set1_epi16(-1));
#else
  const auto rounded = [](u32v bits) { return bits + 0x7fff + ((bits >> 16) & 1); };  // in the upper half
  return (rounded((u32v)even) >> 16) | (rounded((u32v)odd) & 0xffff0000u);
#endif
}

// Every second element of two neighbouring vectors, from element kFirst on.
template <int kFirst, int... kIndex>
ERC_INLINE f32v every_second(f32v a, f32v b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex + kFirst)...);
}

// Rounded once, to nearest even; the block is in the order in which load_block gives one of Source. p and the blocks before it
// are aligned to vectors where kStream.
template <bool kStream, class Source, class T, class V, int kCount>
ERC_INLINE void store_block(T* p, const V (&block)[kCount]) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    for (int j = 0; j < kCount; j += 2) {
      f32v even = block[j], odd = block[j + 1];
      if constexpr (!std::is_same_v<Source, bfloat16>) {
        constexpr std::make_integer_sequence<int, kWidth> kAll{};
        even = every_second<0>(block[j], block[j + 1], kAll);
        odd = every_second<1>(block[j], block[j + 1], kAll);
      }
      store_bits<kStream>(p + j * kWidth, encode_pairs(even, odd));
    }
  } else {
    for (int j = 0; j < kCount; ++j) store_bits<kStream>(p + j * (kLanes / kCount), encode(p, block[j]));
  }
}

ERC_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- exp((v - row_max) * scale), for arguments <= 0 ----------------------------------------------------------------

// 2^(d * rate) for d <= 0, within 2 ulp of it, where rate is the float nearest to scale * log2(e). What that rounding makes of
// a term is a factor of 1 + rate_error * x with x = d * scale, at most 6e-8 * |x|: a gradient may bear it, and the row's sums
// are corrected for it (row_sweep), which costs nothing an element.
template <class Real>
struct ScaledExp;

template <>
struct ScaledExp<float> {
  float rate, floor, lifted_floor;
  float near_limit;   // -d up to here is near
  double rate_error;  // relative

  explicit ScaledExp(double scale) {
    const double exact = scale * 1.4426950408889634074;
    rate = float(exact);
    rate_error = (exact - double(rate)) / exact;
    floor = -finite(127 / exact);
    lifted_floor = -finite(254 / exact);
    near_limit = finite(125 / exact);
  }

  // Keeps d finite, so that 0 * d is 0; NaN passes.
  ERC_INLINE f32v clamp(f32v d) const { return vmax(broadcast(floor), d); }

  // For any clamped d; below 2^-126.5 the result is exactly 0.
  ERC_INLINE f32v operator()(f32v d) const {
    const Parts parts = split(d);
    return parts.fraction * (f32v)((parts.integer << 23) + 0x3f800000u);
  }

  // The same bits where the result is a normal number, which its exponent's integer addition makes.
  ERC_INLINE f32v near(f32v d) const {
    const Parts parts = split(d);
    return (f32v)((u32v)parts.fraction + (parts.integer << 23));
  }

#if ERC_HAS_SCALEF
  // 2^kLift times the exponential, by fewer instructions, for any d but -inf, whose product with what it gives is NaN. What is
  // rounded is u = d * rate + kLift, and the lift makes it small where terms are of weight: the result is within 5e-7 down to
  // x = -22 and 8e-7 down to -33. Of smaller terms the contract asks for less.
  static constexpr int kLift = 16;
  ERC_INLINE f32v lifted(f32v d) const { return lifted_by(kPolynomial, d * rate + float(kLift)); }
  // As clamp, but to where lifted is 0.
  ERC_INLINE f32v clamp_lifted(f32v d) const { return vmax(broadcast(lifted_floor), d); }

  // The coefficients of 2^f on [0, 1): relative error 8.3e-8, and 1 at 0.
  struct Polynomial {
    float c[6];
    ERC_INLINE Polynomial operator*(double factor) const {
      Polynomial product;
      for (int k = 0; k < 6; ++k) product.c[k] = float(c[k] * factor);
      return product;
    }
  };
  static constexpr Polynomial kPolynomial = {
      {1.0f, 0x1.62e4bap-1f, 0x1.ebdb6ap-3f, 0x1.c91c1p-5f, 0x1.277c1ep-7f, 0x1.e969p-10f}};

  // The polynomial's factor times 2^u.
  static ERC_INLINE f32v lifted_by(const Polynomial& p, f32v u) {
    const f32v f = (f32v)_mm512_reduce_ps((__m512)u, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // u - floor(u)
    f32v q = f * p.c[5] + p.c[4];
    q = q * f + p.c[3];
    q = q * f + p.c[2];
    q = q * f + p.c[1];
    q = q * f + p.c[0];
    return (f32v)_mm512_scalef_ps((__m512)q, (__m512)u);
  }
#endif

 private:
  struct Parts {
    f32v fraction;  // 2^(d * rate - integer)
    u32v integer;   // in the low bits, modulo 2^9
  };

  static float finite(double x) { return x < FLT_MAX ? float(x) : FLT_MAX; }

  ERC_INLINE Parts split(f32v d) const {
    const f32v magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
    const f32v shifted = d * rate + magic;
    const f32v integer = shifted - magic;
    const f32v f = d * rate - integer;  // exact, by a fused multiply-subtract
    // Minimax for (2^f - 1) / f on [-1/2, 1/2], relative error of 2^f 9.2e-8.
    f32v q = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
    q = q * f + 0x1.c6b752p-5f;
    q = q * f + 0x1.ebf9bcp-3f;
    q = q * f + 0x1.62e42ap-1f;
    q = q * f + 1.0f;
    return {q, (u32v)shifted};
  }
};

template <>
struct ScaledExp<double> {
  static constexpr double rate_error = 0;
  double scale, floor;
  // exp(-750) is 0, and what a gradient multiplies it by stays finite.
  explicit ScaledExp(double scale) : scale(scale), floor(750 / scale < DBL_MAX ? -750 / scale : -DBL_MAX) {}
  double clamp(double d) const { return d < floor ? floor : d; }  // NaN passes
  double operator()(double d) const { return std::exp(d * scale); }
  double near(double d) const { return (*this)(d); }  // never run: clang looks for it in branches that are left out
};

// While it lives, subnormal numbers count as 0 in sweeps whose exponentials can become one: it would take as long as a hundred
// others.
class FlushSubnormals {
#if ERC_HAS_SCALEF
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#else
 public:
  FlushSubnormals() {}
#endif
};

// tanh within 2 ulp: an odd polynomial where exp would cancel, else (1 - q) / (1 + q) with q = exp(-2|a|).
ERC_INLINE f32v vtanh(f32v a) {
  const f32v magnitude = (f32v)((i32v)a & 0x7fffffff);
  const ScaledExp<float> exp(1.0);
  const f32v q = exp(exp.clamp(-2.0f * magnitude));
  const f32v large = (1.0f - q) / (1.0f + q);
  const f32v s = a * a;
  f32v p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const f32v small = p * s * a + a;
  const f32v signed_large = (f32v)((i32v)large | ((i32v)a & (int32_t)0x80000000));
  return select(magnitude < 0.625f, small, signed_large);
}
ERC_INLINE double vtanh(double a) { return std::tanh(a); }

// 1 / cosh^2, from the exponential: 1 - tanh^2 would cancel where tanh is all but 1.
template <class V>
ERC_INLINE V tanh_slope_of(V q) {
  const V inverse = 1 / (1 + q);
  return 4 * q * inverse * inverse;
}
ERC_INLINE f32v vtanh_slope(f32v a) {
  const ScaledExp<float> exp(1.0);
  return tanh_slope_of(exp(exp.clamp(-2.0f * (f32v)((i32v)a & 0x7fffffff))));
}
ERC_INLINE double vtanh_slope(double a) { return tanh_slope_of(std::exp(-2 * std::fabs(a))); }

}  // namespace ERC_ISA
}  // namespace erc
