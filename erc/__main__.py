"""`python -m erc info` and `python -m erc check`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

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
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("python -m erc prints tables with rich: pip install rich", file=sys.stderr)
        return 2
    if command == "info":
        table = Table("", "value", title="this installation")
        for name, value in info().items():
            table.add_row(name, value)
        Console().print(table)
        return 0
    results = check()
    table = Table(
        "backend", "dtype", "logprob error", "entropy error (relative)", "gradient error", "ERC flips", "contract"
    )
    table.title = "this installation against the float64 oracle"
    for row in results:
        errors = (f"{value:.1e}" for value in (row.logprob, row.entropy, row.gradient))
        table.add_row(
            row.backend, row.dtype, *errors, f"{row.flips} of {row.rows}", "holds" if row.passed else "BROKEN"
        )
    Console().print(table)
    return 0 if all(row.passed for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
