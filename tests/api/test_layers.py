"""Imports point down the layers that docs/architecture.md names, and form no cycle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import erc

ROOT = Path(__file__).parents[2]
PACKAGE = Path(erc.__file__).parent
ENTRIES = ("erc", "erc.__main__", "erc.triton_kernels.autotune")
"""The public names and the programs: they stand above everything and belong to no layer."""


def layers() -> dict[str, int]:
    """Module or package of the table to the number of its layer, 0 at the bottom of the dependencies."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.split("<!-- layers:begin -->")[1].split("<!-- layers:end -->")[0]
    rows = [line for line in table.splitlines() if "`erc." in line]
    return {name: number for number, row in enumerate(rows) for name in re.findall(r"`(erc\.\w+)`", row)}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules of erc that a file imports when it is imported itself, annotations' imports left out."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & known) or {node.module}
    return {name for name in found if name.split(".")[0] == "erc"}


def place(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_the_table_names_every_module():
    named = set(layers())
    there = {place(module) for module in modules() if module not in ENTRIES}
    assert there == named, f"docs/architecture.md lacks {there - named}, or names {named - there} that is not there"


def test_imports_point_down():
    order, known = layers(), modules()
    wrong = [
        f"{module} imports {name}"
        for module, path in known.items()
        if module not in ENTRIES
        for name in imports(path, set(known))
        if name not in ENTRIES and order[place(name)] > order[place(module)]
    ]
    assert not wrong, wrong


def test_modules_form_no_cycle():
    known = modules()
    graph = {module: imports(path, set(known)) - {module} for module, path in known.items() if module not in ENTRIES}
    graph = {module: {name for name in names if name not in ENTRIES} for module, names in graph.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


def test_an_import_that_points_up_is_found(tmp_path):
    file = tmp_path / "ops.py"
    file.write_text("from erc import loss\nfrom erc.stats import token_stats\nimport torch\n")
    found = imports(file, set(modules()))
    assert found == {"erc.loss", "erc.stats"}
    assert all(layers()[name] > layers()["erc.ops"] for name in found)
