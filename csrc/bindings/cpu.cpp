// The CPU operators of erc/ops.py, registered against PyTorch's stable ABI. Shapes and dtypes were checked in Python; what is
// checked again here is what would read or write out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings/gradient_memory.h"
#include "cpu/kernels.h"

namespace erc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16, float16 or float64");
  }
}

ScalarType stats_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, "logits must be [outer, inner, V]");
  STD_TORCH_CHECK(t.size(2) <= 1 || t.stride(2) == 1, "logits must have a last stride of 1");
  return {const_cast<void*>(t.const_data_ptr()), dtype_of(t), t.size(2), std::max<int64_t>(t.size(1), 1), t.stride(0),
          t.stride(1)};
}

int64_t count(const Tensor& logits) { return logits.size(0) * logits.size(1); }

// A per-row tensor: contiguous, of the expected type and length; null where absent.
const void* row_values(const OptionalTensor& t, const char* name, int64_t length, ScalarType type) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == length && t->scalar_type() == type && t->is_contiguous(), name,
                  " must be contiguous, with one value a row, in the statistics dtype (labels: int64)");
  return t->const_data_ptr();
}

const double* params_of(const Tensor& params, int64_t length) {
  STD_TORCH_CHECK(params.numel() >= length && params.scalar_type() == ScalarType::Double && params.is_cpu() &&
                      params.is_contiguous(),
                  "params must be a contiguous CPU float64 tensor");
  return static_cast<const double*>(params.const_data_ptr());
}

RowScaling scaling_of(const Tensor& logits, const OptionalTensor& temperature, const Tensor& params) {
  return {read_scaling(params_of(params, kNumScalingParams)),
          row_values(temperature, "temperature", count(logits), stats_type(logits))};
}

RowInputs row_inputs(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& temperature,
                     const Tensor& params, int64_t ignore_index, int64_t start = 0) {
  const void* label_data = row_values(labels, "labels", count(logits), ScalarType::Long);
  return {rows_of(logits), static_cast<const int64_t*>(label_data), scaling_of(logits, temperature, params), ignore_index,
          start};
}

Tensor per_row(const Tensor& logits, int64_t leading = 1) {
  const int64_t shape[] = {leading, count(logits)};
  const bool flat = leading == 1;
  return torch::stable::new_empty(logits, {shape + flat, size_t(2 - flat)}, stats_type(logits));
}

// Rows are independent: who computes one changes nothing in it. Short rows share a task.
template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, int64_t num_rows, int64_t vocab_size) {
  constexpr int64_t kElementsPerTask = 32768;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, vocab_size));
  torch::stable::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stats_forward(const Tensor& logits, const OptionalTensor& labels,
                                                         const OptionalTensor& temperature, const Tensor& params,
                                                         int64_t ignore_index) {
  const int64_t none[] = {0};
  Tensor logprob = labels ? per_row(logits) : torch::stable::new_empty(logits, {none, 1}, stats_type(logits));
  Tensor entropy = per_row(logits), logsumexp = per_row(logits), saved = per_row(logits, 3);
  const StatsForward call{row_inputs(logits, labels, temperature, params, ignore_index),
                          labels ? logprob.mutable_data_ptr() : nullptr,
                          entropy.mutable_data_ptr(),
                          logsumexp.mutable_data_ptr(),
                          saved.mutable_data_ptr(),
                          count(logits)};
  run(kernels().stats_forward, call, count(logits), logits.size(2));
  return {logprob, entropy, logsumexp, saved};
}

void run_stats_backward(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& temperature,
                        const Tensor& params, int64_t ignore_index, const Tensor& saved, const OptionalTensor& grad_logprob,
                        const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp, const Tensor& grad_logits) {
  const int64_t n = count(logits);
  const ScalarType type = stats_type(logits);
  const StatsBackward call{row_inputs(logits, labels, temperature, params, ignore_index),
                           row_values(saved, "saved", 3 * n, type),
                           row_values(grad_logprob, "grad_logprob", n, type),
                           row_values(grad_entropy, "grad_entropy", n, type),
                           row_values(grad_logsumexp, "grad_logsumexp", n, type),
                           rows_of(grad_logits),
                           n};
  run(kernels().stats_backward, call, n, logits.size(2));
}

Tensor stats_backward(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& temperature,
                      const Tensor& params, int64_t ignore_index, const Tensor& saved, const OptionalTensor& grad_logprob,
                      const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp) {
  Tensor grad_logits = gradient_like(logits);
  run_stats_backward(logits, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, grad_logsumexp,
                     grad_logits);
  return grad_logits;
}

void stats_backward_(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& temperature,
                     const Tensor& params, int64_t ignore_index, const Tensor& saved, const OptionalTensor& grad_logprob,
                     const OptionalTensor& grad_entropy, const OptionalTensor& grad_logsumexp) {
  run_stats_backward(logits, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, grad_logsumexp,
                     logits);
}

using LossOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

LossOutputs run_policy_loss(const Tensor& logits, const Tensor& labels, const OptionalTensor& temperature,
                            const Tensor& params, int64_t ignore_index, const Tensor& weight, const Tensor& advantages,
                            const OptionalTensor& old_logprob, const OptionalTensor& old_entropy,
                            const OptionalTensor& ref_logprob, const OptionalTensor& policy_weight,
                            const OptionalTensor& entropy_weight, const OptionalTensor& logprob_weight, int64_t rule,
                            int64_t kl, int64_t gate, const Tensor* grad_logits) {
  const int64_t n = count(logits);
  const ScalarType type = stats_type(logits);
  Tensor loss = per_row(logits), token_loss = per_row(logits), logprob = per_row(logits), entropy = per_row(logits);
  const int64_t shape[] = {n};
  Tensor flags = torch::stable::new_empty(logits, {shape, 1}, ScalarType::Int);
  PolicyLoss call{row_inputs(logits, labels, temperature, params, ignore_index),
                  row_values(weight, "weight", n, type),
                  row_values(advantages, "advantages", n, type),
                  row_values(old_logprob, "old_logprob", n, type),
                  row_values(old_entropy, "old_entropy", n, type),
                  row_values(ref_logprob, "ref_logprob", n, type),
                  row_values(policy_weight, "policy_weight", n, type),
                  row_values(entropy_weight, "entropy_weight", n, type),
                  row_values(logprob_weight, "logprob_weight", n, type),
                  RatioRule(rule),
                  int(kl),
                  Gate(gate),
                  read_loss_params<double>(params_of(params, kNumParams)),
                  loss.mutable_data_ptr(),
                  token_loss.mutable_data_ptr(),
                  logprob.mutable_data_ptr(),
                  entropy.mutable_data_ptr(),
                  static_cast<int32_t*>(flags.mutable_data_ptr()),
                  {}};
  if (grad_logits != nullptr) call.grad_logits = rows_of(*grad_logits);
  run(kernels().policy_loss, call, n, logits.size(2));
  return {loss, token_loss, logprob, entropy, flags};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
    const Tensor& logits, const Tensor& labels, const OptionalTensor& temperature, const Tensor& params,
    int64_t ignore_index, const Tensor& weight, const Tensor& advantages, const OptionalTensor& old_logprob,
    const OptionalTensor& old_entropy, const OptionalTensor& ref_logprob, const OptionalTensor& policy_weight,
    const OptionalTensor& entropy_weight, const OptionalTensor& logprob_weight, int64_t rule, int64_t kl, int64_t gate,
    bool need_grad) {
  const int64_t none[] = {0, 0, 0};
  Tensor grad_logits = need_grad ? gradient_like(logits) : torch::stable::new_empty(logits, {none, 3});
  return std::tuple_cat(
      run_policy_loss(logits, labels, temperature, params, ignore_index, weight, advantages, old_logprob, old_entropy,
                      ref_logprob, policy_weight, entropy_weight, logprob_weight, rule, kl, gate,
                      need_grad ? &grad_logits : nullptr),
      std::make_tuple(grad_logits));
}

LossOutputs policy_loss_(const Tensor& logits, const Tensor& labels, const OptionalTensor& temperature, const Tensor& params,
                         int64_t ignore_index, const Tensor& weight, const Tensor& advantages,
                         const OptionalTensor& old_logprob, const OptionalTensor& old_entropy,
                         const OptionalTensor& ref_logprob, const OptionalTensor& policy_weight,
                         const OptionalTensor& entropy_weight, const OptionalTensor& logprob_weight, int64_t rule,
                         int64_t kl, int64_t gate) {
  return run_policy_loss(logits, labels, temperature, params, ignore_index, weight, advantages, old_logprob, old_entropy,
                         ref_logprob, policy_weight, entropy_weight, logprob_weight, rule, kl, gate, &logits);
}

void run_scale_rows(const Tensor& grad, const Tensor& scale, const Tensor& destination) {
  const ScaleRows call{rows_of(grad), rows_of(destination), row_values(scale, "scale", count(grad), stats_type(grad))};
  run(kernels().scale_rows, call, count(grad), grad.size(2));
}

Tensor scale_rows(const Tensor& grad, const Tensor& scale) {
  Tensor destination = gradient_like(grad);
  run_scale_rows(grad, scale, destination);
  return destination;
}

void scale_rows_(const Tensor& grad, const Tensor& scale) { run_scale_rows(grad, scale, grad); }

Tensor partial_stats(const Tensor& logits, const OptionalTensor& labels, const OptionalTensor& temperature,
                     const Tensor& params, int64_t ignore_index, int64_t start) {
  Tensor state = per_row(logits, 4);
  const PartialStats call{row_inputs(logits, labels, temperature, params, ignore_index, start), state.mutable_data_ptr(),
                          count(logits)};
  run(kernels().partial_stats, call, count(logits), logits.size(2));
  return state;
}

void check_pair(const Tensor& logits, const Tensor& old_logits) {
  STD_TORCH_CHECK(old_logits.dim() == 3 && count(logits) == count(old_logits) && logits.size(2) == old_logits.size(2) &&
                      logits.scalar_type() == old_logits.scalar_type(),
                  "old_logits must have the shape and dtype of logits");
}

std::tuple<Tensor, Tensor> paired_forward(const Tensor& logits, const Tensor& old_logits, const OptionalTensor& temperature,
                                          const Tensor& params) {
  check_pair(logits, old_logits);
  Tensor stats = per_row(logits, 6), saved = per_row(logits, 8);
  const PairedForward call{rows_of(logits),          rows_of(old_logits),      scaling_of(logits, temperature, params),
                           stats.mutable_data_ptr(), saved.mutable_data_ptr(), count(logits)};
  run(kernels().paired_forward, call, count(logits), logits.size(2));
  return {stats, saved};
}

Tensor paired_backward(const Tensor& logits, const Tensor& old_logits, const OptionalTensor& temperature,
                       const Tensor& params, const Tensor& saved, const Tensor& grads) {
  check_pair(logits, old_logits);
  const int64_t n = count(logits);
  Tensor grad_logits = gradient_like(logits);
  const PairedBackward call{rows_of(logits),
                            rows_of(old_logits),
                            scaling_of(logits, temperature, params),
                            row_values(saved, "saved", 8 * n, stats_type(logits)),
                            row_values(grads, "grads", 6 * n, stats_type(logits)),
                            rows_of(grad_logits),
                            n};
  run(kernels().paired_backward, call, n, logits.size(2));
  return grad_logits;
}

}  // namespace
}  // namespace erc

STABLE_TORCH_LIBRARY_IMPL(erc_cpu, CPU, m) {
  m.impl("stats_forward", TORCH_BOX(&erc::stats_forward));
  m.impl("stats_backward", TORCH_BOX(&erc::stats_backward));
  m.impl("stats_backward_", TORCH_BOX(&erc::stats_backward_));
  m.impl("policy_loss", TORCH_BOX(&erc::policy_loss));
  m.impl("policy_loss_", TORCH_BOX(&erc::policy_loss_));
  m.impl("scale_rows", TORCH_BOX(&erc::scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&erc::scale_rows_));
  m.impl("partial_stats", TORCH_BOX(&erc::partial_stats));
  m.impl("paired_forward", TORCH_BOX(&erc::paired_forward));
  m.impl("paired_backward", TORCH_BOX(&erc::paired_backward));
}

// Which instruction set was chosen, for `python -m erc info`.
extern "C" __attribute__((visibility("default"))) const char* erc_cpu_isa() { return erc::kernels().isa; }
