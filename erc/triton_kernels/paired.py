"""New and old rows side by side: entropies, their ratio, both Kullback-Leibler divergences and the total variation.

The first sweeps give each row its state; the last one adds up terms that are >= 0 one by one:
`KL(p || q) = sum p * (delta + expm1(-delta))` with `delta = log p - log q`, so that a small divergence is no difference
of large numbers. Both rows come from the L2 cache the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .params import kernel, layout_of, read_scaling, rows_of, segment_columns, stats_dtype
from .row_algebra import (
    carrier,
    carrier_and_chain,
    load_lane,
    load_tile,
    log1p,
    row_entropy,
    row_mask,
    row_pointer,
    row_scale,
    row_state,
    tile_offsets,
)

RATIO_EPS = tl.constexpr(1e-8)
STATS = 6
SAVED = 8


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
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@kernel
def paired_forward_kernel(
    logits, old_logits, temperature, stats, saved,
    N: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    old_stride_outer: tl.int64,
    old_stride_inner: tl.int64, scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, L: tl.constexpr,
):  # fmt: skip
    """One program a row; `stats` [6, N], `saved` [8, N]."""
    row = tl.program_id(0).to(tl.int64)
    new = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
    old = row_pointer(old_logits, row, inner, old_stride_outer, old_stride_inner, L)
    p_max, p_rest, p_weighted, s = row_state(
        None, new, row, V, row < 0, temperature, scale, cap, cap_scale, False, "evict_last", L
    )
    q_max, q_rest, q_weighted, _ = row_state(
        None, old, row, V, row < 0, temperature, scale, cap, cap_scale, False, "evict_last", L
    )
    p_log, q_log = log1p(p_rest), log1p(q_rest)
    new_old, old_new = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    variation, balance = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    for first in range(0, V, L.LANES * L.VEC):
        new_v = load_lane(new, first, V, cap, cap_scale, True, "evict_first", L)
        old_v = load_lane(old, first, V, cap, cap_scale, True, "evict_first", L)
        for i in tl.static_range(len(new_v)):
            log_p = log_probability(new_v[i], p_max, p_log, s)
            log_q = log_probability(old_v[i], q_max, q_log, s)
            p, q = tl.exp(log_p), tl.exp(log_q)
            term_p, term_q = divergence_terms(p, q, difference_of(log_p, log_q))
            new_old += term_p
            old_new += term_q
            variation += tl.abs(p - q)
            balance += p * sign(p - q)
    new_old, old_new, variation, balance = tl.reduce((new_old, old_new, variation, balance), 0, _add4)
    entropy, old_entropy = row_entropy(p_rest, p_weighted), row_entropy(q_rest, q_weighted)
    tl.store(stats + row, (entropy + RATIO_EPS) / (old_entropy + RATIO_EPS))
    tl.store(stats + N + row, entropy)
    tl.store(stats + 2 * N + row, old_entropy)
    tl.store(stats + 3 * N + row, new_old)
    tl.store(stats + 4 * N + row, old_new)
    tl.store(stats + 5 * N + row, variation / 2.0)
    tl.store(saved + row, p_max)
    tl.store(saved + N + row, p_rest)
    tl.store(saved + 2 * N + row, p_weighted)
    tl.store(saved + 3 * N + row, q_max)
    tl.store(saved + 4 * N + row, q_rest)
    tl.store(saved + 5 * N + row, q_weighted)
    tl.store(saved + 6 * N + row, new_old)
    tl.store(saved + 7 * N + row, balance)


@kernel
def paired_backward_kernel(
    logits, old_logits, out, temperature, saved, grads,
    N: tl.int64, V: tl.int32, segments: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    old_stride_outer: tl.int64,
    old_stride_inner: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row. The old row is a constant: its entropy has no gradient.

    d/dx_j = p_j * (-g_H * (log p_j + H) + g_new_old * (delta_j - KL) + g_TV / 2 * (sign_j - E_p[sign])) + g_old_new *
    (p_j - q_j).
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    end = tl.minimum(begin + SEGMENT, V)
    new = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
    old = row_pointer(old_logits, row, inner, old_stride_outer, old_stride_inner, L)
    target = row_pointer(out, row, inner, out_stride_outer, out_stride_inner, L)
    s, _ = row_scale(scale, temperature, row, L)
    p_max, p_rest = tl.load(saved + row), tl.load(saved + N + row)
    mean = tl.load(saved + 2 * N + row) / (1.0 + p_rest)
    q_max, q_rest = tl.load(saved + 3 * N + row), tl.load(saved + 4 * N + row)
    old_entropy = row_entropy(q_rest, tl.load(saved + 5 * N + row))
    divergence, balance = tl.load(saved + 6 * N + row), tl.load(saved + 7 * N + row)
    g_entropy = tl.load(grads + N + row) + tl.load(grads + row) / (old_entropy + RATIO_EPS)
    g_new_old, g_old_new = tl.load(grads + 3 * N + row), tl.load(grads + 4 * N + row)
    g_variation = tl.load(grads + 5 * N + row) / 2.0
    p_log, q_log = log1p(p_rest), log1p(q_rest)
    for first in range(begin, end, L.LANES * L.VEC):
        offsets = tile_offsets(first, L)
        z = load_tile(new, first, V, True, "evict_first", L)
        v, chain = carrier_and_chain(z, cap, cap_scale, L)
        old_v = carrier(load_tile(old, first, V, True, "evict_first", L), cap, cap_scale, L)
        log_p = log_probability(v, p_max, p_log, s)
        log_q = log_probability(old_v, q_max, q_log, s)
        p, q = tl.exp(log_p), tl.exp(log_q)
        kl_term = tl.where(g_new_old == 0.0, 0.0, g_new_old * (difference_of(log_p, log_q) - divergence))
        # (x - m) - t / S stands for log p + H: the difference of the two is exact there.
        slope = -g_entropy * ((v - p_max) * s - mean) + kl_term + g_variation * (sign(p - q) - balance)
        gradient = tl.where(p == 0.0, 0.0, p * slope) + g_old_new * (p - q)
        # A forbidden token has gradient 0, unless its row has no distribution: then 0 * NaN.
        gradient = tl.where(v == float("-inf"), 0.0 * (p_max + q_max), gradient * s * chain)
        tl.store(target + offsets, gradient.to(target.dtype.element_ty), mask=row_mask(offsets, end, L))


def paired_forward(
    logits: Tensor, old_logits: Tensor, temperature: Tensor | None, params: Tensor
) -> tuple[Tensor, Tensor]:
    """`stats` [6, N] (ratio, entropy, old_entropy, kl_new_old, kl_old_new, total_variation) and what the backward
    needs.
    """
    new, old = rows_of(logits), rows_of(old_logits)
    dtype = stats_dtype(logits.dtype)
    stats, saved = (logits.new_empty((n, new.count), dtype=dtype) for n in (STATS, SAVED))
    launch(
        paired_forward_kernel, new.count, logits, logits, old_logits, temperature, stats, saved, new.count, new.V,
        *new.address(), old.stride_outer, old.stride_inner, *read_scaling(params),
        L=layout_of(params, temperature, new, old),
    )  # fmt: skip
    return stats, saved


def paired_backward(
    logits: Tensor, old_logits: Tensor, temperature: Tensor | None, params: Tensor, saved: Tensor, grads: Tensor
) -> Tensor:
    """The gradient of `paired_forward`'s stats by `logits`, contiguous."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    new, old, target = rows_of(logits), rows_of(old_logits), rows_of(out)
    layout = layout_of(params, temperature, new, old, target)
    columns = segment_columns(layout)
    segments = triton.cdiv(new.V, columns)
    launch(
        paired_backward_kernel, new.count * segments, logits, logits, old_logits, out, temperature, saved, grads,
        new.count, new.V, segments, *new.address(), old.stride_outer, old.stride_inner,
        target.stride_outer, target.stride_inner, *read_scaling(params), SEGMENT=columns, L=layout,
    )  # fmt: skip
    return out
