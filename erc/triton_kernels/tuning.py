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

_LARGEST_KERNELS = {"policy_loss_kernel", "paired_forward_kernel"}
_OLD_COMPILER = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
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

    A program holds half its row in the cache on average, because its second sweep evicts what it has read. Programs of
    64 registers per thread fit twice on a multiprocessor of 32-thread warps, four times on one of 64-thread wavefronts.
    """
    if _forced:
        return _forced[-1]
    sizes = sorted(kib for name, kib in MEASURED if name == device.architecture and kib * 1024 >= row_bytes)
    if sizes:
        return MEASURED[device.architecture, sizes[0]]
    fitting = CACHE_SHARE * device.cache_bytes / (max(row_bytes, 1) / 2) / device.multiprocessors
    return Tuning(fitting if fitting < 1 else min(int(fitting), device.warp_size // 16), 0.5)


@contextmanager
def override(line: Tuning) -> Iterator[None]:
    """Every launch inside uses `line`, so that it can be measured."""
    _forced.append(line)
    try:
        yield
    finally:
        _forced.pop()


def compile_options(
    kernel: str, architecture: str, warp_size: int, dtype: torch.dtype, softcap: bool
) -> dict[str, int | bool]:
    """What a kernel is compiled with, besides its arguments.

    Contraction is off: every fused multiply-add is written out, so no bit depends on what a compiler contracts.
    NVIDIA's assembler chooses between 32 and 64 registers for 512 threads. The softcap's tanh, and float64, would
    exceed 64 by a few spilled ones; of float16 a kernel spills four words to stay at 40. Of what Triton before 3.8
    makes of the largest kernels it spills some to stay at 40 or 64, where a limit of 64 makes it fit 64, or takes 106.
    Other GPUs know no such limit, RDNA with its warps of 32 threads among them.
    """
    options: dict[str, int | bool] = {"num_warps": max(1, LANES // warp_size), "enable_fp_fusion": False}
    if architecture.startswith("sm_"):
        if softcap or dtype == torch.float64:
            options["maxnreg"] = 128
        elif dtype == torch.float16 or (_OLD_COMPILER and kernel in _LARGEST_KERNELS):
            options["maxnreg"] = 64
    return options


def programs_for_loss(device: Device, row_bytes: int, rows: int) -> int:
    """Programs of the fused loss; each works through every `programs`-th row."""
    if device is _INTERPRETER:
        return rows
    return min(rows, max(1, int(device.multiprocessors * tuning_of(device, row_bytes).loss_programs)))


def shares_rows(device: Device, row_bytes: int, rows: int, segments: int) -> bool:
    """Whether several programs should work on one row, so that few rows still fill the machine."""
    if segments == 1 or device is _INTERPRETER:
        return False
    return rows < device.multiprocessors * tuning_of(device, row_bytes).split_below
