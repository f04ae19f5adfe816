"""Rows of text as a table for the terminal; `benchmarks.markdown` writes the same rows into documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def terminal_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", left: int = 1) -> Table:
    """The first `left` columns to the left, the others to the right."""
    table = Table(title=title or None, title_justify="left")
    for at, heading in enumerate(header):
        table.add_column(heading, justify="left" if at < left else "right")
    for row in rows:
        table.add_row(*row)
    return table
