"""Timing on a GPU, on a simulated one: a clock of the host's, and a queue that works through kernels on its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import timing
from benchmarks.peers.base import Runner


class Machine:
    """Seconds on two clocks: `now` is the host's, `busy_until` the end of everything queued on the GPU."""

    def __init__(self) -> None:
        self.now = self.busy_until = 0.0

    def launch(self, host: float, gpu: float) -> None:
        self.now += host
        self.busy_until = max(self.busy_until, self.now) + gpu

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def cuda(self) -> SimpleNamespace:
        machine = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = max(machine.now, machine.busy_until)

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.time - self.time)

        def sleep(cycles: int) -> None:
            machine.launch(1e-6, cycles / timing._CYCLES_PER_SECOND)

        return SimpleNamespace(Event=Event, synchronize=self.synchronize, _sleep=sleep)


@pytest.fixture
def machine(monkeypatch):
    simulated = Machine()
    monkeypatch.setattr(timing.torch, "cuda", simulated.cuda())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: simulated.now))
    return simulated


@pytest.mark.parametrize("host, gpu", [(100e-6, 5e-6), (20e-6, 3e-3)])
def test_the_gpu_s_time_and_the_host_s_are_told_apart(machine, host, gpu):
    """A kernel of 5 us behind 100 us of launches takes 5 us, and one of 3 ms takes 3 ms."""
    runner = Runner(lambda: machine.launch(host, gpu))
    budget = timing.Budget(seconds=0, min_rounds=3, max_rounds=3)
    spreads, failed = timing.interleave({"a": runner}, "cuda", budget)
    assert not failed and spreads["a"].samples == 3 * 16
    assert spreads["a"].median == pytest.approx(gpu) and spreads["a"].q3 == pytest.approx(gpu)
    assert spreads["a"].host == pytest.approx(host)
    machine.synchronize()
    assert timing.time_once(runner, "cuda") == pytest.approx(host + gpu), "one synchronised call tells their sum"


def test_what_restores_an_input_is_not_timed(machine):
    runner = Runner(lambda: machine.launch(10e-6, 50e-6), reset=lambda: machine.launch(10e-6, 1e-3))
    spreads, _ = timing.interleave({"a": runner}, "cuda", timing.Budget(seconds=0, min_rounds=1, max_rounds=1))
    assert spreads["a"].median == pytest.approx(50e-6) and spreads["a"].host == pytest.approx(10e-6)


def test_a_call_that_waits_for_the_gpu_is_measured_as_it_is(machine):
    """It keeps the GPU waiting for the host, which is its own time too."""

    def call() -> None:
        machine.launch(10e-6, 50e-6)
        machine.synchronize()
        machine.launch(10e-6, 50e-6)

    spreads, _ = timing.interleave({"a": Runner(call)}, "cuda", timing.Budget(seconds=0, min_rounds=1, max_rounds=1))
    assert spreads["a"].median == pytest.approx(110e-6)
