"""Row statistics: log-prob, entropy and logsumexp from one read of the logits, and their gradient from one read and one
write. The state of a vocabulary shard is the same sweep with the state itself as its result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erc.constants import CUT_LABEL as _CUT_LABEL

from .elementary import real
from .gradient import StatGrads, write_gradient, write_zeros
from .launch import launch, shared_lanes
from .params import RowInputs, Rows, columns_per_segment, gradient_rows, kernel, read_scaling, row_inputs, rows_of
from .rows import label_of, load_label, row_pointer, row_scaling, token_of
from .sweep import RowState, row_entropy, row_logprob, row_logsumexp, row_state

CUT_LABEL = tl.constexpr(_CUT_LABEL)


@triton.jit
def _store_state(saved_ptr, token, N, state):
    tl.store(saved_ptr + token, state.row_max)
    tl.store(saved_ptr + N + token, state.sum_rest)
    tl.store(saved_ptr + 2 * N + token, state.weighted_sum)


@kernel
def stats_forward_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, lanes_ptr, logprob_ptr, entropy_ptr, logsumexp_ptr,
    saved_ptr, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, N: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `lanes_ptr` holds the row's segments if other programs have swept them."""
    row = tl.program_id(0).to(tl.int64)
    token = token_of(row, row_index_ptr, first_token)
    label = label_of(labels_ptr, token, ignore_index, V)
    if label.ignored:
        if token >= 0:
            zero = real(0.0, L)
            if labels_ptr is not None:
                tl.store(logprob_ptr + token, zero)
            tl.store(entropy_ptr + token, zero)
            tl.store(logsumexp_ptr + token, zero)
            _store_state(saved_ptr, token, N, RowState(zero, zero, zero))
    else:
        start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
        scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, token, L)
        state = row_state(lanes_ptr, start, row, V, label.error, scaling, False, "evict_first", L)
        if labels_ptr is not None:
            v, _ = load_label(start, label.column, label.inside, scaling, L)
            tl.store(logprob_ptr + token, row_logprob(state, v, scaling.scale))
        tl.store(entropy_ptr + token, row_entropy(state))
        tl.store(logsumexp_ptr + token, row_logsumexp(state, scaling.scale))
        _store_state(saved_ptr, token, N, state)


@kernel
def partial_stats_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, lanes_ptr, state_ptr,
    V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, N: tl.int64, first_column: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `state_ptr` [4, N]: row_max, sum_rest, weighted_sum, label value (-inf if it is elsewhere)."""
    row = tl.program_id(0).to(tl.int64)
    token = token_of(row, row_index_ptr, first_token)
    label = label_of(labels_ptr, token, ignore_index, V)
    if label.ignored:
        if token >= 0:
            zero, empty = real(0.0, L), real(float("-inf"), L)
            _store_state(state_ptr, token, N, RowState(empty, zero, zero))
            tl.store(state_ptr + 3 * N + token, empty)
    else:
        start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
        scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, token, L)
        state = row_state(lanes_ptr, start, row, V, row < 0, scaling, True, "evict_first", L)
        column, inside = token * 0, token < 0
        if labels_ptr is not None:
            column = tl.load(labels_ptr + token) - first_column
            inside = (column >= 0) & (column < V)
        label_value, _ = load_label(start, tl.where(inside, column, 0), inside, scaling, L)
        _store_state(state_ptr, token, N, state)
        tl.store(state_ptr + 3 * N + token, label_value)


@kernel
def stats_backward_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, out_ptr, saved_ptr, grad_logprob_ptr, grad_entropy_ptr,
    grad_logsumexp_ptr,
    V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64, N: tl.int64, segments: tl.int32,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row. A gradient that is absent is no argument; `out_ptr` may be `logits_ptr`."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    end = tl.minimum(begin + SEGMENT, V)
    token = token_of(row, row_index_ptr, first_token)
    label = label_of(labels_ptr, token, ignore_index, V)
    start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
    target = row_pointer(out_ptr, row, inner, out_stride_outer, out_stride_inner, L)
    # A row that a support cut has its log-prob's gradient from another kernel; often nothing else.
    cut = token < token
    if labels_ptr is not None:
        cut = tl.load(labels_ptr + token, mask=token >= 0, other=ignore_index) == CUT_LABEL
    unread = label.ignored
    if grad_entropy_ptr is None:  # noqa: SIM102 (one after the other: each is known when the kernel is compiled)
        if grad_logsumexp_ptr is None:
            unread = unread | cut
    if unread:
        write_zeros(target, begin, end, L)
    else:
        g_logprob, g_entropy, g_logsumexp = real(0.0, L), real(0.0, L), real(0.0, L)
        if grad_logprob_ptr is not None:
            g_logprob = tl.where(cut, 0.0, tl.load(grad_logprob_ptr + token))
        if grad_entropy_ptr is not None:
            g_entropy = tl.load(grad_entropy_ptr + token)
        if grad_logsumexp_ptr is not None:
            g_logsumexp = tl.load(grad_logsumexp_ptr + token)
        state = RowState(tl.load(saved_ptr + token), tl.load(saved_ptr + N + token), tl.load(saved_ptr + 2 * N + token))
        scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, token, L)
        grads = StatGrads(g_logprob, g_entropy, g_logsumexp)
        write_gradient(start, target, begin, end, V, label, state, grads, scaling, grad_entropy_ptr is not None, L)


def _launch_forward(call: RowInputs, outputs: tuple[Tensor | None, ...], count: int) -> None:
    layout = call.layout()
    launch(
        stats_forward_kernel, call.rows.count, call.rows.data, *call.pointers(), shared_lanes(call, layout), *outputs,
        *call.numbers(), count, *read_scaling(call.params), L=layout,
    )  # fmt: skip


def stats_forward(logits: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob [N] or [0], entropy [N], logsumexp [N], saved [3, N]) of `[outer, inner, V]` logits."""
    call = row_inputs(logits, *inputs)
    rows = call.rows
    logprob = rows.per_token() if call.labels is not None else rows.per_token()[:0]
    outputs = (logprob, rows.per_token(), rows.per_token(), rows.per_token(3))
    _launch_forward(call, outputs, rows.count)
    return outputs


def stats_forward_(*inputs_and_stats) -> None:
    """As `stats_forward`, for some tokens, into `stats` [6, N]: logprob, entropy, logsumexp, saved."""
    *inputs, stats = inputs_and_stats
    _launch_forward(row_inputs(*inputs), (stats[0], stats[1], stats[2], stats[3:]), stats.shape[1])


def partial_stats_(*inputs_start_and_state) -> None:
    """[4, N] of a shard that holds columns `[start, start + V)`; labels are those of the whole vocabulary."""
    *inputs, start, state = inputs_start_and_state
    call = row_inputs(*inputs)
    layout = call.layout()
    launch(
        partial_stats_kernel, call.rows.count, call.rows.data, *call.pointers(), shared_lanes(call, layout), state,
        *call.numbers(), state.shape[1], start, *read_scaling(call.params), L=layout,
    )  # fmt: skip


def launch_backward(call: RowInputs, target: Rows, saved: Tensor, *grads: Tensor | None) -> None:
    """`grads` of logprob, entropy and logsumexp, each `[N]` or None."""
    layout = call.layout(target)
    columns = columns_per_segment(layout)
    segments = triton.cdiv(call.rows.V, columns)
    launch(
        stats_backward_kernel, call.rows.count * segments, call.rows.data, *call.pointers(), target.data, saved, *grads,
        *call.numbers(), *target.strides(), saved.shape[1], segments, *read_scaling(call.params),
        SEGMENT=columns, L=layout,
    )  # fmt: skip


def stats_backward(
    logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int, saved: Tensor,
    grad_logprob: Tensor | None, grad_entropy: Tensor | None, grad_logsumexp: Tensor | None,
) -> Tensor:  # fmt: skip
    """The gradient of `stats_forward`'s outputs by the logits, contiguous."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    call = row_inputs(logits, labels, temperature, params, ignore_index)
    launch_backward(call, rows_of(grad), saved, grad_logprob, grad_entropy, grad_logsumexp)
    return grad


def stats_backward_(*inputs_and_grads) -> None:
    """As `stats_backward`, for some tokens, into `grad_logits`, which may be the logits."""
    *inputs, saved, grad_logprob, grad_entropy, grad_logsumexp, grad_logits = inputs_and_grads
    call = row_inputs(*inputs)
    target = gradient_rows(call.rows, grad_logits)
    launch_backward(call, target, saved, grad_logprob, grad_entropy, grad_logsumexp)
