// The CUDA backend's operators. Memory comes from PyTorch's allocator, kernels go to its current stream, and nothing here waits
// for the device.
//
// The tests compile this file once more with ERC_CUDA_HOST, beside kernels that g++ compiled for the CPU (tests/cuda_host).
#include <torch/csrc/stable/accelerator.h>

#include "bindings/operators.h"
#include "cuda/launch.h"

namespace erc {
namespace {

#ifdef ERC_CUDA_HOST
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
  cudaStream_t stream = nullptr;
};
#else
// Makes the tensor's device current and finds its stream.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

class Cuda {
 public:
  static constexpr bool kReadsValues = false;

  explicit Cuda(const Tensor& t) : device_(t) {}

  Tensor gradient_like(const Tensor& logits) {
    const int64_t shape[] = {logits.size(0), logits.size(1), logits.size(2)};
    return torch::stable::new_empty(logits, {shape, 3});
  }
  int64_t workspace_bytes(const Rows& logits) const { return cuda::workspace_bytes(logits); }
  int64_t summary_bytes(int64_t num_tokens) const { return cuda::summary_bytes(num_tokens); }

  void run(const StatsForward& call) { check(cuda::stats_forward(call, device_.stream), "stats_forward"); }
  void run(const StatsBackward& call) { check(cuda::stats_backward(call, device_.stream), "stats_backward"); }
  bool run(const SupportForward& call) {
    check(cuda::support_forward(call, device_.stream), "support_forward");
    return true;
  }
  void run(const SupportBackward& call) { check(cuda::support_backward(call, device_.stream), "support_backward"); }
  void run(const PolicyLoss& call) { check(cuda::policy_loss(call, device_.stream), "policy_loss"); }
  void run(const PairedForward& call) { check(cuda::paired_forward(call, device_.stream), "paired_forward"); }
  void run(const PairedBackward& call) { check(cuda::paired_backward(call, device_.stream), "paired_backward"); }
  void run(const ScaleRows& call) { check(cuda::scale_rows(call, device_.stream), "scale_rows"); }
  bool run(const TokenTable& call, bool wide) {
    check(cuda::token_table(call, wide, device_.stream), "token_table");
    return true;
  }
  void run(const TokenLosses& call, bool wide) { check(cuda::token_losses(call, wide, device_.stream), "token_losses"); }
  void run(const TokenSummary& call, bool wide) { check(cuda::token_summary(call, wide, device_.stream), "token_summary"); }

 private:
  static void check(cudaError_t error, const char* operation) {
    STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
  }
  const OnDeviceOf device_;
};

}  // namespace
}  // namespace erc

#ifdef ERC_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(erc_cuda_host, CPU, m) { erc::Operators<erc::Cuda>::implement(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(erc_cuda, CUDA, m) { erc::Operators<erc::Cuda>::implement(m); }
#endif
