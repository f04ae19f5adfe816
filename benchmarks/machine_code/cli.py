"""What `python -m benchmarks machine-code` does: compile, disassemble, execute, report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.machine_code import cuda_variants, expectation, peers
from benchmarks.machine_code.report import CompiledKernel, measure, triton_kernels

ARCHS = ("sm_80", "sm_90", "sm_100")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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


def document(
    archs: Sequence[str] = ARCHS,
    dtype: str = "bfloat16",
    cubins: Sequence[str] = (),
    peers_folder: Path | None = None,
    model: bool = True,
    say: Callable[[str], object] = print,
) -> dict[str, Any]:
    """The report as JSON has it; says what is left out and why.

    Raises:
        ValueError: for an unknown architecture or dtype, or a cubin that is not named as `cubin_argument` wants.
    """
    for name, value, known in (("arch", archs, ARCHS), ("dtype", [dtype], tuple(_DTYPES))):
        if set(value) - set(known):
            raise ValueError(f"--{name} must be of {', '.join(known)}, got {', '.join(value)}")
    kernels = [cubin_argument(text) for text in cubins]
    kernels += triton_kernels(archs, _DTYPES[dtype])
    if dtype == "bfloat16" and cuda_variants.nvcc():
        kernels += cuda_variants.cuda_kernels(archs)
    else:
        say("left out: csrc/cuda: " + ("measured in bfloat16 only" if cuda_variants.nvcc() else "no nvcc"))
    for name, reason in peers.missing(peers_folder).items():
        say(f"left out: {name}: {reason}")
    kernels += peers.peer_kernels(archs, peers_folder)
    measurements = [measure(kernel).json() for kernel in kernels]
    expected = expectation.expect(kernel for kernel in kernels if kernel.work) if model else []
    report = {"toolchain": toolchain(peers_folder), "kernels": measurements, "expected": expected}
    return json.loads(json.dumps(report))


def spilling(report: dict[str, Any]) -> list[str]:
    """This library's kernels that spill registers."""
    return [f"{k['name']}, {k['arch']}" for k in report["kernels"] if k["spills"] and k["source"] != "peer"]
