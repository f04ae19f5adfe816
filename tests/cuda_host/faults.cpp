// Kernels with one fault each, for the checks of the harness itself. Returns the message of the launch, empty if none.
#include <string>

#include "cuda/device.cuh"

namespace {

using erc::cuda::dynamic_shared;

void divergent_barrier(float*) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void missing_thread(float*) {
  if (threadIdx.x != 3) __syncthreads();
}

void shuffle_without_a_lane(float* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

void partial_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

void uninitialised_shared(float* out) { out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared())[threadIdx.x]; }

void missing_barrier(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = float(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void copy_without_wait(float* out) {
  auto* barrier = reinterpret_cast<erc::cuda::CopyBarrier*>(dynamic_shared());
  if (threadIdx.x == 0) {
    erc::cuda::copy_barrier_init(barrier);
    erc::cuda::copy_bulk(dynamic_shared() + 64, out, 16, barrier);
  }
}

void misaligned_load(float* out) { out[0] = erc::cuda::as_float(erc::cuda::load_streaming(out + 1).word[0]); }

void cluster_wait_alone(float*) { erc::cuda::cluster_wait(); }

void sound(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x] + __shfl_xor_sync(0xffffffffu, shared[threadIdx.x], 1);
}

const struct {
  const char* name;
  void (*kernel)(float*);
} kKernels[] = {
    {"divergent_barrier", divergent_barrier},     {"missing_thread", missing_thread},
    {"shuffle_without_a_lane", shuffle_without_a_lane}, {"partial_mask", partial_mask},
    {"uninitialised_shared", uninitialised_shared}, {"missing_barrier", missing_barrier},
    {"copy_without_wait", copy_without_wait},     {"misaligned_load", misaligned_load},
    {"cluster_wait_alone", cluster_wait_alone},   {"sound", sound},
};

}  // namespace

// Runs `name` with 32 threads in a block; out holds 32 floats, aligned to 16 bytes.
extern "C" const char* erc_cuda_host_fault(const char* name, float* out) {
  for (const auto& entry : kKernels) {
    if (std::string(name) != entry.name) continue;
    const cudaError_t error = erc::cuda::launch(entry.kernel, {1, 32, 1, 256, nullptr}, out);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }
  return "no such kernel";
}
