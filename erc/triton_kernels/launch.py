"""Launching: the device, the number of warps, and rows that several programs share."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .params import RowInputs, columns_per_segment, compiled_layout, kernel, read_scaling
from .rows import Layout, label_of, row_pointer, row_scaling, token_of
from .sweep import store_lane_states, sweep_segment


def launch(function, grid: int, device_tensor: Tensor, *args, L: Layout, **kwargs) -> None:
    """Run `grid` programs of `function` (1-D: a second dimension stops at 65,535). No program, no launch."""
    if grid == 0:
        return
    on_device = torch.cuda.device(device_tensor.device) if device_tensor.is_cuda else nullcontext()
    with on_device:
        device = tuning.device_of(device_tensor)
        options = tuning.compile_options(
            function.__name__, device.architecture, device.warp_size, device_tensor.dtype, L
        )
        layout = compiled_layout(L) if isinstance(function, triton.JITFunction) else L
        function[(grid,)](*args, L=layout, **kwargs, **options)


def launch_tokens(function, grid: int, device_tensor: Tensor, *args, **kwargs) -> None:
    """Run `grid` programs of a kernel that works on tokens, not on rows."""
    if grid == 0:
        return
    with torch.cuda.device(device_tensor.device) if device_tensor.is_cuda else nullcontext():
        options = tuning.token_options(tuning.device_of(device_tensor).architecture, device_tensor.dtype)
        function[(grid,)](*args, **kwargs, **options)


@kernel
def sweep_lanes_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, lanes_ptr,
    V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, segments: tl.int32,
    scale: tl.float64, cap: tl.float64, cap_scale: tl.float64, SEGMENT: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One program a segment of a row; writes its lanes to `lanes_ptr` [rows, segments, 3, LANES]."""
    program = tl.program_id(0).to(tl.int64)
    row = program // segments
    begin = (program % segments).to(tl.int32) * SEGMENT
    token = token_of(row, row_index_ptr, first_token)
    label = label_of(labels_ptr, token, ignore_index, V)
    if label.ignored == 0:
        start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
        scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, token, L)
        lanes = sweep_segment(start, begin, V, scaling, "", L)
        store_lane_states(lanes_ptr + program * (3 * L.LANES), lanes, L)


def shared_lanes(call: RowInputs, layout: Layout) -> Tensor | None:
    """Lanes of every row, swept by one program a segment; None where there are rows enough to keep the machine busy."""
    rows, columns = call.rows, columns_per_segment(layout)
    segments = triton.cdiv(rows.V, columns)
    if not tuning.shares_rows(tuning.device_of(rows.data), rows.row_bytes(), rows.count, segments):
        return None
    dtype = torch.float64 if tl.float64 == layout.REAL else torch.float32
    lanes = torch.empty((rows.count, segments, 3, layout.LANES), dtype=dtype, device=rows.data.device)
    launch(
        sweep_lanes_kernel, rows.count * segments, rows.data, *call.pointers(), lanes, *call.numbers(), segments,
        *read_scaling(call.params), SEGMENT=columns, L=layout,
    )  # fmt: skip
    return lanes
