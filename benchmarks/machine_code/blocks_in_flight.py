"""A model of the blocks in flight on one multiprocessor: what share of a GPU's bandwidth a kernel is expected to hold.

The instructions are those that the emulator saw every warp of a block issue. A warp issues in order, when its operands
are there and its scheduler and pipe are free; loads, copies and stores share the multiprocessor's part of the memory's
bandwidth. The latencies below are assumptions, and `band` scales all of them: nothing here was measured on a GPU.

What the model does not know: misses of the instruction cache, bank conflicts, blocks of a cluster that run out of
step, clocks that sink under load.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

from benchmarks.hardware import GPU
from benchmarks.machine_code.emulator.machine import Executed
from benchmarks.machine_code.emulator.operands import Decoded
from benchmarks.machine_code.sass import Instruction


@dataclass(frozen=True)
class Latencies:
    """Cycles. Arithmetic, shared memory and caches: microbenchmarks of A100 and H100 (Abdelkhalik et al. 2022,
    arXiv:2208.11174; Luo et al. 2024, arXiv:2402.13499, which has the 180 cycles between multiprocessors too).
    `fence`, `cluster_barrier`, `launch` are estimates: a fence is two trips to the L2 cache, a new block has its
    registers and shared memory set up."""

    arithmetic: float = 5
    double: float = 16
    special: float = 20
    uniform: float = 10
    constant: float = 25
    shuffle: float = 24
    shared: float = 29
    block_barrier: float = 30
    remote: float = 180
    cluster_barrier: float = 220
    cache: float = 263
    memory: float = 560
    fence: float = 600
    branch: float = 10
    launch: float = 700

    def scaled(self, band: float) -> Latencies:
        return replace(self, **{each.name: band * getattr(self, each.name) for each in fields(self)})


EFFICIENCY = 0.92
"""Share of the data sheet's bandwidth that a plain copy reaches, at most."""

_WRITES_BEHIND = 96 * 1024
"""Bytes a multiprocessor that the L2 cache holds back while reads wait."""

_STORES = {
    "STG",
    "STS",
    "ST",
    "STAS",
    "BRA",
    "EXIT",
    "BAR",
    "UBLKCP",
    "WARPSYNC",
    "BSYNC",
    "BSSY",
    "RET",
    "BRX",
    "CALL",
}


_FILES = {"R": 0, "UR": 256, "P": 512, "UP": 520}
_REGISTERS = 528


@dataclass(frozen=True)
class _Line:
    """An instruction as the model sees it."""

    name: str
    pipe: str
    latency: str  # of its result, by the name of a field of Latencies
    slots: int  # of the shared pipe: cycles that it keeps it busy
    bytes: int  # through global memory, of a warp
    reads: tuple[int, ...]  # registers, by `_FILES`
    writes: tuple[int, ...]


@lru_cache(maxsize=4096)
def _line(line: object) -> _Line:
    decoded = Decoded.of(line)
    name, opcode = decoded.name, line.opcode
    instruction = Instruction(opcode, "")
    width = instruction.width()
    memory = name in ("LDG", "LD", "STG", "ST")
    reads, writes = _registers(decoded, width)
    slots = 32 * width // (64 if memory else 128) if name in ("LDG", "STG", "LD", "ST", "LDS", "STS") else 1
    return _Line(name, instruction.pipe(), _latency(decoded), max(slots, 1), 32 * width * memory, reads, writes)


def _latency(decoded: Decoded) -> str:
    name = decoded.name
    if name == "MUFU" or name in ("I2F", "F2I", "F2F", "FRND", "S2R", "S2UR"):
        return "special"
    if name in ("DADD", "DMUL", "DFMA", "DSETP"):
        return "double"
    if name in ("SHFL", "REDUX", "CREDUX", "VOTE"):
        return "shuffle"
    if name == "LDS":
        return "shared"
    if name in ("LDC", "ULDC", "LDCU"):
        return "constant"
    return "uniform" if decoded.uniform or name == "R2UR" else "arithmetic"


def _registers(decoded: Decoded, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(read, written), numbered through all files."""
    wide = decoded.name[0] == "D" or "WIDE" in decoded.mods or "64" in decoded.mods
    count = width // 4 if decoded.name in ("LDG", "LDS", "LD", "LDC", "ULDC", "LDCU") else 2 if wide else 1
    written: list[int] = []
    read: list[int] = []
    left = 0 if decoded.name in _STORES else 2 if count == 8 else 1  # 32 bytes come in two operands of four registers
    count = min(count, 4)
    for operand in decoded.operands:
        for _, register, _ in operand.terms:
            if register is not None and register.number >= 0:
                read += [
                    _FILES[register.kind] + register.number + k for k in range(2 if ".64" in register.suffix else 1)
                ]
        if operand.kind not in ("R", "UR", "P", "UP") or operand.number < 0:
            left -= operand.kind in ("R", "UR")
            continue
        result = left > 0
        span = count if result else width // 4 if decoded.name in ("STG", "STS") else 2 if wide else 1
        first = _FILES[operand.kind] + operand.number
        names = range(first, first + (span if operand.kind in ("R", "UR") else 1))
        (written if result else read).extend(names)
        left -= operand.kind in ("R", "UR")
    if decoded.name in ("ISETP", "FSETP", "DSETP", "UISETP", "HSETP2", "PLOP3", "UPLOP3"):
        results = [_FILES[o.kind] + o.number for o in decoded.operands[:2] if o.number >= 0]
        written, read = results, [name for name in (*written, *read) if name not in results]
    if decoded.guard is not None and decoded.guard.number >= 0:
        read.append(_FILES[decoded.guard.kind] + decoded.guard.number)
    return tuple(read), tuple(written)


@dataclass
class _Memory:
    """A multiprocessor's part of the memory's and of the L2 cache's bandwidth, in bytes a cycle."""

    rate: float
    cache_rate: float
    free: float = 0
    cache_free: float = 0
    behind: float = 0  # bytes that the cache will write when nobody reads
    moved: float = 0

    def read(self, now: float, count: float, cached: bool) -> float:
        """When the last byte leaves the cache, or the memory; the latency comes on top."""
        self.cache_free = max(self.cache_free, now) + count / self.cache_rate
        if cached:
            return self.cache_free
        self._drain(now)
        self.free = max(self.free, now) + count / self.rate
        self.moved += count
        return max(self.free, self.cache_free)

    def write(self, now: float, count: float) -> None:
        self.cache_free = max(self.cache_free, now) + count / self.cache_rate
        self.behind += count
        self.moved += count
        self._drain(now)
        if self.behind > _WRITES_BEHIND:
            self.free = max(self.free, now) + (self.behind - _WRITES_BEHIND) / self.rate
            self.behind = _WRITES_BEHIND

    def _drain(self, now: float) -> None:
        if now > self.free:
            self.behind -= min(self.behind, (now - self.free) * self.rate)
            self.free = now


class _Block:
    """A block that runs: where its warps are, and what they wait for."""

    def __init__(self, warps: int, now: float) -> None:
        self.at = [0] * warps
        self.ready = [[0.0] * _REGISTERS for _ in range(warps)]
        self.arrived: dict[str, list[int]] = {}  # the warps that wait at a barrier
        self.arrivals = 0  # at the cluster's barrier
        self.cluster_time = now
        self.copies: dict[int, float] = {}
        self.exchange = now
        self.loaded = 0
        self.left = warps


@dataclass(frozen=True)
class Program:
    """What every warp of a block issues, and how blocks share a multiprocessor."""

    traces: tuple[tuple[tuple[int, int], ...], ...]  # (step, line) by warp
    lines: tuple[_Line, ...]
    copies: dict[int, tuple[int, int]]
    row_bytes: int  # that the block reads from memory; what it loads after them comes from the L2 cache
    slots: int  # blocks on a multiprocessor

    @classmethod
    def of(cls, executed: Executed, warps: int, row_bytes: int, slots: int) -> Program:
        """Of the first block, which finishes the token and writes its outputs."""
        traces = tuple(tuple(executed.trace(warp)) for warp in range(warps))
        lines = tuple(_line(line) for line in executed.function.lines)
        return cls(traces, lines, executed.copies, row_bytes, slots)


class Multiprocessor:
    """Runs blocks of a program, `slots` at a time, until `count` of them are done."""

    def __init__(self, program: Program, gpu: GPU, rate: float, cache_rate: float, latencies: Latencies) -> None:
        self.program, self.latencies = program, latencies
        self.memory = _Memory(rate, cache_rate)
        self.results = {each.name: getattr(latencies, each.name) for each in fields(latencies)}
        self.busy = {"fma": 128 // gpu.fma, "alu": 128 // gpu.alu, "mufu": 128 // gpu.mufu}
        self.scheduler = [0.0] * 4  # when each may issue again
        self.pipes = [dict.fromkeys(self.busy, 0.0) for _ in range(4)]
        self.port = {"memory": 0.0, "shared": 0.0}
        self.queues: list[list[tuple[float, int, _Block, int]]] = [[] for _ in range(4)]  # warps, by when they may
        self.order = 0
        self.done: list[float] = []

    def run(self, count: int) -> list[float]:
        """When each block was done."""
        self.started = 0
        self.count = count
        for slot in range(min(self.program.slots, count)):
            self._start(self.latencies.launch * (1 + slot / self.program.slots))
        queues, scheduler = self.queues, self.scheduler
        while len(self.done) < count:
            now, unit = float("inf"), 0
            for each, queue in enumerate(queues):
                if queue and (time := max(queue[0][0], scheduler[each])) < now:
                    now, unit = time, each
            _, _, block, warp = heapq.heappop(queues[unit])
            self._issue(now, block, warp)
        return self.done

    def _start(self, now: float) -> None:
        self.started += 1
        warps = len(self.program.traces)
        block = _Block(warps, now)
        for warp in range(warps):
            self._push(now, block, warp)

    def _push(self, now: float, block: _Block, warp: int) -> None:
        self.order += 1
        heapq.heappush(self.queues[warp % 4], (now, self.order, block, warp))

    def _issue(self, now: float, block: _Block, warp: int) -> None:
        trace = self.program.traces[warp]
        step, position = trace[block.at[warp]]
        line, ready = self.program.lines[position], block.ready[warp]
        unit, pipe, time = warp % 4, line.pipe, now
        free = self.port if pipe in self.port else self.pipes[unit]
        if pipe in free and free[pipe] > time:
            time = free[pipe]
        for register in line.reads:
            if ready[register] > time:
                time = ready[register]
        if time > now:
            self._push(time, block, warp)
            return
        self.scheduler[unit] = now + 1
        if pipe in free:
            free[pipe] = now + (line.slots if free is self.port else self.busy[pipe])
        block.at[warp] += 1
        following = self._effect(now, block, warp, line, step, ready)
        if block.at[warp] == len(trace):
            block.left -= 1
            if block.left == 0:
                self.done.append(now)
                if self.started < self.count:
                    self._start(now + self.latencies.launch)
        elif following is not None:
            self._push(following, block, warp)

    def _effect(self, now: float, block: _Block, warp: int, line: _Line, step: int, ready: list[float]) -> float | None:
        """When the warp may issue again; None while it waits for others."""
        at, name = self.latencies, line.name
        result = now + self.results[line.latency]
        following = now + 1
        if name in ("LDG", "LD"):
            vector = line.bytes == 512
            cached = not vector or block.loaded >= self.program.row_bytes
            block.loaded += line.bytes if vector else 0
            result = self.memory.read(now, line.bytes, cached) + (at.cache if cached else at.memory)
        elif name == "STG" and line.bytes >= 512:
            self.memory.write(now, line.bytes)
        elif name == "UBLKCP":
            barrier, count = self.program.copies[step]
            landed = self.memory.read(now, count, False) + at.memory
            block.copies[barrier] = max(block.copies.get(barrier, 0.0), landed)
        elif name == "STAS":
            block.exchange = max(block.exchange, now + at.remote)
        elif name == "SYNCS" and step in self.program.copies:
            following = max(following, block.copies.get(self.program.copies[step][0], block.exchange) + at.shared)
        elif name == "MEMBAR":
            following = now + at.fence
        elif name == "UCGABAR_ARV":
            block.cluster_time = max(block.cluster_time, now + at.cluster_barrier)
        elif name == "UCGABAR_WAIT":
            return self._meet("cluster", block, warp, block.cluster_time)
        elif name == "BAR":
            return self._meet("block", block, warp, now + at.block_barrier)
        elif name in ("BRA", "BRX", "CALL", "RET"):
            following = now + self._taken(block, warp)
        for register in line.writes:
            ready[register] = result
        return following

    def _taken(self, block: _Block, warp: int) -> float:
        trace, at = self.program.traces[warp], block.at[warp]
        jumps = at < len(trace) and trace[at][1] != trace[at - 1][1] + 1
        return self.latencies.branch if jumps else 1

    def _meet(self, where: str, block: _Block, warp: int, until: float) -> float | None:
        waiting = block.arrived.setdefault(where, [])
        waiting.append(warp)
        if len(waiting) < block.left:
            return None
        block.arrived[where] = []
        for other in waiting:
            if other != warp:
                self._push(until, block, other)
        return until


def shares(
    program: Program,
    gpu: GPU,
    multiprocessors: float,
    blocks_a_row: int,
    row_bytes: float,
    rows: Sequence[int],
    band: float = 1.0,
    rounds: int = 4,
) -> dict[int, float]:
    """The share of the data sheet's bandwidth by number of rows, each of which moves `row_bytes` through the memory.

    A multiprocessor works through `rounds` times as many blocks as it holds; beyond them time grows as it did over
    the second half. The launch of a kernel takes 3 microseconds.
    """  # fmt: skip
    rate = gpu.bandwidth * EFFICIENCY / multiprocessors / gpu.clock
    cache_rate = gpu.cache_bandwidth / multiprocessors / gpu.clock
    latencies = Latencies().scaled(band)
    most = rounds * program.slots
    times: dict[int, float] = {}

    def time_of(count: int) -> float:
        if count not in times:
            machine = Multiprocessor(program, gpu, rate, cache_rate, latencies)
            last = machine.run(count)[-1]
            times[count] = max(last, machine.memory.free + machine.memory.behind / rate)
        return times[count]

    slope = (time_of(most) - time_of(most // 2)) / (most - most // 2)
    found = {}
    for count in rows:
        blocks = math.ceil(count * blocks_a_row / multiprocessors)
        cycles = time_of(blocks) if blocks <= most else time_of(most) + slope * (blocks - most)
        found[count] = count * row_bytes / (cycles / gpu.clock + 3e-6) / gpu.bandwidth
    return found
