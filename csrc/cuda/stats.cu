// Log-prob, entropy and logsumexp of every row from one read of the logits, and their gradient from one read and one write.
// Of a vocabulary shard (call.label_value) the states themselves are the result: a row that is not read leaves the empty one, and
// a label may lie outside. Merging two of them is RowState::merge of common/row_state.h.
//
// Many rows: one block a row. Few rows: a block for every segment of every row, and a second kernel that merges the segments;
// the numbers are the same, bit for bit, because the segments are.
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

// ---- forward -------------------------------------------------------------------------------------------------------

template <class Real>
ERC_DEVICE void write_statistics(const StatsForward& call, int64_t token, const RowState<Real>& state, Real logprob,
                                 Real entropy, Real logsumexp, Real label_value) {
  const int64_t n = call.rows.num_tokens;
  put(call.logprob, token, logprob);
  put(call.entropy, token, entropy);
  put(call.logsumexp, token, logsumexp);
  put(call.saved, token, state.row_max);
  put(call.saved, n + token, state.sum_rest);
  put(call.saved, 2 * n + token, state.weighted_sum);
  put(call.label_value, token, label_value);
}

// A row that is not read.
template <class Real>
ERC_DEVICE void write_ignored(const StatsForward& call, int64_t token) {
  if (token < 0) return;
  RowState<Real> state;
  if (call.label_value == nullptr) state.row_max = 0;
  write_statistics(call, token, state, Real(0), Real(0), Real(0), -Real(INFINITY));
}

// label_value counts only where the label is in these columns.
template <class Real>
ERC_DEVICE void write_row(const StatsForward& call, int64_t token, const Label& label, const RowScale<Real>& scale,
                          RowState<Real> state, Real label_value) {
  const Real nan = Real(NAN);
  const bool shard = call.label_value != nullptr;
  const bool nowhere = call.rows.labels != nullptr && label.kind != LabelKind::kHere;
  if (nowhere && !shard) state.row_max = state.sum_rest = state.weighted_sum = nan;
  if (label.kind != LabelKind::kHere) label_value = -Real(INFINITY);
  const Real logprob = state.logprob(label_value, scale.scale);
  if (state.is_valid()) {
    write_statistics(call, token, state, logprob, state.entropy(), state.logsumexp(scale.scale), label_value);
  } else {
    write_statistics(call, token, state, nan, nan, nan, label_value);
  }
}

template <class V>
struct StatsShared {
  using Real = typename V::Real;
  SegmentState<Real> states[kMaxSegments];
  GroupShared<Real> group;
};

template <class V>
constexpr int kStatsBlocks = kBlocks < V,
              V::aligned ? 8 : 2 > ;

// One block a row.
template <class V>
__global__ void __launch_bounds__(kLanes, kStatsBlocks<V>) stats_row_kernel(StatsForward call, Prepared<V> host) {
  using Real = typename V::Real;
  const uint32_t row = blockIdx.x;
  const int64_t token = call.rows.token(row);
  const Label label = token_label(call.rows, token);
  if (label.kind == LabelKind::kIgnored) {
    if (threadIdx.x == 0) write_ignored<Real>(call, token);
    return;
  }
  const Partition& partition = host.partition;
  const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
  const auto* logits = host.logits.template row<const typename V::Element>(host.index(row));
  auto& shared = *reinterpret_cast<StatsShared<V>*>(dynamic_shared());
  segment_states<V>(scale, partition.segments, global_segments<V>(partition, logits), &shared.group, shared.states);
  if (threadIdx.x >= kWarp) return;
  const RowResult<Real> result = merge_segments(shared.states, partition.segments, scale.scale);
  if (threadIdx.x != 0) return;
  const Real label_value = label.kind == LabelKind::kHere ? V::value(scale, logits[label.column]) : Real(0);
  write_row(call, token, label, scale, result.state, label_value);
}

// One block a segment: block row * segments + g leaves the state of segment g in the workspace, and of the row's label its value.
template <class V>
__global__ void __launch_bounds__(kLanes, kStatsBlocks<V>)
    segment_kernel(RowInputs rows, Workspace<typename V::Real> workspace, Prepared<V> host) {
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  const uint32_t row = blockIdx.x >> partition.log_segments;
  const int g = int(blockIdx.x & (partition.segments - 1));
  const int64_t token = rows.token(row);
  const Label label = token_label(rows, token);
  if (label.kind == LabelKind::kIgnored) return;
  const RowScale<Real> scale = row_scale(rows, host.scale, token);
  const auto* logits = host.logits.template row<const typename V::Element>(host.index(row));
  auto& shared = *reinterpret_cast<GroupShared<Real>*>(dynamic_shared());
  const SegmentState<Real> state = segment_state<1>(scale, global_segments<V>(partition, logits)(g), &shared);
  if (threadIdx.x != 0) return;
  workspace.states[blockIdx.x] = state;
  if (g == 0 && label.kind == LabelKind::kHere) workspace.label_values[row] = V::value(scale, logits[label.column]);
}

// Eight threads a row.
constexpr int kMergedRows = kWarp / kMaxSegments;

template <class V>
__global__ void __launch_bounds__(kWarp) stats_merge_kernel(StatsForward call, Prepared<V> host) {
  using Real = typename V::Real;
  const uint32_t n = uint32_t(call.rows.logits.num_rows), own = blockIdx.x * kMergedRows + threadIdx.x / kMaxSegments;
  const uint32_t row = own < n ? own : n - 1;  // no thread may be missing
  const Partition& partition = host.partition;
  const int64_t token = call.rows.token(row);
  const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
  const Workspace<Real> workspace(call.workspace, n, partition);
  const auto* states = workspace.states + int64_t(row) * partition.segments;
  const RowResult<Real> result = merge_segments(states, partition.segments, scale.scale);
  if (own >= n || threadIdx.x % kMaxSegments != 0) return;
  const Label label = token_label(call.rows, token);
  if (label.kind == LabelKind::kIgnored) {
    write_ignored<Real>(call, token);
  } else {
    write_row(call, token, label, scale, result.state, workspace.label_values[row]);
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Block row * segments + g writes the gradient of segment g.
template <class V>
__global__ void __launch_bounds__(kLanes, 2) stats_gradient_kernel(StatsBackward call, Prepared<V> host, RowAddress grads) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  const uint32_t row = blockIdx.x >> partition.log_segments;
  const int64_t token = call.rows.token(row), n = call.rows.num_tokens;
  const int g = int(blockIdx.x & (partition.segments - 1)), first = partition.first(g);
  const Label label = token_label(call.rows, token);
  const auto segment = global_segments<V>(partition, host.logits.template row<const T>(host.index(row)))(g);
  const RowScale<Real> scale = row_scale(call.rows, host.scale, token);
  const int64_t column = label.kind == LabelKind::kHere ? label.column - first : kNoColumn;
  auto* plan = reinterpret_cast<GradientPlan<Real>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    *plan = GradientPlan<Real>(Real(0));
    if (label.kind != LabelKind::kIgnored) {
      const Real* saved = static_cast<const Real*>(call.saved);
      const RowState<Real> state{saved[token], saved[n + token], saved[2 * n + token]};
      const bool cut = label.kind == LabelKind::kCut;
      const StatGrads<Real> upstream{cut ? Real(0) : optional(call.grad_logprob, token, Real(0)),
                                     optional(call.grad_entropy, token, Real(0)),
                                     optional(call.grad_logsumexp, token, Real(0))};
      const bool here = column >= 0 && column < segment.columns;
      const Real label_value = here ? V::value(scale, segment.begin[column]) : Real(0);
      *plan = GradientPlan<Real>(state, scale, upstream, label_value, true);
    }
  }
  __syncthreads();
  gradient_segment(*plan, scale, segment, column, grads.row<typename V::Gradient>(host.index(row)) + first);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

int64_t workspace_bytes(const Rows& logits) {
  const int element = logits.dtype == DType::kFloat64 ? 8 : logits.dtype == DType::kFloat32 ? 4 : 2;
  const Partition partition = partition_of(logits.vocab_size, element);
  if (!splits_rows(logits, partition)) return 0;
  const int64_t real = element == 8 ? sizeof(double) : sizeof(float);
  return logits.num_rows * (partition.segments * 4 + 1) * real;
}

template <class V>
cudaError_t launch_segments(const RowInputs& rows, void* workspace, const Prepared<V>& host, cudaStream_t stream) {
  using Real = typename V::Real;
  const Partition& partition = host.partition;
  const LaunchShape shape{rows.logits.num_rows * partition.segments, kLanes, 1, int(sizeof(GroupShared<Real>)), stream};
  return launch(segment_kernel<V>, shape, rows, Workspace<Real>(workspace, rows.logits.num_rows, partition), host);
}

cudaError_t segments_to_workspace(const RowInputs& rows, void* workspace, cudaStream_t stream) {
  return dispatch({&rows.logits}, rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    return launch_segments<V>(rows, workspace, Prepared<V>(rows), stream);
  });
}

cudaError_t stats_forward(const StatsForward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    const Prepared<V> host(call.rows);
    if (!splits_rows(logits, host.partition)) {
      const int bytes = sizeof(StatsShared<V>);
      return launch(stats_row_kernel<V>, {logits.num_rows, kLanes, 1, bytes, stream}, call, host);
    }
    const cudaError_t error = launch_segments<V>(call.rows, call.workspace, host, stream);
    if (error != cudaSuccess) return error;
    return launch(stats_merge_kernel<V>, {(logits.num_rows + kMergedRows - 1) / kMergedRows, kWarp, 1, 0, stream}, call, host);
  });
}

cudaError_t stats_backward(const StatsBackward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch_gradient(logits, call.grad_logits, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    const Prepared<V> host(call.rows);
    const int bytes = sizeof(GradientPlan<typename V::Real>);
    return launch(stats_gradient_kernel<V>, {logits.num_rows * host.partition.segments, kLanes, 1, bytes, stream}, call, host,
                  RowAddress(call.grad_logits, sizeof(typename V::Gradient)));
  });
}

}  // namespace cuda
}  // namespace erc
