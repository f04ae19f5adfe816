// The state of a vocabulary shard: the statistics sweep with the states themselves as the result. Merging two of them is
// RowState::merge of common/row_state.h, whether they are ranks of a tensor-parallel group or chunks of the vocabulary.
#include "cuda/device.cuh"

namespace erc {
namespace cuda {

cudaError_t partial_stats(const RowInputs& rows, void* state, void* workspace, cudaStream_t stream) {
  const int64_t bytes = rows.logits.num_rows * (rows.logits.dtype == DType::kFloat64 ? 8 : 4);
  StatsForward call{};
  call.rows = rows;
  call.saved = state;
  call.label_value = static_cast<char*>(state) + 3 * bytes;
  call.workspace = workspace;
  return stats_forward(call, stream);
}

}  // namespace cuda
}  // namespace erc
