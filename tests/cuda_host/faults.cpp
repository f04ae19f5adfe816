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

void vote_without_a_lane(float* out) {
  if (threadIdx.x != 7) out[threadIdx.x] = __any_sync(0xffffffffu, 1);
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
    erc::cuda::copy_bulk(dynamic_shared() + 64, out, 16, barrier, out, out + 4);
  }
}

void wait_for_nobody(float*) {
  auto* barrier = reinterpret_cast<erc::cuda::CopyBarrier*>(dynamic_shared());
  if (threadIdx.x == 0) {
    erc::cuda::copy_barrier_init(barrier);
    erc::cuda::expect_states(barrier, 16);
  }
  __syncthreads();
  erc::cuda::wait_for_states(barrier);
}

void misaligned_load(float* out) { out[0] = erc::cuda::as_float(erc::cuda::load_streaming(out + 1).word[0]); }

void cluster_wait_alone(float*) { erc::cuda::cluster_wait(); }

void sound(float* out) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  shared[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x] + __shfl_xor_sync(0xffffffffu, shared[threadIdx.x], 1);
}

// out[0]: lanes that voted yes; out[1]: any, all; out[2], out[3]: a sum and a maximum over the threads.
void votes_and_atomics(float* out) {
  const unsigned odd = __ballot_sync(0xffffffffu, threadIdx.x % 2);
  const bool any = __any_sync(0xffffffffu, threadIdx.x == 9), all = __all_sync(0xffffffffu, threadIdx.x < 31);
  atomicAdd(out + 2, float(threadIdx.x));
  atomicMax(out + 3, float(threadIdx.x % 20));
  if (threadIdx.x != 0) return;
  for (int lane = 0; lane < 32; ++lane) out[0] += float((odd >> lane & 1) << (lane % 2));
  out[1] = float(any) + 2 * float(all);
}

const struct {
  const char* name;
  void (*kernel)(float*);
} kKernels[] = {
    {"divergent_barrier", divergent_barrier},
    {"missing_thread", missing_thread},
    {"shuffle_without_a_lane", shuffle_without_a_lane},
    {"partial_mask", partial_mask},
    {"uninitialised_shared", uninitialised_shared},
    {"missing_barrier", missing_barrier},
    {"copy_without_wait", copy_without_wait},
    {"misaligned_load", misaligned_load},
    {"wait_for_nobody", wait_for_nobody},
    {"cluster_wait_alone", cluster_wait_alone},
    {"sound", sound},
    {"vote_without_a_lane", vote_without_a_lane},
    {"votes_and_atomics", votes_and_atomics},
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
