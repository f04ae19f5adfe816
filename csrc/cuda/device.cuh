// Instructions that C++ has no name for, one function each. Under nvcc they are PTX; the host build of the tests
// (tests/cuda_host) compiles the same kernels with g++ and gives the same functions there.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda/launch.h"

namespace erc {
namespace cuda {

// Sixteen bytes of a row, whatever their type.
struct __attribute__((aligned(16), may_alias)) Raw {
  uint32_t word[4];
};

// Two neighbouring elements: one register pair, and from sm_100 on one operand of packed float32 arithmetic.
template <class Real>
struct alignas(2 * sizeof(Real)) Pair {
  Real a, b;
};

// How a kernel is launched; cluster is the number of blocks in a cluster, 1 for none.
struct LaunchShape {
  int64_t grid;
  int block, cluster, shared_bytes;
  cudaStream_t stream;
};

// What the launchers ask about the current device.
struct DeviceInfo {
  int multiprocessors, l2_bytes, shared_bytes_per_block;
  int capability;  // 90: 9.0, whatever the code was compiled for

  bool has_clusters() const { return capability / 10 == 9 || capability / 10 == 10; }
};

}  // namespace cuda
}  // namespace erc

#ifdef ERC_CUDA_HOST
#include "cuda_host/device.h"
#else

#include <cuda_runtime.h>

namespace erc {
namespace cuda {

#define ERC_DEVICE __device__ __forceinline__

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// 2^x within 2^-22; results below 2^-126 are 0.
ERC_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ERC_DEVICE double ex2(double x) { return exp2(x); }

// max(a, b), NaN if either is.
ERC_DEVICE float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
ERC_DEVICE double max_nan(double a, double b) { return a != a || a > b ? a : b; }

// a * b + c, rounded once: explicit, so that every kernel makes the same choice and two kernels give one result.
ERC_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
ERC_DEVICE double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
ERC_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
ERC_DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }

template <class Real>
ERC_DEVICE Pair<Real> fma_pair(Pair<Real> x, Pair<Real> y, Pair<Real> z) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(Real) == 4) {
    Pair<Real> out;
    asm("{ .reg .b64 x, y, z, o; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5}; mov.b64 z, {%6, %7};\n"
        "  fma.rn.f32x2 o, x, y, z; mov.b64 {%0, %1}, o; }"
        : "=f"(out.a), "=f"(out.b)
        : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b), "f"(z.a), "f"(z.b));
    return out;
  }
#endif
  return {fma_rn(x.a, y.a, z.a), fma_rn(x.b, y.b, z.b)};
}

template <class Real>
ERC_DEVICE Pair<Real> add_pair(Pair<Real> x, Pair<Real> y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(Real) == 4) {
    Pair<Real> out;
    asm("{ .reg .b64 x, y, o; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5};\n"
        "  add.rn.f32x2 o, x, y; mov.b64 {%0, %1}, o; }"
        : "=f"(out.a), "=f"(out.b)
        : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b));
    return out;
  }
#endif
  return {x.a + y.a, x.b + y.b};
}

template <class Real>
ERC_DEVICE Pair<Real> mul_pair(Pair<Real> x, Pair<Real> y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if constexpr (sizeof(Real) == 4) {
    Pair<Real> out;
    asm("{ .reg .b64 x, y, o; mov.b64 x, {%2, %3}; mov.b64 y, {%4, %5};\n"
        "  mul.rn.f32x2 o, x, y; mov.b64 {%0, %1}, o; }"
        : "=f"(out.a), "=f"(out.b)
        : "f"(x.a), "f"(x.b), "f"(y.a), "f"(y.b));
    return out;
  }
#endif
  return {mul_rn(x.a, y.a), mul_rn(x.b, y.b)};
}

// ---- two 16-bit elements in a word ---------------------------------------------------------------------------------

// Maxima and minima of packed pairs; a NaN loses against a number (it poisons the sum of exponentials instead).
ERC_DEVICE uint32_t max_packed(bfloat16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
ERC_DEVICE uint32_t max_packed(float16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

ERC_DEVICE uint32_t min_packed(bfloat16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
ERC_DEVICE uint32_t min_packed(float16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("min.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// The four bytes of two neighbouring words, `next` the later one, from a half word on if `half` is not 0.
ERC_DEVICE uint32_t shifted_half(uint32_t word, uint32_t next, int half) {
  return __byte_perm(word, next, half != 0 ? 0x5432 : 0x3210);
}

ERC_DEVICE Pair<float> unpack(bfloat16, uint32_t w) { return {__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u)}; }
ERC_DEVICE Pair<float> unpack(float16, uint32_t w) {
  Pair<float> v;
  asm("{ .reg .f16 lo, hi; mov.b32 {lo, hi}, %2; cvt.f32.f16 %0, lo; cvt.f32.f16 %1, hi; }" : "=f"(v.a), "=f"(v.b) : "r"(w));
  return v;
}

// Rounded to nearest even.
ERC_DEVICE uint32_t pack(bfloat16, Pair<float> v) {
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(v.b), "f"(v.a));
  return w;
}
ERC_DEVICE uint32_t pack(float16, Pair<float> v) {
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(v.b), "f"(v.a));
  return w;
}

ERC_DEVICE float as_float(uint32_t w) { return __uint_as_float(w); }
ERC_DEVICE uint32_t as_uint(float x) { return __float_as_uint(x); }

// ---- memory --------------------------------------------------------------------------------------------------------

// A read of what will not be read again from this cache.
ERC_DEVICE Raw load_streaming(const void* p) {
  Raw r;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.word[0]), "=r"(r.word[1]), "=r"(r.word[2]), "=r"(r.word[3])
               : "l"(p));
  return r;
}

// Sixteen aligned bytes, of which only those in [begin, end) mean anything. The others cannot fault, since no page ends inside;
// another block may be writing them.
ERC_DEVICE Raw load_chunk(const char* p, const void*, const void*) { return load_streaming(p); }

// A write that nothing on the GPU reads soon: it leaves the L2 cache first.
ERC_DEVICE void store_streaming(void* p, Raw r) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r.word[0]), "r"(r.word[1]), "r"(r.word[2]),
               "r"(r.word[3])
               : "memory");
}

ERC_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(128) char shared_memory[];
  return shared_memory;
}

// Counts this block among those that are done, and returns how many were before it. What other threads of this block wrote
// before a barrier ahead of it is seen by whoever counts later.
ERC_DEVICE int count_block(int32_t* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// ---- bulk asynchronous copies (sm_90 and later) --------------------------------------------------------------------

ERC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

using CopyBarrier = uint64_t;  // an mbarrier in shared memory, for one copy or exchange

ERC_DEVICE void copy_barrier_init(CopyBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// After the last of them, by the same thread: what follows, here and in the cluster, finds them set.
ERC_DEVICE void copy_barriers_are_set() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

ERC_DEVICE void copy_barrier_expect(CopyBarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Global to shared memory; both addresses and the size are multiples of 16 bytes. Of the source only the bytes in [begin, end)
// mean anything. One thread calls it, once a barrier.
ERC_DEVICE void copy_bulk(void* destination, const void* source, uint32_t bytes, CopyBarrier* barrier, const void*,
                          const void*) {
  copy_barrier_expect(barrier, bytes);
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Returns when the copy of `barrier` has landed; its bytes are then visible to the calling thread.
ERC_DEVICE void copy_wait(CopyBarrier* barrier) {
  asm volatile(
      "{ .reg .pred done;\n"
      "waiting: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], 0;\n"
      "  @!done bra waiting; }" ::"r"(shared_address(barrier))
      : "memory");
}

// ---- clusters (sm_90 and later) ------------------------------------------------------------------------------------

// Orders nothing but the barriers' initialisation, which has a fence of its own: a release would wait for the whole GPU.
ERC_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
ERC_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// `bytes` of states will be sent here.
ERC_DEVICE void expect_states(CopyBarrier* barrier, uint32_t bytes) { copy_barrier_expect(barrier, bytes); }

// Sends 16 bytes to a block of the cluster: to the places that `p` and `barrier` have in this block's shared memory.
template <class State>
ERC_DEVICE void send_state(State* p, int rank, const State& state, CopyBarrier* barrier) {
  static_assert(sizeof(State) == 16, "");
  Raw raw;
  memcpy(&raw, &state, sizeof raw);
  asm volatile(
      "{ .reg .u32 place, arrival; mapa.shared::cluster.u32 place, %0, %2; mapa.shared::cluster.u32 arrival, %1, %2;\n"
      "  st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [place], {%3, %4, %5, %6}, [arrival]; }" ::"r"(
          shared_address(p)),
      "r"(shared_address(barrier)), "r"(rank), "r"(raw.word[0]), "r"(raw.word[1]), "r"(raw.word[2]), "r"(raw.word[3])
      : "memory");
}

// Returns when all states are there, visible to the calling thread.
ERC_DEVICE void wait_for_states(CopyBarrier* barrier) {
  asm volatile(
      "{ .reg .pred done;\n"
      "waiting: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "  @!done bra waiting; }" ::"r"(shared_address(barrier))
      : "memory");
}

// ---- launches ------------------------------------------------------------------------------------------------------

inline DeviceInfo device_info() {
  int device = 0, major = 0, minor = 0;
  DeviceInfo info{};
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&info.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&info.l2_bytes, cudaDevAttrL2CacheSize, device);
  cudaDeviceGetAttribute(&info.shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  info.capability = 10 * major + minor;
  return info;
}

// Whether a cluster of blocks can run this kernel. Code for sm_80 alone, compiled by the driver for a later GPU, has the kernel's name
// and an empty body: what counts is what the kernel was compiled for.
template <class... Params>
bool runs_in_clusters(void (*kernel)(Params...), const DeviceInfo& device) {
  if (!device.has_clusters()) return false;
  cudaFuncAttributes code{};
  if (cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel)) != cudaSuccess) {
    cudaGetLastError();  // the kernel that is launched instead reports what is wrong
    return false;
  }
  return code.ptxVersion >= 90 && code.binaryVersion >= 90;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), const LaunchShape& shape, Args... args) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid));
  config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace cuda
}  // namespace erc

#endif  // ERC_CUDA_HOST
