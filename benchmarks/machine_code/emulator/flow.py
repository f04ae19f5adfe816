"""Branches, calls, and everything that waits for other threads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.machine_code.emulator.effects import U32, effect
from benchmarks.machine_code.emulator.memory import barrier_at
from benchmarks.machine_code.emulator.operands import Decoded, Operand

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Machine, Step

# What has no effect here: memory is consistent, and no lane runs ahead of its warp.
_NOTHING = (
    "NOP",
    "MEMBAR",
    "ERRBAR",
    "CGAERRBAR",
    "CCTL",
    "FENCE",
    "YIELD",
    "DEPBAR",
    "LDGDEPBAR",
    "ENDCOLLECTIVE",
    "SYNCS.CCTL",
)


@effect(*_NOTHING)
def _nothing(i: Decoded, s: Step) -> None:
    pass


# ---- where a thread goes on ------------------------------------------------------------------------------------------


def _target(i: Decoded, s: Step) -> int:
    return s.machine.function.labels[i.operands[-1].text.strip("`()")]


@effect("BRA")
def _branch(i: Decoded, s: Step) -> None:
    m, threads = s.machine, s.machine.threads_of(s)
    if "DIV" in i.mods or "CONV" in i.mods:  # whether lanes of the warp are missing, or none is
        arrived = np.bincount(m.warp[threads], minlength=m.warps)
        alive = np.bincount(m.warp[~m.gone], minlength=m.warps)
        whole = (arrived == alive)[m.warp[threads]]
        threads = threads[whole if "CONV" in i.mods else ~whole]
    elif "ANY" in i.mods:  # the warp together, if any of its lanes would
        active = threads if s.active is None else s.active
        threads = active[np.isin(m.warp[active], m.warp[threads])]
    elif len(i.operands) > 1:
        threads = threads[np.broadcast_to(i.operands[0].predicate(s), threads.shape)]
    m.at[threads] = _target(i, s)


@effect("CALL")
def _call(i: Decoded, s: Step) -> None:
    """The caller has put the address to return to into a register."""
    s.machine.at[s.threads] = _target(i, s)


@effect("RET")
def _return(i: Decoded, s: Step) -> None:
    address = Operand.parse(i.line.operands[0].split()[0])
    s.machine.at[s.threads] = np.asarray(address.u32(s)).astype(np.int64) // 16


@effect("BRX")
def _indexed_branch(i: Decoded, s: Step) -> None:
    register, offset = i.line.operands[0].split(None, 1)
    base = i.line.address + 16 + int(offset, 0)
    s.machine.at[s.threads] = (base + Operand.parse(register).s32(s).astype(np.int64)) // 16


@effect("EXIT")
def _exit(i: Decoded, s: Step) -> None:
    s.machine.leave(s.machine.threads_of(s))


# ---- waiting for lanes, blocks, clusters and copies ------------------------------------------------------------------


@effect("BSSY")
def _open(i: Decoded, s: Step) -> None:
    """The lanes that are here meet again at the BSYNC of the same register."""
    m, threads = s.machine, s.machine.threads_of(s)
    here = np.zeros(m.at.shape, np.bool_)
    here[threads] = True
    touched = np.isin(m.warp, m.warp[threads])
    m.B[i.operands[0].number][touched] = here[touched]


@effect("BREAK")
def _drop_out(i: Decoded, s: Step) -> None:
    s.machine.B[i.operands[0].number][s.threads] = False


@effect("UCGABAR_ARV")
def _cluster_arrive(i: Decoded, s: Step) -> None:
    m = s.machine
    m.cluster_arrivals[np.isin(m.warp, s.warps)] += 1


@effect("BSYNC", "WARPSYNC", "BAR", "UCGABAR_WAIT", "SYNCS.PHASECHK")
def _wait(i: Decoded, s: Step) -> None:
    m = s.machine
    if i.parts[:1] == ("COLLECTIVE",):
        return
    if i.name == "SYNCS":
        m.note_copy(int(np.max(i.memory.address(s))))
    m.set_aside(np.nonzero(np.isin(m.warp, s.warps))[0] if s.threads is None else m.threads_of(s), s.position)


def may_go_on(i: Decoded, m: Machine, waiting: np.ndarray) -> np.ndarray:
    """Of the threads that wait at the instruction, those that need not any longer."""
    arrived = waiting | m.gone
    if i.name == "BSYNC":
        return ~np.isin(m.warp, m.warp[m.B[i.operands[0].number] & ~arrived])
    if i.name == "WARPSYNC":
        wanted = _named_lanes(i, m, waiting) if i.operands else np.ones(m.at.shape, np.bool_)
        return ~np.isin(m.warp, m.warp[wanted & ~arrived])
    if i.name == "BAR":
        return ~np.isin(m.block, m.block[~arrived])
    if i.name == "UCGABAR_WAIT":
        return m.cluster_waits < m.cluster_arrivals[~m.gone].min()
    return _landed(i, m, waiting)


def _named_lanes(i: Decoded, m: Machine, waiting: np.ndarray) -> np.ndarray:
    """The lanes of the mask that the waiting ones give."""
    threads = np.nonzero(waiting)[0]
    masks = np.zeros(m.warps, np.int64)
    np.maximum.at(masks, m.warp[threads], np.broadcast_to(i.operands[0].u32(m.step_of(threads)), threads.shape))
    return (masks[m.warp] >> m.lane) & 1 == 1


def _landed(i: Decoded, m: Machine, waiting: np.ndarray) -> np.ndarray:
    """Whether the phase of this parity of the copy's barrier is over."""
    done, threads = np.zeros(m.at.shape, np.bool_), np.nonzero(waiting)[0]
    s = m.step_of(threads)
    addresses = np.broadcast_to(i.memory.address(s), threads.shape)
    parities = np.broadcast_to(i.operands[-1].u32(s), threads.shape) >> U32(31)
    for thread, address, parity in zip(threads, addresses, parities, strict=True):
        done[thread] = barrier_at(m, int(address), int(m.block[thread])).phase % 2 != parity
    return done


def go_on(i: Decoded, m: Machine, threads: np.ndarray) -> None:
    """What a wait leaves behind."""
    if i.name == "UCGABAR_WAIT":
        m.cluster_waits[threads] += 1
    elif i.name == "SYNCS":
        m.P[i.operands[0].number][threads] = True
