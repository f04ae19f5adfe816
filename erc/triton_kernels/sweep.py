"""The statistics sweep: the counterpart of `csrc/common/row_state.h` and `csrc/cuda/sweep.cuh`.

A row becomes `(row_max, sum_rest, weighted_sum)`: max v, the sum of `exp((v - row_max) * scale)` over everything but
one maximum, and the sum of `exp((v - row_max) * scale) * (v - row_max) * scale`.

How a row is summed. Columns are dealt out to `LANES` lanes, `VEC` neighbours at a time (one 128-bit load), and a lane
belongs to one thread. A lane keeps its own `(lane_max, sum_exp, weighted_sum)` in base-2 units relative to `reference =
fl(lane_max * scale2)`, `scale2 = scale * log2(e)`. `d = fma(v, scale2, -reference)` is exact up to one rounding,
because the state is relative to the rounded product itself; `finish_row` moves to the exact maximum by `fma(row_max,
-scale2, reference)`. No thread waits for another one inside the loop: lanes meet once per row.

Order. A row is cut into segments of `TILES` tiles; each starts from an empty state, and they merge lane by lane in the
order of their columns. So the bits of a result depend on the dtype and on V alone, not on the address, the batch, or
how many programs share the row. Every fused multiply-add is written out, and the kernels are compiled without
contraction.

A fast sweep leaves out the guard against `exp(-inf) * -inf`. A row with a forbidden token shows it by a weighted sum
that is not finite and is swept again with the guard, which changes no bit of the lanes that did not need it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import LN2, is_finite, log1p, real
from .rows import carrier, load_lanes, segment_columns

# What stands for the reference of a lane without a finite logit: finite, so that a difference of references is never
# NaN.
EMPTY_REFERENCE = tl.constexpr(-3.0e38)


class Lanes(NamedTuple):
    """The states of all lanes, `[LANES]` each, in base-2 units relative to `lane_max * scale2` as it is rounded."""

    lane_max: tl.tensor
    sum_exp: tl.tensor
    weighted_sum: tl.tensor


class RowState(NamedTuple):
    """The state of a row, in units of x; NaN where the row has no distribution."""

    row_max: tl.tensor
    sum_rest: tl.tensor
    weighted_sum: tl.tensor


# ---- the state of a lane ---------------------------------------------------------------------------------------------


@triton.jit
def lowest(scale2):
    return EMPTY_REFERENCE / tl.maximum(scale2, 1.0)


@triton.jit
def empty_lanes(scale2, L: tl.constexpr):
    """Of no elements. Its lane_max stands for -inf and keeps the reference finite."""
    zero = tl.zeros([L.LANES], L.REAL)
    return Lanes(zero + lowest(scale2), zero, zero)


@triton.jit
def update(lanes, v, scale2, GUARD: tl.constexpr):
    """Take in the tuple v of `[LANES]`, with one rescale for all of it."""
    tile_max = v[0]
    for i in tl.static_range(1, len(v)):
        tile_max = tl.maximum(tile_max, v[i])
    new_max = tl.maximum(lanes.lane_max, tile_max)
    reference = new_max * scale2
    shift = lanes.lane_max * scale2 - reference
    factor = tl.exp2(shift)
    tile_sum = tl.zeros_like(lanes.sum_exp)
    tile_weighted = tl.zeros_like(lanes.sum_exp)
    for i in tl.static_range(len(v)):
        d = tl.fma(v[i], scale2, -reference)
        e = tl.exp2(d)
        if GUARD:
            d = tl.maximum(d, EMPTY_REFERENCE)  # exp(-inf) * -inf; a NaN stays in e
        if i == 0:
            tile_sum = e
            tile_weighted = e * d
        else:
            tile_sum = tile_sum + e
            tile_weighted = tl.fma(e, d, tile_weighted)
    weighted_sum = tl.fma(tl.fma(lanes.sum_exp, shift, lanes.weighted_sum), factor, tile_weighted)
    return Lanes(new_max, tl.fma(lanes.sum_exp, factor, tile_sum), weighted_sum)


@triton.jit
def merge(a, b, scale2):
    """The states of two disjoint sets of elements, lane by lane. An empty state changes no bit of the other one."""
    lane_max = tl.maximum(a.lane_max, b.lane_max)
    reference = lane_max * scale2
    shift_a = a.lane_max * scale2 - reference
    shift_b = b.lane_max * scale2 - reference
    factor_a = tl.exp2(shift_a)
    factor_b = tl.exp2(shift_b)
    sum_exp = tl.fma(a.sum_exp, factor_a, b.sum_exp * factor_b)
    moved_b = tl.fma(b.sum_exp, shift_b, b.weighted_sum) * factor_b
    return Lanes(lane_max, sum_exp, tl.fma(tl.fma(a.sum_exp, shift_a, a.weighted_sum), factor_a, moved_b))


@triton.jit
def load_lane_states(at, L: tl.constexpr):
    """Lanes that `store_lane_states` left at `at`, [3, LANES]."""
    offsets = at + tl.arange(0, L.LANES)
    return Lanes(tl.load(offsets), tl.load(offsets + L.LANES), tl.load(offsets + 2 * L.LANES))


@triton.jit
def store_lane_states(at, lanes, L: tl.constexpr):
    offsets = at + tl.arange(0, L.LANES)
    tl.store(offsets, lanes.lane_max)
    tl.store(offsets + L.LANES, lanes.sum_exp)
    tl.store(offsets + 2 * L.LANES, lanes.weighted_sum)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


@triton.jit
def _sweep_segment(start, begin, V, scaling, GUARD: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of columns `[begin, begin + segment)` of the row at `start`."""
    TILE: tl.constexpr = L.LANES * L.VEC * L.LOADS
    lanes = empty_lanes(scaling.scale2, L)
    end = tl.minimum(begin + TILE * L.TILES, V)
    full = (end - begin) // TILE
    for tile in range(full):
        v = load_lanes(start, begin + tile * TILE, V, scaling, False, POLICY, L)
        lanes = update(lanes, v, scaling.scale2, GUARD)
    tail = begin + full * TILE
    if tail < end:
        v = load_lanes(start, tail, V, scaling, True, POLICY, L)
        # Columns behind the end are -inf, so the tail is always guarded.
        lanes = update(lanes, v, scaling.scale2, True)
    return lanes


@triton.jit
def _needs_guard(lanes):
    return tl.max(tl.where(is_finite(lanes.weighted_sum), 0, 1), 0) != 0


@triton.jit
def sweep_segment(start, begin, V, scaling, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of one segment, whatever it holds. For a row shared by several programs."""
    lanes = _sweep_segment(start, begin, V, scaling, False, POLICY, L)
    if _needs_guard(lanes):
        lanes = _sweep_segment(start, begin, V, scaling, True, POLICY, L)
    return lanes


@triton.jit
def _sweep_row(start, V, scaling, GUARD: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    lanes = empty_lanes(scaling.scale2, L)
    for begin in range(0, V, segment_columns(L)):
        lanes = merge(lanes, _sweep_segment(start, begin, V, scaling, GUARD, POLICY, L), scaling.scale2)
    return lanes


@triton.jit
def sweep_row(start, V, scaling, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of a whole row, whatever it holds."""
    lanes = _sweep_row(start, V, scaling, False, POLICY, L)
    if _needs_guard(lanes):
        lanes = _sweep_row(start, V, scaling, True, POLICY, L)
    return lanes


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _take(rest, weighted, maxima, v, center, scale2):
    """Sums with one more value per lane, exactly centred; those at the center itself are counted apart."""
    d = (v - center) * scale2
    e = tl.exp2(d)
    is_max = v == center
    return (
        rest + tl.where(is_max, 0.0, e),
        weighted + tl.where(e == 0.0, 0.0, e * d),
        maxima + tl.where(is_max, 1.0, 0.0),
    )


@triton.jit
def finish_row(lanes, start, V, scaling, L: tl.constexpr):
    """The state of a row from its lanes: NaN if it holds NaN or +inf, (-inf, 0, 0) if all -inf.

    The one lane that met the maximum holds a 1 that has rounded away what sum_rest is about, so its few columns are
    summed again without it, exactly centred.
    """
    scale2 = scaling.scale2
    index = tl.arange(0, L.LANES)
    row_max, winner = tl.max(lanes.lane_max, 0, return_indices=True)
    shift = tl.fma(row_max, -scale2, lanes.lane_max * scale2)
    factor = tl.exp2(shift)
    # A lane without a finite logit has no part in this: at its stand-in for -inf the residual above is anything.
    others = (index != winner) & (lanes.sum_exp != 0.0)
    rest = tl.where(others, lanes.sum_exp * factor, 0.0)
    weighted = tl.where(others, tl.fma(lanes.sum_exp, shift, lanes.weighted_sum) * factor, 0.0)
    maxima = tl.zeros([L.LANES], L.REAL)
    LOAD: tl.constexpr = L.LANES * L.VEC
    UNROLL: tl.constexpr = 1 if L.SOFTCAP else L.VEC  # eight tanh at once would spill
    for load in range(0, tl.cdiv(V, LOAD), L.LANES):
        first = (load + index) * LOAD + winner * L.VEC
        for i in tl.range(0, L.VEC, loop_unroll_factor=UNROLL):
            z = tl.load(start + first + i, mask=first + i < V, other=float("-inf"))
            rest, weighted, maxima = _take(rest, weighted, maxima, carrier(z, scaling, L), row_max, scale2)
    rest, weighted, maxima = tl.reduce((rest, weighted, maxima), 0, _add3)
    rest += maxima - 1.0
    weighted *= LN2
    empty = row_max <= lowest(scale2)
    valid = (row_max < float("inf")) & is_finite(rest) & is_finite(weighted)
    row_max = tl.where(empty, float("-inf"), row_max)
    nan = real(float("nan"), L)
    return RowState(
        tl.where(valid, row_max, nan),
        tl.where(valid, tl.where(empty, 0.0, rest), nan),
        tl.where(valid, tl.where(empty, 0.0, weighted), nan),
    )


@triton.jit
def is_tame(row_max, scale2):
    """Whether the rounding of row_max * scale2 leaves a residual that an exponent holds, 2^5 at most."""
    limit: tl.constexpr = 2.0**58 if row_max.dtype == tl.float64 else 2.0**29
    return tl.abs(row_max) * scale2 < limit


@triton.jit
def careful_row(start, V, scaling, L: tl.constexpr):
    """As `finish_row` by two plain sweeps, centred before they scale: for huge logits, and for what `lowest` cannot
    tell from -inf."""
    index = tl.arange(0, L.LANES)
    largest = tl.full([L.LANES], float("-inf"), L.REAL)
    for first in range(0, V, L.LANES):
        z = tl.load(start + first + index, mask=first + index < V, other=float("-inf"))
        largest = tl.maximum(largest, carrier(z, scaling, L))
    row_max = tl.max(largest, 0)
    center = tl.where(row_max == float("-inf"), 0.0, row_max)
    rest, weighted = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    maxima = tl.zeros([L.LANES], L.REAL)
    for first in range(0, V, L.LANES):
        z = tl.load(start + first + index, mask=first + index < V, other=float("-inf"))
        rest, weighted, maxima = _take(rest, weighted, maxima, carrier(z, scaling, L), center, scaling.scale2)
    rest, weighted, maxima = tl.reduce((rest, weighted, maxima), 0, _add3)
    rest += tl.where(row_max == float("-inf"), 0.0, maxima - 1.0)
    weighted *= LN2
    valid = (row_max < float("inf")) & is_finite(rest) & is_finite(weighted)
    nan = real(float("nan"), L)
    return RowState(tl.where(valid, row_max, nan), tl.where(valid, rest, nan), tl.where(valid, weighted, nan))


# ---- what follows from a state ---------------------------------------------------------------------------------------


@triton.jit
def row_logprob(state, label_value, scale):
    return (label_value - state.row_max) * scale - log1p(state.sum_rest)


@triton.jit
def row_entropy(state):
    """Both terms are >= 0: no cancellation."""
    return log1p(state.sum_rest) - state.weighted_sum / (1.0 + state.sum_rest)


@triton.jit
def row_logsumexp(state, scale):
    return state.row_max * scale + log1p(state.sum_rest)


@triton.jit
def row_state(
    lanes_ptr, start, row, V, error, scaling, PARTIAL: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr
):  # fmt: skip
    """The state of a row: swept here, or merged from `lanes_ptr`, [rows, segments, 3, LANES] of `sweep_lanes_kernel`.

    NaN for an `error` and for a row without a distribution. Of a PARTIAL row, -inf alone is the empty state.
    """
    if lanes_ptr is None:
        lanes = sweep_row(start, V, scaling, POLICY, L)
    else:
        segments = tl.cdiv(V, segment_columns(L))
        lanes = empty_lanes(scaling.scale2, L)
        for segment in range(segments):
            part = load_lane_states(lanes_ptr + (row * segments + segment) * (3 * L.LANES), L)
            lanes = merge(lanes, part, scaling.scale2)
    state = finish_row(lanes, start, V, scaling, L)
    if is_tame(state.row_max, scaling.scale2) == 0:
        state = careful_row(start, V, scaling, L)
    nan = real(float("nan"), L)
    if not PARTIAL:
        error = error | (state.row_max == float("-inf"))
    return RowState(
        tl.where(error, nan, state.row_max),
        tl.where(error, nan, state.sum_rest),
        tl.where(error, nan, state.weighted_sum),
    )
