// The host's half of csrc/cuda/device.cuh: the same functions in C++, and the built-in names of a kernel.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda_host/fibers.h"

#define ERC_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define threadIdx (erc_host::current->thread_idx)
#define blockIdx (erc_host::current->block_idx)
#define blockDim (erc_host::current->block_dim)
#define gridDim (erc_host::current->grid_dim)
#define __syncthreads() erc_host::sync_threads(__FILE__, __LINE__)
#define __syncwarp() erc_host::exchange(0, 0, 0xffffffffu, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, offset) erc::cuda::shuffle_xor(mask, value, offset, __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) erc_host::ballot((predicate) != 0, mask, __FILE__, __LINE__)
#define __ffs(bits) __builtin_ffs(int(bits))
#define __popc(bits) __builtin_popcount(bits)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == 0xffffffffu)

// A fiber runs until it waits for others, so a plain update is atomic.
template <class Value>
inline Value atomicAdd(Value* p, Value value) {
  const Value old = *p;
  *p = old + value;
  return old;
}
template <class Value>
inline Value atomicMax(Value* p, Value value) {
  const Value old = *p;
  *p = old < value ? value : old;
  return old;
}

namespace erc {
namespace cuda {

template <class To, class From>
inline To bits_as(const From& from) {
  To to{};
  std::memcpy(&to, &from, std::min(sizeof(To), sizeof(From)));
  return to;
}

template <class Value>
inline Value shuffle_xor(unsigned mask, Value value, int offset, const char* file, int line) {
  const int lane = int(threadIdx.x) % 32;
  return bits_as<Value>(erc_host::exchange(bits_as<uint64_t>(value), lane ^ offset, mask, file, line));
}

// The hardware's 2^x is within 2^-22 and flushes subnormal results; so is this one, with an error that depends on x alone.
inline float ex2(float x) {
  const float exact = float(std::exp2(double(x)));
  if (!(exact < INFINITY) || x == 0) return exact;
  const uint32_t hash = bits_as<uint32_t>(x) * 2654435761u;
  const double error = (double(hash >> 8) / (1 << 23) - 1) * 0x1p-22;  // in [-2^-22, 2^-22)
  const float y = float(std::exp2(double(x)) * (1 + error));
  return y < 0x1p-126f ? 0.0f : y;
}
inline double ex2(double x) { return std::exp2(x); }

inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }
inline double max_nan(double a, double b) { return a != a || a > b ? a : b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float mul_rn(float a, float b) { return a * b; }
inline double mul_rn(double a, double b) { return a * b; }

template <class Real>
inline Pair<Real> fma_pair(Pair<Real> x, Pair<Real> y, Pair<Real> z) {
  return {fma_rn(x.a, y.a, z.a), fma_rn(x.b, y.b, z.b)};
}
template <class Real>
inline Pair<Real> add_pair(Pair<Real> x, Pair<Real> y) {
  return {x.a + y.a, x.b + y.b};
}
template <class Real>
inline Pair<Real> mul_pair(Pair<Real> x, Pair<Real> y) {
  return {x.a * y.a, x.b * y.b};
}

inline float as_float(uint32_t w) { return bits_as<float>(w); }
inline uint32_t as_uint(float x) { return bits_as<uint32_t>(x); }

inline Pair<float> unpack(bfloat16, uint32_t w) { return {as_float(w << 16), as_float(w & 0xffff0000u)}; }
inline Pair<float> unpack(float16, uint32_t w) {
  return {float(bits_as<_Float16>(uint16_t(w))), float(bits_as<_Float16>(uint16_t(w >> 16)))};
}

inline uint32_t round_bfloat16(float x) {
  const uint32_t bits = as_uint(x);
  return x != x ? 0x7fffu : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack(bfloat16, Pair<float> v) { return round_bfloat16(v.a) | round_bfloat16(v.b) << 16; }
inline uint32_t pack(float16, Pair<float> v) {
  return bits_as<uint16_t>(_Float16(v.a)) | uint32_t(bits_as<uint16_t>(_Float16(v.b))) << 16;
}

// Maxima and minima of packed pairs; a NaN loses against a number.
template <class Half>
inline uint32_t max_packed(Half tag, uint32_t x, uint32_t y) {
  const Pair<float> a = unpack(tag, x), b = unpack(tag, y);
  const auto first = [](float p, float q) { return q != q || p > q; };
  const uint32_t low = first(a.a, b.a) ? x : y, high = first(a.b, b.b) ? x : y;
  return (low & 0xffffu) | (high & 0xffff0000u);
}

template <class Half>
inline uint32_t min_packed(Half tag, uint32_t x, uint32_t y) {
  const Pair<float> a = unpack(tag, x), b = unpack(tag, y);
  const auto first = [](float p, float q) { return q != q || p < q; };
  const uint32_t low = first(a.a, b.a) ? x : y, high = first(a.b, b.b) ? x : y;
  return (low & 0xffffu) | (high & 0xffff0000u);
}

inline uint32_t shifted_half(uint32_t word, uint32_t next, int half) { return half != 0 ? word >> 16 | next << 16 : word; }

inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) erc_host::fail("a 16-byte access is not aligned");
}
inline Raw load_streaming(const void* p) {
  check_aligned(p);
  Raw raw;
  std::memcpy(&raw, p, sizeof raw);
  return raw;
}
// What lies outside of [begin, end) is not read: it may be anything.
inline Raw load_chunk(const char* p, const void* begin, const void* end) {
  check_aligned(p);
  Raw raw;
  std::memset(&raw, 0xa5, sizeof raw);
  erc_host::copy_known(&raw, p, sizeof raw, begin, end);
  return raw;
}
inline void store_streaming(void* p, const Raw& raw) {
  check_aligned(p);
  std::memcpy(p, &raw, sizeof raw);
}

inline int count_block(int32_t* counter) { return (*counter)++; }

inline char* dynamic_shared() { return erc_host::shared_memory(); }

using CopyBarrier = uint64_t;
using erc_host::cluster_arrive;
using erc_host::cluster_wait;
using erc_host::copy_barrier_init;
inline void copy_barriers_are_set() {}
using erc_host::copy_bulk;
using erc_host::copy_wait;

// A state goes to the place that `p` has in this block's shared memory; its barrier counts the bytes that came.
inline void expect_states(CopyBarrier* barrier, uint32_t bytes) { erc_host::expect_bytes(barrier, bytes); }
template <class State>
inline void send_state(State* p, int rank, const State& state, CopyBarrier* barrier) {
  erc_host::send_remote(p, rank, &state, sizeof state, barrier);
}
inline void wait_for_states(CopyBarrier* barrier) { erc_host::wait_for_bytes(barrier); }

inline DeviceInfo device_info() {
  const erc_host::Machine& m = erc_host::machine;
  return {m.multiprocessors, m.l2_bytes, m.shared_bytes_per_block, m.has_clusters ? 90 : 80};
}

template <class... Params>
bool runs_in_clusters(void (*)(Params...), const DeviceInfo& device) {
  return device.has_clusters() && erc_host::machine.compiled_for >= 90;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, Args... args) {
  const auto fibers = [&] {
    return erc_host::run(shape.grid, shape.block, shape.cluster, shape.shared_bytes, [&] { kernel(Params(args)...); });
  };
  const auto elsewhere = [&](const Params&... parameters) {
    const void* const data[] = {&parameters...};
    const int64_t sizes[] = {int64_t(sizeof parameters)...};
    return erc_host::execute(reinterpret_cast<const void*>(kernel), shape.grid, shape.block, shape.cluster, shape.shared_bytes,
                             int(sizeof...(Params)), data, sizes);
  };
  const bool fine = erc_host::executor != nullptr ? elsewhere(Params(args)...) : fibers();
  return fine ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda
}  // namespace erc
