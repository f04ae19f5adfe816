"""Multiply gradient rows by the upstream gradient, read on the device: no synchronisation, and next to nothing where it
is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .params import Rows, kernel, make_layout, rows_of
from .rows import load_tile, row_mask, row_pointer, tile_offsets


@triton.jit
def _scale_row(start, target, begin, end, V, factor, L: tl.constexpr):
    for first in range(begin, end, L.LANES * L.VEC):
        offsets = tile_offsets(first, L)
        scaled = load_tile(start, first, V, True, "evict_first", L) * factor
        tl.store(target + offsets, scaled.to(target.dtype.element_ty), mask=row_mask(offsets, end, L))


@kernel
def scale_rows_kernel(
    logits_ptr, out_ptr, factor_ptr, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, num_rows: tl.int64, programs: tl.int64, parts: tl.int32,
    columns: tl.int32, ONE: tl.constexpr, IN_PLACE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Program `part + parts * p` takes a part of every `programs`-th row from p on. Of the rows it looks at as many
    factors at a time as a row has lanes, and at none of the rows where all of them are 1."""
    program = tl.program_id(0).to(tl.int64)
    begin = (program % parts).to(tl.int32) * columns
    end = tl.minimum(begin + columns, V)
    mine = tl.cdiv(num_rows - program // parts, programs)
    for turn in range(0, mine, L.LANES):
        rows = program // parts + (turn + tl.arange(0, L.LANES)) * programs
        factors = tl.load(factor_ptr + (rows * 0 if ONE else rows), mask=rows < num_rows, other=1.0)
        # Not `factor != 1` alone: a functional result must be written, whatever the factor.
        if (not IN_PLACE) or tl.max(tl.where(factors == 1.0, 0, 1), 0) != 0:
            for other in range(turn, tl.minimum(turn + L.LANES, mine)):
                row = program // parts + other * programs
                factor = tl.load(factor_ptr + (row * 0 if ONE else row))
                if (not IN_PLACE) or (factor != 1.0):
                    start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
                    target = row_pointer(out_ptr, row, inner, out_stride_outer, out_stride_inner, L)
                    _scale_row(start, target, begin, end, V, factor, L)


def _scale_rows(source: Rows, target: Rows, scale: Tensor) -> None:
    if source.count == 0:
        return
    layout = make_layout(source.data.dtype, aligned=source.aligned() and target.aligned())
    resident = 4 * tuning.device_of(source.data).multiprocessors
    programs = min(source.count, resident)
    # Few rows are cut into parts, so that they still fill the machine.
    tile = layout.LANES * layout.VEC
    parts = max(1, min(resident // programs, triton.cdiv(source.V, tile)))
    columns = triton.cdiv(triton.cdiv(source.V, parts), tile) * tile
    launch(
        scale_rows_kernel, programs * parts, source.data, source.data, target.data, scale, source.V, *source.address(),
        *target.strides(), source.count, programs, parts, columns, ONE=scale.dim() == 0,
        IN_PLACE=source is target, L=layout,
    )  # fmt: skip


def scale_rows(grad: Tensor, scale: Tensor) -> Tensor:
    """`grad[i] * scale[i]`, or times a 0-d scale; contiguous, rounded once; `scale` is in the statistics dtype."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _scale_rows(rows_of(grad), rows_of(out), scale)
    return out


def scale_rows_(grad: Tensor, scale: Tensor) -> None:
    """As `scale_rows`, in place."""
    rows = rows_of(grad)
    _scale_rows(rows, rows, scale)
