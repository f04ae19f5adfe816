"""The row algebra in Triton: the counterpart of `csrc/common/row_state.h`, used by every kernel of this package.

`v` is the logit, or its softcapped value; `x = v * scale` is what enters the softmax. A row becomes
`(row_max, sum_rest, weighted_sum)`: max v, the sum of `exp((v - row_max) * scale)` over everything but one maximum, and
the sum of `exp((v - row_max) * scale) * (v - row_max) * scale`.

How a row is summed. Columns are dealt out to `LANES` lanes, `VEC` neighbours at a time (one 128-bit load), and a lane
belongs to one thread. A lane keeps its own `(lane_max, sum_exp, weighted_sum)` in base-2 units relative to `reference =
fl(lane_max * scale2)`, `scale2 = scale * log2(e)`. `d = fma(v, scale2, -reference)` is exact up to one rounding,
because the state is relative to the rounded product itself; `finish_row` moves to the exact maximum by `fma(row_max,
-scale2, reference)`. No thread waits for another one inside the loop: lanes meet once a row.

Order. A row is cut into segments of `TILES` tiles; each starts from an empty state, and they merge lane by lane in the
order of their columns. So the bits of a result depend on the dtype and on V alone, not on the address, the batch, or
how many programs share the row. Every fused multiply-add is written out, and the kernels are compiled without
contraction.

A fast sweep leaves out the guard against `exp(-inf) * -inf`. A row with a forbidden token shows it by a weighted sum
that is not finite and is swept again with the guard, which changes no bit of the lanes that did not need it.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

import inspect
from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The label of a row whose labelled column another vocabulary shard holds.
ABSENT_LABEL = tl.constexpr(-(2**63))

# What stands for the reference of a lane without a finite logit: finite, so that a difference of references is never
# NaN.
EMPTY_REFERENCE = tl.constexpr(-3.0e38)

# Below it tanh is a polynomial; above it `1 - exp(-2u)` loses nothing.
SMALL_TANH = tl.constexpr(0.55)

# Older releases of Triton divide in full, which costs six instructions more.
HAS_APPROXIMATE_DIVISION = tl.constexpr("approx" in inspect.signature(tl.fdiv).parameters)


class Layout(NamedTuple):
    """What changes the machine code of a sweep. One constexpr argument of every kernel."""

    LANES: int  # threads of a program, one lane each
    VEC: int  # neighbouring columns a lane takes by one load: 128 bits
    LOADS: int  # loads a lane takes between two rescales
    TILES: int  # tiles of LANES * VEC * LOADS columns in a segment
    ALIGNED: bool  # rows start at, and V and strides are, multiples of 128 bits
    PACKED: bool  # bfloat16: widen pairs from a 32-bit word, one instruction a value
    SOFTCAP: bool
    PER_ROW: bool  # one temperature a row
    REAL: tl.dtype  # the statistics dtype


class Scaling(NamedTuple):
    """Run-time scaling arguments: x = v * scale / temperature, v = cap * tanh(z * cap_scale) or z."""

    scale: float
    cap: float
    cap_scale: float


# ---- elementary functions: by arithmetic that the interpreter, NVIDIA and AMD share ----------------------------------


@triton.jit
def real(value, L: tl.constexpr):
    """A scalar argument as a 0-d tensor of the statistics dtype."""
    return tl.full((), value, L.REAL)


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp for x >= 0 (Kahan)."""
    u = 1.0 + x
    rest = u - 1.0
    return tl.where(rest == 0.0, x, tl.log(u) * (x / tl.where(rest == 0.0, 1.0, rest)))


@triton.jit
def expm1(x):
    """exp(x) - 1 to a few ulp for |x| <= 80 (Kahan): an error of exp cancels in (u - 1) / log(u)."""
    u = tl.exp(x)
    log_u = tl.log(u)
    return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.where(log_u == 0.0, 1.0, log_u)))


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 - tanh(u)^2, each to a few ulp: no approximate tanh, and one division for both."""
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    if HAS_APPROXIMATE_DIVISION and u.dtype == tl.float32:
        inverse = tl.fdiv(tl.zeros_like(e) + 1.0, 1.0 + e, approx=True)  # 2 ulp: the divisor is in [1, 2]
    else:
        inverse = 1.0 / (1.0 + e)
    w = u * u
    if u.dtype == tl.float64:
        # Lambert's continued fraction, cut where its error is 1e-14.
        numerator = 135135.0 + w * (17325.0 + w * (378.0 + w))
        near_zero = u * (numerator / (135135.0 + w * (62370.0 + w * (3150.0 + w * 28.0))))
    else:
        # Fitted to tanh(u) / u on |u| < SMALL_TANH at the Chebyshev nodes of w: 1.2 ulp.
        p = tl.fma(w, -0.006615761201828718, 0.02131274901330471)
        p = tl.fma(w, p, -0.05391006916761398)
        p = tl.fma(w, p, 0.13333117961883545)
        p = tl.fma(w, p, -0.3333333134651184)
        near_zero = tl.fma(u * w, p, u)
    far = (1.0 - e) * inverse
    tanh = tl.where(tl.abs(u) < SMALL_TANH, near_zero, tl.where(u < 0, -far, far))
    return tanh, 4.0 * e * (inverse * inverse)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


# ---- rows and their scaling ------------------------------------------------------------------------------------------


@triton.jit
def row_pointer(pointer, row, inner, stride_outer, stride_inner, L: tl.constexpr):
    """Where row `row` of `[outer, inner, V]` starts. 64-bit: N * V may exceed 2^31."""
    row = row.to(tl.int64)
    start = pointer + ((row // inner) * stride_outer + (row % inner) * stride_inner)
    if L.ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def row_scale(scale, temperature, row, L: tl.constexpr):
    """(scale, scale * log2(e)) of a row, each rounded once: both come from float64."""
    wide = tl.full((), scale, tl.float64)
    if L.PER_ROW:
        wide = wide / tl.load(temperature + row).to(tl.float64)
    return wide.to(L.REAL), (wide * LOG2E).to(L.REAL)


@triton.jit
def carrier_and_chain(z, cap, cap_scale, L: tl.constexpr):
    """(v, dv/dz) of logits z. -inf stays a forbidden token under a softcap, and +inf stays no logit at all."""
    z = z.to(L.REAL)
    if L.SOFTCAP:
        inner = real(cap_scale, L)
        outer = real(cap, L)
        capped, slope = tanh_and_slope(z * inner)
        return tl.where(tl.abs(z) == float("inf"), z, outer * capped), slope * (outer * inner)
    else:
        return z, real(1.0, L)


@triton.jit
def carrier(z, cap, cap_scale, L: tl.constexpr):
    """The values v of logits z."""
    v, _ = carrier_and_chain(z, cap, cap_scale, L)
    return v


# ---- loading ---------------------------------------------------------------------------------------------------------


@triton.jit
def tile_offsets(first, L: tl.constexpr):
    return (first + tl.arange(0, L.LANES) * L.VEC)[:, None] + tl.arange(0, L.VEC)[None, :]


@triton.jit
def row_mask(offsets, V, L: tl.constexpr):
    """Which offsets lie in the row. Of an aligned row, all of a lane's load or none of it."""
    mask = offsets < V
    if L.ALIGNED:
        mask = tl.max_constancy(mask, [1, L.VEC])
    return mask


@triton.jit
def load_tile(row, first, V, MASKED: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """`[LANES, VEC]` logits from column `first` on, in the statistics dtype; -inf behind the end of the row."""
    if L.PACKED and L.ALIGNED and not MASKED:
        words = (first // 2 + tl.arange(0, L.LANES) * (L.VEC // 2))[:, None] + tl.arange(0, L.VEC // 2)[None, :]
        pair = tl.load(tl.multiple_of(row.to(tl.pointer_type(tl.int32)), 16) + words, eviction_policy=POLICY)
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & -65536).to(tl.float32, bitcast=True)
        z = tl.reshape(tl.join(low, high), [L.LANES, L.VEC])
    else:
        offsets = tile_offsets(first, L)
        if MASKED:
            z = tl.load(row + offsets, mask=row_mask(offsets, V, L), other=float("-inf"), eviction_policy=POLICY)
        else:
            z = tl.load(row + offsets, eviction_policy=POLICY)
    return z.to(L.REAL)


@triton.jit
def _columns(x, WIDTH: tl.constexpr, L: tl.constexpr):
    """A `[LANES, WIDTH]` tile as WIDTH tensors `[LANES]`, in order. One thread holds a row of it: nothing moves."""
    even, odd = tl.split(tl.reshape(x, [L.LANES, WIDTH // 2, 2]))
    if WIDTH == 2:
        return (tl.reshape(even, [L.LANES]), tl.reshape(odd, [L.LANES]))
    else:
        evens = _columns(even, WIDTH // 2, L)
        odds = _columns(odd, WIDTH // 2, L)
        out = ()
        for i in tl.static_range(WIDTH // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def load_lane(row, first, V, cap, cap_scale, MASKED: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The values v of one load of each lane, from column `first` on: a tuple of VEC tensors `[LANES]`."""
    out = ()
    if L.ALIGNED:
        z = _columns(load_tile(row, first, V, MASKED, POLICY, L), L.VEC, L)
        for i in tl.static_range(L.VEC):
            out = out + (carrier(z[i], cap, cap_scale, L),)
    else:
        # A misaligned row takes narrower loads, never a peel: the columns of a lane must not depend on the address.
        lane = first + tl.arange(0, L.LANES) * L.VEC
        for i in tl.static_range(L.VEC):
            if MASKED:
                z1 = tl.load(row + lane + i, mask=lane + i < V, other=float("-inf"), eviction_policy=POLICY)
            else:
                z1 = tl.load(row + lane + i, eviction_policy=POLICY)
            out = out + (carrier(z1, cap, cap_scale, L),)
    return out


@triton.jit
def load_lanes(row, first, V, cap, cap_scale, MASKED: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The values of LOADS loads of each lane."""
    out = ()
    for load in tl.static_range(L.LOADS):
        out = out + load_lane(row, first + load * (L.LANES * L.VEC), V, cap, cap_scale, MASKED, POLICY, L)
    return out


# ---- the state of a lane ---------------------------------------------------------------------------------------------


@triton.jit
def empty_lanes(scale2, L: tl.constexpr):
    """(lane_max, sum_exp, weighted_sum) of no elements. Its lane_max stands for -inf and keeps the reference finite."""
    zero = tl.zeros([L.LANES], L.REAL)
    return zero + lowest(scale2), zero, zero


@triton.jit
def lowest(scale2):
    return EMPTY_REFERENCE / tl.maximum(scale2, 1.0)


@triton.jit
def update(lane_max, sum_exp, weighted_sum, v, scale2, GUARD: tl.constexpr):
    """Take in the tuple v of `[LANES]`, with one rescale for all of it."""
    tile_max = v[0]
    for i in tl.static_range(1, len(v)):
        tile_max = tl.maximum(tile_max, v[i])
    new_max = tl.maximum(lane_max, tile_max)
    reference = new_max * scale2
    shift = lane_max * scale2 - reference
    factor = tl.exp2(shift)
    tile_sum = tl.zeros_like(sum_exp)
    tile_weighted = tl.zeros_like(sum_exp)
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
    weighted_sum = tl.fma(tl.fma(sum_exp, shift, weighted_sum), factor, tile_weighted)
    return new_max, tl.fma(sum_exp, factor, tile_sum), weighted_sum


@triton.jit
def merge(max_a, sum_a, weighted_a, max_b, sum_b, weighted_b, scale2):
    """The states of two disjoint sets of elements, lane by lane. An empty state changes no bit of the other one."""
    lane_max = tl.maximum(max_a, max_b)
    reference = lane_max * scale2
    shift_a = max_a * scale2 - reference
    shift_b = max_b * scale2 - reference
    factor_a = tl.exp2(shift_a)
    factor_b = tl.exp2(shift_b)
    sum_exp = tl.fma(sum_a, factor_a, sum_b * factor_b)
    moved_b = tl.fma(sum_b, shift_b, weighted_b) * factor_b
    return lane_max, sum_exp, tl.fma(tl.fma(sum_a, shift_a, weighted_a), factor_a, moved_b)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


@triton.jit
def segment_columns(L: tl.constexpr):
    return L.LANES * L.VEC * L.LOADS * L.TILES


@triton.jit
def _sweep_segment(row, begin, V, scale2, cap, cap_scale, GUARD: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of columns `[begin, begin + segment)` of the row."""
    TILE: tl.constexpr = L.LANES * L.VEC * L.LOADS
    lane_max, sum_exp, weighted_sum = empty_lanes(scale2, L)
    end = tl.minimum(begin + TILE * L.TILES, V)
    full = (end - begin) // TILE
    for tile in range(full):
        v = load_lanes(row, begin + tile * TILE, V, cap, cap_scale, False, POLICY, L)
        lane_max, sum_exp, weighted_sum = update(lane_max, sum_exp, weighted_sum, v, scale2, GUARD)
    tail = begin + full * TILE
    if tail < end:
        v = load_lanes(row, tail, V, cap, cap_scale, True, POLICY, L)
        # Columns behind the end are -inf, so the tail is always guarded.
        lane_max, sum_exp, weighted_sum = update(lane_max, sum_exp, weighted_sum, v, scale2, True)
    return lane_max, sum_exp, weighted_sum


@triton.jit
def _needs_guard(weighted_sum):
    return tl.max(tl.where(is_finite(weighted_sum), 0, 1), 0) != 0


@triton.jit
def sweep_segment(row, begin, V, scale2, cap, cap_scale, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of one segment, whatever it holds. For a row shared by several programs."""
    lane_max, sum_exp, weighted_sum = _sweep_segment(row, begin, V, scale2, cap, cap_scale, False, POLICY, L)
    if _needs_guard(weighted_sum):
        lane_max, sum_exp, weighted_sum = _sweep_segment(row, begin, V, scale2, cap, cap_scale, True, POLICY, L)
    return lane_max, sum_exp, weighted_sum


@triton.jit
def _sweep_row(row, V, scale2, cap, cap_scale, GUARD: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    lane_max, sum_exp, weighted_sum = empty_lanes(scale2, L)
    for begin in range(0, V, L.LANES * L.VEC * L.LOADS * L.TILES):
        max_b, sum_b, weighted_b = _sweep_segment(row, begin, V, scale2, cap, cap_scale, GUARD, POLICY, L)
        lane_max, sum_exp, weighted_sum = merge(lane_max, sum_exp, weighted_sum, max_b, sum_b, weighted_b, scale2)
    return lane_max, sum_exp, weighted_sum


@triton.jit
def sweep_row(row, V, scale2, cap, cap_scale, POLICY: tl.constexpr, L: tl.constexpr):
    """The lanes of a whole row, whatever it holds."""
    lane_max, sum_exp, weighted_sum = _sweep_row(row, V, scale2, cap, cap_scale, False, POLICY, L)
    if _needs_guard(weighted_sum):
        lane_max, sum_exp, weighted_sum = _sweep_row(row, V, scale2, cap, cap_scale, True, POLICY, L)
    return lane_max, sum_exp, weighted_sum


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def finish_row(lane_max, sum_exp, weighted_sum, row, V, scale2, cap, cap_scale, L: tl.constexpr):
    """(row_max, sum_rest, weighted_sum) of a row from its lanes: NaN if it holds NaN or +inf, (-inf, 0, 0) if all -inf.

    The one lane that met the maximum holds a 1 that has rounded away what sum_rest is about, so its few columns are
    summed again without it, exactly centred.
    """
    lanes = tl.arange(0, L.LANES)
    row_max, winner = tl.max(lane_max, 0, return_indices=True)
    shift = tl.fma(row_max, -scale2, lane_max * scale2)
    factor = tl.exp2(shift)
    # A lane without a finite logit has no part in this: at its stand-in for -inf the residual above is anything.
    others = (lanes != winner) & (sum_exp != 0.0)
    rest = tl.where(others, sum_exp * factor, 0.0)
    weighted = tl.where(others, tl.fma(sum_exp, shift, weighted_sum) * factor, 0.0)
    maxima = tl.zeros([L.LANES], L.REAL)
    LOAD: tl.constexpr = L.LANES * L.VEC
    UNROLL: tl.constexpr = 1 if L.SOFTCAP else L.VEC  # eight tanh at once would spill
    for load in range(0, tl.cdiv(V, LOAD), L.LANES):
        first = (load + lanes) * LOAD + winner * L.VEC
        for i in tl.range(0, L.VEC, loop_unroll_factor=UNROLL):
            z = tl.load(row + first + i, mask=first + i < V, other=float("-inf"))
            v = carrier(z, cap, cap_scale, L)
            d = (v - row_max) * scale2
            e = tl.exp2(d)
            is_max = v == row_max
            maxima += tl.where(is_max, 1.0, 0.0)
            rest += tl.where(is_max, 0.0, e)
            weighted += tl.where(e == 0.0, 0.0, e * d)
    rest, weighted, maxima = tl.reduce((rest, weighted, maxima), 0, _add3)
    rest += maxima - 1.0
    weighted *= LN2
    empty = row_max <= lowest(scale2)
    valid = (row_max < float("inf")) & is_finite(rest) & is_finite(weighted)
    row_max = tl.where(empty, float("-inf"), row_max)
    nan = real(float("nan"), L)
    return (
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
def careful_row(row, V, scale2, cap, cap_scale, L: tl.constexpr):
    """As `finish_row` by two plain sweeps, centred before they scale: for huge logits, and for what `lowest` cannot
    tell from -inf."""
    lanes = tl.arange(0, L.LANES)
    largest = tl.full([L.LANES], float("-inf"), L.REAL)
    for first in range(0, V, L.LANES):
        z = tl.load(row + first + lanes, mask=first + lanes < V, other=float("-inf"))
        largest = tl.maximum(largest, carrier(z, cap, cap_scale, L))
    row_max = tl.max(largest, 0)
    center = tl.where(row_max == float("-inf"), 0.0, row_max)
    rest, weighted = tl.zeros([L.LANES], L.REAL), tl.zeros([L.LANES], L.REAL)
    maxima = tl.zeros([L.LANES], L.REAL)
    for first in range(0, V, L.LANES):
        z = tl.load(row + first + lanes, mask=first + lanes < V, other=float("-inf"))
        v = carrier(z, cap, cap_scale, L)
        d = (v - center) * scale2
        e = tl.exp2(d)
        is_max = v == center
        maxima += tl.where(is_max, 1.0, 0.0)
        rest += tl.where(is_max, 0.0, e)
        weighted += tl.where(e == 0.0, 0.0, e * d)
    rest, weighted, maxima = tl.reduce((rest, weighted, maxima), 0, _add3)
    rest += tl.where(row_max == float("-inf"), 0.0, maxima - 1.0)
    weighted *= LN2
    valid = (row_max < float("inf")) & is_finite(rest) & is_finite(weighted)
    nan = real(float("nan"), L)
    return tl.where(valid, row_max, nan), tl.where(valid, rest, nan), tl.where(valid, weighted, nan)


# ---- what follows from a state ---------------------------------------------------------------------------------------


@triton.jit
def row_logprob(row_max, sum_rest, label_value, scale):
    return (label_value - row_max) * scale - log1p(sum_rest)


@triton.jit
def row_entropy(sum_rest, weighted_sum):
    """Both terms are >= 0: no cancellation."""
    return log1p(sum_rest) - weighted_sum / (1.0 + sum_rest)


@triton.jit
def label_column(label, V):
    """(column to load, whether the label is in the row)."""
    inside = (label >= 0) & (label < V)
    return tl.where(inside, label, 0), inside


@triton.jit
def load_label(row, column, inside, cap, cap_scale, L: tl.constexpr):
    """The labelled column's (v, dv/dz); v is -inf where it is elsewhere."""
    z = tl.load(row + column, mask=inside, other=float("-inf"))
    return carrier_and_chain(z, cap, cap_scale, L)


@triton.jit
def label_gradient(row_max, sum_rest, weighted_sum, scale, g_logprob, g_entropy, g_logsumexp, label_value):
    """The labelled column's d/dx by itself: in the formula of the others 1 - p_y would cancel."""
    inverse_sum = 1.0 / (1.0 + sum_rest)
    mean = weighted_sum * inverse_sum
    shift = (label_value - row_max) * scale
    at_max = (g_logprob * sum_rest + g_logsumexp + g_entropy * mean) * inverse_sum
    probability = tl.exp(shift) * inverse_sum
    others = tl.where(probability == 0.0, 0.0, probability * (g_logsumexp + g_entropy * (mean - shift)))  # 0 * inf
    below = g_logprob * (1.0 - probability) + others
    return tl.where(label_value == float("-inf"), 0.0, tl.where(shift == 0.0, at_max, below))


@triton.jit
def column_coefficients(sum_rest, weighted_sum, scale, g_logprob, g_entropy, g_logsumexp):
    """(constant, slope): d/dv_j = exp2(d) * (constant + slope * d) with d = (v_j - row_max) * scale2.

    d is centred before it is scaled, one operation more than a fused multiply-add: what rounding would leave of the
    maximum's own d is all of a peaked row's entropy gradient.
    """
    inverse_sum = 1.0 / (1.0 + sum_rest)
    factor = inverse_sum * scale
    return (g_logsumexp - g_logprob + g_entropy * (weighted_sum * inverse_sum)) * factor, -g_entropy * LN2 * factor


# ---- the gradient sweep ----------------------------------------------------------------------------------------------


@triton.jit
def _gradient_tile(
    row, out, first, V, scale2, cap, cap_scale, row_max, constant, slope,
    MASKED: tl.constexpr, SLOPE: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    z = load_tile(row, first, V, MASKED, POLICY, L)
    v, chain = carrier_and_chain(z, cap, cap_scale, L)
    d = (v - row_max) * scale2
    e = tl.exp2(d)
    if SLOPE:
        # exp(-inf) * -inf would be NaN; a NaN stays in e.
        gradient = e * tl.fma(tl.maximum(d, EMPTY_REFERENCE * 1e-30), slope, constant)
    else:
        gradient = e * constant
    if L.SOFTCAP:
        gradient = tl.where(e == 0.0, 0.0, gradient * chain)
    offsets = tile_offsets(first, L)
    gradient = gradient.to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + offsets, gradient, mask=row_mask(offsets, V, L))
    else:
        tl.store(out + offsets, gradient)


@triton.jit
def gradient_sweep(
    row, out, begin, end, V, scale2, cap, cap_scale, row_max, constant, slope,
    SLOPE: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Write the gradient of columns `[begin, end)`; `out` may be `row`, since a thread stores what it has loaded."""
    LOAD: tl.constexpr = L.LANES * L.VEC
    full = (end - begin) // (LOAD * L.LOADS)
    for tile in range(full):
        for load in tl.static_range(L.LOADS):
            first = begin + (tile * L.LOADS + load) * LOAD
            _gradient_tile(
                row, out, first, V, scale2, cap, cap_scale, row_max, constant, slope, False, SLOPE, POLICY, L
            )
    for first in range(begin + full * (LOAD * L.LOADS), end, LOAD):
        _gradient_tile(row, out, first, V, scale2, cap, cap_scale, row_max, constant, slope, True, SLOPE, POLICY, L)


@triton.jit
def write_zeros(out, begin, end, L: tl.constexpr):
    """A gradient of exactly 0 for columns `[begin, end)`."""
    for first in range(begin, end, L.LANES * L.VEC):
        offsets = tile_offsets(first, L)
        zero = tl.zeros([L.LANES, L.VEC], out.dtype.element_ty)
        tl.store(out + offsets, zero, mask=row_mask(offsets, end, L))


# ---- a row from beginning to end, for the kernels --------------------------------------------------------------------


@triton.jit
def row_state(
    lanes, start, row, V, error, temperature, scale, cap, cap_scale,
    PARTIAL: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(row_max, sum_rest, weighted_sum, scale) of a row: swept here, or merged from `lanes`.

    `lanes` is [N, segments, 3, LANES], from `sweep_lanes_kernel`.
    NaN for an `error` and for a row without a distribution. Of a PARTIAL row, -inf alone is the empty state.
    """
    s, scale2 = row_scale(scale, temperature, row, L)
    if lanes is None:
        lane_max, sum_exp, total = sweep_row(start, V, scale2, cap, cap_scale, POLICY, L)
    else:
        SEGMENT: tl.constexpr = L.LANES * L.VEC * L.LOADS * L.TILES
        segments = tl.cdiv(V, SEGMENT)
        lane_max, sum_exp, total = empty_lanes(scale2, L)
        for segment in range(segments):
            at = lanes + (row * segments + segment) * (3 * L.LANES) + tl.arange(0, L.LANES)
            max_b, sum_b, total_b = tl.load(at), tl.load(at + L.LANES), tl.load(at + 2 * L.LANES)
            lane_max, sum_exp, total = merge(lane_max, sum_exp, total, max_b, sum_b, total_b, scale2)
    row_max, rest, weighted = finish_row(lane_max, sum_exp, total, start, V, scale2, cap, cap_scale, L)
    if is_tame(row_max, scale2) == 0:
        row_max, rest, weighted = careful_row(start, V, scale2, cap, cap_scale, L)
    nan = real(float("nan"), L)
    if not PARTIAL:
        error = error | (row_max == float("-inf"))
    return tl.where(error, nan, row_max), tl.where(error, nan, rest), tl.where(error, nan, weighted), s


@triton.jit
def write_gradient(
    start, target, begin, end, V, column, inside, row_max, rest, weighted, g_logprob, g_entropy, g_logsumexp,
    row, temperature, scale, cap, cap_scale, SLOPE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """The gradient of columns `[begin, end)`, the labelled one by its own formula."""
    s, scale2 = row_scale(scale, temperature, row, L)
    # Read before the sweep: `target` may be `start`, and another program may be writing columns outside [begin, end).
    inside = inside & (column >= begin) & (column < end)
    label_value, label_chain = load_label(start, column, inside, cap, cap_scale, L)
    at_label = label_gradient(row_max, rest, weighted, s, g_logprob, g_entropy, g_logsumexp, label_value)
    at_label *= s * label_chain
    at_label = tl.where(label_value == float("-inf"), 0.0, at_label)
    constant, slope = column_coefficients(rest, weighted, s, g_logprob, g_entropy, g_logsumexp)
    tl.debug_barrier()
    gradient_sweep(
        start, target, begin, end, V, scale2, cap, cap_scale, row_max, constant, slope, SLOPE, "evict_first", L
    )
    # Whoever wrote the label's column in the sweep is another thread.
    tl.debug_barrier()
    tl.store(target + column, at_label.to(target.dtype.element_ty), mask=inside)
