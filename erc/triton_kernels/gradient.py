"""The gradient sweep, and the labelled column by itself: the counterpart of `csrc/cuda/gradient.cuh`."""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import LN2
from .rows import carrier_and_chain, load_label, load_tile, row_mask, tile_offsets
from .sweep import EMPTY_REFERENCE


class StatGrads(NamedTuple):
    """What the statistics of a row are differentiated by."""

    logprob: tl.tensor
    entropy: tl.tensor
    logsumexp: tl.tensor


class Coefficients(NamedTuple):
    """`d/dv_j = exp2(d) * (constant + slope * d)` with `d = (v_j - row_max) * scale2`.

    d is centred before it is scaled, one operation more than a fused multiply-add: what rounding would leave of the
    maximum's own d is all of a peaked row's entropy gradient, and more than a gradient bears of huge logits.
    """

    row_max: tl.tensor
    constant: tl.tensor
    slope: tl.tensor


@triton.jit
def label_gradient(state, grads, scale, label_value):
    """The labelled column's d/dx by itself: in the formula of the others 1 - p_y would cancel."""
    inverse_sum = 1.0 / (1.0 + state.sum_rest)
    mean = state.weighted_sum * inverse_sum
    shift = (label_value - state.row_max) * scale
    at_max = (grads.logprob * state.sum_rest + grads.logsumexp + grads.entropy * mean) * inverse_sum
    probability = tl.exp(shift) * inverse_sum
    others = tl.where(probability == 0.0, 0.0, probability * (grads.logsumexp + grads.entropy * (mean - shift)))
    below = grads.logprob * (1.0 - probability) + others
    return tl.where(label_value == float("-inf"), 0.0, tl.where(shift == 0.0, at_max, below))


@triton.jit
def column_coefficients(state, grads, scale):
    inverse_sum = 1.0 / (1.0 + state.sum_rest)
    factor = inverse_sum * scale
    constant = (grads.logsumexp - grads.logprob + grads.entropy * (state.weighted_sum * inverse_sum)) * factor
    return Coefficients(state.row_max, constant, -grads.entropy * LN2 * factor)


@triton.jit
def _store_gradient(out, first, z, V, scaling, c, MASKED: tl.constexpr, SLOPE: tl.constexpr, L: tl.constexpr):
    """The gradient of the logits z, `[LANES, VEC]` from column `first` on."""
    v, chain = carrier_and_chain(z, scaling, L)
    d = (v - c.row_max) * scaling.scale2
    e = tl.exp2(d)
    if SLOPE:
        # exp(-inf) * -inf would be NaN; a NaN stays in e.
        gradient = e * tl.fma(tl.maximum(d, EMPTY_REFERENCE * 1e-30), c.slope, c.constant)
    else:
        gradient = e * c.constant
    if L.SOFTCAP:
        gradient = tl.where(e == 0.0, 0.0, gradient * chain)
    offsets = tile_offsets(first, L)
    gradient = gradient.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + offsets, gradient, mask=row_mask(offsets, V, L), eviction_policy="evict_first")
    else:
        tl.store(out + offsets, gradient, eviction_policy="evict_first")


@triton.jit
def gradient_sweep(
    start, out, begin, end, V, scaling, c, SLOPE: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """Write the gradient of columns `[begin, end)`; `out` may be `start`, since a thread stores what it has loaded."""
    LOAD: tl.constexpr = L.LANES * L.VEC
    full = (end - begin) // (LOAD * L.LOADS)
    for tile in range(full):
        first = begin + tile * (LOAD * L.LOADS)
        # No load passes a store, so all of them come first and wait together.
        z = ()
        for load in tl.static_range(L.LOADS):
            z = z + (load_tile(start, first + load * LOAD, V, False, POLICY, L),)
        for load in tl.static_range(L.LOADS):
            _store_gradient(out, first + load * LOAD, z[load], V, scaling, c, False, SLOPE, L)
    for first in range(begin + full * (LOAD * L.LOADS), end, LOAD):
        z = load_tile(start, first, V, True, POLICY, L)
        _store_gradient(out, first, z, V, scaling, c, True, SLOPE, L)


@triton.jit
def write_zeros(out, begin, end, L: tl.constexpr):
    """A gradient of exactly 0 for columns `[begin, end)`."""
    for first in range(begin, end, L.LANES * L.VEC):
        offsets = tile_offsets(first, L)
        zero = tl.zeros([L.LANES, L.VEC], out.dtype.element_ty)
        tl.store(out + offsets, zero, mask=row_mask(offsets, end, L), eviction_policy="evict_first")


@triton.jit
def write_gradient(start, out, begin, end, V, label, state, grads, scaling, SLOPE: tl.constexpr, L: tl.constexpr):
    """The gradient of columns `[begin, end)`, the labelled one by its own formula."""
    # Read before the sweep: `out` may be `start`, and another program may be writing columns outside [begin, end).
    inside = label.inside & (label.column >= begin) & (label.column < end)
    label_value, label_chain = load_label(start, label.column, inside, scaling, L)
    at_label = label_gradient(state, grads, scaling.scale, label_value)
    at_label *= scaling.scale * label_chain
    at_label = tl.where(label_value == float("-inf"), 0.0, at_label)
    c = column_coefficients(state, grads, scaling.scale)
    tl.debug_barrier()
    gradient_sweep(start, out, begin, end, V, scaling, c, SLOPE, "evict_first", L)
    # Whoever wrote the label's column in the sweep is another thread.
    tl.debug_barrier()
    tl.store(out + label.column, at_label.to(out.dtype.element_ty), mask=inside)
