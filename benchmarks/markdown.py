"""Documents with a generated block between two markers."""

from __future__ import annotations

from pathlib import Path

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def current_block(document: Path) -> str:
    """What a document holds now, markers included.

    Raises:
        ValueError: where the markers are missing.
    """
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{document} must hold {BEGIN} and, after it, {END}, once each")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def rewrite(document: Path, new: str) -> None:
    """Put `new` between a document's markers."""
    document.write_text(document.read_text().replace(current_block(document), new))
