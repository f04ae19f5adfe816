"""A launch, the threads that run, and where they are.

Threads are numbered from 0 over the blocks that run side by side, block after block. A `Group` is some of them at one
place of the code; a `slot` is a block among those that run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields

import numpy as np

from tests.ptx.machine.tensors import Region, Regions
from tests.ptx.native import lanes
from tests.ptx.program import LOCAL_BASE, Program
from tests.ptx.source import Address, Integer, Name, Register

WARP = 32
FULL = 0xFFFFFFFF


class Fault(Exception):
    """What a GPU leaves undefined, with the instruction and the thread that did it."""


@dataclass(frozen=True)
class Shape:
    """Of a launch: blocks, threads per block, blocks per cluster, bytes of dynamic shared memory per block."""

    grid: int
    threads: int
    cluster: int = 1
    shared: int = 0


@dataclass(frozen=True)
class Checks:
    """How a launch is run, and what it is checked for besides addresses and alignment, which always are.

    `order`: threads that touch the same bytes of shared memory with nothing between them that orders the two;
    `order_global`: the same in global memory. `poison` fills shared memory, and bytes that an asynchronous operation
    will write. `seed` chooses which way approximate instructions err. `width`: how many threads, about, run side by
    side.
    """

    order: bool = True
    order_global: bool = False
    poison: int = 0xFF
    seed: int = 0
    width: int = 4096


@dataclass
class Counts:
    """What a launch did, summed over its threads."""

    pipes: Counter = field(default_factory=Counter)  # instructions
    loaded: int = 0  # bytes of global memory that threads asked for
    stored: int = 0
    sectors_loaded: int = 0  # 32-byte sectors that a warp's instruction touched
    sectors_stored: int = 0
    copied: int = 0  # bytes of bulk copies
    shared: int = 0  # loads and stores of shared memory
    block_barriers: int = 0  # of a block
    cluster_barriers: int = 0
    in_flight: int = 0  # the most bytes of bulk copies that one block had under way

    def add(self, other: Counts) -> None:
        for one in fields(self):
            mine, more = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(mine, more) if one.name == "in_flight" else mine + more)

    @property
    def instructions(self) -> int:
        return sum(self.pipes.values())


class Group:
    """Threads at the same place, in ascending order, and the registers that are read from there on."""

    def __init__(self, threads: np.ndarray, registers: dict[str, np.ndarray]) -> None:
        self.threads = threads
        self.n = len(threads)
        self.r = registers
        self.parked_at = -1  # the machine's event count when the group was found unable to go on
        self.tried: int | None = None  # the basic block whose mbarrier has answered "not yet" once
        self.cache: dict[str, np.ndarray] = {}

    def part(self, mask: np.ndarray, names: frozenset[str]) -> Group:
        index = np.flatnonzero(mask)
        return Group(self.threads[index], {name: self.r[name][index] for name in names})

    def merged(self, other: Group, names: frozenset[str]) -> Group:
        threads = np.concatenate((self.threads, other.threads))
        order = np.argsort(threads, kind="stable")
        registers = {name: np.concatenate((self.r[name], other.r[name]))[order] for name in names}
        return Group(threads[order], registers)


class Ledger:
    """Who touched which granule of a piece of memory (lanes.c), and of which size the granules are."""

    def __init__(self, size: int, granule: int) -> None:
        self.granule = granule
        self.cells = np.zeros((size // granule + 1) * lanes().CELL_BYTES, np.uint8)  # zero: nobody


class Grid:
    """What all blocks of a launch share: parameters, global memory, and how atomic operations order blocks."""

    def __init__(
        self, program: Program, shape: Shape, parameters: list[bytes], regions: Regions, checks: Checks
    ) -> None:
        self.program, self.shape, self.regions, self.checks = program, shape, regions, checks
        self.parameters = [np.frombuffer(bytearray(data), np.uint8) for data in parameters]
        self.ledgers: dict[Region, Ledger] = {}
        blocks = shape.grid if checks.order_global else 1
        self.atomics = 0
        self.published = np.zeros((blocks, 3), np.int32)  # as Clocks in lanes.c
        self.informed = np.zeros(blocks, np.int32)


class Threads:
    """`blocks` blocks of a grid from block `first` on: their threads, their memory and their clocks."""

    def __init__(self, grid: Grid, first: int, blocks: int) -> None:
        program, shape, checks = grid.program, grid.shape, grid.checks
        self.grid, self.program, self.shape, self.checks = grid, program, shape, checks
        self.first, self.blocks, self.threads = first, blocks, shape.threads
        self.n = n = blocks * shape.threads
        self.first_thread = first * shape.threads
        self.warps_per_block = -(-shape.threads // WARP)
        self.warps = blocks * self.warps_per_block
        self.parameters = [np.uint64(buffer.ctypes.data) for buffer in grid.parameters]
        self.counts = Counts()
        self.events = 0  # grows whenever a group that could not go on may be able to

        self.alive = np.ones(n, bool)
        self.alive_in_block = np.full(blocks, shape.threads)
        self.alive_in_warp = np.bincount(self.warp_of(np.arange(n)), minlength=self.warps)

        self.shared_bytes = program.static_shared + shape.shared
        self.stride = -(-max(self.shared_bytes, 1) // 128) * 128
        self.shared = np.full(blocks * self.stride, checks.poison, np.uint8)
        self.local_stride = max(program.local_bytes, 1)
        has_local = program.local_bytes > LOCAL_BASE
        self.local = np.full(n * self.local_stride if has_local else 1, checks.poison, np.uint8)
        self.ledger = Ledger(blocks * self.stride, program.granule) if checks.order and self.shared_bytes else None

        # Clocks in lanes.c says what these are.
        self.block_clock = np.zeros(blocks, np.int32)
        self.warp_clock = np.zeros(self.warps, np.int32)
        self.arrived = np.zeros(n, np.int32)
        self.waited = np.zeros(n, np.int32)
        self.released = np.zeros((blocks, 8), np.int32)
        self.seen = np.zeros((n, 4, 2), np.int32)
        self.copy_rows: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)]
        self._clocks: tuple | None = None

    def clocks(self) -> tuple:
        """The first argument of the ledger's functions."""
        if self._clocks is None:
            sizes = (self.threads, self.shape.cluster, self.released.shape[1], self.seen.shape[1], self.first_thread)
            self._clocks = (
                np.array(sizes, np.int64), self.block_clock, self.warp_clock, self.arrived, self.waited, self.released,
                self.seen, np.array(self.copy_rows, np.int32), self.grid.published, self.grid.informed,
            )  # fmt: skip
        return self._clocks

    # ---- where threads are ----

    def slot(self, group: Group) -> np.ndarray:
        """The block of each thread."""
        if "slot" not in group.cache:
            group.cache["slot"] = group.threads // self.threads
        return group.cache["slot"]

    def warp_of(self, threads: np.ndarray) -> np.ndarray:
        return threads // self.threads * self.warps_per_block + threads % self.threads // WARP

    def lane(self, group: Group) -> np.ndarray:
        if "lane" not in group.cache:
            group.cache["lane"] = (group.threads % self.threads % WARP).astype(np.uint32)
        return group.cache["lane"]

    def is_whole(self, group: Group) -> bool:
        """Whether the group is full warps, one after another."""
        if "whole" not in group.cache:
            t = group.threads
            group.cache["whole"] = (
                group.n % WARP == 0
                and self.threads % WARP == 0
                and bool((t[::WARP] % WARP == 0).all() and (t[WARP - 1 :: WARP] - t[::WARP] == WARP - 1).all())
            )
        return group.cache["whole"]

    def who(self, thread: int, what: str = "thread") -> str:
        block = self.first + int(thread) // self.threads
        return f"block {block}" if what == "block" else f"thread {int(thread) % self.threads} of block {block}"

    def special(self, group: Group, name: str) -> np.ndarray:
        """A special register of every thread."""
        if name not in group.cache:
            base, _, axis = name.partition(".")
            values = self._special(group, base) if axis in ("", "x") else int(base[0] == "n" or "_n" in base)
            group.cache[name] = np.broadcast_to(np.asarray(values).astype(np.uint32), group.n).copy()
        return group.cache[name]

    def _special(self, group: Group, name: str) -> np.ndarray | int:
        block, size, lane = self.slot(group) + self.first, self.shape.cluster, self.lane(group)
        below = (np.uint32(1) << lane) - np.uint32(1)
        return {
            "tid": group.threads % self.threads,
            "ntid": self.threads,
            "ctaid": block,
            "nctaid": self.shape.grid,
            "cluster_ctaid": block % size,
            "cluster_ctarank": block % size,
            "cluster_nctaid": size,
            "cluster_nctarank": size,
            "clusterid": block // size,
            "nclusterid": self.shape.grid // size,
            "laneid": lane,
            "lanemask_eq": below + np.uint32(1),
            "lanemask_lt": below,
            "lanemask_le": below + below + np.uint32(1),
            "lanemask_gt": ~(below + below + np.uint32(1)),
            "lanemask_ge": ~below,
        }[name]

    def operand(self, group: Group, operand) -> np.ndarray:
        """An operand's value before its instruction runs: a register, a literal or an address."""
        if isinstance(operand, Register):
            values = group.r[operand.name]
            return values.view(f"u{values.dtype.itemsize}")
        if isinstance(operand, Integer):
            return np.uint32(operand.value & FULL)
        if isinstance(operand, Address) and isinstance(operand.base, Name):
            return np.full(group.n, self.program.variables[operand.base.text] + operand.offset, np.uint64)
        assert isinstance(operand, Address)
        return (self.operand(group, operand.base).astype(np.int64) + operand.offset).astype(np.uint64)

    # ---- what instructions may not do ----

    def fault(self, site: int, thread: int, text: str) -> Fault:
        ins = self.program.kernel.instructions[site]
        return Fault(f"{self.program.kernel.name}: {self.who(thread)} {text}\n  at `{ins.text}`, line {ins.line}")

    def trap(self, group: Group, site: int, mask: np.ndarray | None) -> None:
        for thread in group.threads[:1] if mask is None else group.threads[mask][:1]:
            raise self.fault(site, thread, "traps")

    def quotient(self, group: Group, site: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Integer division, toward zero. By zero the result is unspecified, so it is a fault."""
        x, y = np.broadcast_to(x, group.n), np.broadcast_to(y, group.n)
        if not y.all():
            raise self.fault(site, group.threads[np.flatnonzero(y == 0)[0]], "divides by zero")
        quotient = x // y
        if x.dtype.kind == "i":
            quotient = quotient + ((quotient * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)
        return quotient
