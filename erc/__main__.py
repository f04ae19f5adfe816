"""`erc info`, `erc check` and `erc --version`, which are `python -m erc ...` as well."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from erc import __version__
from erc.backend import backends, cpu_isa, cpu_wide_product, library_path
from erc.check import check


def info() -> dict[str, Any]:
    """Versions, machine, backends and build."""
    facts: dict[str, Any] = {"erc": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts["backends"] = backends()
    facts["cpu instruction set"] = cpu_isa() or "none"
    facts["cpu products, bfloat16 into float32"] = cpu_wide_product() or "float32 tiles of the weight"
    facts["cpu library"] = str(library_path("cpu"))
    return facts


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="erc", description="Looks at this installation.")
    parser.add_argument("--version", action="version", version=f"erc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | check")
    about = commands.add_parser("info", help="versions, machine and backends")
    about.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("check", help="every available backend against the float64 oracle")
    arguments = parser.parse_args()
    if arguments.command == "check":
        return print_check()
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    facts |= {f"backend {name}": state for name, state in facts.pop("backends").items()}
    print_table("this installation", ("", "value"), facts.items())
    return 0


def print_check() -> int:
    """Returns 1 where a backend breaks the contract."""
    results = check()
    header = (
        "backend",
        "dtype",
        "logprob error",
        "entropy error (relative)",
        "gradient error",
        "ERC flips",
        "contract",
    )
    rows = []
    for row in results:
        errors = (f"{value:.1e}" for value in (row.logprob, row.entropy, row.gradient))
        flips = f"{row.flips} of {row.rows}"
        rows.append((row.backend, row.dtype, *errors, flips, "holds" if row.passed else "BROKEN"))
    print_table("this installation against the float64 oracle", header, rows)
    return 0 if all(row.passed for row in results) else 1


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """By rich, where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, *("  ".join(row) for row in (header, *rows)), sep="\n")
        return
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
