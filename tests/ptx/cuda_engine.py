"""csrc/cuda on PTX: the library's launchers, compiled by g++, hand their launches to the interpreter.

What a launcher decides (form, grid, shared memory, cluster, packed arguments) is the shipped code's; the kernels are
what nvcc made of the same files. Memory is the CPU's: a kernel may touch the tensors that the bindings took an address
of.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.cuda_host import build
from tests.ptx.machine import Checks, Counts, Regions, Shape, launch
from tests.ptx.nvcc import Library


@dataclass
class Launched:
    """One launch: the kernel's symbol, its shape and what it did."""

    kernel: str
    shape: Shape
    counts: Counts


@dataclass
class CudaEngine:
    """Executes the launches of `host`'s operators with `library`'s kernels while `running`."""

    host: build.Host
    library: Library
    checks: Checks = field(default_factory=Checks)
    launches: list[Launched] = field(default_factory=list)
    regions: Regions = field(default_factory=Regions)

    @contextmanager
    def running(self):
        self.host.tensors()  # what was noted before belongs to others
        self.host.execute_with(self._execute)
        try:
            yield self
        finally:
            self.host.execute_with(None)

    def _execute(self, name: str, grid: int, block: int, cluster: int, shared: int, parameters: list[bytes]) -> None:
        for address, size in self.host.tensors():
            self.regions.add(address, size, f"a tensor of {size} bytes")
        shape = Shape(grid, block, cluster, shared)
        counts = launch(self.library.program(name), shape, parameters, self.regions, self.checks)
        self.launches.append(Launched(name, shape, counts))
