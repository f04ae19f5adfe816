"""New and old rows side by side: entropies, their ratio, both Kullback-Leibler divergences and the total variation.

The first sweeps give each row its state; the last one adds up terms that are >= 0 one by one:
`KL(p || q) = sum p * (delta + expm1(-delta))` with `delta = log p - log q`, so that a small divergence is no difference
of large numbers. Both rows come from the L2 cache the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from erc import constants

from .elementary import log1p
from .launch import launch
from .params import columns_per_segment, kernel, read_scaling, row_inputs, rows_of
from .rows import carrier, carrier_and_chain, load_lane, load_tile, row_mask, row_pointer, row_scaling, tile_offsets
from .sweep import RowState, row_entropy, row_state

RATIO_EPS = tl.constexpr(constants.RATIO_EPS)


@triton.jit
def divergence_series(delta):
    """delta + expm1(-delta) for |delta| <= 1/2, by its series: 14 terms leave less than 1e-15 of it."""
    sum_of_terms = delta * 0.0 + 1.0
    for k in tl.static_range(12):
        sum_of_terms = 1.0 - delta * (1.0 / (14 - k)) * sum_of_terms
    return delta * delta * 0.5 * sum_of_terms


@triton.jit
def log_probability(v, row_max, log_sum, scale):
    return (v - row_max) * scale - log_sum


@triton.jit
def difference_of(log_p, log_q):
    """log p - log q, 0 where both tokens are forbidden."""
    return tl.where(log_p == log_q, 0.0, log_p - log_q)


@triton.jit
def divergence_terms(p, q, delta):
    """The terms of (KL(p || q), KL(q || p)), each >= 0."""
    small = tl.abs(delta) < 0.5
    tame = tl.where(small, delta, 0.0)
    far_p = tl.where(p == 0.0, 0.0, p * delta) - (p - q)
    far_q = (p - q) - tl.where(q == 0.0, 0.0, q * delta)
    return tl.where(small, p * divergence_series(tame), far_p), tl.where(small, q * divergence_series(-tame), far_q)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def saved_state(pointer, N):
    return RowState(tl.load(pointer), tl.load(pointer + N), tl.load(pointer + 2 * N))


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@kernel
def paired_forward_kernel(
    logits_ptr, old_logits_ptr, temperature_ptr, states_ptr, stats_ptr, saved_ptr,
    N: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    old_stride_outer: tl.int64, old_stride_inner: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `stats_ptr` [6, N], `saved_ptr` [8, N]. With `states_ptr` [6, N] the row is part of a row of
    those states, and the sums are its own columns'."""
    row = tl.program_id(0).to(tl.int64)
    new = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
    old = row_pointer(old_logits_ptr, row, inner, old_stride_outer, old_stride_inner, L)
    scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, row, L)
    if states_ptr is None:
        p_state = row_state(None, new, row, V, row < 0, scaling, False, "evict_last", L)
        q_state = row_state(None, old, row, V, row < 0, scaling, False, "evict_last", L)
    else:
        p_state, q_state = saved_state(states_ptr + row, N), saved_state(states_ptr + 3 * N + row, N)
    p_log, q_log = log1p(p_state.sum_rest), log1p(q_state.sum_rest)
    new_old, old_new = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    variation, balance = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    for first in range(0, V, L.LANES * L.VEC):
        new_v = load_lane(new, first, V, scaling, True, "evict_first", L)
        old_v = load_lane(old, first, V, scaling, True, "evict_first", L)
        for i in tl.static_range(len(new_v)):
            log_p = log_probability(new_v[i], p_state.row_max, p_log, scaling.scale)
            log_q = log_probability(old_v[i], q_state.row_max, q_log, scaling.scale)
            p, q = tl.exp(log_p), tl.exp(log_q)
            term_p, term_q = divergence_terms(p, q, difference_of(log_p, log_q))
            new_old += term_p
            old_new += term_q
            variation += tl.abs(p - q)
            balance += p * sign(p - q)
    new_old, old_new, variation, balance = tl.reduce((new_old, old_new, variation, balance), 0, _add4)
    entropy, old_entropy = row_entropy(p_state), row_entropy(q_state)
    tl.store(stats_ptr + row, (entropy + RATIO_EPS) / (old_entropy + RATIO_EPS))
    tl.store(stats_ptr + N + row, entropy)
    tl.store(stats_ptr + 2 * N + row, old_entropy)
    tl.store(stats_ptr + 3 * N + row, new_old)
    tl.store(stats_ptr + 4 * N + row, old_new)
    tl.store(stats_ptr + 5 * N + row, variation / 2.0)
    for i in tl.static_range(3):
        tl.store(saved_ptr + i * N + row, p_state[i])
        tl.store(saved_ptr + (3 + i) * N + row, q_state[i])
    tl.store(saved_ptr + 6 * N + row, new_old)
    tl.store(saved_ptr + 7 * N + row, balance)


@kernel
def paired_backward_kernel(
    logits_ptr, old_logits_ptr, out_ptr, temperature_ptr, saved_ptr, grads_ptr,
    N: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    old_stride_outer: tl.int64, old_stride_inner: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64,
    segments: tl.int32, scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row. The old row is a constant: its entropy has no gradient.

    d/dx_j = p_j * (-g_H * (log p_j + H) + g_new_old * (delta_j - KL) + g_TV / 2 * (sign_j - E_p[sign])) + g_old_new *
    (p_j - q_j).
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    end = tl.minimum(begin + SEGMENT, V)
    new = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
    old = row_pointer(old_logits_ptr, row, inner, old_stride_outer, old_stride_inner, L)
    target = row_pointer(out_ptr, row, inner, out_stride_outer, out_stride_inner, L)
    scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, row, L)
    saved, grads = saved_ptr + row, grads_ptr + row
    p_state, q_state = saved_state(saved, N), saved_state(saved + 3 * N, N)
    divergence, balance = tl.load(saved + 6 * N), tl.load(saved + 7 * N)
    mean = p_state.weighted_sum / (1.0 + p_state.sum_rest)
    g_entropy = tl.load(grads + N) + tl.load(grads) / (row_entropy(q_state) + RATIO_EPS)
    g_new_old, g_old_new = tl.load(grads + 3 * N), tl.load(grads + 4 * N)
    g_variation = tl.load(grads + 5 * N) / 2.0
    p_log, q_log = log1p(p_state.sum_rest), log1p(q_state.sum_rest)
    for first in range(begin, end, L.LANES * L.VEC):
        offsets = tile_offsets(first, L)
        z = load_tile(new, first, V, True, "evict_first", L)
        v, chain = carrier_and_chain(z, scaling, L)
        old_v = carrier(load_tile(old, first, V, True, "evict_first", L), scaling, L)
        log_p = log_probability(v, p_state.row_max, p_log, scaling.scale)
        log_q = log_probability(old_v, q_state.row_max, q_log, scaling.scale)
        p, q = tl.exp(log_p), tl.exp(log_q)
        kl_term = tl.where(g_new_old == 0.0, 0.0, g_new_old * (difference_of(log_p, log_q) - divergence))
        # (x - m) - t / S stands for log p + H: the difference of the two is exact there.
        slope = -g_entropy * ((v - p_state.row_max) * scaling.scale - mean) + kl_term
        slope += g_variation * (sign(p - q) - balance)
        gradient = tl.where(p == 0.0, 0.0, p * slope) + g_old_new * (p - q)
        # A forbidden token has gradient 0, unless its row has no distribution: then 0 * NaN.
        broken = 0.0 * (p_state.row_max + q_state.row_max)
        gradient = tl.where(v == float("-inf"), broken, gradient * scaling.scale * chain)
        tl.store(target + offsets, gradient.to(target.dtype.element_ty), mask=row_mask(offsets, end, L))


def paired_forward(
    logits: Tensor, old_logits: Tensor, temperature: Tensor | None, params: Tensor, states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`stats` [6, N] (`erc.constants.PAIRED_OUTPUTS`) and what the backward needs; `states`: of a shard's columns."""
    call, old = row_inputs(logits, None, temperature, params, 0), rows_of(old_logits)
    new = call.rows
    stats, saved = new.per_token(len(constants.PAIRED_OUTPUTS)), new.per_token(constants.PAIRED_SAVED)
    launch(
        paired_forward_kernel, new.count, logits, logits, old_logits, temperature, states, stats, saved, new.count,
        new.V, *new.address(), *old.strides(), *read_scaling(params), L=call.layout(old),
    )  # fmt: skip
    return stats, saved


def paired_backward(
    logits: Tensor, old_logits: Tensor, temperature: Tensor | None, params: Tensor, saved: Tensor, grads: Tensor
) -> Tensor:
    """The gradient of `paired_forward`'s stats by `logits`, contiguous."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    call, old, target = row_inputs(logits, None, temperature, params, 0), rows_of(old_logits), rows_of(out)
    new, layout = call.rows, call.layout(old, target)
    columns = columns_per_segment(layout)
    segments = triton.cdiv(new.V, columns)
    launch(
        paired_backward_kernel, new.count * segments, logits, logits, old_logits, out, temperature, saved, grads,
        new.count, new.V, *new.address(), *old.strides(), *target.strides(), segments, *read_scaling(params),
        SEGMENT=columns, L=layout,
    )  # fmt: skip
    return out
