"""Rows: how they are addressed, scaled and loaded, and which token each of them belongs to.

`v` is the logit, or its softcapped value; `x = v * scale` is what enters the softmax.
"""

# ruff: noqa: RUF005 (Triton has no starred expressions)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .elementary import LOG2E, real, tanh_and_slope


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
    """Run-time scaling arguments of a launch: x = v * scale / temperature, v = cap * tanh(z * cap_scale) or z."""

    scale: float
    cap: float
    cap_scale: float


class RowScaling(NamedTuple):
    """The scaling of one row, in the statistics dtype; `scale2 = scale * log2(e)`."""

    scale: tl.tensor
    scale2: tl.tensor
    cap: tl.tensor
    cap_scale: tl.tensor


class Label(NamedTuple):
    """`column` to load, whether it is `inside` the row, whether it is an `error`, and whether the row is `ignored`."""

    column: tl.tensor
    inside: tl.tensor
    error: tl.tensor
    ignored: tl.tensor


# ---- addresses -------------------------------------------------------------------------------------------------------


@triton.jit
def row_pointer(pointer, row, inner, stride_outer, stride_inner, L: tl.constexpr):
    """Where row `row` of `[outer, inner, V]` starts. 64-bit: N * V may exceed 2^31."""
    row = row.to(tl.int64)
    start = pointer + ((row // inner) * stride_outer + (row % inner) * stride_inner)
    if L.ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def token_of(row, row_index_ptr, first_token):
    """The token that a row belongs to; negative for a row that nobody wants."""
    if row_index_ptr is not None:
        return tl.load(row_index_ptr + row)
    else:
        return row + first_token


@triton.jit
def label_of(labels_ptr, token, ignore_index, V):
    """The label of a token in a row of V columns; without labels there is none, which is no error."""
    if labels_ptr is not None:
        label = tl.load(labels_ptr + token, mask=token >= 0, other=ignore_index)
        inside = (label >= 0) & (label < V)
        return Label(tl.where(inside, label, 0), inside, inside == 0, label == ignore_index)
    else:
        return Label(token * 0, token < token, token < token, token < 0)


# ---- scaling ---------------------------------------------------------------------------------------------------------


@triton.jit
def row_scaling(scale, cap, cap_scale, temperature_ptr, token, L: tl.constexpr):
    """The scaling of a row; scale and scale2 are rounded once each: both come from float64."""
    wide = tl.full((), scale, tl.float64)
    if L.PER_ROW:
        wide = wide / tl.load(temperature_ptr + token, mask=token >= 0, other=1.0).to(tl.float64)
    return RowScaling(wide.to(L.REAL), (wide * LOG2E).to(L.REAL), real(cap, L), real(cap_scale, L))


@triton.jit
def carrier_and_chain(z, scaling, L: tl.constexpr):
    """(v, dv/dz) of logits z. -inf stays a forbidden token under a softcap, and +inf stays no logit at all."""
    z = z.to(L.REAL)
    if L.SOFTCAP:
        capped, slope = tanh_and_slope(z * scaling.cap_scale)
        return tl.where(tl.abs(z) == float("inf"), z, scaling.cap * capped), slope * (scaling.cap * scaling.cap_scale)
    else:
        return z, real(1.0, L)


@triton.jit
def carrier(z, scaling, L: tl.constexpr):
    """The values v of logits z."""
    v, _ = carrier_and_chain(z, scaling, L)
    return v


@triton.jit
def load_label(row, column, inside, scaling, L: tl.constexpr):
    """The labelled column's (v, dv/dz); v is -inf where it is elsewhere."""
    z = tl.load(row + column, mask=inside, other=float("-inf"))
    return carrier_and_chain(z, scaling, L)


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
def load_lane(row, first, V, scaling, MASKED: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The values v of one load of each lane, from column `first` on: a tuple of VEC tensors `[LANES]`."""
    out = ()
    if L.ALIGNED:
        z = _columns(load_tile(row, first, V, MASKED, POLICY, L), L.VEC, L)
        for i in tl.static_range(L.VEC):
            out = out + (carrier(z[i], scaling, L),)
    else:
        # A misaligned row takes narrower loads, never a peel: the columns of a lane must not depend on the address.
        lane = first + tl.arange(0, L.LANES) * L.VEC
        for i in tl.static_range(L.VEC):
            if MASKED:
                z1 = tl.load(row + lane + i, mask=lane + i < V, other=float("-inf"), eviction_policy=POLICY)
            else:
                z1 = tl.load(row + lane + i, eviction_policy=POLICY)
            out = out + (carrier(z1, scaling, L),)
    return out


@triton.jit
def load_lanes(row, first, V, scaling, MASKED: tl.constexpr, POLICY: tl.constexpr, L: tl.constexpr):
    """The values of LOADS loads of each lane."""
    out = ()
    for load in tl.static_range(L.LOADS):
        out = out + load_lane(row, first + load * (L.LANES * L.VEC), V, scaling, MASKED, POLICY, L)
    return out


@triton.jit
def segment_columns(L: tl.constexpr):
    return L.LANES * L.VEC * L.LOADS * L.TILES
