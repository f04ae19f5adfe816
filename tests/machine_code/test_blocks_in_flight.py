"""The model of blocks in flight, by programs whose time is known by hand."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton", reason="its package carries the disassembler")
from benchmarks.hardware import GPU
from benchmarks.machine_code.blocks_in_flight import EFFICIENCY, Latencies, Multiprocessor, Program, shares
from benchmarks.machine_code.emulator.cubin import Function, Line, split_operands
from benchmarks.machine_code.emulator.machine import Executed

TOY = GPU("toy", "sm_90", 100, 1e9, 1e12, fma=128, cache_bandwidth=4e12, cache_bytes=1 << 26, clustered=96)
AT = Latencies()


def program(listing: str, warps: int = 1, slots: int = 1, copies: dict | None = None, row_bytes: int = 0) -> Program:
    """A straight line of instructions that every warp issues once."""
    lines = []
    for address, text in enumerate(filter(None, (line.strip() for line in listing.splitlines()))):
        opcode, _, operands = text.partition(" ")
        lines.append(Line(16 * address, "", opcode, split_operands(operands)))
    function = Function("toy", tuple(lines), {}, {}, (0, 0), 0)
    schedule = [(line, np.arange(warps)) for line in range(len(lines))]
    issues = np.ones((len(lines), warps), np.int64)
    return Program.of(Executed(function, issues, schedule, copies or {}), warps, row_bytes, slots)


def cycles(what: Program, count: int = 1, rate: float = 10.0) -> float:
    return Multiprocessor(what, TOY, rate, 40.0, AT).run(count)[-1] - AT.launch


def test_a_chain_waits_for_every_result_and_independent_instructions_do_not():
    chain = "FADD R1, R1, R2\n" * 10 + "EXIT"
    apart = "".join(f"FADD R{k}, R{k}, R1\n" for k in range(2, 12)) + "EXIT"
    assert cycles(program(chain)) == 9 * AT.arithmetic + 1
    assert cycles(program(apart)) == 10


def test_a_pipe_is_shared_by_the_warps_of_a_scheduler():
    special = "MUFU.EX2 R1, R2\nEXIT"
    assert cycles(program(special, warps=4)) == cycles(program(special))  # one warp each
    assert cycles(program(special, warps=16)) >= 3 * 128 / TOY.mufu


def test_a_wait_ends_when_the_copy_has_landed():
    listing = "UBLKCP.S.G [UR4], [UR6], UR8\nSYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2\nEXIT"
    copy = program(listing, copies={0: (64, 5000), 1: (64, 0)})
    assert cycles(copy) == pytest.approx(5000 / 10 + AT.memory + AT.shared, abs=3)


def test_a_device_wide_barrier_costs_what_the_assumption_says():
    with_fence, without = (program(f"{line}\nEXIT") for line in ("MEMBAR.ALL.GPU", "NOP"))
    assert cycles(with_fence) - cycles(without) == pytest.approx(AT.fence, abs=1)


def test_the_share_is_bounded_by_bandwidth_and_falls_with_latency():
    loads = "".join(f"LDG.E.128 R{4 * k}, [R100.64]\n" for k in range(1, 9)) + "FADD R1, R32, R33\nEXIT"
    kernel = program(loads, warps=8, slots=4, row_bytes=1 << 30)
    row = 8 * 8 * 512
    (many,) = shares(kernel, TOY, 100, 1, row, [100_000]).values()
    assert 0.8 * EFFICIENCY < many <= EFFICIENCY * 1.001
    few = program(loads, warps=1, slots=1, row_bytes=1 << 30)
    near, far = (shares(few, TOY, 100, 1, row / 8, [100_000], band)[100_000] for band in (0.7, 1.3))
    assert far < near < many
    assert shares(few, TOY, 100, 1, row / 8, [100])[100] < near  # a launch for one block each
