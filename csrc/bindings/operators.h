// The operators of erc/ops.py for every compiled backend: from PyTorch's tensors to the calls of common/calls.h, on the stable
// ABI. Shapes and dtypes were checked in Python; what is checked again here is what would read or write out of bounds.
//
// A Backend is made for the tensor that a call is about, which makes its device current, and has
//   gradient_like(logits)   an uninitialised tensor like the logits, contiguous
//   workspace_bytes(rows)   scratch memory that rows of this kind need; summary_bytes(tokens) for a summary
//   run(call)               for each kind of call; run(call, wide) for those per token: whether statistics are float64
//   kReadsValues            whether run(TokenTable) says if all values are valid
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/token_table.h"

namespace erc {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Short: return DType::kInt16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    default: STD_TORCH_CHECK(false, "a tensor of this dtype is not supported");
  }
}

inline Rows rows_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1),
                  "rows must be [outer, inner, V] with a last stride of 1");
  const DType dtype = dtype_of(t);
  STD_TORCH_CHECK(dtype <= DType::kFloat64, "logits must be float32, bfloat16, float16 or float64");
  return {const_cast<void*>(t.const_data_ptr()),
          dtype,
          t.size(0) * t.size(1),
          t.size(2),
          std::max<int64_t>(t.size(1), 1),
          t.stride(0),
          t.stride(1)};
}

inline const double* numbers(const Tensor& params) {
  STD_TORCH_CHECK(params.numel() >= Param::kCount && params.scalar_type() == ScalarType::Double && params.is_cpu() &&
                      params.is_contiguous(),
                  "params must be a contiguous CPU float64 tensor");
  return static_cast<const double*>(params.const_data_ptr());
}

// What is allocated and checked against one tensor: per-token values are in the statistics dtype, on its device.
class Like {
 public:
  Like(const Tensor& tensor, bool wide) : tensor_(tensor), wide(wide), real(wide ? ScalarType::Double : ScalarType::Float) {}
  explicit Like(const Tensor& logits) : Like(logits, logits.scalar_type() == ScalarType::Double) {}

  const void* values(const MaybeTensor& t, const char* name, int64_t count, ScalarType type) const {
    if (!t) return nullptr;
    check(*t, name, count, t->scalar_type() == type);
    return t->const_data_ptr();
  }
  const void* values(const MaybeTensor& t, const char* name, int64_t count) const { return values(t, name, count, real); }

  Column column(const MaybeTensor& t, const char* name, int64_t count) const {
    if (!t) return {};
    check(*t, name, count, true);
    return {t->const_data_ptr(), dtype_of(*t)};
  }

  // A tensor that is written: [leading, count], or [count].
  void* target(const Tensor& t, const char* name, int64_t count, ScalarType type) const {
    check(t, name, count, t.scalar_type() == type);
    return t.mutable_data_ptr();
  }

  Tensor output(std::initializer_list<int64_t> shape, std::optional<ScalarType> type = std::nullopt) const {
    return torch::stable::new_empty(tensor_, {shape.begin(), shape.size()}, type.value_or(real));
  }

  Tensor bytes(int64_t count) const { return output({count}, ScalarType::Byte); }

 private:
  void check(const Tensor& t, const char* name, int64_t count, bool has_type) const {
    STD_TORCH_CHECK(has_type && t.numel() == count && t.is_contiguous() && t.is_cpu() == tensor_.is_cpu() &&
                        t.get_device_index() == tensor_.get_device_index(),
                    name,
                    " must be contiguous, with one value per token, on the device of the logits, in the dtype of its kind");
  }
  const Tensor& tensor_;

 public:
  const bool wide;
  const ScalarType real;
};

// Memory that a call needs for itself: asked for piece by piece, allocated at once.
class Scratch {
 public:
  int64_t reserve(int64_t bytes) {
    const int64_t at = size_;
    size_ += (bytes + 255) / 256 * 256;
    return at;
  }
  void allocate(const Like& like) { memory_ = like.bytes(size_); }
  template <class T = void>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->mutable_data_ptr()) + offset);
  }

 private:
  int64_t size_ = 0;
  std::optional<Tensor> memory_;
};

// Rows, which token each of them belongs to, and how they are read. `tokens`: how many there are in all.
struct Selection {
  const MaybeTensor& row_index;
  int64_t first_token = 0;
  int64_t num_tokens = -1;  // as many as rows
};

inline RowInputs row_inputs(const Like& like, const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature,
                            const Tensor& params, int64_t ignore_index, const Selection& selection, int64_t start = 0) {
  const Rows rows = rows_of(logits);
  const int64_t tokens = selection.num_tokens < 0 ? rows.num_rows : selection.num_tokens;
  STD_TORCH_CHECK(selection.row_index || (selection.first_token >= 0 && selection.first_token + rows.num_rows <= tokens),
                  "every row must have a token");
  const void* index = like.values(selection.row_index, "row_index", rows.num_rows, ScalarType::Long);
  return {rows,
          static_cast<const int64_t*>(like.values(labels, "labels", tokens, ScalarType::Long)),
          like.values(temperature, "temperature", tokens),
          Scaling::read(numbers(params)),
          ignore_index,
          start,
          static_cast<const int64_t*>(index),
          selection.first_token,
          tokens};
}

// A gradient is the logits' own memory, or other memory of their dtype, or, of float32 logits, of a narrower one.
inline Rows gradient_rows(const Rows& logits, const Tensor& grad_logits) {
  const Rows grad = rows_of(grad_logits);
  STD_TORCH_CHECK(grad.num_rows == logits.num_rows && grad.vocab_size == logits.vocab_size,
                  "grad_logits must be like the logits");
  const bool narrower = logits.dtype == DType::kFloat32 && (grad.dtype == DType::kBFloat16 || grad.dtype == DType::kFloat16);
  STD_TORCH_CHECK(grad.dtype == logits.dtype || (narrower && grad.data != logits.data),
                  "grad_logits must have the dtype of the logits, or of float32 logits a 16-bit one in memory of its own");
  return grad;
}

template <class Backend>
struct Operators {
  // ---- statistics ----------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor, Tensor> stats_forward(const Tensor& logits, const MaybeTensor& labels,
                                                                  const MaybeTensor& temperature, const Tensor& params,
                                                                  int64_t ignore_index) {
    Backend backend(logits);
    const Like like(logits);
    const RowInputs rows = row_inputs(like, logits, labels, temperature, params, ignore_index, {std::nullopt});
    const int64_t n = rows.num_tokens;
    check_labels(rows);
    Tensor logprob = like.output({labels ? n : 0}), entropy = like.output({n}), logsumexp = like.output({n});
    Tensor saved = like.output({3, n});
    StatsForward call{};
    call.rows = rows;
    call.logprob = labels ? logprob.mutable_data_ptr() : nullptr;
    call.entropy = entropy.mutable_data_ptr();
    call.logsumexp = logsumexp.mutable_data_ptr();
    call.saved = saved.mutable_data_ptr();
    run_with_workspace(backend, like, call);
    return {logprob, entropy, logsumexp, saved};
  }

  // All that a sweep knows, for the tokens of some rows: [6, num_tokens] logprob, entropy, logsumexp, saved.
  static void stats_forward_(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature,
                             const Tensor& params, int64_t ignore_index, const MaybeTensor& row_index, int64_t first_token,
                             const Tensor& stats) {
    Backend backend(logits);
    const Like like(logits);
    const int64_t n = stats.size(1);
    const RowInputs rows = row_inputs(like, logits, labels, temperature, params, ignore_index, {row_index, first_token, n});
    check_labels(rows);
    StatsForward call{};
    call.rows = rows;
    char* data = static_cast<char*>(like.target(stats, "stats", 6 * n, like.real));
    const int64_t bytes = n * (like.wide ? 8 : 4);
    call.logprob = data;
    call.entropy = data + bytes;
    call.logsumexp = data + 2 * bytes;
    call.saved = data + 3 * bytes;
    run_with_workspace(backend, like, call);
  }

  // The state of a vocabulary shard, for the tokens of some rows: [4, num_tokens] saved, label value.
  static void partial_stats_(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature,
                             const Tensor& params, int64_t ignore_index, const MaybeTensor& row_index, int64_t first_token,
                             int64_t start, const Tensor& state) {
    Backend backend(logits);
    const Like like(logits);
    const int64_t n = state.size(1);
    StatsForward call{};
    call.rows = row_inputs(like, logits, labels, temperature, params, ignore_index, {row_index, first_token, n}, start);
    char* data = static_cast<char*>(like.target(state, "state", 4 * n, like.real));
    call.saved = data;
    call.label_value = data + 3 * n * (like.wide ? 8 : 4);
    run_with_workspace(backend, like, call);
  }

  static Tensor stats_backward(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature,
                               const Tensor& params, int64_t ignore_index, const Tensor& saved, const MaybeTensor& grad_logprob,
                               const MaybeTensor& grad_entropy, const MaybeTensor& grad_logsumexp) {
    Backend backend(logits);
    Tensor grad_logits = backend.gradient_like(logits);
    run_stats_backward(backend, logits, labels, temperature, params, ignore_index, {std::nullopt}, saved, grad_logprob,
                       grad_entropy, grad_logsumexp, grad_logits);
    return grad_logits;
  }

  static void stats_backward_(const Tensor& logits, const MaybeTensor& labels, const MaybeTensor& temperature,
                              const Tensor& params, int64_t ignore_index, const MaybeTensor& row_index, int64_t first_token,
                              const Tensor& saved, const MaybeTensor& grad_logprob, const MaybeTensor& grad_entropy,
                              const MaybeTensor& grad_logsumexp, const Tensor& grad_logits) {
    Backend backend(logits);
    run_stats_backward(backend, logits, labels, temperature, params, ignore_index, {row_index, first_token, saved.size(1)},
                       saved, grad_logprob, grad_entropy, grad_logsumexp, grad_logits);
  }

  // ---- sampling supports ---------------------------------------------------------------------------------------------

  // After the statistics of the full vocabulary, which become NaN where a row breaks a rule, or before; see SupportForward.
  static void support_forward_(const Tensor& logits, const Tensor& labels, const MaybeTensor& temperature, const Tensor& params,
                               int64_t ignore_index, const MaybeTensor& row_index, int64_t first_token, int64_t start,
                               int64_t vocab_size, const Tensor& token_ids, const Tensor& offsets, bool gathered,
                               const Tensor& values, const MaybeTensor& logprob_full, const MaybeTensor& entropy,
                               const MaybeTensor& logsumexp, const MaybeTensor& saved, const Tensor& logprob,
                               const Tensor& state, const Tensor& dense_labels) {
    Backend backend(logits);
    const Like like(logits);
    const int64_t n = labels.numel();
    SupportForward call{};
    call.rows = row_inputs(like, logits, labels, temperature, params, ignore_index, {row_index, first_token, n}, start);
    call.support = support_of(like, token_ids, offsets, n);
    call.vocab_size = vocab_size;
    call.gathered = gathered;
    call.values = like.target(values, "values", call.support.num_ids, like.real);
    if (logprob_full || entropy || logsumexp || saved) {
      STD_TORCH_CHECK(logprob_full && entropy && logsumexp && saved, "the statistics of the full vocabulary go together");
      call.logprob_full = like.target(*logprob_full, "logprob_full", n, like.real);
      call.entropy = like.target(*entropy, "entropy", n, like.real);
      call.logsumexp = like.target(*logsumexp, "logsumexp", n, like.real);
      call.saved = like.target(*saved, "saved", 3 * n, like.real);
    }
    call.logprob = like.target(logprob, "logprob", n, like.real);
    call.state = like.target(state, "state", 3 * n, like.real);
    call.dense_labels = static_cast<int64_t*>(like.target(dense_labels, "dense_labels", n, ScalarType::Long));
    STD_TORCH_CHECK(backend.run(call), kInvalidValue);
  }

  static void support_backward_(const Tensor& labels, const MaybeTensor& temperature, const Tensor& params,
                                const MaybeTensor& row_index, int64_t first_token, int64_t start, const Tensor& token_ids,
                                const Tensor& offsets, const Tensor& values, const Tensor& saved, const Tensor& logprob_full,
                                const Tensor& state, const Tensor& dense_labels, const Tensor& grad_logprob,
                                const MaybeTensor& grad_logprob_full, const MaybeTensor& grad_entropy,
                                const MaybeTensor& grad_logsumexp, const Tensor& grad_logits) {
    Backend backend(grad_logits);
    const Like like(grad_logits);
    const int64_t n = labels.numel();
    SupportBackward call{};
    call.rows = row_inputs(like, grad_logits, labels, temperature, params, kAbsentLabel, {row_index, first_token, n}, start);
    call.support = support_of(like, token_ids, offsets, n);
    call.values = like.values(values, "values", call.support.num_ids);
    call.saved = like.values(saved, "saved", 3 * n);
    call.logprob_full = like.values(logprob_full, "logprob_full", n);
    call.state = like.values(state, "state", 3 * n);
    call.dense_labels = static_cast<const int64_t*>(like.values(dense_labels, "dense_labels", n, ScalarType::Long));
    call.grad_logprob = like.values(grad_logprob, "grad_logprob", n);
    call.grad_logprob_full = like.values(grad_logprob_full, "grad_logprob_full", n);
    call.grad_entropy = like.values(grad_entropy, "grad_entropy", n);
    call.grad_logsumexp = like.values(grad_logsumexp, "grad_logsumexp", n);
    call.grad_logits = rows_of(grad_logits);
    backend.run(call);
  }

  // ---- tokens --------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor, Tensor> token_table(const Tensor& labels, const Tensor& advantages, const MaybeTensor& mask,
                                                        const MaybeTensor& old_logprob, const MaybeTensor& old_entropy,
                                                        const MaybeTensor& ref_logprob, const MaybeTensor& policy_weight,
                                                        const MaybeTensor& nll_mask, const MaybeTensor& cu_seqlens,
                                                        const MaybeTensor& normalizer, const MaybeTensor& entropy_normalizer,
                                                        const MaybeTensor& nll_normalizer, const MaybeTensor& grad_scale,
                                                        const Tensor& params, int64_t ignore_index, int64_t vocab_size,
                                                        bool wide) {
    Backend backend(labels);
    const Like like(labels, wide);
    const int64_t n = labels.numel();
    Tensor table = like.output({n, kNumColumns}), final_labels = like.output({n}, ScalarType::Long);
    Tensor counter = like.output({1}, ScalarType::Int);
    TokenTable call =
        table_call(like, labels, advantages, mask, old_logprob, old_entropy, ref_logprob, policy_weight, nll_mask, cu_seqlens,
                   normalizer, entropy_normalizer, nll_normalizer, grad_scale, params, ignore_index, vocab_size);
    Scratch scratch;
    const int64_t sums = scratch.reserve(call.num_groups * 2 * sizeof(double));
    scratch.allocate(like);
    call.group_sums = scratch.at<double>(sums);
    call.table = table.mutable_data_ptr();
    call.final_labels = static_cast<int64_t*>(final_labels.mutable_data_ptr());
    call.counter = static_cast<int32_t*>(counter.mutable_data_ptr());
    STD_TORCH_CHECK(backend.run(call, wide), kInvalidValue);
    return {table, final_labels, counter};
  }

  // (per_token [4, num_tokens], its derivatives by log-prob and entropy [2, num_tokens], flags); see TokenLosses.
  static std::tuple<Tensor, Tensor, Tensor> token_losses(const Tensor& logprob, const Tensor& entropy, const Tensor& table,
                                                         const Tensor& labels, const Tensor& params, int64_t ignore_index,
                                                         const MaybeTensor& policy, const MaybeTensor& d_policy,
                                                         const MaybeTensor& clip_low, const MaybeTensor& clip_high,
                                                         const MaybeTensor& filtered) {
    Backend backend(table);
    const Like like(table);
    const int64_t n = labels.numel(), bytes = n * (like.wide ? 8 : 4);
    Tensor per_token = like.output({4, n}), derivatives = like.output({2, n}), flags = like.output({n}, ScalarType::Int);
    const auto bits = [&](const MaybeTensor& t, const char* name) {
      return static_cast<const uint8_t*>(like.values(t, name, n, ScalarType::Bool));
    };
    TokenLosses call{};
    call.num_tokens = n;
    call.ignore_index = ignore_index;
    call.logprob = like.values(logprob, "logprob", n);
    call.entropy = like.values(entropy, "entropy", n);
    call.table = like.values(table, "table", n * kNumColumns);
    call.labels = static_cast<const int64_t*>(like.values(labels, "labels", n, ScalarType::Long));
    call.params = LossParams<double>::read(numbers(params));
    call.policy = like.values(policy, "policy", n);
    call.d_policy = like.values(d_policy, "d_policy", n);
    call.clip_low = bits(clip_low, "clip_low");
    call.clip_high = bits(clip_high, "clip_high");
    call.filtered = bits(filtered, "filtered");
    char* values = static_cast<char*>(per_token.mutable_data_ptr());
    call.loss = values;
    call.token_loss = values + bytes;
    call.logprob_out = values + 2 * bytes;
    call.entropy_out = values + 3 * bytes;
    call.d_logprob = derivatives.mutable_data_ptr();
    call.d_entropy = static_cast<char*>(derivatives.mutable_data_ptr()) + bytes;
    call.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
    STD_TORCH_CHECK((call.policy == nullptr) == (call.d_policy == nullptr), "policy and d_policy go together");
    backend.run(call, like.wide);
    return {per_token, derivatives, flags};
  }

  // per_token: [4, num_tokens] share of the loss, token loss, log-prob, entropy; logprob_full and flags [num_tokens].
  static std::tuple<Tensor, Tensor, Tensor> token_summary(const Tensor& per_token, const MaybeTensor& logprob_full,
                                                          const Tensor& flags, const Tensor& table, const Tensor& labels,
                                                          const Tensor& counter, const Tensor& params, int64_t ignore_index) {
    Backend backend(table);
    const Like like(table);
    const int64_t n = labels.numel(), bytes = n * (like.wide ? 8 : 4);
    Tensor total = like.output({}), metrics = like.output({Metric::kCount}, ScalarType::Double);
    Tensor tokens = like.output({}, ScalarType::Long);
    Scratch scratch;
    const int64_t partials = scratch.reserve(backend.summary_bytes(n));
    scratch.allocate(like);
    TokenSummary call{};
    const char* values = static_cast<const char*>(like.values(per_token, "per_token", 4 * n));
    call.loss = values;
    call.logprob = values + 2 * bytes;
    call.entropy = values + 3 * bytes;
    call.logprob_full = like.values(logprob_full, "logprob_full", n);
    call.flags = static_cast<const int32_t*>(like.values(flags, "flags", n, ScalarType::Int));
    call.table = like.values(table, "table", n * kNumColumns);
    call.labels = static_cast<const int64_t*>(like.values(labels, "labels", n, ScalarType::Long));
    call.counter = static_cast<int32_t*>(like.target(counter, "counter", 1, ScalarType::Int));
    call.partials = scratch.at<double>(partials);
    finish_summary(call, n, params, ignore_index, total, metrics, tokens);
    backend.run(call, like.wide);
    return {total, metrics, tokens};
  }

  // ---- the fused loss ------------------------------------------------------------------------------------------------

  static void loss_rows_(const Tensor& logits, const Tensor& labels, const MaybeTensor& temperature, const Tensor& params,
                         int64_t ignore_index, const MaybeTensor& row_index, int64_t first_token, const Tensor& table,
                         const Tensor& per_token, const Tensor& flags, const MaybeTensor& over_support,
                         const MaybeTensor& grad_logits) {
    Backend backend(logits);
    const Like like(logits);
    const int64_t n = labels.numel(), bytes = n * (like.wide ? 8 : 4);
    PolicyLoss call{};
    call.rows = row_inputs(like, logits, labels, temperature, params, ignore_index, {row_index, first_token, n});
    call.table = like.values(table, "table", n * kNumColumns);
    call.params = LossParams<double>::read(numbers(params));
    char* values = static_cast<char*>(like.target(per_token, "per_token", (over_support ? 5 : 4) * n, like.real));
    call.loss = values;
    call.token_loss = values + bytes;
    call.logprob = values + 2 * bytes;
    call.entropy = values + 3 * bytes;
    call.flags = static_cast<int32_t*>(like.target(flags, "flags", n, ScalarType::Int));
    if (over_support) {
      char* kept = static_cast<char*>(like.target(*over_support, "over_support", 7 * n, like.real));
      set_over_support(call, kept, values + 4 * bytes, bytes);
    }
    if (grad_logits) call.grad_logits = gradient_rows(call.rows.logits, *grad_logits);
    run_with_workspace(backend, like, call);
  }

  // Table, rows and summary in one call, and with a support what is around the rows. loss is [num_tokens] where per_row, else the
  // scalar; grad_logits is [0, 0, 0] unless need_grad, or where it is written over the logits.
  template <bool kInPlace>
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
      const Tensor& logits, const MaybeTensor& temperature, const Tensor& labels, const Tensor& advantages,
      const MaybeTensor& mask, const MaybeTensor& old_logprob, const MaybeTensor& old_entropy, const MaybeTensor& ref_logprob,
      const MaybeTensor& policy_weight, const MaybeTensor& nll_mask, const MaybeTensor& cu_seqlens,
      const MaybeTensor& normalizer, const MaybeTensor& entropy_normalizer, const MaybeTensor& nll_normalizer,
      const MaybeTensor& grad_scale, const Tensor& params, int64_t ignore_index, const MaybeTensor& token_ids,
      const MaybeTensor& offsets, bool per_row, bool need_grad) {
    Backend backend(logits);
    const Like like(logits);
    const int64_t n = logits.size(0) * logits.size(1), bytes = n * (like.wide ? 8 : 4);
    STD_TORCH_CHECK(labels.numel() == n, "labels must have one value per row");
    TokenTable table =
        table_call(like, labels, advantages, mask, old_logprob, old_entropy, ref_logprob, policy_weight, nll_mask, cu_seqlens,
                   normalizer, entropy_normalizer, nll_normalizer, grad_scale, params, ignore_index, logits.size(2));
    Tensor loss = per_row ? like.output({n}) : like.output({});
    const bool cuts = token_ids && offsets;
    STD_TORCH_CHECK(cuts || (!token_ids && !offsets), "token_ids and offsets go together");
    const int64_t num_ids = cuts ? token_ids->numel() : 0;
    Tensor per_token = like.output({cuts ? 4 : 3, n}), flags = like.output({n}, ScalarType::Int);
    Tensor metrics = like.output({Metric::kCount}, ScalarType::Double), tokens = like.output({}, ScalarType::Long);
    const bool own_grad = need_grad && !kInPlace;
    Tensor grad_logits = own_grad ? backend.gradient_like(logits) : like.output({0, 0, 0}, logits.scalar_type());

    Scratch scratch;
    const int64_t at_table = scratch.reserve(kNumColumns * bytes), at_labels = scratch.reserve(n * 8);
    const int64_t at_counter = scratch.reserve(4), at_sums = scratch.reserve(table.num_groups * 2 * sizeof(double));
    const int64_t at_shares = scratch.reserve(bytes), at_partials = scratch.reserve(backend.summary_bytes(n));
    const int64_t at_workspace = scratch.reserve(backend.workspace_bytes(rows_of(logits))), at_total = scratch.reserve(8);
    // The kept logits, seven values a token, the state of the support and the dense labels.
    const int64_t at_values = scratch.reserve(num_ids * (like.wide ? 8 : 4)), at_kept = scratch.reserve(cuts ? 7 * bytes : 0);
    const int64_t at_state = scratch.reserve(cuts ? 3 * bytes : 0), at_dense = scratch.reserve(cuts ? n * 8 : 0);
    scratch.allocate(like);

    table.table = scratch.at(at_table);
    table.final_labels = scratch.at<int64_t>(at_labels);
    table.counter = scratch.at<int32_t>(at_counter);
    table.group_sums = scratch.at<double>(at_sums);
    STD_TORCH_CHECK(backend.run(table, like.wide), kInvalidValue);

    PolicyLoss rows{};
    rows.rows = row_inputs(like, logits, std::nullopt, temperature, params, ignore_index, {std::nullopt});
    rows.rows.labels = table.final_labels;
    SupportForward kept{};
    if (cuts) {
      kept.rows = rows.rows;
      kept.support = support_of(like, *token_ids, *offsets, n);
      kept.vocab_size = logits.size(2);
      kept.values = scratch.at(at_values);
      kept.logprob = scratch.at(at_kept);
      kept.state = scratch.at(at_state);
      kept.dense_labels = scratch.at<int64_t>(at_dense);
      STD_TORCH_CHECK(backend.run(kept), kInvalidValue);
    }
    rows.table = table.table;
    rows.params = LossParams<double>::read(numbers(params));
    char* values = static_cast<char*>(per_token.mutable_data_ptr());
    rows.loss = per_row ? loss.mutable_data_ptr() : scratch.at(at_shares);
    rows.token_loss = values;
    rows.logprob = values + bytes;
    rows.entropy = values + 2 * bytes;
    rows.flags = static_cast<int32_t*>(flags.mutable_data_ptr());
    if (own_grad) rows.grad_logits = rows_of(grad_logits);
    if (kInPlace) rows.grad_logits = rows.rows.logits;
    rows.workspace = scratch.at(at_workspace);
    if (cuts) set_over_support(rows, scratch.at<char>(at_kept), values + 3 * bytes, bytes);
    backend.run(rows);
    if (cuts && need_grad) {
      SupportBackward gradient{};
      gradient.rows = rows.rows;
      gradient.support = kept.support;
      gradient.values = kept.values;
      gradient.saved = rows.saved;
      gradient.logprob_full = rows.logprob_full;
      gradient.state = kept.state;
      gradient.dense_labels = kept.dense_labels;
      gradient.grad_logprob = rows.d_logprob;
      gradient.grad_logprob_full = rows.d_logprob_full;
      gradient.grad_entropy = rows.d_entropy;
      gradient.grad_logits = rows.grad_logits;
      backend.run(gradient);
    }

    TokenSummary summary{};
    summary.loss = rows.loss;
    summary.logprob = rows.logprob;
    summary.entropy = rows.entropy;
    summary.logprob_full = rows.logprob_full;
    summary.flags = rows.flags;
    summary.table = table.table;
    summary.labels = table.final_labels;
    summary.counter = table.counter;
    summary.partials = scratch.at<double>(at_partials);
    finish_summary(summary, n, params, ignore_index, loss, metrics, tokens);
    if (per_row) summary.total = scratch.at(at_total);
    backend.run(summary, like.wide);
    return {loss, per_token, flags, metrics, tokens, grad_logits};
  }

  // ---- scaling -------------------------------------------------------------------------------------------------------

  static Tensor scale_rows(const Tensor& grad, const Tensor& scale) {
    Backend backend(grad);
    Tensor destination = backend.gradient_like(grad);
    run_scale_rows(backend, grad, scale, destination);
    return destination;
  }

  static void scale_rows_(const Tensor& grad, const Tensor& scale) {
    Backend backend(grad);
    run_scale_rows(backend, grad, scale, grad);
  }

  // ---- pairs ---------------------------------------------------------------------------------------------------------

  static std::tuple<Tensor, Tensor> paired_forward(const Tensor& logits, const Tensor& old_logits,
                                                   const MaybeTensor& temperature, const Tensor& params,
                                                   const MaybeTensor& states) {
    Backend backend(logits);
    const Like like(logits);
    PairedForward call{};
    call.rows = row_inputs(like, logits, std::nullopt, temperature, params, 0, {std::nullopt});
    call.old_logits = old_rows(call.rows.logits, old_logits);
    Tensor stats = like.output({kPairedOutputs, call.rows.num_tokens}),
           saved = like.output({kPairedSaved, call.rows.num_tokens});
    call.states = like.values(states, "states", 6 * call.rows.num_tokens);
    call.stats = stats.mutable_data_ptr();
    call.saved = saved.mutable_data_ptr();
    backend.run(call);
    return {stats, saved};
  }

  static Tensor paired_backward(const Tensor& logits, const Tensor& old_logits, const MaybeTensor& temperature,
                                const Tensor& params, const Tensor& saved, const Tensor& grads) {
    Backend backend(logits);
    const Like like(logits);
    Tensor grad_logits = backend.gradient_like(logits);
    PairedBackward call{};
    call.rows = row_inputs(like, logits, std::nullopt, temperature, params, 0, {std::nullopt});
    call.old_logits = old_rows(call.rows.logits, old_logits);
    call.saved = like.values(saved, "saved", kPairedSaved * call.rows.num_tokens);
    call.grads = like.values(grads, "grads", kPairedOutputs * call.rows.num_tokens);
    call.grad_logits = rows_of(grad_logits);
    backend.run(call);
    return grad_logits;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("stats_forward", TORCH_BOX(&stats_forward));
    m.impl("stats_forward_", TORCH_BOX(&stats_forward_));
    m.impl("stats_backward", TORCH_BOX(&stats_backward));
    m.impl("stats_backward_", TORCH_BOX(&stats_backward_));
    m.impl("partial_stats_", TORCH_BOX(&partial_stats_));
    m.impl("support_forward_", TORCH_BOX(&support_forward_));
    m.impl("support_backward_", TORCH_BOX(&support_backward_));
    m.impl("token_table", TORCH_BOX(&token_table));
    m.impl("token_losses", TORCH_BOX(&token_losses));
    m.impl("token_summary", TORCH_BOX(&token_summary));
    m.impl("loss_rows_", TORCH_BOX(&loss_rows_));
    m.impl("policy_loss", TORCH_BOX((&Operators::template policy_loss<false>)));
    m.impl("policy_loss_", TORCH_BOX((&Operators::template policy_loss<true>)));
    m.impl("scale_rows", TORCH_BOX(&scale_rows));
    m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
    m.impl("paired_forward", TORCH_BOX(&paired_forward));
    m.impl("paired_backward", TORCH_BOX(&paired_backward));
  }

 private:
  static void check_labels(const RowInputs& rows) {
    if constexpr (Backend::kReadsValues) STD_TORCH_CHECK(Backend::labels_are_valid(rows), kInvalidValue);
  }

  template <class Call>
  static void run_with_workspace(Backend& backend, const Like& like, Call& call) {
    const int64_t bytes = backend.workspace_bytes(call.rows.logits);
    Tensor workspace = like.bytes(bytes);
    call.workspace = workspace.mutable_data_ptr();
    backend.run(call);
  }

  // `kept`: [7, num_tokens] log-prob over the support, saved, and the derivatives by log-prob, log-prob over the full vocabulary
  // and entropy.
  static void set_over_support(PolicyLoss& call, char* kept, void* logprob_full, int64_t bytes) {
    call.support_logprob = kept;
    call.saved = kept + bytes;
    call.d_logprob = kept + 4 * bytes;
    call.d_logprob_full = kept + 5 * bytes;
    call.d_entropy = kept + 6 * bytes;
    call.logprob_full = logprob_full;
  }

  static Support support_of(const Like& like, const Tensor& token_ids, const Tensor& offsets, int64_t num_tokens) {
    const int64_t count = token_ids.numel();
    return {static_cast<const int64_t*>(like.values(token_ids, "token_ids", count, ScalarType::Long)),
            static_cast<const int64_t*>(like.values(offsets, "offsets", num_tokens + 1, ScalarType::Long)), count};
  }

  static void run_stats_backward(Backend& backend, const Tensor& logits, const MaybeTensor& labels,
                                 const MaybeTensor& temperature, const Tensor& params, int64_t ignore_index,
                                 const Selection& selection, const Tensor& saved, const MaybeTensor& grad_logprob,
                                 const MaybeTensor& grad_entropy, const MaybeTensor& grad_logsumexp,
                                 const Tensor& grad_logits) {
    const Like like(logits);
    StatsBackward call{};
    call.rows = row_inputs(like, logits, labels, temperature, params, ignore_index, selection);
    const int64_t n = call.rows.num_tokens;
    call.saved = like.values(saved, "saved", 3 * n);
    call.grad_logprob = like.values(grad_logprob, "grad_logprob", n);
    call.grad_entropy = like.values(grad_entropy, "grad_entropy", n);
    call.grad_logsumexp = like.values(grad_logsumexp, "grad_logsumexp", n);
    call.grad_logits = gradient_rows(call.rows.logits, grad_logits);
    backend.run(call);
  }

  static TokenTable table_call(const Like& like, const Tensor& labels, const Tensor& advantages, const MaybeTensor& mask,
                               const MaybeTensor& old_logprob, const MaybeTensor& old_entropy, const MaybeTensor& ref_logprob,
                               const MaybeTensor& policy_weight, const MaybeTensor& nll_mask, const MaybeTensor& cu_seqlens,
                               const MaybeTensor& normalizer, const MaybeTensor& entropy_normalizer,
                               const MaybeTensor& nll_normalizer, const MaybeTensor& grad_scale, const Tensor& params,
                               int64_t ignore_index, int64_t vocab_size) {
    const int64_t n = labels.numel();
    TokenTable call{};
    call.params = TableParams::read(numbers(params));
    call.num_tokens = n;
    call.num_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : 0;
    call.ignore_index = ignore_index;
    call.vocab_size = vocab_size;
    const TableParams& p = call.params;
    const int64_t sequences = cu_seqlens ? call.num_sequences : p.sequence_length > 0 ? n / p.sequence_length : 0;
    call.num_groups = counts_sequences(p.reduction) ? sequences : (n + kCountRun - 1) / kCountRun;
    const auto divides = [n](int64_t length) { return length == 0 || n % length == 0; };
    STD_TORCH_CHECK(divides(p.sequence_length) && divides(p.advantage_length) && (n == 0 || !cu_seqlens || sequences > 0),
                    "every token must be in a sequence");
    int64_t advantage_count = p.advantage_length == 0 ? call.num_sequences : n / p.advantage_length;
    if (n == 0) advantage_count = advantages.numel();  // [B, 0] rows have B
    call.labels = like.column(labels, "labels", n);
    call.advantages = like.column(advantages, "advantages", advantage_count);
    call.mask = like.column(mask, "mask", n);
    call.old_logprob = like.column(old_logprob, "old_logprob", n);
    call.old_entropy = like.column(old_entropy, "old_entropy", n);
    call.ref_logprob = like.column(ref_logprob, "ref_logprob", n);
    call.policy_weight = like.column(policy_weight, "policy_weight", n);
    call.nll_mask = like.column(nll_mask, "nll_mask", n);
    call.offsets = like.column(cu_seqlens, "cu_seqlens", call.num_sequences + 1);
    call.normalizer = like.column(normalizer, "normalizer", 1);
    call.entropy_normalizer = like.column(entropy_normalizer, "entropy_normalizer", 1);
    call.nll_normalizer = like.column(nll_normalizer, "nll_normalizer", 1);
    call.grad_scale = like.column(grad_scale, "grad_scale", 1);
    return call;
  }

  static void finish_summary(TokenSummary& call, int64_t num_tokens, const Tensor& params, int64_t ignore_index,
                             const Tensor& total, const Tensor& metrics, const Tensor& tokens) {
    call.num_tokens = num_tokens;
    call.ignore_index = ignore_index;
    call.params = LossParams<double>::read(numbers(params));
    call.total = total.mutable_data_ptr();
    call.metrics = static_cast<double*>(metrics.mutable_data_ptr());
    call.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  }

  static void run_scale_rows(Backend& backend, const Tensor& grad, const Tensor& scale, const Tensor& destination) {
    const Like like(grad);
    const Rows source = rows_of(grad);
    const bool one_scale = scale.dim() == 0;
    backend.run(
        ScaleRows{source, rows_of(destination), like.values(scale, "scale", one_scale ? 1 : source.num_rows), one_scale});
  }

  static Rows old_rows(const Rows& rows, const Tensor& old_logits) {
    const Rows old = rows_of(old_logits);
    STD_TORCH_CHECK(rows.num_rows == old.num_rows && rows.vocab_size == old.vocab_size && rows.dtype == old.dtype,
                    "old_logits must have the shape and dtype of logits");
    return old;
  }
};

}  // namespace
}  // namespace erc
