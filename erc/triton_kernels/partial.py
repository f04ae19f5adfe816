"""The state of a vocabulary shard: what ranks exchange instead of logits."""

import triton.language as tl
from torch import Tensor

from .launch import launch, shared_lanes
from .params import kernel, layout_of, read_scaling, rows_of, stats_dtype
from .row_algebra import ABSENT_LABEL, load_label, real, row_pointer, row_state


@kernel
def partial_stats_kernel(
    logits, labels, temperature, lanes, state,
    N: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, ignore_index: tl.int64,
    start: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `state` [4, N]: row_max, sum_rest, weighted_sum, label value (-inf if it is elsewhere)."""
    row = tl.program_id(0).to(tl.int64)
    label = row * 0 + ABSENT_LABEL
    ignored = row < 0
    if labels is not None:
        label = tl.load(labels + row)
        ignored = label == ignore_index
    if ignored:
        empty = real(float("-inf"), L)
        tl.store(state + row, empty)
        tl.store(state + N + row, real(0.0, L))
        tl.store(state + 2 * N + row, real(0.0, L))
        tl.store(state + 3 * N + row, empty)
    else:
        begin = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
        row_max, rest, weighted, _ = row_state(
            lanes, begin, row, V, row < 0, temperature, scale, cap, cap_scale, True, "evict_first", L
        )
        inside = (label >= start) & (label - start < V)
        label_value, _ = load_label(begin, tl.where(inside, label - start, 0), inside, cap, cap_scale, L)
        tl.store(state + row, row_max)
        tl.store(state + N + row, rest)
        tl.store(state + 2 * N + row, weighted)
        tl.store(state + 3 * N + row, label_value)


def partial_stats(
    logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int, start: int
) -> Tensor:
    """[4, N] of a shard that holds columns `[start, start + V)`; labels are those of the whole vocabulary."""
    rows = rows_of(logits)
    layout = layout_of(params, temperature, rows)
    scaling = read_scaling(params)
    state = logits.new_empty((4, rows.count), dtype=stats_dtype(logits.dtype))
    lanes = shared_lanes(rows, labels, temperature, scaling, ignore_index, layout)
    launch(
        partial_stats_kernel, rows.count, logits, logits, labels, temperature, lanes, state,
        rows.count, rows.V, *rows.address(), ignore_index, start, *scaling, L=layout,
    )  # fmt: skip
    return state
