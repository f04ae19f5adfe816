// The CUDA kernels' launchers, on the calls of common/calls.h and free of PyTorch. All of them only enqueue work on `stream`:
// none synchronises, none allocates, all can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "common/calls.h"

namespace erc {
namespace cuda {

// Scratch memory that a call with these rows needs: only few rows, which are split over blocks, need any.
int64_t workspace_bytes(const Rows& logits);
// Scratch memory of a summary.
int64_t summary_bytes(int64_t num_tokens);

cudaError_t stats_forward(const StatsForward& call, cudaStream_t stream);
cudaError_t stats_backward(const StatsBackward& call, cudaStream_t stream);
cudaError_t support_forward(const SupportForward& call, cudaStream_t stream);
cudaError_t support_backward(const SupportBackward& call, cudaStream_t stream);
cudaError_t policy_loss(const PolicyLoss& call, cudaStream_t stream);
cudaError_t paired_forward(const PairedForward& call, cudaStream_t stream);
cudaError_t paired_backward(const PairedBackward& call, cudaStream_t stream);
cudaError_t scale_rows(const ScaleRows& call, cudaStream_t stream);
// `wide`: statistics are float64.
cudaError_t token_table(const TokenTable& call, bool wide, cudaStream_t stream);
cudaError_t token_losses(const TokenLosses& call, bool wide, cudaStream_t stream);
cudaError_t token_summary(const TokenSummary& call, bool wide, cudaStream_t stream);

}  // namespace cuda
}  // namespace erc
