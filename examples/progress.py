"""Progress bars: one a phase, made when the phase first reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, message)."""


def silent(phase: str, done: int, total: int, message: str) -> None:
    """The `Report` of a caller who does not watch."""


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
