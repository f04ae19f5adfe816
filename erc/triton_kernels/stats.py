"""Row statistics: log-prob, entropy and logsumexp from one read of the logits, and their gradient from one read and one
write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, shared_lanes
from .params import Rows, kernel, layout_of, read_scaling, rows_of, segment_columns, stats_dtype
from .row_algebra import (
    label_column,
    load_label,
    log1p,
    real,
    row_entropy,
    row_logprob,
    row_pointer,
    row_state,
    write_gradient,
    write_zeros,
)


@kernel
def stats_forward_kernel(
    logits, labels, temperature, lanes, logprob, entropy, logsumexp, saved,
    N: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `lanes` holds the row's segments if other programs have swept them."""
    row = tl.program_id(0).to(tl.int64)
    column, inside, error = row * 0, row < 0, row < 0
    ignored = row < 0
    if labels is not None:
        label = tl.load(labels + row)
        column, inside = label_column(label, V)
        error = inside == 0
        ignored = label == ignore_index
    if ignored:
        zero = real(0.0, L)
        tl.store(logprob + row, zero)
        tl.store(entropy + row, zero)
        tl.store(logsumexp + row, zero)
        for i in tl.static_range(3):
            tl.store(saved + i * N + row, zero)
    else:
        start = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
        row_max, rest, weighted, s = row_state(
            lanes, start, row, V, error, temperature, scale, cap, cap_scale, False, "evict_first", L
        )
        if labels is not None:
            v, _ = load_label(start, column, inside, cap, cap_scale, L)
            tl.store(logprob + row, row_logprob(row_max, rest, v, s))
        tl.store(entropy + row, row_entropy(rest, weighted))
        tl.store(logsumexp + row, row_max * s + log1p(rest))
        tl.store(saved + row, row_max)
        tl.store(saved + N + row, rest)
        tl.store(saved + 2 * N + row, weighted)


@kernel
def stats_backward_kernel(
    logits, out, labels, temperature, saved, grad_logprob, grad_entropy, grad_logsumexp,
    N: tl.int64, V: tl.int32, segments: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row. A gradient that is absent is no argument; `out` may be `logits`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    end = tl.minimum(begin + SEGMENT, V)
    start = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
    target = row_pointer(out, row, inner, out_stride_outer, out_stride_inner, L)
    column, inside, ignored = row * 0, row < 0, row < 0
    if labels is not None:
        label = tl.load(labels + row)
        column, inside = label_column(label, V)
        ignored = label == ignore_index
    if ignored:
        write_zeros(target, begin, end, L)
    else:
        g_logprob, g_entropy, g_logsumexp = real(0.0, L), real(0.0, L), real(0.0, L)
        if grad_logprob is not None:
            g_logprob = tl.load(grad_logprob + row)
        if grad_entropy is not None:
            g_entropy = tl.load(grad_entropy + row)
        if grad_logsumexp is not None:
            g_logsumexp = tl.load(grad_logsumexp + row)
        row_max = tl.load(saved + row)
        rest = tl.load(saved + N + row)
        weighted = tl.load(saved + 2 * N + row)
        write_gradient(
            start, target, begin, end, V, column, inside, row_max, rest, weighted, g_logprob, g_entropy, g_logsumexp,
            row, temperature, scale, cap, cap_scale, grad_entropy is not None, L,
        )  # fmt: skip


def stats_forward(
    logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N] or [0], entropy [N], logsumexp [N], saved [3, N]) of `[outer, inner, V]` logits."""
    rows = rows_of(logits)
    layout = layout_of(params, temperature, rows)
    scaling = read_scaling(params)
    dtype = stats_dtype(logits.dtype)
    entropy, logsumexp = (logits.new_empty(rows.count, dtype=dtype) for _ in range(2))
    logprob = logits.new_empty(0 if labels is None else rows.count, dtype=dtype)
    saved = logits.new_empty((3, rows.count), dtype=dtype)
    lanes = shared_lanes(rows, labels, temperature, scaling, ignore_index, layout)
    launch(
        stats_forward_kernel, rows.count, logits, logits, labels, temperature, lanes, logprob, entropy, logsumexp,
        saved,
        rows.count, rows.V, *rows.address(), ignore_index, *scaling, L=layout,
    )  # fmt: skip
    return logprob, entropy, logsumexp, saved


def launch_backward(
    source: Rows, target: Rows, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int,
    saved: Tensor, grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None,
) -> None:  # fmt: skip
    layout = layout_of(params, temperature, source, target)
    columns = segment_columns(layout)
    segments = triton.cdiv(source.V, columns)
    launch(
        stats_backward_kernel, source.count * segments, source.data,
        source.data, target.data, labels, temperature, saved, grad_logprob, grad_entropy, grad_logsumexp,
        source.count, source.V, segments, *source.address(), target.stride_outer, target.stride_inner, ignore_index,
        *read_scaling(params), SEGMENT=columns, L=layout,
    )  # fmt: skip


def stats_backward(
    logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int, saved: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of `stats_forward`'s outputs by the logits, contiguous."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch_backward(
        rows_of(logits), rows_of(grad), labels, temperature, params, ignore_index,
        saved, grad_logprob, grad_entropy, grad_logsumexp,
    )  # fmt: skip
    return grad


def stats_backward_(
    logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int, saved: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None,
) -> None:  # fmt: skip
    """As `stats_backward`, written over the logits."""
    rows = rows_of(logits)
    launch_backward(
        rows, rows, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, grad_logsumexp
    )
