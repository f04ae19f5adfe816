"""Two results files side by side: what became slower, in time or against the plain read or copy of the same run."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.markdown import markdown_table
from benchmarks.report import BASELINES
from benchmarks.results import Results


@dataclass(frozen=True)
class Change:
    """`factor` > 1: slower than before. `certain`: the quartiles of before and after do not overlap."""

    case: tuple
    variant: str
    factor: float
    certain: bool


def changes(before: Results, after: Results, *, relative: bool) -> list[Change]:
    """Every variant and case that both files have.

    Args:
        relative: divide each time by the read or copy of its own run, so that the load of the machine cancels.
    """
    found = []
    for key in before.cases():
        old, new = before.of(key), after.of(key)
        baseline = next((name for name in BASELINES if name in old and name in new), None) if relative else None
        scale_old, scale_new = (case[baseline].median if baseline else 1.0 for case in (old, new))
        for name in old:
            if name in new and name not in BASELINES:
                a, b = old[name], new[name]
                factor = (b.median / scale_new) / (a.median / scale_old)
                apart = b.q1 / scale_new > a.q3 / scale_old or b.q3 / scale_new < a.q1 / scale_old
                found.append(Change(key, name, factor, apart))
    return found


def regressions(found: list[Change], threshold: float) -> list[Change]:
    """Changes of erc itself that are slower by more than `threshold` and outside the quartiles."""
    return [c for c in found if c.variant.startswith("erc") and c.certain and c.factor > 1 + threshold]


def change_table(found: list[Change], threshold: float) -> str:
    """Slowest first."""
    rows = []
    for change in sorted(found, key=lambda c: -c.factor):
        mark = ""
        if change.certain and abs(change.factor - 1) > threshold:
            mark = "**slower**" if change.factor > 1 else "faster"
        operator, objective, dtype, rows_of_case, vocab, *_ = change.case
        case = f"{operator} {objective} {dtype} N={rows_of_case} V={vocab}"
        rows.append((case, change.variant, f"{change.factor:.2f}", mark))
    return markdown_table(("case", "variant", "time, after / before", ""), rows, left=2)
