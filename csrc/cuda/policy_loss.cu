// The fused policy loss: statistics, the token's loss and its gradient from one read of the logits, and one write.
//
// Three forms with the same numbers, segment by segment:
//   cluster  sm_90 and later: a cluster of blocks holds the row in shared memory, one segment a block. One DRAM read, one write.
//   block    one block a row, which reads it again from the L2 cache; the grid is kept so small that the rows in flight fit there.
//   split    few rows: a block a segment, statistics first, then loss and gradient.
#include "common/token_loss.h"

#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

template <class Real>
ERC_DEVICE void write_outputs(const PolicyLoss& call, int64_t token, Real loss, Real token_loss, Real logprob, Real entropy,
                              int32_t flags) {
  put(call.loss, token, loss);
  put(call.token_loss, token, token_loss);
  put(call.logprob, token, logprob);
  put(call.entropy, token, entropy);
  call.flags[token] = flags;
}

// What one thread does between the two sweeps. `writes`: of the blocks that share a row one writes its outputs.
template <class Real>
ERC_DEVICE GradientPlan<Real> finish_token(const PolicyLoss& call, int64_t token, const RowScale<Real>& scale,
                                           const RowResult<Real>& result, Real label_value, bool writes) {
  Real logprob = Real(NAN), entropy = Real(NAN);
  if (result.state.is_valid()) {
    logprob = result.state.logprob(label_value, scale.scale);
    entropy = result.state.entropy();
  }
  const auto in = TokenInputs<Real>::read(call.table, token, call.params.present, logprob);
  const TokenLoss<Real> loss = token_loss(LossParams<Real>::from(call.params), in, logprob, entropy);
  if (writes) write_outputs(call, token, weighted_loss(in, loss.value, logprob, entropy), loss.value, logprob, entropy, loss.flags);
  const StatGrads<Real> grads{loss.d_logprob, loss.d_entropy, Real(0)};
  return GradientPlan<Real>(result.state, scale, grads, label_value, result.guarded);
}

// A row that is not read: ignored, or without a label in range. Returns its constant gradient.
template <class Real>
ERC_DEVICE GradientPlan<Real> finish_unread(const PolicyLoss& call, int64_t token, const Label& label, bool writes) {
  const Real value = label.kind == LabelKind::kIgnored ? Real(0) : Real(NAN);
  if (writes && token >= 0) write_outputs(call, token, value, value, value, value, 0);
  return GradientPlan<Real>(value);
}

// ---- cluster -------------------------------------------------------------------------------------------------------

// Shared memory of a block: its segment of the row, then the small things.
template <class V>
struct ClusterShared {
  using T = typename V::Element;
  using Real = typename V::Real;
  T* tile;
  StatsShared<Real> stats;         // of this block's segment
  SegmentState<Real>* gathered;    // of all blocks' segments
  GradientPlan<Real>* plan;
  CopyBarrier* copied;

  static ERC_HOST_DEVICE int64_t tile_bytes(const Partition& partition) {
    const int64_t columns = partition.segments == 1 ? partition.vocab_size : partition.segment_size;
    return (columns * int64_t(sizeof(T)) + 15) / 16 * 16;
  }
  static int64_t bytes(const Partition& partition) {
    return tile_bytes(partition) + stats_shared_bytes<Real>(1, 1 + kMaxSegments) + 64;
  }
  ERC_DEVICE ClusterShared(char* memory, const Partition& partition)
      : tile(reinterpret_cast<T*>(memory)), stats(memory + tile_bytes(partition), 1), gathered(stats.states + 1),
        copied(reinterpret_cast<CopyBarrier*>(gathered + kMaxSegments)) {
    plan = reinterpret_cast<GradientPlan<Real>*>(copied + 1);
  }
};

// Block row * segments + rank, one cluster a row. Four clusters of eight such blocks share eight multiprocessors at V = 151,936
// in bfloat16 (64 registers a thread; shared memory would hold five): while one waits for its copy, the others compute.
template <class V>
__global__ void __launch_bounds__(kLanes, kResident<V>) loss_cluster_kernel(PolicyLoss call, Partition partition) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x / partition.segments, token = call.rows.token(row);
  const int rank = int(blockIdx.x % partition.segments);
  const int64_t first = rank * partition.segment_size;
  const Label label = token_label(call.rows, token);
  const ClusterShared<V> shared(dynamic_shared(), partition);
  const RowScale<Real> scale(call.rows, token);
  const T* logits = call.rows.logits.row<const T>(row);
  T* out = call.grad_logits.row<T>(row) + first;
  const Segment<V, SharedSource<T>> segment{{shared.tile}, partition.columns(rank)};
  if (label.kind != LabelKind::kHere) {  // all blocks of the cluster agree
    const GradientPlan<Real> plan = finish_unread<Real>(call, token, label, rank == 0 && threadIdx.x == 0);
    gradient_segment(plan, scale, segment, kNoColumn, out);
    return;
  }
  const Real label_value = V::value(scale, logits[label.column]);
  if (threadIdx.x == 0) copy_barrier_init(shared.copied);
  __syncthreads();
  cluster_arrive();  // "this block runs": its shared memory may be written from now on
  if (threadIdx.x == 0 && segment.whole() > 0) copy_bulk(shared.tile, logits + first, segment.whole() * 16, shared.copied);
  const int tail = segment.whole() * kVector<T> + int(threadIdx.x);
  if (int(threadIdx.x) < segment.rest()) shared.tile[tail] = logits[first + tail];
  if (segment.whole() > 0) copy_wait(shared.copied);
  __syncthreads();

  segment_states<V>(scale, 0, 1, [&](int) { return segment; }, shared.stats);

  cluster_wait();
  constexpr int kWords = sizeof(SegmentState<Real>) / sizeof(uint32_t);
  if (int(threadIdx.x) < partition.segments * kWords) {
    const int word = threadIdx.x % kWords, to = threadIdx.x / kWords;
    store_remote(reinterpret_cast<uint32_t*>(shared.gathered + rank) + word, to,
                 reinterpret_cast<const uint32_t*>(shared.stats.states)[word]);
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x == 0) {
    const RowResult<Real> result(shared.gathered, partition.segments, scale.scale);
    *shared.plan = finish_token(call, token, scale, result, label_value, rank == 0);
  }
  __syncthreads();
  gradient_segment(*shared.plan, scale, segment, label.column - first, out);
#endif
}

// ---- block ---------------------------------------------------------------------------------------------------------

// At most: groups of kLanes threads that share a row. Element by element, two would leave too few registers for each.
template <class V>
constexpr int kBlockGroups = V::aligned ? 2 : 1;

template <class V>
__global__ void __launch_bounds__(kBlockGroups<V>* kLanes, 1)
    loss_block_kernel(PolicyLoss call, Partition partition) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const StatsShared<Real> shared(dynamic_shared(), partition.segments);
  auto* plan = reinterpret_cast<GradientPlan<Real>*>(shared.states + partition.segments);
  const int group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  for (int64_t row = blockIdx.x; row < call.rows.logits.num_rows; row += gridDim.x) {
    const int64_t token = call.rows.token(row);
    const Label label = token_label(call.rows, token);
    const RowScale<Real> scale(call.rows, token);
    const T* logits = call.rows.logits.row<const T>(row);
    const auto segments = global_segments<V>(partition, logits);
    if (label.kind == LabelKind::kHere) {
      segment_states<V>(scale, 0, partition.segments, segments, shared);
      if (threadIdx.x == 0) {
        const RowResult<Real> result(shared.states, partition.segments, scale.scale);
        *plan = finish_token(call, token, scale, result, V::value(scale, logits[label.column]), true);
      }
    } else if (threadIdx.x == 0) {
      *plan = finish_unread<Real>(call, token, label, true);
    }
    __syncthreads();
    if (call.grad_logits.data != nullptr) {
      auto* out = call.grad_logits.row<typename V::Gradient>(row);
      for (int g = group; g < partition.segments; g += groups) {
        const int64_t first = g * partition.segment_size;
        gradient_segment(*plan, scale, segments(g), label.column - first, out + first);
      }
    }
    __syncthreads();  // the next row overwrites the plan
  }
}

// ---- split ---------------------------------------------------------------------------------------------------------

// Block row * blocks_per_row + g: every block of a row finishes the token for itself, from the states in the workspace.
template <class V>
__global__ void __launch_bounds__(kLanes, 2)
    loss_gradient_kernel(PolicyLoss call, Workspace<typename V::Real> workspace, Partition partition, int blocks_per_row) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x / blocks_per_row, token = call.rows.token(row);
  const int g = int(blockIdx.x % blocks_per_row);
  const Label label = token_label(call.rows, token);
  const RowScale<Real> scale(call.rows, token);
  auto* plan = reinterpret_cast<GradientPlan<Real>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    if (label.kind == LabelKind::kHere) {
      const RowResult<Real> result(workspace.states + row * partition.segments, partition.segments, scale.scale);
      *plan = finish_token(call, token, scale, result, workspace.label_values[row], g == 0);
    } else {
      *plan = finish_unread<Real>(call, token, label, g == 0);
    }
  }
  __syncthreads();
  if (call.grad_logits.data == nullptr) return;
  const int64_t first = g * partition.segment_size;
  const auto segment = global_segments<V>(partition, call.rows.logits.row<const T>(row))(g);
  gradient_segment(*plan, scale, segment, label.column - first, call.grad_logits.row<typename V::Gradient>(row) + first);
}

// ---- launcher ------------------------------------------------------------------------------------------------------

// As many rows in flight as stay in the L2 cache between the two sweeps: 0.6 of it, since other data passes through.
inline int64_t rows_in_l2(const DeviceInfo& device, int64_t row_bytes) {
  const int64_t rows = int64_t(0.6 * device.l2_bytes) / (row_bytes > 0 ? row_bytes : 1);
  return rows > 1 ? rows : 1;
}

cudaError_t policy_loss(const PolicyLoss& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  const int64_t n = logits.num_rows;
  if (n == 0) return cudaSuccess;
  const DeviceInfo device = device_info();
  const bool wants_grad = call.grad_logits.data != nullptr;
  return dispatch_gradient(logits, call.grad_logits, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    using Real = typename V::Real;
    const Partition partition = partition_of(logits.vocab_size, sizeof(typename V::Element));
    if constexpr (V::aligned) {
      const int64_t bytes = ClusterShared<V>::bytes(partition);
      if (wants_grad && bytes <= device.shared_bytes_per_block && runs_in_clusters(loss_cluster_kernel<V>, device)) {
        return launch(loss_cluster_kernel<V>, {n * partition.segments, kLanes, partition.segments, int(bytes), stream}, call,
                      partition);
      }
    }
    if (splits_rows(logits, partition)) {
      const cudaError_t error = segments_to_workspace(call.rows, call.workspace, stream);
      if (error != cudaSuccess) return error;
      const int blocks = wants_grad ? partition.segments : 1;
      return launch(loss_gradient_kernel<V>, {n * blocks, kLanes, 1, int(sizeof(GradientPlan<Real>)), stream}, call,
                    Workspace<Real>(call.workspace, n, partition), partition, blocks);
    }
    int64_t grid = n;
    int groups = 1;
    if (wants_grad) {
      const int64_t resident = rows_in_l2(device, logits.vocab_size * int64_t(sizeof(typename V::Element)));
      const int64_t blocks = int64_t(device.multiprocessors) * 2;
      grid = n < resident ? n : resident;
      grid = grid < blocks ? grid : blocks;
      // So few rows fit that a multiprocessor has one block or none: it needs more loads in flight.
      if (resident < blocks && partition.segments > 1) groups = kBlockGroups<V>;
    }
    const int bytes = stats_shared_bytes<Real>(partition.segments, partition.segments) + int(sizeof(GradientPlan<Real>));
    return launch(loss_block_kernel<V>, {grid, groups * kLanes, 1, bytes, stream}, call, partition);
  });
}

}  // namespace cuda
}  // namespace erc
