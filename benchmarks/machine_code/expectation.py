"""What share of the bandwidth the forms of the fused loss are expected to hold, by the model of blocks in flight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
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


def _shape(kernel: CompiledKernel, gpu: GPU, rows: int) -> tuple[int, float, int]:
    """(blocks on a multiprocessor, multiprocessors, blocks per row), as the launchers choose them."""
    found = kernel.kernel()
    fitting = Occupancy.of(kernel.arch, kernel.threads, found.registers, found.shared_bytes, kernel.dynamic_shared)
    if kernel.cluster > 1:
        return fitting.blocks, gpu.clustered, kernel.cluster
    if kernel.source == "cuda":
        in_cache = int(0.6 * gpu.cache_bytes) // (_ROW_BYTES // 2)
        wanted = in_cache if 3 * in_cache >= 2 * gpu.multiprocessors else gpu.multiprocessors
    else:
        device = tuning.Device(gpu.arch, gpu.multiprocessors, 32, gpu.cache_bytes)
        wanted = tuning.programs_for_loss(device, _ROW_BYTES, 1 << 20)
    most = min(wanted, fitting.blocks * gpu.multiprocessors)
    resident = math.ceil(rows / math.ceil(rows / most))  # in as few turns, evenly
    slots = -(-resident // gpu.multiprocessors)
    return slots, resident / slots, 1


def _fills(kernel: CompiledKernel, gpu: GPU, rows: int) -> bool:
    slots, multiprocessors, blocks_a_row = _shape(kernel, gpu, rows)
    return rows * blocks_a_row >= (slots * multiprocessors if blocks_a_row > 1 else gpu.multiprocessors)


def expect(kernels: Iterable[CompiledKernel], gpus: Iterable[GPU] = GPUS, rows: Iterable[int] = ROWS) -> list[dict]:
    """A line a form and GPU: the shares by number of rows, each with the ends of its band."""
    lines = []
    for kernel in kernels:
        if kernel.name not in FORMS:
            continue
        executed, _ = kernel.execute()
        for gpu in (gpu for gpu in gpus if gpu.arch == kernel.arch):
            # Fewer rows than fill the GPU are split over blocks, which is another form.
            counted = [count for count in rows if _fills(kernel, gpu, count)]
            by_rows = {}
            for shape, group in groupby(counted, partial(_shape, kernel, gpu)):
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
