"""How time is measured: variants take turns, so that whatever else the machine does meets all of them alike.

On a GPU calls run back to back and events between them tell the GPU's own time; what the host needs to queue a call is
measured apart. A single synchronised call would measure launches, not kernels.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from benchmarks.peers.base import Runner


@dataclass(frozen=True)
class Budget:
    """Rounds of one case: at least `min_rounds`, then more until `seconds` are spent or `max_rounds` are done."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 30
    repeat_below: float = (
        0.2  # a faster variant runs up to `max_repeats` times a round, as long as they stay below this
    )
    max_repeats: int = 4


_GPU_REPEATS = 16  # calls back to back
_LONGEST_HEAD_START = 0.2  # seconds
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, at most about


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `samples` timings, in seconds; on a GPU also the median host time per call."""

    median: float
    q1: float
    q3: float
    samples: int
    host: float | None = None

    @classmethod
    def of(cls, samples: list[float], host: list[float] = ()) -> Spread:
        middle = median(host) if host else None
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1, middle)
        q1, _, q3 = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), q1, q3, len(samples), middle)


def time_once(runner: Runner, device: str) -> float:
    """Seconds of one call, its GPU work included."""
    if runner.reset is not None:
        runner.reset()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    runner.call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def host_seconds(runner: Runner) -> float:
    """Seconds until a call returns that finds the GPU idle: checks, autograd and launches, not the kernels."""
    if runner.reset is not None:
        runner.reset()
    torch.cuda.synchronize()
    start = time.perf_counter()
    runner.call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def gpu_seconds(runner: Runner, repeats: int, host: float) -> list[float]:
    """Seconds of the GPU for each of `repeats` calls back to back, where the host needs `host` seconds for one.

    The GPU sleeps until the host has queued everything, so it never waits for a launch; `reset` runs between the
    intervals.
    """
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    head_start = min(1.5 * host * repeats, _LONGEST_HEAD_START)
    torch.cuda._sleep(int(head_start * _CYCLES_PER_SECOND))
    for start, end in marks:
        if runner.reset is not None:
            runner.reset()
        start.record()
        runner.call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def reason_of(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def interleave(runners: dict[str, Runner], device: str, budget: Budget) -> tuple[dict[str, Spread], dict[str, str]]:
    """Time all `runners` in turns, in an order that rotates from round to round.

    Returns:
        The spread of each that ran, and the error of each that did not.
    """
    failed: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for name, runner in runners.items():
        try:
            time_once(runner, device)  # compiles, allocates, warms caches
            seconds = time_once(runner, device)
        except Exception as error:  # a peer may fail in any way; the others are still measured
            failed[name] = reason_of(error)
            continue
        most = _GPU_REPEATS if device == "cuda" else budget.max_repeats
        repeats[name] = min(most, max(1, int(budget.repeat_below / max(seconds, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    host: dict[str, list[float]] = {name: [] for name in repeats}
    names = list(repeats)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for turn in range(budget.max_rounds):
            if turn >= budget.min_rounds and time.perf_counter() - start > budget.seconds:
                break
            shift = turn % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                if device == "cuda":
                    host[name].append(host_seconds(runners[name]))
                    samples[name] += gpu_seconds(runners[name], repeats[name], host[name][-1])
                else:
                    samples[name] += [time_once(runners[name], device) for _ in range(repeats[name])]
    finally:
        gc.enable()
    return {name: Spread.of(values, host[name]) for name, values in samples.items()}, failed
