"""The one writer of tables, in Markdown, which `python -m benchmarks` shows on the terminal by rich; and documents with
generated blocks, each between two markers that hold its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """The first `left` columns to the left, the others to the right."""
    ruler = ["---"] * left + ["---:"] * (len(header) - left)
    lines = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in (header, ruler, *rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def generated(name: str, *parts: str) -> str:
    """The parts that are not empty as the block `name`, markers included."""
    return "\n\n".join([f"<!-- {name}:begin -->", *(part for part in parts if part), f"<!-- {name}:end -->"])


def current_block(document: Path, name: str = "benchmarks") -> str:
    """What a document holds now as its block `name`, markers included.

    Raises:
        ValueError: where the markers are missing.
    """
    found = re.findall(rf"<!-- {name}:begin -->.*?<!-- {name}:end -->", document.read_text(), re.DOTALL)
    if len(found) != 1 or found[0].count(f"<!-- {name}:begin -->") != 1:
        raise ValueError(f"{document} must hold <!-- {name}:begin --> and, after it, <!-- {name}:end -->, once each")
    return found[0]


def rewrite(document: Path, block: str) -> None:
    """Put a `generated` block in place of the document's block of that name."""
    name = re.match(r"<!-- (.+):begin -->", block)
    assert name is not None
    document.write_text(document.read_text().replace(current_block(document, name[1]), block))
