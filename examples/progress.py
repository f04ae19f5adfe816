"""Progress: bars on a terminal, plain lines where the output is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, message)."""


def silent(phase: str, done: int, total: int, message: str) -> None:
    """The `Report` of a caller who does not watch."""


@contextmanager
def reporting(console: Console) -> Iterator[Report]:
    """A `Report` that draws bars on a terminal and prints plain lines elsewhere."""
    if console.is_terminal:
        with bars(console) as report:
            yield report
    else:
        yield lines(console)


def lines(console: Console, seconds: float = 10.0) -> Report:
    """A `Report` of plain lines: one per step, of phases with hundreds of steps about twenty, and none later than
    `seconds` after the one before."""
    last = {}

    def report(phase: str, done: int, total: int, message: str) -> None:
        stride, now = 1 if total <= 200 else total // 20, time.monotonic()
        if phase not in last or done % stride == 0 or done == total or now - last[phase] >= seconds:
            last[phase] = now
            console.print(f"{phase} {done}/{total}  {message}", markup=False, highlight=False, soft_wrap=True)

    return report


@contextmanager
def bars(console: Console) -> Iterator[Report]:
    """A `Report` that draws."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        drawn = {}

        def report(phase: str, done: int, total: int, message: str) -> None:
            if phase not in drawn:
                drawn[phase] = progress.add_task(phase, total=total, note="")
            progress.update(drawn[phase], completed=done, note=message)

        yield report
