"""What share of the bandwidth the forms of the fused loss are expected to hold, by the model of blocks in flight."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from benchmarks.hardware import GPU, GPUS
from benchmarks.machine_code.blocks_in_flight import Program, shares
from benchmarks.machine_code.occupancy import Occupancy
from benchmarks.machine_code.ordinary_row import VOCABULARY
from benchmarks.machine_code.report import CompiledKernel
from erc.triton_kernels import tuning

ROWS = (64, 256, 1_024, 2_048, 8_192, 65_536)
BANDS = (1.0, 0.7, 1.3)
"""The factors on all latencies: as assumed, and the ends of the band."""

FORMS = ("loss, cluster", "loss, block", "policy_loss erc-dapo+entropy")
_ROW_BYTES = 2 * VOCABULARY


Shape = tuple[int, float, int]
"""Blocks on a multiprocessor, multiprocessors, blocks per row."""


def _shapes(kernel: CompiledKernel, gpu: GPU, rows: Iterable[int]) -> dict[int, Shape]:
    """As the launchers choose them, by number of rows: CUDA's block form goes by the rule of Triton's programs. Fewer
    rows than fill the GPU are split over blocks, which is another form."""
    found = kernel.kernel()
    fitting = Occupancy.of(kernel.arch, kernel.threads, found.registers, found.shared_bytes, kernel.dynamic_shared)
    if kernel.cluster > 1:
        shape = fitting.blocks, gpu.clustered, kernel.cluster
        return {count: shape for count in rows if count * kernel.cluster >= fitting.blocks * gpu.clustered}
    device = tuning.Device(gpu.arch, gpu.multiprocessors, 32, gpu.cache_bytes)
    shapes = {}
    for count in (count for count in rows if count >= gpu.multiprocessors):
        resident = tuning.programs_for_loss(device, _ROW_BYTES, count, fitting.blocks)
        slots = -(-resident // gpu.multiprocessors)
        shapes[count] = slots, resident / slots, 1
    return shapes


def expect(kernels: Iterable[CompiledKernel], gpus: Iterable[GPU] = GPUS, rows: Iterable[int] = ROWS) -> list[dict]:
    """A line a form and GPU: the shares by number of rows, each with the ends of its band."""
    lines = []
    for kernel in kernels:
        if kernel.name not in FORMS:
            continue
        executed, _ = kernel.execute()
        for gpu in (gpu for gpu in gpus if gpu.arch == kernel.arch):
            shapes, by_rows = _shapes(kernel, gpu, rows), {}
            for shape, group in groupby(shapes, shapes.__getitem__):
                slots, multiprocessors, blocks_a_row = shape
                program = Program.of(executed, kernel.threads // 32, _ROW_BYTES // blocks_a_row, slots)
                rounds = 12 if blocks_a_row > 1 else 2 * slots  # so many that the bunching of blocks evens out
                counts = list(group)
                bands = [
                    shares(program, gpu, multiprocessors, blocks_a_row, 2 * _ROW_BYTES, counts, band, rounds)
                    for band in BANDS
                ]
                by_rows |= {str(count): [band[count] for band in bands] for count in counts}
            lines.append({"source": kernel.source, "name": kernel.name, "gpu": gpu.name, "shares": by_rows})
    return lines
