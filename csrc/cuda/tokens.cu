// What is done per token and not per logit: the token table, losses and the summary. Sums are taken in an order that depends on the
// number of tokens and the sequences alone, so runs repeat bit by bit.
#include "common/token_summary.h"
#include "common/token_table.h"
#include "cuda/sweep.cuh"

namespace erc {
namespace cuda {

constexpr int kTokenThreads = 256;
constexpr int kTokenWarps = kTokenThreads / kWarp;
constexpr int kTokenBlocks = 8;  // a multiprocessor has place for as many
constexpr int64_t kSummaryRun = 512;  // tokens of a block of the summary

// ---- the table -----------------------------------------------------------------------------------------------------

// Sums over the block's threads, known to all of them.
template <int kCount>
ERC_DEVICE void sum_over_block(double (&values)[kCount]) {
  auto* of_warps = reinterpret_cast<double*>(dynamic_shared());  // [kCount, kTokenWarps]
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const double sum = warp_sum(values[k]);
    if (threadIdx.x % kWarp == 0) of_warps[k * kTokenWarps + threadIdx.x / kWarp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = 0;
    for (int w = 0; w < kTokenWarps; ++w) values[k] += of_warps[k * kTokenWarps + w];
  }
}

// One block a group of tokens. Offsets that were not checked, as nobody reads them on the host, leave no token's place.
template <class Real>
__global__ void __launch_bounds__(kTokenThreads) count_kernel(TokenTable call) {
  const int64_t group = blockIdx.x, begin = group_begin(call, group), end = group_begin(call, group + 1);
  TokenCount count;
  for (int64_t token = (begin > 0 ? begin : 0) + threadIdx.x; token < end && token < call.num_tokens; token += kTokenThreads) {
    count.add(TokenCount::of<Real>(call, token));
  }
  double sums[] = {count.mask, count.nll};
  sum_over_block(sums);
  if (threadIdx.x != 0) return;
  call.group_sums[2 * group] = sums[0];
  call.group_sums[2 * group + 1] = sums[1];
}

// Every block adds the groups for itself: a grid that the GPU holds at once, which loops over the tokens.
template <class Real>
__global__ void __launch_bounds__(kTokenThreads) table_kernel(TokenTable call, bool is_counted) {
  Totals totals;
  if (is_counted) {
    for (int64_t group = threadIdx.x; group < call.num_groups; group += kTokenThreads) totals.add(call.group_sums + 2 * group);
    double sums[] = {totals.tokens, totals.nll, totals.groups};
    sum_over_block(sums);
    totals = {sums[0], sums[1], sums[2]};
  }
  const int64_t first = int64_t(blockIdx.x) * kTokenThreads + threadIdx.x, step = int64_t(gridDim.x) * kTokenThreads;
  if (first == 0) *call.counter = 0;
  for (int64_t token = first; token < call.num_tokens; token += step) {
    static_cast<TokenInputs<Real>*>(call.table)[token] = table_row<Real>(call, totals, token);
    const bool is_active = mask_of<Real>(call, token) != 0;
    call.final_labels[token] = is_active ? element<int64_t>(call.labels, token) : call.ignore_index;
  }
}

template <class Real>
cudaError_t launch_table(const TokenTable& call, cudaStream_t stream) {
  const bool is_counted = needs_counts(call);
  if (is_counted && call.num_groups > 0) {
    const int bytes = 2 * kTokenWarps * int(sizeof(double));
    const cudaError_t error = launch(count_kernel<Real>, {call.num_groups, kTokenThreads, 1, bytes, stream}, call);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = (call.num_tokens + kTokenThreads - 1) / kTokenThreads;
  const int64_t resident = int64_t(device_info().multiprocessors) * kTokenBlocks;
  const int64_t grid = blocks < 1 ? 1 : blocks < resident ? blocks : resident;
  const int bytes = 3 * kTokenWarps * int(sizeof(double));
  return launch(table_kernel<Real>, {grid, kTokenThreads, 1, bytes, stream}, call, is_counted);
}

cudaError_t token_table(const TokenTable& call, bool wide, cudaStream_t stream) {
  return wide ? launch_table<double>(call, stream) : launch_table<float>(call, stream);
}

// ---- losses of tokens whose statistics exist -------------------------------------------------------------------------

// Two blocks on a multiprocessor are enough: without the number, ptxas saves registers for more and spills on sm_100.
template <class Real>
__global__ void __launch_bounds__(kTokenThreads, 2) losses_kernel(TokenLosses call) {
  const int64_t token = int64_t(blockIdx.x) * kTokenThreads + threadIdx.x;
  if (token < call.num_tokens) judge_token<Real>(call, token);
}

cudaError_t token_losses(const TokenLosses& call, bool wide, cudaStream_t stream) {
  const LaunchShape shape{(call.num_tokens + kTokenThreads - 1) / kTokenThreads, kTokenThreads, 1, 0, stream};
  if (call.num_tokens == 0) return cudaSuccess;
  return wide ? launch(losses_kernel<double>, shape, call) : launch(losses_kernel<float>, shape, call);
}

// ---- the summary ---------------------------------------------------------------------------------------------------

// The states of the block's threads in one, which thread 0 gets.
ERC_DEVICE void merge_over_block(SummaryState& state, SummaryState* of_warps) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int i = 0; i < SummaryState::kCount; ++i) {
      const double other = __shfl_xor_sync(0xffffffffu, state.values[i], offset);
      state.values[i] = SummaryState::combined(i, state.values[i], other);
    }
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kTokenWarps; ++w) state.merge(of_warps[w]);
  }
}

// A block a run of tokens; the last block that is done merges them all.
template <class Real>
__global__ void __launch_bounds__(kTokenThreads) summary_kernel(TokenSummary call) {
  auto* of_warps = reinterpret_cast<SummaryState*>(dynamic_shared());
  auto* is_last = reinterpret_cast<int*>(of_warps + kTokenWarps);
  auto* of_blocks = reinterpret_cast<SummaryState*>(call.partials);
  const int64_t begin = blockIdx.x * kSummaryRun, left = call.num_tokens - begin;
  SummaryState state;
  for (int64_t i = threadIdx.x; i < kSummaryRun && i < left; i += kTokenThreads) state.add<Real>(call, begin + i);
  merge_over_block(state, of_warps);
  if (threadIdx.x == 0) {
    of_blocks[blockIdx.x] = state;
    *is_last = count_block(call.counter) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (!*is_last) return;
  SummaryState total;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kTokenThreads) total.merge(of_blocks[block]);
  merge_over_block(total, of_warps);
  if (threadIdx.x != 0) return;
  total.write<Real>(call);
  *call.counter = 0;  // another summary of these tokens counts anew
}

static int64_t summary_blocks(int64_t num_tokens) {
  const int64_t blocks = (num_tokens + kSummaryRun - 1) / kSummaryRun;
  return blocks > 0 ? blocks : 1;
}

int64_t summary_bytes(int64_t num_tokens) { return summary_blocks(num_tokens) * int64_t(sizeof(SummaryState)); }

cudaError_t token_summary(const TokenSummary& call, bool wide, cudaStream_t stream) {
  constexpr int kBytes = kTokenWarps * int(sizeof(SummaryState)) + 16;
  const LaunchShape shape{summary_blocks(call.num_tokens), kTokenThreads, 1, kBytes, stream};
  return wide ? launch(summary_kernel<double>, shape, call) : launch(summary_kernel<float>, shape, call);
}

}  // namespace cuda
}  // namespace erc
