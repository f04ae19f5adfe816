// The CPU backend's operators.
#include "bindings/gradient_memory.h"
#include "bindings/operators.h"
#include "cpu/kernels.h"
#include "cpu/tokens.h"
#include "cpu/wide_product.h"

namespace erc {
namespace {

class Cpu {
 public:
  static constexpr bool kReadsValues = true;
  static bool labels_are_valid(const RowInputs& rows) { return erc::labels_are_valid(rows, rows.logits.vocab_size); }

  explicit Cpu(const Tensor&) {}
  Tensor gradient_like(const Tensor& logits) { return erc::gradient_like(logits); }
  int64_t workspace_bytes(const Rows&) const { return 0; }
  int64_t summary_bytes(int64_t) const { return 0; }

  void run(const StatsForward& call) { each_row(kernels().stats_forward, call, call.rows.logits); }
  void run(const StatsBackward& call) { each_row(kernels().stats_backward, call, call.rows.logits); }
  bool run(SupportForward call) {
    int32_t broken = 0;
    call.broken = &broken;
    each_row(kernels().support_forward, call, call.rows.logits);
    return broken == 0;
  }
  void run(const SupportBackward& call) { each_row(kernels().support_backward, call, call.grad_logits); }
  void run(const PolicyLoss& call) { each_row(kernels().policy_loss, call, call.rows.logits); }
  void run(const PairedForward& call) { each_row(kernels().paired_forward, call, call.rows.logits); }
  void run(const PairedBackward& call) { each_row(kernels().paired_backward, call, call.rows.logits); }
  void run(const ScaleRows& call) { each_row(kernels().scale_rows, call, call.source); }
  bool run(const TokenTable& call, bool wide) { return wide ? token_table<double>(call) : token_table<float>(call); }
  void run(const TokenLosses& call, bool wide) { wide ? token_losses<double>(call) : token_losses<float>(call); }
  void run(const TokenSummary& call, bool wide) { wide ? token_summary<double>(call) : token_summary<float>(call); }

 private:
  // Rows are independent: who computes one changes nothing in it. Short rows share a task.
  template <class Call>
  static void each_row(void (*kernel)(const Call&, int64_t, int64_t), const Call& call, const Rows& rows) {
    constexpr int64_t kElementsPerTask = 32768;
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, rows.vocab_size));
    torch::stable::parallel_for(0, rows.num_rows, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  }
};

void wide_product_(const Tensor& rows, const Tensor& weight, const MaybeTensor& bias, bool accumulate, const Tensor& out) {
  const auto matrix = [](const Tensor& t, ScalarType type) { return t.dim() == 2 && t.scalar_type() == type; };
  const auto strides = [](const Tensor& t) { return WideProduct::Strides{t.stride(0), t.stride(1)}; };
  STD_TORCH_CHECK(
      matrix(rows, ScalarType::BFloat16) && matrix(weight, ScalarType::BFloat16) && matrix(out, ScalarType::Float) &&
          rows.size(1) == weight.size(1) && out.size(0) == rows.size(0) && out.size(1) == weight.size(0) &&
          (out.stride(1) == 1 || (out.stride(0) == 1 && !bias)),
      "wide_product_ needs bfloat16 [n, D] and [V, D] and float32 [n, V] with a stride of 1, without bias the first");
  WideProduct call{};
  call.rows = static_cast<const uint16_t*>(rows.const_data_ptr());
  call.weight = static_cast<const uint16_t*>(weight.const_data_ptr());
  call.bias = static_cast<const float*>(Like(out).values(bias, "bias", weight.size(0)));
  call.out = static_cast<float*>(out.mutable_data_ptr());
  call.num_rows = rows.size(0), call.num_columns = weight.size(0), call.width = rows.size(1);
  call.row_strides = strides(rows), call.weight_strides = strides(weight), call.out_strides = strides(out);
  call.accumulate = accumulate;
  Tensor packed = Like(out).bytes(2 * wide_product_packed(call));
  pack_wide_product(call, static_cast<uint16_t*>(packed.mutable_data_ptr()));
  constexpr int64_t kBlocksPerTask = 16;
  const int64_t blocks = (call.num_columns + kProductBlock - 1) / kProductBlock;
  torch::stable::parallel_for(0, blocks, kBlocksPerTask, [&](int64_t begin, int64_t end) {
    run_wide_product(call, static_cast<const uint16_t*>(packed.const_data_ptr()), begin, end);
  });
}

}  // namespace
}  // namespace erc

STABLE_TORCH_LIBRARY_IMPL(erc_cpu, CPU, m) {
  erc::Operators<erc::Cpu>::implement(m);
  m.impl("wide_product_", TORCH_BOX(&erc::wide_product_));
}

// What multiplies bfloat16 into float32 here, empty where nothing does.
extern "C" __attribute__((visibility("default"))) const char* erc_cpu_wide_product() { return erc::wide_product_isa(); }

// Which instruction set was chosen, for `python -m erc info`.
extern "C" __attribute__((visibility("default"))) const char* erc_cpu_isa() { return erc::kernels().isa; }
