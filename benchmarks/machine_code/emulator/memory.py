"""Loads, stores, bulk copies and the barriers that say when those have landed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.machine_code.emulator.effects import U32, effect
from benchmarks.machine_code.emulator.operands import Decoded

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Machine, Step

BASE = 0x7000_0000_0000
SHARED_WINDOW = 0x7F01  # the upper half of generic addresses of shared memory


class Memory:
    """The GPU's memory: arrays at addresses."""

    def __init__(self, size: int = 1 << 22) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self._used = 256

    def put(self, array: np.ndarray, offset: int = 0) -> int:
        """Copies `array` to `offset` bytes behind a multiple of 256, and returns the address."""
        data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        at = self._used + offset
        self._used = (at + data.size + 511) // 256 * 256
        if self._used > self.bytes.size:
            raise MemoryError("the emulated memory is full")
        self.bytes[at : at + data.size] = data
        return BASE + at

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        at = address - BASE
        return self.bytes[at : at + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def offsets(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Raises RuntimeError unless all accesses are aligned and inside."""
        if (addresses % width).any():
            raise RuntimeError(f"an access of {width} bytes is not aligned")
        at = addresses - BASE
        if (at < 0).any() or (at + width > self._used).any():
            raise RuntimeError("an access outside of the memory")
        return at


# ---- loads and stores ------------------------------------------------------------------------------------------------

_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_SPACES = {"LDG": "global", "LD": "generic", "LDS": "shared", "STG": "global", "ST": "generic", "STS": "shared"}


def _width(i: Decoded) -> int:
    return next((_WIDTHS[part] for part in i.parts if part in _WIDTHS), 4)


def _place(m: Machine, address: int, block: int) -> tuple[int, int]:
    """(block, offset) of an address of shared memory: in a cluster its upper byte is the block's rank."""
    return (address >> 24 & 0xFF if m.launch.cluster > 1 else block), address & 0xFFFFFF


def _access(i: Decoded, s: Step) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, which of them each thread accesses [threads, width])."""
    m, width, space = s.machine, _width(i), _SPACES[i.name]
    threads = m.threads_of(s)
    extended = space == "generic" and "E" in i.mods
    address = np.broadcast_to(i.memory.address(s, extended), threads.shape).astype(np.int64)
    if space == "generic":
        shared = address >> 32 == SHARED_WINDOW
        if shared.any() and not shared.all():
            raise NotImplementedError("generic addresses of both kinds")
        space = "shared" if shared.all() else "global"
    if space == "global":
        return m.memory.bytes, m.memory.offsets(address, width)[:, None] + np.arange(width)
    offset = address & 0xFFFFFF
    block = address >> 24 & 0xFF if m.launch.cluster > 1 else m.block[threads]
    if (offset % width).any() or (offset + width > m.shared.shape[1]).any() or (block >= m.launch.cluster).any():
        raise RuntimeError(
            f"shared memory at {offset.max():#x}: not aligned to {width} bytes, or outside of the block's"
        )
    return m.shared.reshape(-1), (block * m.shared.shape[1] + offset)[:, None] + np.arange(width)


@effect("LDG", "LD", "LDS")
def _load(i: Decoded, s: Step) -> None:
    into, width = i.operands[0], _width(i)
    view, at = _access(i, s)
    data = view[at]
    if width < 4:
        value = data.view(np.uint16 if width == 2 else np.uint8).reshape(-1)
        signed = np.int16 if width == 2 else np.int8
        into.put(s, value.view(signed).astype(np.int32).view(U32) if i.mods & {"S16", "S8"} else value.astype(U32))
        return
    # Of 32 bytes the second operand takes the lower half.
    registers = (
        [into.next(word) for word in range(width // 4)]
        if width < 32
        else [half.next(word) for half in (i.operands[1], into) for word in range(4)]
    )
    for register, value in zip(registers, data.view(U32).T, strict=True):
        register.put(s, value)


@effect("STG", "ST", "STS")
def _store(i: Decoded, s: Step) -> None:
    view, at = _access(i, s)
    width, source = _width(i), i.operands[-1]
    words = [np.broadcast_to(source.next(word).u32(s), at.shape[:1]) for word in range(max(width // 4, 1))]
    view[at] = np.ascontiguousarray(np.stack(words, 1).astype(U32)).view(np.uint8)[:, :width]


# ---- bulk copies and their barriers ----------------------------------------------------------------------------------


@dataclass
class CopyBarrier:
    """An mbarrier: its phase ends when all arrivals and all announced bytes are there."""

    count: int
    pending: int = 0
    bytes: int = 0
    phase: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, announced: int) -> None:
        self.pending -= 1
        self.bytes += announced
        self._settle()

    def land(self, count: int) -> None:
        self.bytes -= count
        self._settle()

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


def _arrivals(word: int) -> int:
    """Those that an initialised barrier waits for: its lower word holds them, negated, above the lowest bit."""
    return 0x100000 - (word >> 1)


def barrier_at(m: Machine, address: int, block: int) -> CopyBarrier:
    """The barrier at an address; sm_100 initialises one by a plain store of its word."""
    place = _place(m, address, block)
    if place not in m.barriers:
        owner, offset = place
        count = _arrivals(int(m.shared[owner, offset : offset + 4].view(U32)[0]))
        if not 0 < count <= 1024:
            raise RuntimeError(f"the barrier at {address:#x} was not initialised")
        m.barriers[place] = CopyBarrier(count)
    return m.barriers[place]


@effect("SYNCS.EXCH")
def _initialise(i: Decoded, s: Step) -> None:
    m = s.machine
    addresses, words = (np.broadcast_to(x, s.warps.shape) for x in (i.memory.address(s), i.operands[-1].raw(s)))
    for warp, address, word in zip(s.warps, addresses, words, strict=True):
        m.barriers[_place(m, int(address), int(m.block[warp * 32]))] = CopyBarrier(_arrivals(int(word)))


@effect("SYNCS.ARRIVE")
def _announce(i: Decoded, s: Step) -> None:
    """Arrives and announces bytes."""
    m = s.machine
    threads = m.threads_of(s)
    addresses, counts = (np.broadcast_to(x, threads.shape) for x in (i.memory.address(s), i.operands[-1].u32(s)))
    for thread, address, count in zip(threads, addresses, counts, strict=True):
        barrier_at(m, int(address), int(m.block[thread])).arrive(int(count))


@effect("UBLKCP")
def _bulk_copy(i: Decoded, s: Step) -> None:
    """Global to shared memory. The pair of the destination holds the barrier's address too; sizes count 16 bytes."""
    m = s.machine
    into, source, size = i.operands
    target = into.terms[0][1]
    values = (target.raw(s), target.next(1).raw(s), np.asarray(source.terms[0][1].u64(s)).astype(np.int64), size.raw(s))
    for warp, start, barrier, begin, units in zip(s.warps, *values, strict=True):
        count, block = 16 * int(units & 0xFFFF), int(m.block[warp * 32])
        owner, offset = _place(m, int(start), block)
        if offset % 16:
            raise RuntimeError("a bulk copy that is not aligned to 16 bytes")
        at = int(m.memory.offsets(np.array([begin]), 16)[0])
        m.shared[owner, offset : offset + count] = m.memory.bytes[at : at + count]
        barrier_at(m, int(barrier), block).land(count)
        m.note_copy(int(barrier), count)


@effect("STAS")
def _send(i: Decoded, s: Step) -> None:
    """To shared memory of a block of the cluster. The address's pair holds the place and the barrier that counts."""
    m, width, source = s.machine, _width(i), i.operands[-1]
    place = i.operands[0].terms[0][1]
    threads = m.threads_of(s)
    words = np.stack([np.broadcast_to(source.next(word).u32(s), threads.shape) for word in range(width // 4)], 1)
    for thread, address, barrier, data in zip(threads, place.raw(s), place.next(1).raw(s), words, strict=True):
        block, offset = _place(m, int(address), int(m.block[thread]))
        m.shared[block, offset : offset + width] = np.ascontiguousarray(data.astype(U32)).view(np.uint8)
        barrier_at(m, int(barrier), int(m.block[thread])).land(width)
