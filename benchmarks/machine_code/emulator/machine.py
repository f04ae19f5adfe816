"""Blocks and clusters of threads that execute a function of a cubin.

The threads of all blocks advance together, those at the lowest address first, which is how a warp's lanes meet again.
Whatever waits (for lanes of its warp, its block, its cluster, a copy) is set aside until it may go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.machine_code.emulator import floats, flow, integers, lanes  # noqa: F401 (they fill EFFECTS)
from benchmarks.machine_code.emulator.cubin import Function
from benchmarks.machine_code.emulator.effects import EFFECTS
from benchmarks.machine_code.emulator.memory import CopyBarrier, Memory
from benchmarks.machine_code.emulator.operands import Decoded

WARP = 32
_ASIDE = 1 << 24  # added to the position of a thread that waits
_GONE = 1 << 26

# Where bank 0 holds what a launch is made of: (block, grid, "this is a cluster"), by the offset of the arguments.
_LAUNCH = {0x160: (0x0, 0xC, None), 0x210: (0x0, 0xC, 0x140), 0x380: (0x360, 0x370, 0x36C)}


@dataclass
class Step:
    """What one instruction sees: the threads that execute it and, aligned with them, their warps; of a uniform
    instruction the warps alone."""

    machine: Machine
    threads: Any
    warps: Any
    R: np.ndarray
    UR: np.ndarray
    P: np.ndarray
    UP: np.ndarray
    position: int
    active: Any = None  # the threads before the guard


@dataclass(frozen=True)
class Launch:
    """`blocks` of `threads` threads, `cluster` of them together, with bytes of dynamic shared memory."""

    threads: int
    dynamic_shared: int = 0
    cluster: int = 1
    blocks: int = 1  # of the grid


@dataclass
class Executed:
    """How often every warp issued every instruction, and in which order: `schedule` has the line and the warps of
    every step, `copies` which barrier a step's bulk copy completes or its wait is for, and the bytes of the copy."""

    function: Function
    issues: np.ndarray  # [lines, warps]
    schedule: list[tuple[int, np.ndarray]]
    copies: dict[int, tuple[int, int]]

    def trace(self, warp: int) -> list[tuple[int, int]]:
        """(step, line) of the instructions that a warp issued, in order."""
        return [(step, line) for step, (line, warps) in enumerate(self.schedule) if warp in warps]


class Machine:
    """One cluster (or one block) of a launch."""

    def __init__(self, function: Function, launch: Launch, params: bytes, memory: Memory, first_block: int = 0) -> None:
        self.function, self.launch, self.memory = function, launch, memory
        self.first_block = first_block
        threads = launch.threads * launch.cluster
        self.warps = threads // WARP
        self.thread = np.arange(threads)
        self.block = self.thread // launch.threads
        self.warp = self.thread // WARP
        self.lane = self.thread % WARP
        self.R = np.zeros((256, threads), np.uint32)
        self.UR = np.zeros((256, self.warps), np.uint32)
        self.P = np.zeros((8, threads), np.bool_)
        self.UP = np.zeros((8, self.warps), np.bool_)
        self.B = np.zeros((16, threads), np.bool_)
        self.at = np.zeros(threads, np.int64)
        self.cluster_arrivals = np.zeros(threads, np.int64)
        self.cluster_waits = np.zeros(threads, np.int64)
        self.barriers: dict[tuple[int, int], CopyBarrier] = {}
        # A kernel reads no shared memory that it has not written: what would be there is NaN.
        self.shared_start = function.shared_bytes
        size = -(-(self.shared_start + launch.dynamic_shared) // 1024) * 1024
        self.shared = np.full((launch.cluster, max(size, 1024)), 0xFF, np.uint8)
        self.banks = dict(function.constants)
        self.banks[0] = self._bank(params)
        self._decoded: list[Decoded | None] = [None] * len(function.lines)
        self.issues = np.zeros((len(function.lines), self.warps), np.int64)
        self.schedule: list[tuple[int, np.ndarray]] = []
        self.copies: dict[int, tuple[int, int]] = {}

    def _bank(self, params: bytes) -> bytes:
        offset, size = self.function.params
        if len(params) != size:
            raise ValueError(f"{self.function.name} takes {size} bytes of arguments, got {len(params)}")
        bank = bytearray(offset + size)
        bank[offset:] = params
        block, grid, cluster = _LAUNCH[offset]
        for at, value in ((block, self.launch.threads), (grid, self.launch.blocks), (cluster, self.launch.cluster > 1)):
            if at is not None:
                bank[at : at + 4] = int(value).to_bytes(4, "little")
        for at in (block + 4, block + 8, grid + 4, grid + 8):
            bank[at : at + 4] = (1).to_bytes(4, "little")
        return bytes(bank)

    def constant(self, bank: int, address: Any, width: int) -> Any:
        content, kind = self.banks[bank], np.uint32 if width == 4 else np.uint64
        if np.ndim(address) == 0:
            return np.frombuffer(content, kind, 1, int(address))[0]
        return np.array([np.frombuffer(content, kind, 1, int(at))[0] for at in address])

    # ---- running ----------------------------------------------------------------------------------------------------

    def run(self) -> Executed:
        """Until every thread has left.

        Raises:
            RuntimeError: if none can go on, or an instruction does what a GPU leaves undefined.
            NotImplementedError: at an instruction that the emulator does not know.
        """
        while True:
            position = int(self.at.min())
            if position >= _GONE:
                return Executed(self.function, self.issues, self.schedule, self.copies)
            if position >= _ASIDE:
                self._release_any()
            else:
                self._step(position)

    def _step(self, position: int) -> None:
        decoded = self._decoded[position]
        if decoded is None:
            decoded = self._decoded[position] = Decoded.of(self.function.lines[position])
        here = self.at == position
        threads: Any = slice(None) if here.all() else np.nonzero(here)[0]
        warps = np.arange(self.warps) if isinstance(threads, slice) else np.unique(self.warp[threads])
        self.issues[position, warps] += 1
        self.schedule.append((position, warps))
        self.at[threads] = position + 1
        step = self._whole_warps(warps) if decoded.uniform else self.step_of(threads)
        step.position = position
        if decoded.guard is not None:
            holds = np.broadcast_to(decoded.guard.predicate(step), step.warps.shape)
            if not holds.any():
                return
            if decoded.uniform:
                step.warps = step.warps[holds]
            elif not holds.all():
                step = self.step_of(self.thread[threads][holds])
                step.position, step.active = position, self.thread[threads]
        if decoded.effect not in EFFECTS:
            raise NotImplementedError(f"{decoded.line.opcode} {', '.join(decoded.line.operands)}")
        with np.errstate(all="ignore"):
            EFFECTS[decoded.effect](decoded, step)

    def step_of(self, threads: Any) -> Step:
        return Step(self, threads, self.warp[threads], self.R, self.UR, self.P, self.UP, 0)

    def _whole_warps(self, warps: np.ndarray) -> Step:
        return Step(self, None, warps, self.R, self.UR, self.P, self.UP, 0)

    def threads_of(self, s: Step) -> np.ndarray:
        """The numbers of the threads that execute the step."""
        return self.thread[s.threads]

    def set_aside(self, threads: np.ndarray, position: int) -> None:
        """They wait at the instruction `position` until `_release` lets them go on."""
        self.at[threads] = position + _ASIDE
        self._release(position)

    def note_copy(self, barrier: int, count: int = 0) -> None:
        """Says of the present step which barrier it is about."""
        self.copies[len(self.schedule) - 1] = (barrier & 0xFFFFFF, count)

    def leave(self, threads: np.ndarray) -> None:
        self.at[threads] = _GONE

    def _release_any(self) -> None:
        aside = np.unique(self.at[(self.at >= _ASIDE) & (self.at < _GONE)]) - _ASIDE
        if not any([self._release(int(position)) for position in aside]):
            lines = [self.function.lines[position] for position in aside]
            raise RuntimeError("nobody can go on: " + ", ".join(f"{x.address:#x} {x.opcode}" for x in lines))

    def _release(self, position: int) -> bool:
        decoded = self._decoded[position]
        waiting = self.at == position + _ASIDE
        free = waiting & flow.may_go_on(decoded, self, waiting)
        if not free.any():
            return False
        flow.go_on(decoded, self, np.nonzero(free)[0])
        self.at[free] = position + 1
        return True

    @property
    def gone(self) -> np.ndarray:
        return self.at >= _GONE
