"""`python -m erc info` and `python -m erc check`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

from erc import __version__
from erc.backend import backends, cpu_isa, library_path
from erc.check import check


def info() -> dict[str, str]:
    """Versions, machine, backends and build."""
    facts = {"erc": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numpy"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts |= {f"backend {name}": state for name, state in backends().items()}
    facts["cpu instruction set"] = cpu_isa() or "none"
    facts["cpu library"] = str(library_path("cpu"))
    return facts


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m erc", description=__doc__)
    parser.add_argument("command", choices=("info", "check"), help="what to print")
    command = parser.parse_args().command
    if command == "info":
        print_table("this installation", ("", "value"), info().items())
        return 0
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
