"""How launches are shaped. Only knobs that leave the order of every sum alone are tuned, so tuning changes no bit.

`LANES`, `LOADS` and `TILES` fix the order of summation, hence the bits of every result: they are constants of the
kernels' version, not knobs. What is tuned is how many programs a GPU works on at a time in the fused loss (its second
sweep hits the L2 cache only while the rows in flight fit there) and from how few rows on a row is shared by several
programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from .rows import Layout

LANES = 512  # a program's threads: 16 warps of NVIDIA, 8 of AMD
LOADS = 2  # 128-bit loads a lane takes between two rescales
TILES = 4  # of LANES * VEC * LOADS columns: a segment, 32,768 columns of 16-bit logits

CACHE_SHARE = 0.6
"""Rows in flight may take this share of the cache; beyond it the gradient sweep reads DRAM again."""


class Tuning(NamedTuple):
    """`loss_programs`: programs of the fused loss per multiprocessor; `split_below`: rows per multiprocessor under
    which a row is cut over several programs."""

    loss_programs: float
    split_below: float


MEASURED: dict[tuple[str, int], Tuning] = {}
"""By architecture and largest row in KiB (V of 16-bit logits / 512): lines that `python -m erc.triton_kernels.autotune`
printed on that machine. None so far."""

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_OLD_COMPILER = _TRITON < (3, 8)
_forced: list[Tuning] = []


class Device(NamedTuple):
    architecture: str
    multiprocessors: int
    warp_size: int
    cache_bytes: int


# The interpreter runs programs one after another, so a row is never worth sharing.
_INTERPRETER = Device("interpreter", 1, 32, 1 << 20)
_cpu_devices = [_INTERPRETER]


@lru_cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    warp_size = properties.warp_size if torch.version.hip else 32
    return Device(name, properties.multi_processor_count, warp_size, properties.L2_cache_size)


def device_of(tensor: torch.Tensor) -> Device:
    return _gpu(tensor.get_device()) if tensor.is_cuda else _cpu_devices[-1]


@contextmanager
def cpu_as(device: Device) -> Iterator[None]:
    """CPU tensors inside count as memory of `device` and get its launches: for compiled kernels without a GPU."""
    _cpu_devices.append(device)
    try:
        yield
    finally:
        _cpu_devices.pop()


def tuning_of(device: Device, row_bytes: int) -> Tuning:
    """What was measured for the smallest listed row that holds `row_bytes`, else what the sizes of the machine say.

    A program holds half its row in the cache on average, because its second sweep evicts what it has read. Where less
    than two thirds of the multiprocessors could work that way, all of them do: a third transfer of each row costs less
    than idle ones.
    """
    if _forced:
        return _forced[-1]
    sizes = sorted(kib for name, kib in MEASURED if name == device.architecture and kib * 1024 >= row_bytes)
    if sizes:
        return MEASURED[device.architecture, sizes[0]]
    fitting = CACHE_SHARE * device.cache_bytes / (max(row_bytes, 1) / 2) / device.multiprocessors
    return Tuning(fitting if fitting >= 2 / 3 else 1.0, 0.5)


@contextmanager
def override(line: Tuning) -> Iterator[None]:
    """Every launch inside uses `line`, so that it can be measured."""
    _forced.append(line)
    try:
        yield
    finally:
        _forced.pop()


def _is_wide(dtype: torch.dtype, layout: Layout) -> bool:
    """Whether every kernel takes more than 64 registers."""
    return layout.SOFTCAP or dtype == torch.float64


def resident_programs(architecture: str, dtype: torch.dtype, layout: Layout) -> int:
    """Programs of the fused loss that a multiprocessor holds. NVIDIA's has 65,536 registers: 128 or 64 for a thread.

    The softcap's tanh, float64 and the narrow loads of misaligned rows would exceed 64 by a few spilled ones. A
    wavefront of AMD's takes 128 at most, which fits twice.
    """
    return 1 if architecture.startswith("sm_") and (_is_wide(dtype, layout) or not layout.ALIGNED) else 2


def _register_limit(kernel: str, architecture: str, dtype: torch.dtype, layout: Layout) -> int | None:
    """NVIDIA's assembler chooses between 32 and 64 registers for 512 threads, and may spill some to stay there.

    Of float16 a kernel spills four words to stay at 40. Of Triton before 3.8, the loss and pairs of rows spill some at
    40 or 64, where a limit of 64 makes them fit or the loss takes 106; pairs of 16-bit rows on sm_100 take 45, and
    spill some to stay at a limit of 64. Of Triton 3.8, statistics without a label spill two words to stay at 40.
    """
    loss, pairs = kernel == "policy_loss_kernel", kernel == "paired_forward_kernel"
    if _is_wide(dtype, layout) or (not layout.ALIGNED and (loss or (_OLD_COMPILER and pairs))):
        return 128
    if _OLD_COMPILER and pairs and architecture == "sm_100" and dtype.itemsize == 2:
        return None
    if kernel == "stats_forward_kernel" and architecture == "sm_90" and _TRITON == (3, 8):
        return 64
    return 64 if dtype == torch.float16 or (_OLD_COMPILER and (loss or pairs)) else None


def compile_options(
    kernel: str, architecture: str, warp_size: int, dtype: torch.dtype, layout: Layout
) -> dict[str, int | bool]:
    """What a kernel is compiled with, besides its arguments.

    Contraction is off: every fused multiply-add is written out, so no bit depends on what a compiler contracts. Only
    NVIDIA's GPUs know a limit of registers; RDNA, with warps of 32 threads too, does not.
    """
    options: dict[str, int | bool] = {"num_warps": max(1, LANES // warp_size), "enable_fp_fusion": False}
    if architecture.startswith("sm_") and (limit := _register_limit(kernel, architecture, dtype, layout)):
        options["maxnreg"] = limit
    return options


def token_options(architecture: str, dtype: torch.dtype) -> dict[str, int | bool]:
    """As `compile_options`, of a kernel that works on tokens.

    The float64 summary takes 179 registers; NVIDIA's assembler spills some to stay at 168.
    """
    options: dict[str, int | bool] = {"num_warps": 4, "enable_fp_fusion": False}
    if architecture.startswith("sm_") and dtype == torch.float64:
        options["maxnreg"] = 255
    return options


def programs_for_loss(device: Device, row_bytes: int, rows: int, resident: int = 2) -> int:
    """Programs of the fused loss, at most `resident` per multiprocessor; each works through every `programs`-th row.

    As few as take the same number of turns: more would only wait for those that have a last row.
    """
    if device is _INTERPRETER or rows == 0:
        return rows
    most = max(1, int(device.multiprocessors * min(tuning_of(device, row_bytes).loss_programs, resident)))
    return triton.cdiv(rows, triton.cdiv(rows, most))


def shares_rows(device: Device, row_bytes: int, rows: int, segments: int) -> bool:
    """Whether several programs should work on one row, so that few rows still fill the machine."""
    if segments == 1 or device is _INTERPRETER:
        return False
    return rows < device.multiprocessors * tuning_of(device, row_bytes).split_below
