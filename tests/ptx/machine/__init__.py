"""Runs a translated kernel over its grid, on this machine's memory."""

from __future__ import annotations

from math import prod

import numpy as np

from tests.ptx.machine.scheduler import Machine
from tests.ptx.machine.state import Checks, Counts, Fault, Grid, Shape
from tests.ptx.machine.tensors import Regions
from tests.ptx.native import lanes
from tests.ptx.program import Program

__all__ = ["Checks", "Counts", "Fault", "LaunchError", "Regions", "Shape", "launch"]

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory that a block may have, by architecture (CUDA programming guide, compute capabilities)."""


class LaunchError(Exception):
    """A launch that a GPU would refuse, or that would do nothing."""


def launch(
    program: Program, shape: Shape, parameters: list[bytes], regions: Regions, checks: Checks | None = None
) -> Counts:
    """Runs a kernel. `parameters` are its arguments as they lie in parameter memory; pointers in them are addresses on
    this machine, of tensors that `regions` knows.

    Raises:
        LaunchError: for a launch that the kernel or its architecture does not allow.
        Fault: for what a GPU leaves undefined.
    """
    checks, counts = checks or Checks(), Counts()
    _check_launch(program, shape, parameters)
    lanes().set_seed(checks.seed)
    grid = Grid(program, shape, parameters, regions, checks)
    at_once = max(1, checks.width // (shape.threads * shape.cluster)) * shape.cluster
    with np.errstate(all="ignore"):
        for first in range(0, shape.grid, at_once):
            machine = Machine(grid, first, min(at_once, shape.grid - first))
            machine.run()
            counts.add(machine.counts)
    return counts


def _check_launch(program: Program, shape: Shape, parameters: list[bytes]) -> None:
    kernel, needs = program.kernel, program.kernel.directives
    expected, given = [size for _, size in kernel.parameters], [len(data) for data in parameters]
    shared, limit = program.static_shared + shape.shared, SHARED_LIMIT.get(kernel.architecture, 99) * 1024
    most = prod(needs.get("maxntid", (1024,)))
    for wrong, text in (
        (program.is_empty, f"is empty for {kernel.target}: the launch would do nothing"),
        (expected != given, f"takes parameters of {expected} bytes, not {given}"),
        (shape.cluster > 1 and kernel.architecture < 90, f"has no clusters on {kernel.target}"),
        (not 1 <= shape.cluster <= 8, f"cannot have clusters of {shape.cluster}"),
        (not 1 <= shape.grid < 1 << 31 or shape.grid % shape.cluster, f"cannot have a grid of {shape.grid}"),
        ("reqntid" in needs and shape.threads != prod(needs["reqntid"]), f"does not run with {shape.threads} threads"),
        (not 1 <= shape.threads <= most, f"runs with at most {most} threads, not {shape.threads}"),
        (shared > limit, f"has {shared} bytes of shared memory on {kernel.target}, at most {limit}"),
    ):
        if wrong:
            raise LaunchError(f"{kernel.name} {text}")
