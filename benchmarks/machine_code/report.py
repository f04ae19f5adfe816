"""The machine-code report: by element, what a kernel's whole life costs (executed on the ordinary row) and what its
main loops cost, and the share of the bandwidth that the whole leaves reachable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.hardware import GPUS, Reachable
from benchmarks.machine_code.emulator.machine import Executed, Launch
from benchmarks.machine_code.occupancy import Occupancy
from benchmarks.machine_code.ordinary_row import OrdinaryRow, Work, execute
from benchmarks.machine_code.sass import Kernel, Loop, disassemble, disassemble_file
from benchmarks.markdown import markdown_table


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel to report on. This is how kernels from elsewhere (CUDA cubins, peers) join the report.

    `arch` is "sm_80", "sm_90" or "sm_100"; `cubin` the bytes or a path; `function` the name inside it (None: the only
    one). `elements` are the elements that one thread takes in an iteration of the statistics and of the gradient loop;
    None reads them off the bytes that the loop loads from global memory; a kernel without a loop needs them for its
    gradient. `itemsize` is that of a logit in bytes. A launch has blocks of `threads` threads with `dynamic_shared`
    bytes of shared memory each, `cluster` of them in a cluster. `work` says what to execute for the kernel's whole
    life, on a row that is `softcap` or not and starts `offset` bytes behind a multiple of 16.
    """

    name: str
    arch: str
    cubin: bytes | Path
    function: str | None = None
    elements: tuple[int | None, int | None] = (None, None)
    itemsize: int = 2
    source: str = "erc"
    threads: int | None = None
    dynamic_shared: int = 0
    cluster: int = 1
    work: Callable[[OrdinaryRow], Work] | None = None
    softcap: bool = False
    offset: int = 0

    def kernel(self) -> Kernel:
        """Raises LookupError if `function` is not in the cubin, or is needed to choose."""
        kernels = disassemble(self.cubin) if isinstance(self.cubin, bytes) else disassemble_file(self.cubin)
        found = [k for k in kernels if self.function in (None, k.name)]
        if len(found) != 1:
            raise LookupError(f"{self.name}: {self.function!r} does not name one of {[k.name for k in kernels]}")
        return found[0]

    def execute(self) -> tuple[Executed, int]:
        """One block (or cluster) on the ordinary row, and the columns that it works on.

        Raises:
            ArithmeticError: if its results are not the oracle's.
        """
        row = OrdinaryRow(self.softcap, self.offset)
        work = self.work(row)
        return execute(self.cubin, self.function, row, work), work.elements


@dataclass(frozen=True)
class LoopCost:
    """A main loop by element: operations of each pipe, bytes through global memory, barriers and shuffles."""

    elements: float
    instructions: float
    pipes: dict[str, float]
    mufu: float
    read_bytes: float
    write_bytes: float
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]
    barriers: int
    shuffles: int

    @classmethod
    def of(cls, loop: Loop, elements: float) -> LoopCost:
        pipes = loop.pipes()
        return cls(
            elements=elements,
            instructions=len(loop.instructions) / elements,
            pipes={pipe: count / elements for pipe, count in sorted(pipes.items())},
            mufu=pipes["mufu"] / elements,
            read_bytes=loop.bytes_of("LDG") / elements,
            write_bytes=loop.bytes_of("STG") / elements,
            load_bits=loop.widths("LDG") or loop.widths("LDS"),
            store_bits=loop.widths("STG") or loop.widths("STS"),
            barriers=loop.barriers(),
            shuffles=loop.shuffles(),
        )


@dataclass(frozen=True)
class WholeCost:
    """A kernel's whole life by element: the issue slots of every warp, weighted by how often it issued, in threads.

    `main_loops` is the part of `instructions` that was issued in the main loops.
    """

    elements: int
    instructions: float
    main_loops: float
    mufu: float
    pipes: dict[str, float]

    @classmethod
    def of(cls, kernel: Kernel, slots: np.ndarray, elements: int, loops: Iterable[Loop]) -> WholeCost:
        """`slots`: by element, of every instruction."""
        pipes: Counter[str] = Counter()
        for instruction, count in zip(kernel.instructions, slots, strict=True):
            pipes[instruction.pipe()] += float(count)
        inside = sum(_spent(slots, loop) for loop in loops)
        used = {pipe: count for pipe, count in sorted(pipes.items()) if count}
        return cls(elements, float(slots.sum()), inside, used.get("mufu", 0.0), used)


@dataclass(frozen=True)
class Measurement:
    """A line of the report. `reachable`: by GPU of this architecture, from the whole kernel where it was executed."""

    name: str
    source: str
    arch: str
    registers: int
    shared_bytes: int  # what the cubin states
    dynamic_shared: int
    threads: int | None
    cluster: int
    occupancy: Occupancy | None
    spills: bool
    device_barriers: int
    statistics: LoopCost | None
    gradient: LoopCost | None
    whole: WholeCost | None
    reachable: dict[str, Reachable] = field(default_factory=dict)

    def instructions(self) -> float:
        return sum(loop.instructions for loop in (self.statistics, self.gradient) if loop)

    def mufu(self) -> float:
        return sum(loop.mufu for loop in (self.statistics, self.gradient) if loop)

    def json(self) -> dict:
        return {**asdict(self), "instructions": self.instructions(), "mufu": self.mufu()}


def _spent(slots: np.ndarray, loop: Loop) -> float:
    return float(slots[loop.begin : loop.begin + len(loop.instructions)].sum())


def _main_loop(
    loops: Iterable[Loop], elements: int | None, itemsize: int, slots: np.ndarray | None
) -> tuple[LoopCost, Loop] | None:
    """The main loop is the one in which the ordinary row spends most; of a kernel that was not executed the one with
    the fewest instructions per element, since guarded and masked twins have more.

    Given `elements`, a loop must take as many exponentials: others are tails and merges.
    """
    costs = [
        (LoopCost.of(loop, elements or loop.reads() / itemsize), loop)
        for loop in loops
        if elements is None or loop.count("MUFU") >= elements
    ]
    if slots is not None:
        return max(costs, key=lambda found: _spent(slots, found[1]), default=None)
    return min(costs, key=lambda found: found[0].instructions, default=None)


def _whole_code(kernel: Kernel) -> list[Loop]:
    """A kernel without a loop, as one pass of a loop."""
    end = max((at for at, i in enumerate(kernel.instructions) if i.name == "EXIT"), default=0)
    return [Loop(kernel.instructions[: end + 1])]


def measure(compiled: CompiledKernel) -> Measurement:
    """The whole kernel, its main loops, resources and reachable bandwidth. A kernel with `work` is executed.

    The fused loss reads DRAM once and writes it once for both of its loops: its second read is one of the L2 cache.
    """
    kernel = compiled.kernel()
    slots, columns = None, 0
    if compiled.work:
        executed, columns = compiled.execute()
        slots = executed.issues.sum(1) * 32 / columns
    statistics = _main_loop(kernel.load_loops(), compiled.elements[0], compiled.itemsize, slots)
    gradient_loops = kernel.gradient_loops()
    if not gradient_loops and compiled.elements[1] and not statistics:
        gradient_loops = _whole_code(kernel)
    gradient = _main_loop(gradient_loops, compiled.elements[1], compiled.itemsize, slots)
    found = [each for each in (statistics, gradient) if each]
    whole = None if slots is None else WholeCost.of(kernel, slots, columns, [loop for _, loop in found])
    reachable = {}
    if found:
        traffic = compiled.itemsize * (2 if gradient else 1)
        demand: Counter[str] = Counter()
        for pipes in [whole.pipes] if whole else [cost.pipes for cost, _ in found]:
            demand.update(pipes)
        reachable = {gpu.name: gpu.reachable(demand, traffic) for gpu in GPUS if gpu.arch == compiled.arch}
    occupancy = compiled.threads and Occupancy.of(
        compiled.arch, compiled.threads, kernel.registers, kernel.shared_bytes, compiled.dynamic_shared
    )
    return Measurement(
        name=compiled.name,
        source=compiled.source,
        arch=compiled.arch,
        registers=kernel.registers,
        shared_bytes=kernel.shared_bytes,
        dynamic_shared=compiled.dynamic_shared,
        threads=compiled.threads,
        cluster=compiled.cluster,
        occupancy=occupancy or None,
        spills=kernel.spills(),
        device_barriers=kernel.device_barriers(),
        statistics=statistics and statistics[0],
        gradient=gradient and gradient[0],
        whole=whole,
        reachable=reachable,
    )


def triton_kernels(archs: Iterable[str], dtype: torch.dtype = torch.bfloat16) -> list[CompiledKernel]:
    """This library's Triton kernels, compiled ahead of time."""
    from benchmarks.machine_code.triton_variants import main_variants

    return [
        from_triton(
            variant.name, arch, variant.compile(arch), itemsize=dtype.itemsize, source="triton",
            softcap=variant.softcap, offset=0 if variant.aligned else 2,
            work=variant.work if dtype == torch.bfloat16 else None,
        )
        for variant in main_variants(dtype)
        for arch in archs
    ]  # fmt: skip


def from_triton(name: str, arch: str, compiled: Any, **options: Any) -> CompiledKernel:
    """A kernel that Triton compiled; it knows its own block."""
    metadata = compiled.metadata
    launch = Launch(metadata.num_warps * 32, metadata.shared)
    if work := options.pop("work", None):
        options["work"] = partial(work, launch)
    return CompiledKernel(
        name, arch, compiled.asm["cubin"], threads=launch.threads, dynamic_shared=launch.dynamic_shared, **options
    )


def _cell(cost: dict | None) -> str:
    if cost is None:
        return "-"
    widths = "/".join(str(bits) for bits in (*cost["load_bits"], *cost["store_bits"]))
    return f"{cost['instructions']:.2f} ({widths} bit)"


_HEADER = ("kernel", "arch", "statistics", "gradient", "main loops", "whole kernel", "MUFU", "barriers", "regs")
_HEADER += ("blocks an SM", "spills", "reachable")


def machine_code_table(document: dict) -> str:
    """Instructions by element, and the share of the peak bandwidth that they leave reachable. The report is
    `{"toolchain": versions by name, "kernels": `Measurement.json` of every kernel}`."""
    rows = []
    for m in document["kernels"]:
        loops = [loop for loop in (m["statistics"], m["gradient"]) if loop]
        reachable = ", ".join(
            f"{gpu} {r['share']:.0%} ({r['resource']} at {r['headroom']:.2f}x)" for gpu, r in m["reachable"].items()
        )
        cells = (
            f"{m['source']}: {m['name']}",
            m["arch"],
            _cell(m["statistics"]),
            _cell(m["gradient"]),
            f"{m['instructions']:.2f}",
            f"{m['whole']['instructions']:.2f}" if m["whole"] else "-",
            f"{(m['whole'] or m)['mufu']:.3f}",
            str(sum(loop["barriers"] + loop["shuffles"] for loop in loops)),
            str(m["registers"]),
            f"{m['occupancy']['blocks']} x {m['threads']}" if m["occupancy"] else "-",
            "yes" if m["spills"] else "no",
            reachable,
        )
        rows.append(cells)
    return markdown_table(_HEADER, rows)
