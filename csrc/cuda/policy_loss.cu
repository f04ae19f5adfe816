// The fused policy loss: statistics, the token's loss and its gradient from one read of the logits, and one write.
//
// Three forms with the same numbers, segment by segment:
//   cluster  sm_90 and later: a cluster of blocks holds the row in shared memory, one segment a block. One DRAM read, one write.
//            The copy comes first and in parts; what a thread finishes with, and what the blocks tell each other, waits for nobody
//            but those that need it.
//   block    one block a row, which reads it again from the L2 cache; the grid is kept so small that the rows in flight fit there.
//   split    few rows: a block a segment, statistics first, then loss and gradient.
// forms.cpp says where a GPU that has clusters takes them.
#include "common/token_loss.h"
#include "cuda/forms.h"
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

// What is known of a token before its logits are, loaded while they are read. One thread writes it, and reads it again.
template <class Real>
struct KnownToken {
  TokenInputs<Real> inputs;
  Real label_value;
};

template <class Real>
ERC_DEVICE const TokenInputs<Real>& token_row(const PolicyLoss& call, int64_t token) {
  return static_cast<const TokenInputs<Real>*>(call.table)[token];
}

// With a support: the log-prob over the full vocabulary, and of a row that was read what SupportBackward takes.
template <class Real>
struct FullOutputs {
  Real logprob, d_support_logprob, d_logprob, d_entropy;
  Real row_max, sum_rest, weighted_sum;
};

// What a token leaves: its gradient's coefficients, which every thread waits for, and its outputs, which no thread does.
template <class Real>
struct FinishedToken {
  GradientPlan<Real> plan;
  Real loss, token_loss, logprob, entropy;
  int32_t flags;
  FullOutputs<Real> full;  // left alone without a support

  ERC_DEVICE FinishedToken(const GradientPlan<Real>& plan, Real loss, Real token_loss, Real logprob, Real entropy,
                           int32_t flags)
      : plan(plan), loss(loss), token_loss(token_loss), logprob(logprob), entropy(entropy), flags(flags) {}

  ERC_DEVICE void write_outputs(const PolicyLoss& call, int64_t token) const {
    put(call.loss, token, loss);
    put(call.token_loss, token, token_loss);
    put(call.logprob, token, logprob);
    put(call.entropy, token, entropy);
    call.flags[token] = flags;
    if (call.support_logprob == nullptr) return;
    put(call.logprob_full, token, full.logprob);
    put(call.d_logprob, token, full.d_support_logprob);
    put(call.d_logprob_full, token, full.d_logprob);
    put(call.d_entropy, token, full.d_entropy);
    put(call.saved, token, full.row_max);
    put(call.saved, call.rows.num_tokens + token, full.sum_rest);
    put(call.saved, 2 * call.rows.num_tokens + token, full.weighted_sum);
  }
};

// Where the threads of a block meet, between the two sweeps: one has finished the token, another one writes its outputs, unless a
// block of the same row does.
template <class Real>
ERC_DEVICE const GradientPlan<Real>& meet(const FinishedToken<Real>& finished, const PolicyLoss& call, int64_t token,
                                          bool writes) {
  __syncthreads();
  if (writes && token >= 0 && threadIdx.x == kWarp) finished.write_outputs(call, token);
  return finished.plan;
}

// What one thread does between the two sweeps.
template <bool kOverSupport, class Real>
ERC_DEVICE FinishedToken<Real> finished_token(const PolicyLoss& call, const RowScale<Real>& scale,
                                              const RowResult<Real>& result, const TokenInputs<Real>& known, Real label_value,
                                              int64_t token) {
  RowState<Real> state = result.state;
  const Real over_support = kOverSupport ? static_cast<const Real*>(call.support_logprob)[token] : Real(INFINITY);
  // A support without a distribution over it: then the row has none.
  if (over_support != over_support) state.row_max = Real(NAN);
  const bool cut = over_support < Real(INFINITY);
  Real logprob = Real(NAN), entropy = Real(NAN), logprob_full = Real(NAN);
  if (state.is_valid()) {
    logprob_full = state.logprob(label_value, scale.scale);
    logprob = cut ? over_support : logprob_full;
    entropy = state.entropy();
  }
  auto in = TokenInputs<Real>::read(&known, 0, call.params.present, logprob);
  auto params = LossParams<Real>::from(call.params);
  FullTerms<Real> full;
  if (cut) full = FullTerms<Real>::taken_from(params, in);
  TokenLoss<Real> loss = token_loss(params, in, logprob, entropy);
  const Real more = cut ? full.add_to(loss, params, in, logprob, logprob_full) : Real(0);
  Real share = weighted_loss(in, loss.value, logprob, entropy);
  if (cut) share += more;
  const StatGrads<Real> grads{cut ? full.d_logprob : loss.d_logprob, loss.d_entropy, Real(0)};
  FinishedToken<Real> finished(GradientPlan<Real>(state, scale, grads, label_value, result.guarded), share, loss.value, logprob,
                               entropy, loss.flags);
  if (kOverSupport) {
    finished.full = {logprob_full,  loss.d_logprob, full.d_logprob,    loss.d_entropy,
                     state.row_max, state.sum_rest, state.weighted_sum};
  }
  return finished;
}

// Two copies of the code, so that a call without a support does not execute what is of one.
template <class... Arguments>
ERC_DEVICE auto finish_token(const PolicyLoss& call, const Arguments&... arguments) {
  return call.support_logprob == nullptr ? finished_token<false>(call, arguments...) : finished_token<true>(call, arguments...);
}

// A row that is not read, because it is ignored or has no label in range: its gradient and outputs are constant.
template <class Real>
ERC_DEVICE FinishedToken<Real> finish_unread(const Label& label) {
  const Real value = label.kind == LabelKind::kIgnored ? Real(0) : Real(NAN);
  FinishedToken<Real> finished(GradientPlan<Real>(value), value, value, value, value, 0);
  finished.full = {value};
  return finished;
}

// ---- cluster -------------------------------------------------------------------------------------------------------

// The copy of a block's segment comes in parts, each with a barrier: the first trips of the sweep (sweep_lane), then the rest.
constexpr int kParts = 4;

struct TileMemory {
  CopyBarrier* copied;
  int last;  // part

  ERC_DEVICE Raw chunk(const char* p) const { return *reinterpret_cast<const Raw*>(p); }
  ERC_DEVICE void wait(int trip) const { copy_wait(copied + (trip < last ? trip : last)); }
  ERC_DEVICE void wait_from(int trip) const {
    for (int part = trip < last ? trip : last; part <= last; ++part) copy_wait(copied + part);
  }
};

// Where a segment lies in shared memory: with the chunks around it, so that what was misaligned stays so by as much.
template <class T, bool kAligned>
struct Tile {
  static constexpr int kPartBytes = kUnroll * kLanes * 16;
  const char* source;  // the chunks
  int behind, columns;

  ERC_DEVICE Tile(const T* segment, int columns)
      : source(reinterpret_cast<const char*>(segment)), behind(kAligned ? 0 : int(reinterpret_cast<uintptr_t>(segment) % 16)),
        columns(columns) {
    source -= behind;
  }
  ERC_DEVICE int bytes() const { return (behind + columns * int(sizeof(T)) + 15) / 16 * 16; }
  // A trip of a misaligned segment reads one chunk more.
  ERC_DEVICE int first_part() const { return kPartBytes + (behind == 0 ? 0 : 16); }
  ERC_DEVICE int last() const {
    const int part = (bytes() - first_part() + kPartBytes - 1) / kPartBytes;
    return part < 0 ? 0 : part < kParts - 1 ? part : kParts - 1;
  }
  ERC_DEVICE const T* segment(const char* tile) const { return reinterpret_cast<const T*>(tile + behind); }

  // One thread calls it.
  ERC_DEVICE void copy(char* tile, CopyBarrier* copied) const {
    const char *begin = source + behind, *end = begin + columns * int64_t(sizeof(T));
    const int all = bytes();
    int first = 0, next = first_part();
#pragma unroll
    for (int part = 0; part < kParts; ++part, first = next, next += kPartBytes) {
      if (part == kParts - 1 || next > all) next = all;
      if (first < all) copy_bulk(tile + first, source + first, next - first, copied + part, begin, end);
    }
  }
};

// Shared memory of a block: its segment of the row, then the small things.
template <class V>
struct ClusterShared {
  using T = typename V::Element;
  using Real = typename V::Real;
  SegmentState<Real> gathered[kMaxSegments + 1];  // of all blocks' segments; behind them the label's value, as a row_max
  GroupShared<Real> group;
  CopyBarrier copied[kParts], exchanged;
  FinishedToken<Real> finished;
  TokenInputs<Real> known;  // loaded while the row is

  static ERC_HOST_DEVICE int tile_bytes(const Partition& partition) {
    constexpr int kAlignment = alignof(ClusterShared);  // a multiple of 16; a misaligned row is copied with what is around it
    const int columns = partition.segments == 1 ? partition.vocab_size : partition.segment_size;
    return (columns * int(sizeof(T)) + (V::aligned ? 0 : 15) + kAlignment - 1) / kAlignment * kAlignment;
  }
  static int64_t bytes(const Partition& partition) { return tile_bytes(partition) + int64_t(sizeof(ClusterShared)); }
};

// Block row * segments + rank, one cluster a row. Five clusters of eight such blocks share eight multiprocessors at V = 151,936
// in bfloat16: while one waits for its copy, the others compute.
template <class V>
__global__ void __launch_bounds__(kLanes, kBlocks<V, 5>)
    loss_cluster_kernel(PolicyLoss call, Prepared<V> host, RowAddress grads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = typename V::Element;
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  const uint32_t row = blockIdx.x >> partition.log_segments;
  const int rank = int(blockIdx.x & (partition.segments - 1)), thread = threadIdx.x;
  char* memory = dynamic_shared();
  ClusterShared<V>& shared = *reinterpret_cast<ClusterShared<V>*>(memory + ClusterShared<V>::tile_bytes(partition));
  if (thread == 0) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) copy_barrier_init(shared.copied + part);
    copy_barrier_init(&shared.exchanged);
    copy_barriers_are_set();
  }
  const int64_t token = call.rows.token(row);
  const Label label = token_label(call.rows, token);
  const int first = partition.first(rank), columns = partition.columns(rank);
  const RowIndex index = host.index(row);
  const T* logits = host.logits.template row<const T>(index);
  auto* out = grads.row<typename V::Gradient>(index) + first;
  const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
  const Tile<T, V::aligned> tile(logits + first, columns);
  const Segment<V, TileMemory> segment{tile.segment(memory), columns, {shared.copied, tile.last()}};
  if (label.kind != LabelKind::kHere) {  // all blocks of the cluster agree
    const FinishedToken<Real> unread = finish_unread<Real>(label);
    if (rank == 0 && thread == 0 && token >= 0) unread.write_outputs(call, token);
    gradient_segment(unread.plan, scale, segment, kNoColumn, out);
    return;
  }
  if (thread == 0) {
    tile.copy(memory, shared.copied);
    expect_states(&shared.exchanged, (partition.segments + 1) * int(sizeof(SegmentState<Real>)));
  }
  cluster_arrive();  // "this block runs, and its barriers are set": it may be sent states from now on
  __syncthreads();
  if (thread == 0) shared.known = token_row<Real>(call, token);

  const SegmentState<Real> state = segment_state<1>(scale, segment, &shared.group);

  cluster_wait();
  if (thread < kWarp) {
    // Eight lanes send the segment's state, and in the block that holds it eight more the label's value: read by others from the
    // row, it might be overwritten where the gradient takes the row's place.
    const int64_t column = label.column - first;
    const bool sends_label = thread >= kMaxSegments && column >= 0 && column < columns;
    const int to = thread % kMaxSegments, slot = sends_label ? partition.segments : rank;
    const bool sends = to < partition.segments && (thread < kMaxSegments || (sends_label && thread < 2 * kMaxSegments));
    SegmentState<Real> sent = state;
    if (sends_label) sent.row_max = V::value(scale, segment.begin[column]);
    if (partition.segments > 1) {
      if (sends) send_state(shared.gathered + slot, to, sent, &shared.exchanged);
      wait_for_states(&shared.exchanged);
    } else {  // a cluster of one block has nobody to send to
      if (sends) shared.gathered[slot] = sent;
      __syncwarp();
    }
    const RowResult<Real> result = merge_segments(shared.gathered, partition.segments, scale.scale);
    const Real label_value = shared.gathered[partition.segments].row_max;
    if (thread == 0) shared.finished = finish_token(call, scale, result, shared.known, label_value, token);
  }
  const GradientPlan<Real>& plan = meet(shared.finished, call, token, rank == 0);
  gradient_segment(plan, scale, segment, label.column - first, out);
#endif
}

// ---- block ---------------------------------------------------------------------------------------------------------

// At most: groups of kLanes threads that share a row. Four would leave too few registers for misaligned rows.
template <class V>
constexpr int kBlockGroups = V::aligned ? 4 : 2;

template <class V>
struct BlockShared {
  using Real = typename V::Real;
  SegmentState<Real> states[kMaxSegments];
  GroupShared<Real> group[kBlockGroups<V>];
  KnownToken<Real> known;
  FinishedToken<Real> finished;
};

template <class V>
__global__ void __launch_bounds__(kBlockGroups<V>* kLanes, 1)
    loss_block_kernel(PolicyLoss call, Prepared<V> host, RowAddress grads) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  auto& shared = *reinterpret_cast<BlockShared<V>*>(dynamic_shared());
  const int group = threadIdx.x / kLanes, groups = blockDim.x / kLanes;
  for (uint32_t row = blockIdx.x; row < call.rows.logits.num_rows; row += gridDim.x) {
    const int64_t token = call.rows.token(row);
    const Label label = token_label(call.rows, token);
    const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
    const T* logits = host.logits.template row<const T>(host.index(row));
    const auto segments = global_segments<V>(partition, logits);
    if (label.kind == LabelKind::kHere) {
      if (threadIdx.x == 0) shared.known = {token_row<Real>(call, token), V::value(scale, logits[label.column])};
      segment_states<V, kBlockGroups<V>>(scale, partition.segments, segments, shared.group, shared.states);
      if (threadIdx.x < kWarp) {
        const RowResult<Real> result = merge_segments(shared.states, partition.segments, scale.scale);
        const KnownToken<Real>& known = shared.known;
        if (threadIdx.x == 0) shared.finished = finish_token(call, scale, result, known.inputs, known.label_value, token);
      }
    } else if (threadIdx.x == 0) {
      shared.finished = finish_unread<Real>(label);
    }
    const GradientPlan<Real>& plan = meet(shared.finished, call, token, true);
    if (grads.data != nullptr) {
      auto* out = grads.row<typename V::Gradient>(host.index(row));
      for (int g = group; g < partition.segments; g += groups) {
        const int first = partition.first(g);
        gradient_segment(plan, scale, segments(g), label.column - first, out + first);
      }
    }
    __syncthreads();  // the next row overwrites the plan
  }
}

// ---- split ---------------------------------------------------------------------------------------------------------

// Block row * blocks_per_row + g: every block of a row finishes the token for itself, from the states in the workspace.
template <class V>
__global__ void __launch_bounds__(kLanes, 2) loss_gradient_kernel(PolicyLoss call, Workspace<typename V::Real> workspace,
                                                                  Prepared<V> host, RowAddress grads, int log_blocks) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  const uint32_t row = blockIdx.x >> log_blocks;
  const int g = int(blockIdx.x & ((1u << log_blocks) - 1)), first = partition.first(g);
  const int64_t token = call.rows.token(row);
  const Label label = token_label(call.rows, token);
  const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
  const T* logits = host.logits.template row<const T>(host.index(row));
  auto& shared = *reinterpret_cast<BlockShared<V>*>(dynamic_shared());
  if (label.kind == LabelKind::kHere) {
    if (threadIdx.x < kWarp) {
      if (threadIdx.x == 0) shared.known = {token_row<Real>(call, token), workspace.label_values[row]};
      const auto* states = workspace.states + int64_t(row) * partition.segments;
      const RowResult<Real> result = merge_segments(states, partition.segments, scale.scale);
      const KnownToken<Real>& known = shared.known;
      if (threadIdx.x == 0) shared.finished = finish_token(call, scale, result, known.inputs, known.label_value, token);
    }
  } else if (threadIdx.x == 0) {
    shared.finished = finish_unread<Real>(label);
  }
  const GradientPlan<Real>& plan = meet(shared.finished, call, token, g == 0);
  if (grads.data == nullptr) return;
  gradient_segment(plan, scale, global_segments<V>(partition, logits)(g), label.column - first,
                   grads.row<typename V::Gradient>(host.index(row)) + first);
}

// ---- launcher ------------------------------------------------------------------------------------------------------

// As many rows in flight as stay in the L2 cache between the two sweeps: 0.6 of it, since other data passes through, and half a row
// each on average, since the second sweep evicts what it has read. Where that keeps less than two thirds of the multiprocessors
// busy, all of them work: a third transfer of each row costs less than idle ones.
inline int64_t rows_in_l2(const DeviceInfo& device, int64_t row_bytes) {
  const int64_t rows = int64_t(0.6 * device.l2_bytes) / (row_bytes > 2 ? row_bytes / 2 : 1);
  return 3 * rows >= 2 * device.multiprocessors ? rows : device.multiprocessors;
}

// The fewest blocks, at most `most`, that take as many turns over n rows: more would only wait for those that have a last row.
inline int64_t even_turns(int64_t n, int64_t most) {
  const int64_t turns = (n + most - 1) / most;
  return (n + turns - 1) / turns;
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
    const Prepared<V> host(call.rows);
    const Partition& partition = host.partition;
    const RowAddress grads(call.grad_logits, sizeof(typename V::Gradient));
    const int64_t row_bytes = logits.vocab_size * int64_t(sizeof(typename V::Element));
    if constexpr (sizeof(Real) == 4) {
      const int64_t bytes = ClusterShared<V>::bytes(partition);
      if (wants_grad && bytes <= device.shared_bytes_per_block &&
          loss_form(device.capability, row_bytes) == LossForm::kCluster && runs_in_clusters(loss_cluster_kernel<V>, device)) {
        return launch(loss_cluster_kernel<V>, {n * partition.segments, kLanes, partition.segments, int(bytes), stream}, call,
                      host, grads);
      }
    }
    const int bytes = sizeof(BlockShared<V>);
    if (splits_rows(logits, partition)) {
      const cudaError_t error = segments_to_workspace(call.rows, call.workspace, stream);
      if (error != cudaSuccess) return error;
      const int log_blocks = wants_grad ? partition.log_segments : 0;
      return launch(loss_gradient_kernel<V>, {n << log_blocks, kLanes, 1, bytes, stream}, call,
                    Workspace<Real>(call.workspace, n, partition), host, grads, log_blocks);
    }
    int64_t grid = n;
    int groups = 1;
    if (wants_grad) {
      const int64_t resident = rows_in_l2(device, row_bytes), multiprocessors = device.multiprocessors;
      // Two long rows on a multiprocessor where the cache holds them, each with half the threads: one computes while the other
      // waits for its last loads, its sums or its token.
      const int wanted = resident > multiprocessors ? kBlockGroups<V> / 2 : kBlockGroups<V>;
      while (groups < wanted && groups < partition.segments) groups *= 2;
      const int64_t most = multiprocessors * kBlockGroups<V> / groups;
      grid = even_turns(n, resident < most ? resident : most);
    }
    return launch(loss_block_kernel<V>, {grid, groups * kLanes, 1, bytes, stream}, call, host, grads);
  });
}

}  // namespace cuda
}  // namespace erc
