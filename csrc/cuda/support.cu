// Log-probs over the tokens that a sampler kept, and their gradient: a warp a row, around the dense sweeps, which stay as they are.
#include "common/support.h"
#include "cuda/sweep.cuh"

namespace erc {
namespace cuda {

struct WarpLanes {
  ERC_DEVICE int index() const { return int(threadIdx.x); }
  ERC_DEVICE int count() const { return kWarp; }
  ERC_DEVICE double sum(double x) const { return warp_sum(x); }
  ERC_DEVICE double largest(double x) const {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
  }
};

template <class T>
__global__ void __launch_bounds__(kWarp) support_forward_kernel(SupportForward call) {
  const T* row = call.rows.logits.row<const T>(blockIdx.x);
  support_statistics<stats_t<T>>(call, blockIdx.x, WarpLanes{}, [row](int64_t column) { return double(to_real(row[column])); });
}

template <class T>
__global__ void __launch_bounds__(kWarp) support_backward_kernel(SupportBackward call) {
  T* row = call.grad_logits.row<T>(blockIdx.x);
  support_gradient<stats_t<T>>(call, blockIdx.x, WarpLanes{},
                               [row](int64_t column, double x) { row[column] = from_real(T{}, stats_t<T>(x)); });
}

cudaError_t support_forward(const SupportForward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  const LaunchShape shape{logits.num_rows, kWarp, 1, 0, stream};
  return dispatch({&logits}, false, [&](auto variant) {
    return launch(support_forward_kernel<typename decltype(variant)::Element>, shape, call);
  });
}

cudaError_t support_backward(const SupportBackward& call, cudaStream_t stream) {
  const Rows& gradient = call.grad_logits;
  if (gradient.num_rows == 0) return cudaSuccess;
  const LaunchShape shape{gradient.num_rows, kWarp, 1, 0, stream};
  return dispatch({&gradient}, false, [&](auto variant) {
    return launch(support_backward_kernel<typename decltype(variant)::Element>, shape, call);
  });
}

}  // namespace cuda
}  // namespace erc
