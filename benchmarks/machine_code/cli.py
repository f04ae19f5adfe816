"""`python -m benchmarks machine-code`: the report as a table, and as JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from rich.console import Console

from benchmarks.machine_code import cuda_variants, expectation, peers
from benchmarks.machine_code.report import CompiledKernel, machine_code_table, measure, triton_kernels

ARCHS = ("sm_80", "sm_90", "sm_100")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks machine-code", description=__doc__)
    options.add_argument(
        "--arch", action="append", choices=ARCHS, help="an architecture; may be repeated (default: all)"
    )
    options.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="dtype of the logits (default: bfloat16)")
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the figures as JSON; - for standard output"
    )
    options.add_argument(
        "--cubin", action="append", default=[], metavar="NAME:ARCH:FUNCTION:ELEMENTS:PATH",
        help="report on a kernel of a cubin too; FUNCTION may be empty (the only one), ELEMENTS counts those of a "
        "main-loop iteration and may be empty (read off the loads)",
    )  # fmt: skip
    options.add_argument(
        "--peers", type=Path, metavar="FOLDER",
        help="a folder with unpacked wheels of trl and liger-kernel (default: where they are installed)",
    )  # fmt: skip
    options.add_argument(
        "--no-model", action="store_true", help="leave out the model of blocks in flight, which takes minutes"
    )
    return options


def cubin_argument(text: str) -> CompiledKernel:
    """Raises ValueError unless `text` is NAME:ARCH:FUNCTION:ELEMENTS:PATH."""
    parts = text.split(":", 4)
    if len(parts) != 5:
        raise ValueError(f"--cubin must be NAME:ARCH:FUNCTION:ELEMENTS:PATH, got {text!r}")
    name, arch, function, elements, path = parts
    count = int(elements) if elements else None
    return CompiledKernel(name, arch, Path(path), function or None, (count, count), source="cubin")


def toolchain(folder: Path | None) -> dict[str, str]:
    """The versions of what made and of what is measured; absent ones are left out."""
    nvcc = cuda_variants.nvcc() and re.search(r"release \S+ (V\S+)", cuda_variants.version(cuda_variants.nvcc()))
    return {"triton": triton.__version__, **({"nvcc": nvcc[1]} if nvcc else {}), **peers.versions(folder)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, disassemble, report. Returns 1 if a kernel spills."""
    options = parser().parse_args(arguments)
    archs = options.arch or ARCHS
    kernels = triton_kernels(archs, _DTYPES[options.dtype])
    if options.dtype == "bfloat16" and cuda_variants.nvcc():
        kernels += cuda_variants.cuda_kernels(archs)
    else:
        print("left out: csrc/cuda: " + ("measured in bfloat16 only" if cuda_variants.nvcc() else "no nvcc"))
    kernels += [cubin_argument(text) for text in options.cubin]
    for name, reason in peers.missing(options.peers).items():
        print(f"left out: {name}: {reason}")
    kernels += peers.peer_kernels(archs, options.peers)
    measurements = [measure(kernel) for kernel in kernels]
    expected = [] if options.no_model else expectation.expect(k for k in kernels if k.work)
    versions = toolchain(options.peers)
    report = {"toolchain": versions, "kernels": [m.json() for m in measurements], "expected": expected}
    figures = json.dumps(report, indent=1)
    if options.json and str(options.json) != "-":
        options.json.write_text(figures + "\n")
    if options.json and str(options.json) == "-":
        print(figures)
    else:
        Console(width=None if sys.stdout.isatty() else 230).print(machine_code_table(json.loads(figures)))
    return int(any(m.spills and m.source != "peer" for m in measurements))
