"""Instructions by which the lanes of a warp meet: votes, shuffles, reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.machine_code.emulator.effects import U32, effect
from benchmarks.machine_code.emulator.operands import Decoded

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Step


def _by_warp(s: Step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(threads, the warps they form, for each thread the position of its warp)."""
    threads = s.machine.threads_of(s)
    warps, inverse = np.unique(s.machine.warp[threads], return_inverse=True)
    return threads, warps, inverse


@effect("VOTE", "VOTEU")
def _vote(i: Decoded, s: Step) -> None:
    threads, warps, inverse = _by_warp(s)
    voted = np.broadcast_to(i.operands[-1].predicate(s), threads.shape)
    bits, count = np.zeros(warps.size, np.int64), np.zeros(warps.size, np.int64)
    np.add.at(bits, inverse, voted.astype(np.int64) << s.machine.lane[threads])
    np.add.at(count, inverse, 1)
    votes = np.bincount(inverse, voted)
    held = votes == count if "ALL" in i.mods else votes > 0
    uniform = i.name == "VOTEU"
    for output in i.operands[:-1]:
        value = held if output.kind in ("P", "UP") else bits
        if output.number >= 0 and uniform:
            (s.UP if output.kind == "UP" else s.UR)[output.number][warps] = value
        elif output.number >= 0:
            output.put(s, value[inverse])


@effect("ELECT")
def _elect(i: Decoded, s: Step) -> None:
    threads, _, inverse = _by_warp(s)
    first = np.full(inverse.max() + 1, 1 << 30)
    np.minimum.at(first, inverse, threads)
    i.operands[0].put(s, threads == first[inverse])


@effect("SHFL")
def _shuffle(i: Decoded, s: Step) -> None:
    into_p, into, source, by, _ = i.operands
    threads = s.machine.threads_of(s)
    lane = s.machine.lane[threads]
    amount = np.asarray(by.u32(s)).astype(np.int64)
    other = {"BFLY": lane ^ amount, "IDX": lane * 0 + amount, "DOWN": lane + amount, "UP": lane - amount}[i.parts[0]]
    inside = (other >= 0) & (other < 32)
    other = np.where(inside, other, lane)
    takes_part = np.zeros(s.machine.at.shape, np.bool_)
    takes_part[threads] = True
    sources = threads - lane + other
    if not takes_part[sources].all():
        raise RuntimeError(f"a shuffle at {i.line.address:#x} reads a lane that does not take part")
    values = np.zeros(s.machine.at.shape, U32)
    values[threads] = source.u32(s)
    into.put(s, values[sources])
    into_p.put(s, inside)


@effect("REDUX", "CREDUX")
def _reduce(i: Decoded, s: Step) -> None:
    threads, warps, inverse = _by_warp(s)
    signed = "S32" in i.mods
    values = np.broadcast_to(i.operands[1].s32(s) if signed else i.operands[1].u32(s), threads.shape).astype(np.int64)
    operations = {"MAX": np.maximum, "MIN": np.minimum, "OR": np.bitwise_or}
    operation = next((function for name, function in operations.items() if name in i.mods), np.add)
    start = {np.maximum: -(1 << 62), np.minimum: 1 << 62}.get(operation, 0)
    result = np.full(warps.size, start, np.int64)
    operation.at(result, inverse, values)
    s.UR[i.operands[0].number][warps] = result & 0xFFFFFFFF
