// An operator's arguments as plain data, for both compiled backends and free of PyTorch.
//
// Outputs and per-token values are in the statistics dtype (float64 for float64 logits, else float32) and indexed by token;
// a null pointer is an absent input, or an output that nobody wants.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/params.h"

namespace erc {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64, kBool, kUInt8, kInt8, kInt16, kInt32, kInt64 };

// The 16-bit types as bit patterns; arithmetic is always float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The dtype of statistics of logits of type T.
template <class T>
struct StatsOf {
  using type = float;
};
template <>
struct StatsOf<double> {
  using type = double;
};
template <class T>
using stats_t = typename StatsOf<T>::type;

// Rows of logits: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t num_rows, vocab_size, inner, outer_stride, inner_stride;

  template <class T>
  ERC_HOST_DEVICE T* row(int64_t i) const {
    const int64_t outer = i / inner;
    return static_cast<T*>(data) + outer * outer_stride + (i - outer * inner) * inner_stride;
  }
};

// What identifies the rows and how they are read; part of every call. Row i belongs to the token row_index[i], or to
// first_token + i; a negative token is a row that nobody wants: it is not read, and its gradient is 0.
struct RowInputs {
  Rows logits;
  const int64_t* labels;    // [num_tokens], null without
  const void* temperature;  // [num_tokens], or null where scaling.temperature holds for every row
  Scaling scaling;
  int64_t ignore_index;
  int64_t label_start;  // the vocabulary column of the shard's first column
  const int64_t* row_index;
  int64_t first_token, num_tokens;

  ERC_HOST_DEVICE int64_t token(int64_t row) const { return row_index != nullptr ? row_index[row] : first_token + row; }
};

struct StatsForward {
  RowInputs rows;
  void *logprob, *entropy, *logsumexp;
  void* saved;        // [3, num_tokens]: row_max, sum_rest, weighted_sum
  void* label_value;  // of a shard: v at the label, -inf where another one holds it; null otherwise
  void* workspace;    // of the cuda backend: workspace_bytes(rows.logits)
};

struct StatsBackward {
  RowInputs rows;
  const void *saved, *grad_logprob, *grad_entropy, *grad_logsumexp;  // null gradients count as 0
  Rows grad_logits;                                                  // may be the logits themselves
};

// The tokens that a sampler kept: of a token the columns ids[offsets[token]] to ids[offsets[token + 1] - 1] of the whole vocabulary,
// rising strictly after padding of -1. None: the full vocabulary.
struct Support {
  const int64_t *ids, *offsets;  // [num_ids], [num_tokens + 1]
  int64_t num_ids;
};

// Log-probs over a support; labels are those of the whole vocabulary.
struct SupportForward {
  RowInputs rows;
  Support support;
  int64_t vocab_size;
  bool gathered;  // the values are there already
  void* values;   // [num_ids]: the kept logits
  // Of the full vocabulary, as StatsForward leaves them; NaN where a rule is broken. Null where they are not there yet: then the
  // log-prob of a token that was not cut is inf, which says that it is that of the full vocabulary.
  void *logprob_full, *entropy, *logsumexp, *saved;
  void* logprob;  // over the support
  void* state;  // [3, num_tokens] of cut rows: the largest kept logit, R and S (common/support.h)
  int64_t* dense_labels;  // the labels, kCutLabel for a cut row
  int32_t* broken;  // on the CPU: set to 1 where a rule is broken
};

// After StatsBackward with the dense labels, or PolicyLoss.
struct SupportBackward {
  RowInputs rows;  // the logits are gone
  Support support;
  const void *values, *saved, *logprob_full, *state;
  const int64_t* dense_labels;
  const void *grad_logprob, *grad_logprob_full, *grad_entropy, *grad_logsumexp;  // null counts as 0, but for the first
  Rows grad_logits;
};

struct PolicyLoss {
  RowInputs rows;
  const void* table;  // [num_tokens, kNumColumns]
  LossParams<double> params;
  void *loss, *token_loss, *logprob, *entropy;  // loss: the token's share of the scalar one
  int32_t* flags;
  // Over a sampling support: log-probs as SupportForward leaves them before the full vocabulary is read, and what SupportBackward
  // takes. The gradient of a token that was cut is then that of the terms over the full vocabulary. Null without a support.
  const void* support_logprob;
  void *logprob_full, *saved, *d_logprob, *d_logprob_full, *d_entropy;
  Rows grad_logits;  // data is null where no gradient is wanted; may be the logits themselves
  void* workspace;
};

struct PairedForward {
  RowInputs rows;  // without labels
  Rows old_logits;
  const void* states;  // [6, num_tokens], new and old, of rows of which these are a shard's columns; null: they are whole
  void* stats;  // [kPairedOutputs, num_tokens]
  void* saved;  // [kPairedSaved, num_tokens]
};

struct PairedBackward {
  RowInputs rows;
  Rows old_logits;
  const void *saved, *grads;
  Rows grad_logits;
};

struct ScaleRows {
  Rows source, destination;  // may be the same
  const void* scale;  // [num_rows], or one number for all rows
  bool one_scale;
};

// A tensor of the caller, of whatever dtype it came in; null where absent.
struct Column {
  const void* data;
  DType dtype;

  ERC_HOST_DEVICE bool given() const { return data != nullptr; }
};

struct TokenTable {
  int64_t num_tokens, num_groups, num_sequences;  // sequences: packed ones
  Column labels, advantages, mask, old_logprob, old_entropy, ref_logprob, policy_weight, nll_mask;  // [num_tokens]
  Column offsets;  // [sequences + 1]
  Column normalizer, entropy_normalizer, nll_normalizer, grad_scale;  // 0-d
  int64_t ignore_index, vocab_size;
  TableParams params;
  void* table;  // [num_tokens, kNumColumns]
  int64_t* final_labels;  // ignore_index where the mask is 0
  int32_t* counter;  // set to 0 for the summary
  double* group_sums;  // [num_groups, 2], scratch
};

// The loss of tokens whose log-probs and entropies exist already. The policy term is that of the params' rule, or was computed
// elsewhere, with its derivative and what it clipped; filtered tokens lose theirs.
struct TokenLosses {
  int64_t num_tokens, ignore_index;
  const void *logprob, *entropy, *table;
  const int64_t* labels;
  LossParams<double> params;
  const void *policy, *d_policy;  // null: the rule of the params
  const uint8_t *clip_low, *clip_high, *filtered;  // null: none
  void *loss, *token_loss, *logprob_out, *entropy_out;  // as the loss of rows leaves them
  void *d_logprob, *d_entropy;  // of the token's share of the loss
  int32_t* flags;
};

struct TokenSummary {
  int64_t num_tokens, ignore_index;
  const void *loss, *logprob, *entropy, *table;
  const void* logprob_full;  // null where the log-probs are over no support
  const int32_t* flags;
  const int64_t* labels;
  LossParams<double> params;
  void* total;  // the loss, one number
  double* metrics;  // [Metric::kCount]
  int64_t* tokens;
  int32_t* counter;
  double* partials;  // scratch of the cuda backend
};

}  // namespace erc
