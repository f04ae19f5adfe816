"""How launches are shaped. Only knobs that leave the order of every sum alone are tuned, so tuning changes no bit.

`LANES`, `LOADS` and `TILES` fix the order of summation, hence the bits of every result: they are constants of the
kernels' version, not knobs. What is tuned is how many programs a GPU works on at a time in the fused loss (its second
sweep hits the L2 cache only while the rows in flight fit there) and from how few rows on a row is shared by several
programs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

LANES = 512  # a program's threads: 16 warps of NVIDIA, 8 of AMD
LOADS = 2  # 128-bit loads a lane takes between two rescales
TILES = 4  # of LANES * VEC * LOADS columns: a segment, 32,768 columns of 16-bit logits

L2_SHARE = 0.6
"""Rows in flight may take this share of the L2 cache; beyond it the gradient sweep reads DRAM again."""


class Tuning(NamedTuple):
    """`loss_programs`: programs of the fused loss per multiprocessor; `split_below`: rows per multiprocessor under
    which a row
    is cut over several programs."""

    loss_programs: int
    split_below: float


# Derived from cache sizes, not measured on these machines: a program of the fused loss holds half its row in the L2
# cache on average, because its second sweep evicts what it has read. Replace a line by `python -m benchmarks autotune`
# on the machine.
_TABLE = {
    # (architecture, vocabulary up to): Tuning
    ("sm_80", 32_768): Tuning(4, 0.5),
    ("sm_80", 131_072): Tuning(2, 0.5),
    ("sm_80", 155_648): Tuning(1, 0.5),
    ("sm_80", 262_144): Tuning(1, 0.5),
    ("sm_90", 32_768): Tuning(4, 0.5),
    ("sm_90", 131_072): Tuning(2, 0.5),
    ("sm_90", 155_648): Tuning(2, 0.5),
    ("sm_90", 262_144): Tuning(1, 0.5),
    ("sm_100", 32_768): Tuning(4, 0.5),
    ("sm_100", 131_072): Tuning(4, 0.5),
    ("sm_100", 155_648): Tuning(4, 0.5),
    ("sm_100", 262_144): Tuning(2, 0.5),
    ("gfx942", 32_768): Tuning(4, 0.5),
    ("gfx942", 131_072): Tuning(4, 0.5),
    ("gfx942", 155_648): Tuning(4, 0.5),
    ("gfx942", 262_144): Tuning(2, 0.5),
}
_FALLBACK = Tuning(2, 0.5)


class Device(NamedTuple):
    architecture: str
    multiprocessors: int
    warp_size: int


# The interpreter runs programs one after another, so a row is never worth sharing.
_INTERPRETER = Device("interpreter", 1, 32)


@lru_cache
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Device(properties.gcnArchName.split(":")[0], properties.multi_processor_count, properties.warp_size)
    return Device(f"sm_{properties.major}{properties.minor}", properties.multi_processor_count, 32)


def device_of(tensor: torch.Tensor) -> Device:
    return _gpu(tensor.get_device()) if tensor.is_cuda else _INTERPRETER


def tuning_of(device: Device, V: int) -> Tuning:
    """The table's line for the smallest listed vocabulary that holds V; the fallback for other machines and sizes."""
    sizes = sorted(size for architecture, size in _TABLE if architecture == device.architecture and size >= V)
    return _TABLE[device.architecture, sizes[0]] if sizes else _FALLBACK


def compile_options(warp_size: int, softcap: bool, float64: bool) -> dict[str, int | bool]:
    """What a kernel is compiled with, besides its arguments.

    Contraction is off: every fused multiply-add is written out, so no bit depends on what a compiler contracts.
    NVIDIA's assembler holds 512 threads to 64 registers, which the softcap's tanh, and float64, would exceed by a few
    spilled ones.
    """
    options: dict[str, int | bool] = {"num_warps": max(1, LANES // warp_size), "enable_fp_fusion": False}
    if (softcap or float64) and warp_size == 32:
        options["maxnreg"] = 128
    return options


def programs_for_loss(device: Device, V: int, rows: int) -> int:
    """Programs of the fused loss; each works through every `programs`-th row."""
    if device is _INTERPRETER:
        return rows
    return min(rows, device.multiprocessors * tuning_of(device, V).loss_programs)


def shares_rows(device: Device, V: int, rows: int, segments: int) -> bool:
    """Whether several programs should work on one row, so that few rows still fill the machine."""
    return (
        segments > 1 and device is not _INTERPRETER and rows < device.multiprocessors * tuning_of(device, V).split_below
    )
