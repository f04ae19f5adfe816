"""Launching: the device, the number of warps, and rows that several programs share."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .params import Rows, compiled_layout, kernel, segment_columns
from .row_algebra import Layout, Scaling, row_pointer, row_scale, sweep_segment


def launch(function, grid: int, device_tensor: Tensor, *args, L: Layout, **kwargs) -> None:
    """Run `grid` programs of `function` (1-D: a second dimension stops at 65,535). No program, no launch."""
    if grid == 0:
        return
    on_device = torch.cuda.device(device_tensor.device) if device_tensor.is_cuda else nullcontext()
    with on_device:
        device = tuning.device_of(device_tensor)
        options = tuning.compile_options(
            function.__name__, device.architecture, device.warp_size, device_tensor.dtype, L.SOFTCAP
        )
        layout = compiled_layout(L) if isinstance(function, triton.JITFunction) else L
        function[(grid,)](*args, L=layout, **kwargs, **options)


@kernel
def sweep_lanes_kernel(
    logits, labels, temperature, lanes,
    V: tl.int32, segments: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    ignore_index: tl.int64,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row; writes its lanes to `lanes` [N, segments, 3, LANES]."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    ignored = row < 0
    if labels is not None:
        ignored = tl.load(labels + row) == ignore_index
    if ignored == 0:
        start = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
        _, scale2 = row_scale(scale, temperature, row, L)
        lane_max, sum_exp, weighted_sum = sweep_segment(start, begin, V, scale2, cap, cap_scale, "evict_last", L)
        at = lanes + program * (3 * L.LANES) + tl.arange(0, L.LANES)
        tl.store(at, lane_max)
        tl.store(at + L.LANES, sum_exp)
        tl.store(at + 2 * L.LANES, weighted_sum)


def shared_lanes(
    rows: Rows, labels: Tensor | None, temperature: Tensor | None, scaling: Scaling, ignore_index: int, layout: Layout
) -> Tensor | None:
    """Lanes of every row, swept by one program a segment; None where there are rows enough to keep the machine busy."""
    columns = segment_columns(layout)
    segments = triton.cdiv(rows.V, columns)
    if not tuning.shares_rows(tuning.device_of(rows.data), rows.row_bytes(), rows.count, segments):
        return None
    dtype = torch.float64 if tl.float64 == layout.REAL else torch.float32
    lanes = torch.empty((rows.count, segments, 3, layout.LANES), dtype=dtype, device=rows.data.device)
    launch(
        sweep_lanes_kernel, rows.count * segments, rows.data, rows.data, labels, temperature, lanes, rows.V, segments,
        *rows.address(), ignore_index, *scaling, SEGMENT=columns, L=layout,
    )  # fmt: skip
    return lanes
