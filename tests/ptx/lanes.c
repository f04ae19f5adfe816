// Arithmetic over the threads of a kernel that NumPy lacks, as ufuncs: fused multiply-adds in every rounding, PTX's minima and
// maxima, the approximate instructions with their documented error, 16-bit formats, loads from addresses. And three functions
// that look at every access: stores, range checks, and the ledger of who touched which bytes of shared memory.
#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_7_API_VERSION
#include <Python.h>

#include <math.h>
#include <numpy/arrayobject.h>
#include <numpy/ufuncobject.h>
#include <stdint.h>
#include <string.h>

#include "ledger.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v3", "default")))  // fmaf is a call without it
#else
#define CLONES
#endif

// ---- scalars -------------------------------------------------------------------------------------------------------

static float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static double as_double(uint64_t bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
static uint64_t as_bits64(double x) {
  uint64_t bits;
  memcpy(&bits, &x, 8);
  return bits;
}

static inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

// The exact sum high + low rounded to float32: down, up or toward zero. |low| is at most half an ulp of high.
enum Rounding { DOWN, UP, ZERO };
static inline float rounded(double high, double low, int mode) {
  const float nearest = (float)high;
  if (isnan(high) || isinf(high)) return nearest;
  const double left = high - (double)nearest;  // exact; infinite where the nearest overflowed
  const int sign = left > 0 || (left == 0 && low > 0) ? 1 : left < 0 || low < 0 ? -1 : 0;
  const int down = mode == DOWN || (mode == ZERO && nearest > 0);
  const int up = mode == UP || (mode == ZERO && nearest < 0);
  if (down && sign < 0) return nextafterf(nearest, -INFINITY);
  if (up && sign > 0) return nextafterf(nearest, INFINITY);
  return nearest;
}
static inline float fma_rounded(float a, float b, float c, int mode) {
  const double x = (double)a * b, y = c, sum = x + y, part = sum - x;  // the product is exact
  if (sum == 0 && mode == DOWN && signbit(x) != signbit(y)) return -0.0f;
  return rounded(sum, (x - (sum - part)) + (y - part), mode);
}

// Which way an approximate result errs: a hash of its operand, so that the same operand always gives the same result.
static uint32_t seed = 0;
static inline uint32_t errs_up(uint32_t bits) { return (((bits ^ seed) * 2654435761u) ^ (bits >> 15)) >> 31; }

// The correctly rounded value, moved by `ulps` units in the last place; special values stay. Without branches: the direction is
// as good as random, and this is an element's most expensive instruction.
static inline float off_by(double exact, uint32_t operand, uint32_t ulps) {
  const uint32_t bits = as_bits((float)exact), magnitude = bits & 0x7fffffffu;
  const uint32_t moved = magnitude + (2 * errs_up(operand) - 1) * ulps;
  const uint32_t finite = moved < 0x7f800000u ? moved : 0x7f7fffffu;
  return as_float((bits & 0x80000000u) | (magnitude < 0x7f800000u && magnitude > ulps ? finite : magnitude));
}

// 2^x within 2^-45: the fraction's exponential by its series, the integer part into the exponent.
static inline double exp2_series(double x) {
  const double bounded = x > 1000 ? 1000 : x < -1000 ? -1000 : x;  // NaN stays
  const double shifted = bounded + 0x1.8p52, y = (bounded - (shifted - 0x1.8p52)) * 0.69314718055994530942;
  double sum = 1;
  for (int k = 11; k > 0; --k) sum = 1 + sum * y * (1.0 / k);
  return sum * as_double((as_bits64(shifted) + 1023) << 52);
}
static inline float ex2_approx(float x) {
  const float y = off_by(exp2_series(x), as_bits(x), 2);
  return x == 0 ? 1.0f : y;
}
static inline float rcp_approx(float x) { return off_by(1.0 / x, as_bits(x), 1); }
static inline float div_full(float a, float b) { return off_by((double)a / b, as_bits(a) * 31u + as_bits(b), 2); }
static inline float div_approx(float a, float b) {
  const float size = fabsf(b);
  if (size > 0x1p126f && size < INFINITY) return isinf(a) || isnan(a) ? NAN : copysignf(0.0f, a) * copysignf(1.0f, b);
  return div_full(a, b);
}
static inline float sqrt_approx(float x) { return off_by(sqrt((double)x), as_bits(x), 1); }
static inline float rsqrt_approx(float x) { return off_by(1 / sqrt((double)x), as_bits(x), 2); }
static inline float lg2_approx(float x) {
  const double exact = log2((double)x), error = x > 0.5f && x < 2.0f ? 0x1p-22 : fabs(exact) * 0x1p-22;
  if (x == 1 || isnan(exact) || isinf(exact)) return (float)exact;
  return (float)(exact + (errs_up(as_bits(x)) ? error : -error) * 0.75);  // the rest of the bound is the rounding's
}
static inline float tanh_approx(float x) {
  const double exact = tanh((double)x);
  if (isnan(x) || isinf(x) || fabsf(x) < 0x1p-126f) return (float)exact;
  const double moved = exact * (1 + (errs_up(as_bits(x)) ? 0x1p-11 : -0x1p-11) * 0.999);
  return fabs(moved) > 1 ? copysignf(1.0f, x) : (float)moved;
}
// rcp.approx.ftz.f64: the upper word alone, in and out.
static inline double rcp_gross(double x) {
  const uint64_t upper = as_bits64(x) & 0xffffffff00000000ull;
  if (isnan(x)) return as_double(0x7fffffff00000000ull);
  const double y = as_double(upper);
  if (y == 0 || fabs(y) < 0x1p-1022) return copysign(INFINITY, x);
  const double exact = 1.0 / y;
  if (isinf(y) || fabs(exact) < 0x1p-1022) return copysign(0.0, x);
  const uint64_t bits = (as_bits64(exact) + 0x80000000ull) & 0xffffffff00000000ull;
  return as_double(bits + (errs_up((uint32_t)(upper >> 32)) ? 0x100000000ull : -0x100000000ull));
}

#define CHOICE(NAME, T, NAN_LOSES, BETTER, SIGN, CANONICAL)             \
  static inline T NAME(T a, T b) {                                      \
    if (isnan(a) || isnan(b)) {                                         \
      if (!(NAN_LOSES) || (isnan(a) && isnan(b))) return CANONICAL;     \
      return isnan(a) ? b : a;                                          \
    }                                                                   \
    if (a == b) return (signbit(a) != 0) == (SIGN) ? a : b; /* -0 < +0 */ \
    return a BETTER b ? a : b;                                          \
  }
CHOICE(max_num_f, float, 1, >, 0, as_float(0x7fffffffu))
CHOICE(min_num_f, float, 1, <, 1, as_float(0x7fffffffu))
CHOICE(max_nan_f, float, 0, >, 0, as_float(0x7fffffffu))
CHOICE(min_nan_f, float, 0, <, 1, as_float(0x7fffffffu))
CHOICE(max_num_d, double, 1, >, 0, NAN)
CHOICE(min_num_d, double, 1, <, 1, NAN)

static inline uint16_t to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  return isnan(x) ? 0x7fffu : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float from_bf16(uint16_t x) { return as_float((uint32_t)x << 16); }
static inline uint16_t to_f16(float x) {
  const _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return isnan(x) ? 0x7fffu : bits;
}
static inline float from_f16(uint16_t bits) {
  _Float16 half;
  memcpy(&half, &bits, 2);
  return (float)half;
}
#define PACKED_CHOICE(NAME, CHOOSE, FROM)                                                                            \
  static inline uint32_t NAME(uint32_t a, uint32_t b) {                                                              \
    uint32_t out = 0;                                                                                                \
    for (int shift = 0; shift <= 16; shift += 16) {                                                                  \
      const uint16_t x = (uint16_t)(a >> shift), y = (uint16_t)(b >> shift);                                         \
      const float c = CHOOSE(FROM(x), FROM(y));                                                                      \
      out |= (uint32_t)(isnan(c) ? 0x7fffu : as_bits(c) == as_bits(FROM(x)) ? x : y) << shift;                       \
    }                                                                                                                \
    return out;                                                                                                      \
  }
PACKED_CHOICE(max_num_bf16x2, max_num_f, from_bf16)
PACKED_CHOICE(min_num_bf16x2, min_num_f, from_bf16)
PACKED_CHOICE(max_num_f16x2, max_num_f, from_f16)
PACKED_CHOICE(min_num_f16x2, min_num_f, from_f16)

// ---- ufuncs --------------------------------------------------------------------------------------------------------

// Arrays that lie as they should take a loop that the compiler vectorises.
#define ARG(T, i) (*(const T*)(args[i] + k * steps[i]))
#define PLAIN(T, i) (((const T*)args[i])[k])
#define LOOP1(NAME, OUT, A, EXPRESSION)                                                        \
  CLONES static void NAME(char** args, const npy_intp* n, const npy_intp* steps, void* data) { \
    (void)data;                                                                                \
    if (steps[0] == sizeof(A) && steps[1] == sizeof(OUT)) {                                    \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                    \
        const A a = PLAIN(A, 0);                                                               \
        ((OUT*)args[1])[k] = (EXPRESSION);                                                     \
      }                                                                                        \
    } else {                                                                                   \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                    \
        const A a = ARG(A, 0);                                                                 \
        *(OUT*)(args[1] + k * steps[1]) = (EXPRESSION);                                        \
      }                                                                                        \
    }                                                                                          \
  }
#define LOOP2(NAME, OUT, A, B, EXPRESSION)                                                     \
  CLONES static void NAME(char** args, const npy_intp* n, const npy_intp* steps, void* data) { \
    (void)data;                                                                                \
    if (steps[0] == sizeof(A) && steps[1] == sizeof(B) && steps[2] == sizeof(OUT)) {           \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                    \
        const A a = PLAIN(A, 0);                                                               \
        const B b = PLAIN(B, 1);                                                               \
        ((OUT*)args[2])[k] = (EXPRESSION);                                                     \
      }                                                                                        \
    } else {                                                                                   \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                    \
        const A a = ARG(A, 0);                                                                 \
        const B b = ARG(B, 1);                                                                 \
        *(OUT*)(args[2] + k * steps[2]) = (EXPRESSION);                                        \
      }                                                                                        \
    }                                                                                          \
  }
#define LOOP3(NAME, OUT, A, B, C, EXPRESSION)                                                                 \
  CLONES static void NAME(char** args, const npy_intp* n, const npy_intp* steps, void* data) {                \
    (void)data;                                                                                               \
    if (steps[0] == sizeof(A) && steps[1] == sizeof(B) && steps[2] == sizeof(C) && steps[3] == sizeof(OUT)) { \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                                   \
        const A a = PLAIN(A, 0);                                                                              \
        const B b = PLAIN(B, 1);                                                                              \
        const C c = PLAIN(C, 2);                                                                              \
        ((OUT*)args[3])[k] = (EXPRESSION);                                                                    \
      }                                                                                                       \
    } else {                                                                                                  \
      for (npy_intp k = 0; k < n[0]; ++k) {                                                                   \
        const A a = ARG(A, 0);                                                                                \
        const B b = ARG(B, 1);                                                                                \
        const C c = ARG(C, 2);                                                                                \
        *(OUT*)(args[3] + k * steps[3]) = (EXPRESSION);                                                       \
      }                                                                                                       \
    }                                                                                                         \
  }

LOOP3(fma_rn_f, float, float, float, float, fmaf(a, b, c))
LOOP3(fma_rn_d, double, double, double, double, fma(a, b, c))
LOOP3(fma_rm_f, float, float, float, float, fma_rounded(a, b, c, DOWN))
LOOP3(fma_rp_f, float, float, float, float, fma_rounded(a, b, c, UP))
LOOP3(fma_rz_f, float, float, float, float, fma_rounded(a, b, c, ZERO))

// By size alone: a bit mask needs no branch.
LOOP3(select_1, npy_bool, npy_bool, npy_bool, npy_bool, (a & b) | ((!a) & c))
LOOP3(select_2, uint16_t, npy_bool, uint16_t, uint16_t, (uint16_t)((b & -(uint32_t)a) | (c & ((uint32_t)a - 1))))
LOOP3(select_4, uint32_t, npy_bool, uint32_t, uint32_t, (b & -(uint32_t)a) | (c & ((uint32_t)a - 1)))
LOOP3(select_8, uint64_t, npy_bool, uint64_t, uint64_t, (b & -(uint64_t)a) | (c & ((uint64_t)a - 1)))

LOOP2(max_num_ff, float, float, float, max_num_f(a, b))
LOOP2(max_num_dd, double, double, double, max_num_d(a, b))
LOOP2(min_num_ff, float, float, float, min_num_f(a, b))
LOOP2(min_num_dd, double, double, double, min_num_d(a, b))
LOOP2(max_nan_ff, float, float, float, max_nan_f(a, b))
LOOP2(min_nan_ff, float, float, float, min_nan_f(a, b))
LOOP2(max_bf16x2_II, uint32_t, uint32_t, uint32_t, max_num_bf16x2(a, b))
LOOP2(min_bf16x2_II, uint32_t, uint32_t, uint32_t, min_num_bf16x2(a, b))
LOOP2(max_f16x2_II, uint32_t, uint32_t, uint32_t, max_num_f16x2(a, b))
LOOP2(min_f16x2_II, uint32_t, uint32_t, uint32_t, min_num_f16x2(a, b))

LOOP1(flush_f, float, float, flush(a))
LOOP1(ex2_f, float, float, ex2_approx(a))
LOOP1(ex2_ftz_f, float, float, flush(ex2_approx(flush(a))))
LOOP1(lg2_f, float, float, lg2_approx(a))
LOOP1(rcp_f, float, float, rcp_approx(a))
LOOP1(sqrt_f, float, float, sqrt_approx(a))
LOOP1(rsqrt_f, float, float, rsqrt_approx(a))
LOOP1(tanh_f, float, float, tanh_approx(a))
LOOP1(rcp_gross_d, double, double, rcp_gross(a))
LOOP2(div_full_f, float, float, float, div_full(a, b))
LOOP2(div_approx_f, float, float, float, div_approx(a, b))

LOOP1(to_bf16_f, uint16_t, float, to_bf16(a))
LOOP1(from_bf16_H, float, uint16_t, from_bf16(a))
LOOP1(to_f16_f, uint16_t, float, to_f16(a))
LOOP1(from_f16_H, float, uint16_t, from_f16(a))
LOOP2(pack16_HH, uint32_t, uint16_t, uint16_t, a | (uint32_t)b << 16)
LOOP2(pack32_II, uint64_t, uint32_t, uint32_t, a | (uint64_t)b << 32)
LOOP1(low16_I, uint16_t, uint32_t, (uint16_t)a)
LOOP1(high16_I, uint16_t, uint32_t, (uint16_t)(a >> 16))
LOOP1(low32_Q, uint32_t, uint64_t, (uint32_t)a)
LOOP1(high32_Q, uint32_t, uint64_t, (uint32_t)(a >> 32))

// Loads from where a + b points; ranges and alignment were checked before.
LOOP2(load8_QQ, uint8_t, uint64_t, uint64_t, *(const uint8_t*)(uintptr_t)(a + b))
LOOP2(load16_QQ, uint16_t, uint64_t, uint64_t, *(const uint16_t*)(uintptr_t)(a + b))
LOOP2(load32_QQ, uint32_t, uint64_t, uint64_t, *(const uint32_t*)(uintptr_t)(a + b))
LOOP2(load64_QQ, uint64_t, uint64_t, uint64_t, *(const uint64_t*)(uintptr_t)(a + b))

typedef PyUFuncGenericFunction Loop;
#define UFUNC(NAME, INPUTS, LOOPS, TYPES) {NAME, INPUTS, sizeof(LOOPS) / sizeof(Loop), LOOPS, TYPES}
#define TF NPY_FLOAT32
#define TD NPY_FLOAT64
#define TH NPY_UINT16
#define TI NPY_UINT32
#define TQ NPY_UINT64
#define ONE(NAME, LOOP, ...)                       \
  static Loop NAME##_loops[] = {(Loop)LOOP};       \
  static const char NAME##_types[] = {__VA_ARGS__};
static Loop fma_rn_loops[] = {(Loop)fma_rn_f, (Loop)fma_rn_d};
static const char fma_rn_types[] = {TF, TF, TF, TF, TD, TD, TD, TD};
static Loop select_loops[] = {(Loop)select_1, (Loop)select_2, (Loop)select_4, (Loop)select_8,
                              (Loop)select_4, (Loop)select_8, (Loop)select_4, (Loop)select_8};
#define WITH_BOOL(T) NPY_BOOL, T, T, T
static const char select_types[] = {WITH_BOOL(NPY_BOOL), WITH_BOOL(TH), WITH_BOOL(TI), WITH_BOOL(TQ),
                                    WITH_BOOL(NPY_INT32), WITH_BOOL(NPY_INT64), WITH_BOOL(TF), WITH_BOOL(TD)};
static Loop max_num_loops[] = {(Loop)max_num_ff, (Loop)max_num_dd};
static Loop min_num_loops[] = {(Loop)min_num_ff, (Loop)min_num_dd};
static const char choice_types[] = {TF, TF, TF, TD, TD, TD};
ONE(fma_rm, fma_rm_f, TF, TF, TF, TF)
ONE(fma_rp, fma_rp_f, TF, TF, TF, TF)
ONE(fma_rz, fma_rz_f, TF, TF, TF, TF)
ONE(max_nan, max_nan_ff, TF, TF, TF)
ONE(min_nan, min_nan_ff, TF, TF, TF)
ONE(max_bf16x2, max_bf16x2_II, TI, TI, TI)
ONE(min_bf16x2, min_bf16x2_II, TI, TI, TI)
ONE(max_f16x2, max_f16x2_II, TI, TI, TI)
ONE(min_f16x2, min_f16x2_II, TI, TI, TI)
ONE(flush, flush_f, TF, TF)
ONE(ex2, ex2_f, TF, TF)
ONE(ex2_ftz, ex2_ftz_f, TF, TF)
ONE(lg2, lg2_f, TF, TF)
ONE(rcp, rcp_f, TF, TF)
ONE(sqrt, sqrt_f, TF, TF)
ONE(rsqrt, rsqrt_f, TF, TF)
ONE(tanh, tanh_f, TF, TF)
ONE(rcp_gross, rcp_gross_d, TD, TD)
ONE(div_full, div_full_f, TF, TF, TF)
ONE(div_approx, div_approx_f, TF, TF, TF)
ONE(to_bf16, to_bf16_f, TF, TH)
ONE(from_bf16, from_bf16_H, TH, TF)
ONE(to_f16, to_f16_f, TF, TH)
ONE(from_f16, from_f16_H, TH, TF)
ONE(pack16, pack16_HH, TH, TH, TI)
ONE(pack32, pack32_II, TI, TI, TQ)
ONE(low16, low16_I, TI, TH)
ONE(high16, high16_I, TI, TH)
ONE(low32, low32_Q, TQ, TI)
ONE(high32, high32_Q, TQ, TI)
ONE(load8, load8_QQ, TQ, TQ, NPY_UINT8)
ONE(load16, load16_QQ, TQ, TQ, TH)
ONE(load32, load32_QQ, TQ, TQ, TI)
ONE(load64, load64_QQ, TQ, TQ, TQ)

static const struct {
  const char* name;
  int inputs, loops;
  Loop* functions;
  const char* types;
} kUfuncs[] = {
    UFUNC("fma_rn", 3, fma_rn_loops, fma_rn_types), UFUNC("fma_rm", 3, fma_rm_loops, fma_rm_types),
    UFUNC("fma_rp", 3, fma_rp_loops, fma_rp_types), UFUNC("fma_rz", 3, fma_rz_loops, fma_rz_types),
    UFUNC("select", 3, select_loops, select_types), UFUNC("max_num", 2, max_num_loops, choice_types),
    UFUNC("min_num", 2, min_num_loops, choice_types), UFUNC("max_nan", 2, max_nan_loops, max_nan_types),
    UFUNC("min_nan", 2, min_nan_loops, min_nan_types), UFUNC("max_bf16x2", 2, max_bf16x2_loops, max_bf16x2_types),
    UFUNC("min_bf16x2", 2, min_bf16x2_loops, min_bf16x2_types), UFUNC("max_f16x2", 2, max_f16x2_loops, max_f16x2_types),
    UFUNC("min_f16x2", 2, min_f16x2_loops, min_f16x2_types), UFUNC("flush", 1, flush_loops, flush_types),
    UFUNC("ex2", 1, ex2_loops, ex2_types), UFUNC("ex2_ftz", 1, ex2_ftz_loops, ex2_ftz_types), UFUNC("lg2", 1, lg2_loops, lg2_types), UFUNC("rcp", 1, rcp_loops, rcp_types),
    UFUNC("sqrt", 1, sqrt_loops, sqrt_types), UFUNC("rsqrt", 1, rsqrt_loops, rsqrt_types),
    UFUNC("tanh", 1, tanh_loops, tanh_types), UFUNC("rcp_gross", 1, rcp_gross_loops, rcp_gross_types),
    UFUNC("div_full", 2, div_full_loops, div_full_types), UFUNC("div_approx", 2, div_approx_loops, div_approx_types),
    UFUNC("to_bf16", 1, to_bf16_loops, to_bf16_types), UFUNC("from_bf16", 1, from_bf16_loops, from_bf16_types),
    UFUNC("to_f16", 1, to_f16_loops, to_f16_types), UFUNC("from_f16", 1, from_f16_loops, from_f16_types),
    UFUNC("pack16", 2, pack16_loops, pack16_types), UFUNC("pack32", 2, pack32_loops, pack32_types),
    UFUNC("low16", 1, low16_loops, low16_types), UFUNC("high16", 1, high16_loops, high16_types),
    UFUNC("low32", 1, low32_loops, low32_types), UFUNC("high32", 1, high32_loops, high32_types),
    UFUNC("load8", 2, load8_loops, load8_types), UFUNC("load16", 2, load16_loops, load16_types),
    UFUNC("load32", 2, load32_loops, load32_types), UFUNC("load64", 2, load64_loops, load64_types),
};

// ---- memory --------------------------------------------------------------------------------------------------------

static const void* data_of(PyObject* array) { return PyArray_DATA((PyArrayObject*)array); }

// store(addresses, values): contiguous arrays of one length.
static PyObject* py_store(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject *addresses, *values;
  if (!PyArg_ParseTuple(arguments, "OO", &addresses, &values)) return NULL;
  const npy_intp n = PyArray_SIZE((PyArrayObject*)addresses), size = PyArray_ITEMSIZE((PyArrayObject*)values);
  const uint64_t* to = data_of(addresses);
  const char* from = data_of(values);
  for (npy_intp k = 0; k < n; ++k) memcpy((void*)(uintptr_t)to[k], from + k * size, (size_t)size);
  Py_RETURN_NONE;
}

// outside(addresses, bytes, low, high): the first access that is not within [low, high), or -1.
static PyObject* py_outside(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject* addresses;
  unsigned long long bytes, low, high;
  if (!PyArg_ParseTuple(arguments, "OKKK", &addresses, &bytes, &low, &high)) return NULL;
  const npy_intp n = PyArray_SIZE((PyArrayObject*)addresses);
  const uint64_t* at = data_of(addresses);
  for (npy_intp k = 0; k < n; ++k) {
    if (at[k] < low || at[k] + bytes > high || at[k] + bytes < at[k]) return PyLong_FromSsize_t(k);
  }
  return PyLong_FromLong(-1);
}

// misaligned(addresses, bytes): the first address that is no multiple of `bytes`, a power of two, or -1.
static PyObject* py_misaligned(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject* addresses;
  unsigned long long bytes;
  if (!PyArg_ParseTuple(arguments, "OK", &addresses, &bytes)) return NULL;
  const npy_intp n = PyArray_SIZE((PyArrayObject*)addresses);
  const uint64_t* at = data_of(addresses);
  for (npy_intp k = 0; k < n; ++k) {
    if (at[k] & (bytes - 1)) return PyLong_FromSsize_t(k);
  }
  return PyLong_FromLong(-1);
}

// sectors(addresses, bytes, warps): how many 32-byte sectors the accesses of each warp touch, summed; a warp's accesses are
// neighbours in the arrays.
static PyObject* py_sectors(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject *addresses, *warps;
  unsigned long long bytes;
  if (!PyArg_ParseTuple(arguments, "OKO", &addresses, &bytes, &warps)) return NULL;
  const npy_intp n = PyArray_SIZE((PyArrayObject*)addresses);
  const uint64_t* at = data_of(addresses);
  const int64_t* warp = data_of(warps);
  uint64_t seen[64];
  long long total = 0;
  int count = 0;
  for (npy_intp k = 0; k < n; ++k) {
    if (k == 0 || warp[k] != warp[k - 1]) total += count, count = 0;
    for (uint64_t sector = at[k] / 32; sector <= (at[k] + bytes - 1) / 32; ++sector) {
      int i = 0;
      while (i < count && seen[i] != sector) ++i;
      if (i == count && count < 64) seen[count++] = sector;
    }
  }
  return PyLong_FromLongLong(total + count);
}

// ---- the ledger ----------------------------------------------------------------------------------------------------

static Clocks clocks_of(PyObject* arrays) {
  const void* p[10];
  for (int i = 0; i < 10; ++i) p[i] = data_of(PyTuple_GET_ITEM(arrays, i));
  const int64_t* sizes = p[0];
  return (Clocks){sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9]};
}

// touch(clocks, cells, first granule of each access, granules, threads, access, must_be_written, copy):
// None, or (verdict, which access, the other thread). `copy`: the operation whose bytes these are from now on, 0 for none.
static PyObject* py_touch(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject *arrays, *cells, *granules, *threads;
  int span, access, must_be_written, copy;
  if (!PyArg_ParseTuple(arguments, "OOOiOiii", &arrays, &cells, &granules, &span, &threads, &access, &must_be_written, &copy)) {
    return NULL;
  }
  const Clocks clocks = clocks_of(arrays);
  Cell* cell = (Cell*)data_of(cells);
  const int64_t *at = data_of(granules), *who = data_of(threads);
  const npy_intp n = PyArray_SIZE((PyArrayObject*)granules);
  for (npy_intp k = 0; k < n; ++k) {
    const Stamp stamp = stamp_of(&clocks, who[k]);
    for (int j = 0; j < span; ++j) {
      Cell* one = cell + at[k] + j;
      const int32_t other = access == READ || one->readers == NOBODY ? one->write.thread : one->read.thread;
      const enum Verdict verdict = touch(&clocks, one, &stamp, who[k], access, must_be_written);
      if (verdict != FINE) return Py_BuildValue("(inL)", verdict, k, (long long)other - 1);
      if (copy != 0) one->copy = copy;
    }
  }
  Py_RETURN_NONE;
}

// unordered(clocks, cells, first granule, granules, thread): the first granule that is_shared_with_others, or -1.
static PyObject* py_unordered(PyObject* self, PyObject* arguments) {
  (void)self;
  PyObject *arrays, *cells;
  long long begin, count, thread;
  if (!PyArg_ParseTuple(arguments, "OOLLL", &arrays, &cells, &begin, &count, &thread)) return NULL;
  const Clocks clocks = clocks_of(arrays);
  const Cell* cell = (const Cell*)data_of(cells) + begin;
  for (long long k = 0; k < count; ++k) {
    if (is_shared_with_others(&clocks, cell + k, thread)) return PyLong_FromLongLong(k);
  }
  return PyLong_FromLong(-1);
}

static PyObject* py_set_seed(PyObject* self, PyObject* value) {
  (void)self;
  seed = (uint32_t)PyLong_AsUnsignedLongMask(value);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"store", py_store, METH_VARARGS, "store(addresses, values)"},
    {"outside", py_outside, METH_VARARGS, "outside(addresses, bytes, low, high) -> first offender or -1"},
    {"misaligned", py_misaligned, METH_VARARGS, "misaligned(addresses, bytes) -> first offender or -1"},
    {"sectors", py_sectors, METH_VARARGS, "sectors(addresses, bytes, warps) -> 32-byte sectors"},
    {"touch", py_touch, METH_VARARGS, "touch(clocks, cells, granules, span, threads, access, must_be_written, copy)"},
    {"unordered", py_unordered, METH_VARARGS, "unordered(clocks, cells, begin, count, thread) -> first granule or -1"},
    {"set_seed", py_set_seed, METH_O, "set_seed(seed of the direction in which approximate instructions err)"},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "lanes", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_lanes(void) {
  import_array();
  import_umath();
  PyObject* m = PyModule_Create(&module);
  if (m == NULL) return NULL;
  static void* no_data[8];
  for (size_t i = 0; i < sizeof kUfuncs / sizeof *kUfuncs; ++i) {
    PyObject* ufunc = PyUFunc_FromFuncAndData(kUfuncs[i].functions, no_data, kUfuncs[i].types, kUfuncs[i].loops,
                                              kUfuncs[i].inputs, 1, PyUFunc_None, kUfuncs[i].name, "", 0);
    if (ufunc == NULL || PyModule_AddObject(m, kUfuncs[i].name, ufunc) < 0) return NULL;
  }
  if (PyModule_AddIntConstant(m, "CELL_BYTES", sizeof(Cell)) < 0) return NULL;
  return m;
}
