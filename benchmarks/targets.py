"""What the library set out to reach: a figure of a report, and the least or most that it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """`figure` reads the report, None where it has no such figure; `show` writes figure and bound."""

    text: str
    figure: Callable[[Any], float | None]
    bound: float
    at_least: bool = False
    show: Callable[[float], str] = "{:.4g}".format

    def holds(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound


TARGET_HEADER = ("target", "bound", "measured", "holds")


def target_rows(targets: Iterable[Target], report: Any) -> list[tuple[str, str, str, str]]:
    """A line for each target whose figure the report has, by `TARGET_HEADER`."""
    rows = []
    for target in targets:
        figure = target.figure(report)
        if figure is not None:
            bound = f"{'at least' if target.at_least else 'at most'} {target.show(target.bound)}"
            rows.append((target.text, bound, target.show(figure), "yes" if target.holds(figure) else "no"))
    return rows


def unmet(targets: Iterable[Target], report: Any) -> list[str]:
    """The targets that the report does not meet."""
    return [text for text, *_, holds in target_rows(targets, report) if holds == "no"]
