// The CUDA kernels' interface: arguments as plain data, free of PyTorch. One launcher an operator; all of them only enqueue work
// on `stream`: none synchronises, none allocates, all can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/params.h"

namespace erc {
namespace cuda {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Rows of logits: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride elements.
struct Rows {
  void* data;  // null where there is no such tensor
  DType dtype;
  int64_t num_rows, vocab_size, inner, outer_stride, inner_stride;
};

// What identifies the rows and how they are read; part of every call.
struct RowInputs {
  Rows logits;
  const int64_t* labels;    // [N], null without
  const void* temperature;  // [N] in the statistics dtype, or null where scaling.temperature holds for every row
  Scaling scaling;
  int64_t ignore_index;
  int64_t label_start;  // the vocabulary column of the shard's first column
};

// Outputs are [N] in the statistics dtype; a null one is not written.
struct StatsForward {
  RowInputs rows;
  void *logprob, *entropy, *logsumexp;
  void* saved;        // [3, N]: row_max, sum_rest, weighted_sum
  void* label_value;  // [N]: v at the label, -inf where another shard holds it
  void* workspace;    // workspace_bytes(rows.logits)
};

struct StatsBackward {
  RowInputs rows;
  const void *saved, *grad_logprob, *grad_entropy, *grad_logsumexp;  // null gradients count as 0
  Rows grad_logits;                                                  // may be the logits themselves
};

struct PolicyLoss {
  RowInputs rows;
  const void *weight, *advantages, *old_logprob, *old_entropy, *ref_logprob, *policy_weight, *entropy_weight, *logprob_weight;
  RatioRule rule;
  int kl;
  Gate gate;
  LossParams<double> params;
  void *loss, *token_loss, *logprob, *entropy;
  int32_t* flags;
  Rows grad_logits;  // data is null where no gradient is wanted; may be the logits themselves
  void* workspace;   // workspace_bytes(rows.logits)
};

struct PairedForward {
  RowInputs rows;  // labels are null
  Rows old_logits;
  void* stats;  // [6, N]
  void* saved;  // [8, N]
};

struct PairedBackward {
  RowInputs rows;
  Rows old_logits;
  const void *saved, *grads;  // [8, N], [6, N]
  Rows grad_logits;
};

struct ScaleRows {
  Rows source, destination;  // may be the same
  const void* scale;         // [N]
};

// Scratch memory that a call with these rows needs: only few rows, which are split over blocks, need any.
int64_t workspace_bytes(const Rows& logits);

cudaError_t stats_forward(const StatsForward& call, cudaStream_t stream);
cudaError_t stats_backward(const StatsBackward& call, cudaStream_t stream);
cudaError_t policy_loss(const PolicyLoss& call, cudaStream_t stream);
cudaError_t paired_forward(const PairedForward& call, cudaStream_t stream);
cudaError_t paired_backward(const PairedBackward& call, cudaStream_t stream);
cudaError_t scale_rows(const ScaleRows& call, cudaStream_t stream);
// The state of a vocabulary shard: [4, N] row_max, sum_rest, weighted_sum, label value.
cudaError_t partial_stats(const RowInputs& rows, void* state, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace erc
