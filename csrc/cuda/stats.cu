// Log-prob, entropy and logsumexp of every row from one read of the logits, and their gradient from one read and one write.
//
// Many rows: one block a row. Few rows: a block for every segment of every row, and a second kernel that merges the segments;
// the numbers are the same, bit for bit, because the segments are.
#include "cuda/gradient.cuh"

namespace erc {
namespace cuda {

// ---- forward -------------------------------------------------------------------------------------------------------

template <class Real>
ERC_DEVICE void put(void* values, int64_t index, Real x) {
  if (values != nullptr) static_cast<Real*>(values)[index] = x;
}

template <class Real>
ERC_DEVICE void write_statistics(const StatsForward& call, int64_t row, const RowState<Real>& state, Real logprob, Real entropy,
                                 Real logsumexp, Real label_value) {
  const int64_t n = call.rows.logits.num_rows;
  put(call.logprob, row, logprob);
  put(call.entropy, row, entropy);
  put(call.logsumexp, row, logsumexp);
  put(call.saved, row, state.row_max);
  put(call.saved, n + row, state.sum_rest);
  put(call.saved, 2 * n + row, state.weighted_sum);
  put(call.label_value, row, label_value);
}

// A row that is not read. A shard's state of it is empty; its statistics are 0.
template <class Real>
ERC_DEVICE void write_ignored(const StatsForward& call, int64_t row) {
  RowState<Real> state;
  if (call.label_value == nullptr) state.row_max = 0;
  write_statistics(call, row, state, Real(0), Real(0), Real(0), -Real(INFINITY));
}

template <class V>
ERC_DEVICE void write_row(const StatsForward& call, int64_t row, const Label& label, const RowScale<typename V::Real>& scale,
                          RowState<typename V::Real> state, const typename V::Element* logits) {
  using Real = typename V::Real;
  const Real nan = Real(NAN);
  const bool shard = call.label_value != nullptr;  // a label may lie outside of it
  if (label.kind == LabelKind::kOutOfRange && !shard) state.row_max = state.sum_rest = state.weighted_sum = nan;
  Real logprob = 0, label_value = -Real(INFINITY);
  if (label.kind == LabelKind::kHere) {
    label_value = V::value(scale, logits[label.column]);
    logprob = state.logprob(label_value, scale.scale);
  }
  if (state.is_valid()) {
    write_statistics(call, row, state, logprob, state.entropy(), state.logsumexp(scale.scale), label_value);
  } else {
    write_statistics(call, row, state, nan, nan, nan, label_value);
  }
}

template <class V>
ERC_DEVICE auto global_segments(const Partition& partition, const typename V::Element* row) {
  using Source = GlobalSource<typename V::Element, V::aligned>;
  return [=](int g) { return Segment<V, Source>{Source{row + g * partition.segment_size}, partition.columns(g)}; };
}

// One block a row.
template <class V>
__global__ void __launch_bounds__(kLanes, V::aligned && !V::softcap ? 5 : 2)
    stats_row_kernel(StatsForward call, Partition partition) {
  using Real = typename V::Real;
  const int64_t row = blockIdx.x;
  const Label label = row_label(call.rows, row);
  if (label.kind == LabelKind::kIgnored) {
    if (threadIdx.x == 0) write_ignored<Real>(call, row);
    return;
  }
  const RowScale<Real> scale(call.rows, row);
  const auto* logits = row_pointer<const typename V::Element>(call.rows.logits, row);
  const StatsShared<Real> shared(dynamic_shared(), partition.segments);
  segment_states<V>(scale, 0, partition.segments, global_segments<V>(partition, logits), shared);
  if (threadIdx.x == 0) {
    const RowResult<Real> result(shared.states, partition.segments, scale.scale);
    write_row<V>(call, row, label, scale, result.state, logits);
  }
}

// One block a segment: block row * segments + g leaves the state of segment g in the workspace.
template <class V>
__global__ void __launch_bounds__(kLanes, V::aligned && !V::softcap ? 5 : 2)
    stats_segment_kernel(StatsForward call, Partition partition) {
  using Real = typename V::Real;
  const int64_t row = blockIdx.x / partition.segments;
  const int g = int(blockIdx.x % partition.segments);
  if (row_label(call.rows, row).kind == LabelKind::kIgnored) return;
  const RowScale<Real> scale(call.rows, row);
  const auto* logits = row_pointer<const typename V::Element>(call.rows.logits, row);
  const StatsShared<Real> shared(dynamic_shared(), 1);
  segment_states<V>(scale, g, g + 1, global_segments<V>(partition, logits), shared);
  if (threadIdx.x == 0) static_cast<SegmentState<Real>*>(call.workspace)[blockIdx.x] = shared.states[0];
}

// One thread a row.
template <class V>
__global__ void __launch_bounds__(kWarp) stats_merge_kernel(StatsForward call, Partition partition) {
  using Real = typename V::Real;
  const int64_t row = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  if (row >= call.rows.logits.num_rows) return;
  const Label label = row_label(call.rows, row);
  if (label.kind == LabelKind::kIgnored) {
    write_ignored<Real>(call, row);
    return;
  }
  const RowScale<Real> scale(call.rows, row);
  const auto* segments = static_cast<const SegmentState<Real>*>(call.workspace) + row * partition.segments;
  const RowResult<Real> result(segments, partition.segments, scale.scale);
  write_row<V>(call, row, label, scale, result.state, row_pointer<const typename V::Element>(call.rows.logits, row));
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class Real>
ERC_DEVICE Real optional(const void* values, int64_t row, Real otherwise) {
  return values != nullptr ? static_cast<const Real*>(values)[row] : otherwise;
}

// Block row * segments + g writes the gradient of segment g.
template <class V>
__global__ void __launch_bounds__(kLanes, 2) stats_gradient_kernel(StatsBackward call, Partition partition) {
  using T = typename V::Element;
  using Real = typename V::Real;
  const int64_t row = blockIdx.x / partition.segments, n = call.rows.logits.num_rows;
  const int g = int(blockIdx.x % partition.segments);
  const Label label = row_label(call.rows, row);
  const auto segment = global_segments<V>(partition, row_pointer<const T>(call.rows.logits, row))(g);
  const RowScale<Real> scale(call.rows, row);
  auto* plan = reinterpret_cast<GradientPlan<Real>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    *plan = GradientPlan<Real>(Real(0));
    if (label.kind != LabelKind::kIgnored) {
      const Real* saved = static_cast<const Real*>(call.saved);
      const RowState<Real> state{saved[row], saved[n + row], saved[2 * n + row]};
      const StatGrads<Real> grads{optional(call.grad_logprob, row, Real(0)), optional(call.grad_entropy, row, Real(0)),
                                  optional(call.grad_logsumexp, row, Real(0))};
      const int64_t column = label.column - g * partition.segment_size;
      const bool here = label.kind == LabelKind::kHere && column >= 0 && column < segment.columns;
      const Real label_value = here ? V::value(scale, segment.source.begin[column]) : Real(0);
      *plan = GradientPlan<Real>(state, scale, grads, label_value, true);
    }
  }
  __syncthreads();
  const int64_t column = label.kind == LabelKind::kHere ? label.column - g * partition.segment_size : -1;
  T* out = row_pointer<T>(call.grad_logits, row) + g * partition.segment_size;
  gradient_segment(*plan, scale, segment, column, out);
}

// ---- launchers -----------------------------------------------------------------------------------------------------

inline int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Fewer rows than twice the multiprocessors leave some of them idle, or half busy in the last wave.
bool splits_rows(const Rows& logits) {
  return logits.num_rows < 2 * device_info().multiprocessors &&
         partition_of(logits.vocab_size, element_bytes(logits.dtype)).segments > 1;
}

int64_t workspace_bytes(const Rows& logits) {
  if (!splits_rows(logits)) return 0;
  const int64_t state = logits.dtype == DType::kFloat64 ? sizeof(SegmentState<double>) : sizeof(SegmentState<float>);
  return logits.num_rows * partition_of(logits.vocab_size, element_bytes(logits.dtype)).segments * state;
}

cudaError_t stats_forward(const StatsForward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    using Real = typename V::Real;
    const Partition partition = partition_of(logits.vocab_size, sizeof(typename V::Element));
    if (!splits_rows(logits)) {
      const int bytes = stats_shared_bytes<Real>(partition.segments, partition.segments);
      return launch(stats_row_kernel<V>, {logits.num_rows, kLanes, 1, bytes, stream}, call, partition);
    }
    const cudaError_t error =
        launch(stats_segment_kernel<V>,
               {logits.num_rows * partition.segments, kLanes, 1, stats_shared_bytes<Real>(1, 1), stream}, call, partition);
    if (error != cudaSuccess) return error;
    return launch(stats_merge_kernel<V>, {(logits.num_rows + kWarp - 1) / kWarp, kWarp, 1, 0, stream}, call, partition);
  });
}

cudaError_t stats_backward(const StatsBackward& call, cudaStream_t stream) {
  const Rows& logits = call.rows.logits;
  if (logits.num_rows == 0) return cudaSuccess;
  return dispatch({&logits, &call.grad_logits}, call.rows.scaling.softcap != 0, [&](auto variant) {
    using V = decltype(variant);
    const Partition partition = partition_of(logits.vocab_size, sizeof(typename V::Element));
    const int bytes = sizeof(GradientPlan<typename V::Real>);
    return launch(stats_gradient_kernel<V>, {logits.num_rows * partition.segments, kLanes, 1, bytes, stream}, call, partition);
  });
}

}  // namespace cuda
}  // namespace erc
