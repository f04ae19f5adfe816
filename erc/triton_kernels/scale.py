"""Multiply gradient rows by the upstream gradient, read on the device: no synchronisation, and no traffic where it is
1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .params import Rows, kernel, make_layout, rows_of, segment_columns
from .row_algebra import load_tile, row_mask, row_pointer, tile_offsets


@kernel
def scale_rows_kernel(
    logits, out, row_factor, V: tl.int32, segments: tl.int32, inner: tl.int64, stride_outer: tl.int64,
    stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, IN_PLACE: tl.constexpr, SEGMENT: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    end = tl.minimum(begin + SEGMENT, V)
    factor = tl.load(row_factor + row)
    # Not `factor != 1` alone: a functional result must be written, whatever the factor.
    if (not IN_PLACE) or (factor != 1.0):
        source = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
        target = row_pointer(out, row, inner, out_stride_outer, out_stride_inner, L)
        for first in range(begin, end, L.LANES * L.VEC):
            offsets = tile_offsets(first, L)
            scaled = load_tile(source, first, V, True, "evict_first", L) * factor
            tl.store(target + offsets, scaled.to(target.dtype.element_ty), mask=row_mask(offsets, end, L))


def _scale_rows(source: Rows, target: Rows, scale: Tensor) -> None:
    layout = make_layout(source.data.dtype, aligned=source.aligned() and target.aligned())
    columns = segment_columns(layout)
    segments = triton.cdiv(source.V, columns)
    launch(
        scale_rows_kernel, source.count * segments, source.data, source.data, target.data, scale, source.V, segments,
        *source.address(), target.stride_outer, target.stride_inner,
        IN_PLACE=source is target, SEGMENT=columns, L=layout,
    )  # fmt: skip


def scale_rows(grad: Tensor, scale: Tensor) -> Tensor:
    """`grad[i] * scale[i]`, contiguous, rounded once; `scale` is `[N]` in the statistics dtype."""
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _scale_rows(rows_of(grad), rows_of(out), scale)
    return out


def scale_rows_(grad: Tensor, scale: Tensor) -> None:
    """As `scale_rows`, in place."""
    rows = rows_of(grad)
    _scale_rows(rows, rows, scale)
