// The CUDA operators of erc/ops.py, registered against PyTorch's stable ABI. Outputs come from PyTorch's allocator, kernels go to
// its current stream, and nothing here waits for the device. Shapes and dtypes were checked in Python; what is checked again is
// what would read or write out of bounds.
//
// The tests compile this file once more with ERC_CUDA_HOST, beside kernels that g++ compiled for the CPU (tests/cuda_host).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "cuda/launch.h"

namespace erc {
namespace cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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

void check(cudaError_t error, const char* operation) {
  STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error));
}

DType dtype_of(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::BFloat16) return DType::kBFloat16;
  if (type == ScalarType::Half) return DType::kFloat16;
  if (type == ScalarType::Float) return DType::kFloat32;
  STD_TORCH_CHECK(type == ScalarType::Double, "logits must be float32, bfloat16, float16 or float64");
  return DType::kFloat64;
}

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), "logits must be [outer, inner, V] with a last stride of 1");
  const int64_t inner = t.size(1) > 0 ? t.size(1) : 1;
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t), t.size(0) * t.size(1), t.size(2), inner, t.stride(0), t.stride(1)};
}

// One call's logits, and what is allocated and checked against them.
struct Batch {
  const Tensor& logits;
  Rows rows;
  ScalarType real;

  explicit Batch(const Tensor& logits)
      : logits(logits), rows(rows_of(logits)),
        real(logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {}

  const void* input(const MaybeTensor& t, const char* name, int leading = 1) const { return values(t, name, real, leading); }

  const void* values(const MaybeTensor& t, const char* name, ScalarType type, int leading = 1) const {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->numel() == leading * rows.num_rows && t->scalar_type() == type && t->is_contiguous() &&
                        t->get_device_index() == logits.get_device_index(),
                    name, " must be contiguous on the device of logits, with one value a row, in the statistics dtype "
                    "(labels: int64)");
    return t->const_data_ptr();
  }

  Tensor output(std::initializer_list<int64_t> leading = {}, std::optional<ScalarType> type = std::nullopt) const {
    int64_t shape[2] = {0, rows.num_rows};
    for (int64_t count : leading) shape[0] = count;
    return torch::stable::new_empty(logits, {shape + (leading.size() == 0), leading.size() + 1}, type.value_or(real));
  }

  Tensor gradient() const {
    const int64_t shape[] = {logits.size(0), logits.size(1), logits.size(2)};
    return torch::stable::new_empty(logits, {shape, 3});
  }

  Tensor empty(size_t dimensions) const {
    const int64_t shape[] = {0, 0, 0};
    return torch::stable::new_empty(logits, {shape, dimensions}, dimensions == 1 ? real : logits.scalar_type());
  }

  Tensor workspace() const {
    const int64_t shape[] = {workspace_bytes(rows) / (real == ScalarType::Double ? 8 : 4)};
    return torch::stable::new_empty(logits, {shape, 1}, real);
  }

  RowInputs inputs(const MaybeTensor& labels, const MaybeTensor& temperature, const Tensor& params, int64_t ignore_index,
                   int64_t start = 0) const {
    return {rows, static_cast<const int64_t*>(values(labels, "labels", ScalarType::Long)), input(temperature, "temperature"),
            read_scaling(numbers(params, kNumScalingParams)), ignore_index, start};
  }

  static const double* numbers(const Tensor& params, int64_t length) {
    STD_TORCH_CHECK(params.numel() >= length && params.scalar_type() == ScalarType::Double && params.is_cpu() &&
                        params.is_contiguous(),
                    "params must be a contiguous CPU float64 tensor");
    return static_cast<const double*>(params.const_data_ptr());
  }
};

// ---- statistics ----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> op_stats_forward(const Tensor& logits, const MaybeTensor& labels,
                                                            const MaybeTensor& temperature, const Tensor& params,
                                                            int64_t ignore_index) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  Tensor logprob = labels ? batch.output() : batch.empty(1);
  Tensor entropy = batch.output(), logsumexp = batch.output(), saved = batch.output({3}), workspace = batch.workspace();
  StatsForward call{};
  call.rows = batch.inputs(labels, temperature, params, ignore_index);
  call.logprob = labels ? logprob.mutable_data_ptr() : nullptr;
  call.entropy = entropy.mutable_data_ptr();
  call.logsumexp = logsumexp.mutable_data_ptr();
  call.saved = saved.mutable_data_ptr();
  call.workspace = workspace.mutable_data_ptr();
  check(stats_forward(call, device.stream), "stats_forward");
  return {logprob, entropy, logsumexp, saved};
}

void run_stats_backward(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature, const Tensor& params,
                        int64_t ignore_index, const Tensor& saved, const MaybeTensor& grad_logprob,
                        const MaybeTensor& grad_entropy, const MaybeTensor& grad_logsumexp, const Tensor& grad_logits) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  const StatsBackward call{batch.inputs(labels, temperature, params, ignore_index), batch.input(saved, "saved", 3),
                           batch.input(grad_logprob, "grad_logprob"), batch.input(grad_entropy, "grad_entropy"),
                           batch.input(grad_logsumexp, "grad_logsumexp"), rows_of(grad_logits)};
  check(stats_backward(call, device.stream), "stats_backward");
}

Tensor op_stats_backward(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature, const Tensor& params,
                         int64_t ignore_index, const Tensor& saved, const MaybeTensor& grad_logprob,
                         const MaybeTensor& grad_entropy, const MaybeTensor& grad_logsumexp) {
  Tensor grad_logits = Batch(logits).gradient();
  run_stats_backward(logits, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, grad_logsumexp,
                     grad_logits);
  return grad_logits;
}

void op_stats_backward_(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature, const Tensor& params,
                        int64_t ignore_index, const Tensor& saved, const MaybeTensor& grad_logprob,
                        const MaybeTensor& grad_entropy, const MaybeTensor& grad_logsumexp) {
  run_stats_backward(logits, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, grad_logsumexp,
                     logits);
}

Tensor op_partial_stats(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature, const Tensor& params,
                        int64_t ignore_index, int64_t start) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  Tensor state = batch.output({4}), workspace = batch.workspace();
  check(partial_stats(batch.inputs(labels, temperature, params, ignore_index, start), state.mutable_data_ptr(),
                      workspace.mutable_data_ptr(), device.stream),
        "partial_stats");
  return state;
}

// ---- the fused loss ------------------------------------------------------------------------------------------------

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LossOutputs run_policy_loss(const Tensor& logits, const Tensor& labels, const MaybeTensor& temperature, const Tensor& params,
                            int64_t ignore_index, const Tensor& weight, const Tensor& advantages, const MaybeTensor& old_logprob,
                            const MaybeTensor& old_entropy, const MaybeTensor& ref_logprob, const MaybeTensor& policy_weight,
                            const MaybeTensor& entropy_weight, const MaybeTensor& logprob_weight, int64_t rule, int64_t kl,
                            int64_t gate, const Tensor* grad_logits) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  Tensor loss = batch.output(), token_loss = batch.output(), logprob = batch.output(), entropy = batch.output();
  Tensor flags = batch.output({}, ScalarType::Int), workspace = batch.workspace();
  PolicyLoss call{};
  call.rows = batch.inputs(labels, temperature, params, ignore_index);
  call.weight = batch.input(weight, "weight");
  call.advantages = batch.input(advantages, "advantages");
  call.old_logprob = batch.input(old_logprob, "old_logprob");
  call.old_entropy = batch.input(old_entropy, "old_entropy");
  call.ref_logprob = batch.input(ref_logprob, "ref_logprob");
  call.policy_weight = batch.input(policy_weight, "policy_weight");
  call.entropy_weight = batch.input(entropy_weight, "entropy_weight");
  call.logprob_weight = batch.input(logprob_weight, "logprob_weight");
  call.rule = RatioRule(rule);
  call.kl = int(kl);
  call.gate = Gate(gate);
  call.params = read_loss_params<double>(Batch::numbers(params, kNumParams));
  call.loss = loss.mutable_data_ptr();
  call.token_loss = token_loss.mutable_data_ptr();
  call.logprob = logprob.mutable_data_ptr();
  call.entropy = entropy.mutable_data_ptr();
  call.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
  if (grad_logits != nullptr) call.grad_logits = rows_of(*grad_logits);
  call.workspace = workspace.mutable_data_ptr();
  check(policy_loss(call, device.stream), "policy_loss");
  return {loss, token_loss, logprob, entropy, flags};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> op_policy_loss(
    const Tensor& logits, const Tensor& labels, const MaybeTensor& temperature, const Tensor& params, int64_t ignore_index,
    const Tensor& weight, const Tensor& advantages, const MaybeTensor& old_logprob, const MaybeTensor& old_entropy,
    const MaybeTensor& ref_logprob, const MaybeTensor& policy_weight, const MaybeTensor& entropy_weight,
    const MaybeTensor& logprob_weight, int64_t rule, int64_t kl, int64_t gate, bool need_grad) {
  Tensor grad_logits = need_grad ? Batch(logits).gradient() : Batch(logits).empty(3);
  return std::tuple_cat(run_policy_loss(logits, labels, temperature, params, ignore_index, weight, advantages, old_logprob,
                                        old_entropy, ref_logprob, policy_weight, entropy_weight, logprob_weight, rule, kl, gate,
                                        need_grad ? &grad_logits : nullptr),
                        std::make_tuple(grad_logits));
}

LossOutputs op_policy_loss_(const Tensor& logits, const Tensor& labels, const MaybeTensor& temperature, const Tensor& params,
                            int64_t ignore_index, const Tensor& weight, const Tensor& advantages, const MaybeTensor& old_logprob,
                            const MaybeTensor& old_entropy, const MaybeTensor& ref_logprob, const MaybeTensor& policy_weight,
                            const MaybeTensor& entropy_weight, const MaybeTensor& logprob_weight, int64_t rule, int64_t kl,
                            int64_t gate) {
  return run_policy_loss(logits, labels, temperature, params, ignore_index, weight, advantages, old_logprob, old_entropy,
                         ref_logprob, policy_weight, entropy_weight, logprob_weight, rule, kl, gate, &logits);
}

void run_scale_rows(const Tensor& grad, const Tensor& scale, const Tensor& destination) {
  const OnDeviceOf device(grad);
  const Batch batch(grad);
  check(scale_rows({batch.rows, rows_of(destination), batch.input(scale, "scale")}, device.stream), "scale_rows");
}

Tensor op_scale_rows(const Tensor& grad, const Tensor& scale) {
  Tensor destination = Batch(grad).gradient();
  run_scale_rows(grad, scale, destination);
  return destination;
}

void op_scale_rows_(const Tensor& grad, const Tensor& scale) { run_scale_rows(grad, scale, grad); }

// ---- pairs ---------------------------------------------------------------------------------------------------------

Rows old_rows_of(const Tensor& logits, const Tensor& old_logits) {
  const Rows rows = rows_of(logits), old = rows_of(old_logits);
  STD_TORCH_CHECK(rows.num_rows == old.num_rows && rows.vocab_size == old.vocab_size && rows.dtype == old.dtype,
                  "old_logits must have the shape and dtype of logits");
  return old;
}

std::tuple<Tensor, Tensor> op_paired_forward(const Tensor& logits, const Tensor& old_logits, const MaybeTensor& temperature,
                                             const Tensor& params) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  Tensor stats = batch.output({6}), saved = batch.output({8});
  const PairedForward call{batch.inputs(std::nullopt, temperature, params, 0), old_rows_of(logits, old_logits),
                           stats.mutable_data_ptr(), saved.mutable_data_ptr()};
  check(paired_forward(call, device.stream), "paired_forward");
  return {stats, saved};
}

Tensor op_paired_backward(const Tensor& logits, const Tensor& old_logits, const MaybeTensor& temperature, const Tensor& params,
                          const Tensor& saved, const Tensor& grads) {
  const OnDeviceOf device(logits);
  const Batch batch(logits);
  Tensor grad_logits = batch.gradient();
  const PairedBackward call{batch.inputs(std::nullopt, temperature, params, 0), old_rows_of(logits, old_logits),
                            batch.input(saved, "saved", 8), batch.input(grads, "grads", 6), rows_of(grad_logits)};
  check(paired_backward(call, device.stream), "paired_backward");
  return grad_logits;
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("stats_forward", TORCH_BOX(&op_stats_forward));
  m.impl("stats_backward", TORCH_BOX(&op_stats_backward));
  m.impl("stats_backward_", TORCH_BOX(&op_stats_backward_));
  m.impl("policy_loss", TORCH_BOX(&op_policy_loss));
  m.impl("policy_loss_", TORCH_BOX(&op_policy_loss_));
  m.impl("scale_rows", TORCH_BOX(&op_scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&op_scale_rows_));
  m.impl("partial_stats", TORCH_BOX(&op_partial_stats));
  m.impl("paired_forward", TORCH_BOX(&op_paired_forward));
  m.impl("paired_backward", TORCH_BOX(&op_paired_backward));
}

}  // namespace
}  // namespace cuda
}  // namespace erc

#ifdef ERC_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(erc_cuda_host, CPU, m) { erc::cuda::register_operators(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(erc_cuda, CUDA, m) { erc::cuda::register_operators(m); }
#endif
