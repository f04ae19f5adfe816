"""What the CPU's main loops are made of, and how near that lets a loss come to a plain read or copy.

`python -m benchmarks cpu-loops` compiles the sweeps by themselves for each instruction set that this machine runs,
counts the instructions of their main loops, times them on a row that stays in the cache, and puts beside it what erc
and a plain read or copy of many rows take, on one thread. What a row in the cache takes is what instructions alone
cost: no better prefetch, store or cache gets below it. Together with the read or copy it is what a core would take that
did not compute while it waits.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

import erc
from benchmarks import ours
from benchmarks.markdown import generated, markdown_table
from benchmarks.peers.base import Runner
from benchmarks.results import machine
from benchmarks.workloads import Case, Inputs

__all__ = ["cpu_loops_block"]

_ROOT = Path(__file__).parents[1]
_ISA_FLAGS = {  # as setup.py
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512", "-mfma", "-mf16c"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast", f"-I{_ROOT / 'csrc'}")
_DTYPES = ("float32", "bfloat16")
_ROWS, _VOCAB = 512, 151_936
_HEADER = (
    "instruction set", "logits", "of an element", "instructions", "vector arithmetic", "ns, row in the cache",
    "ns, plain read or copy", "ratio, row in the cache", "ratio, both in turn", "ratio of erc", "of its median",
)  # fmt: skip
_READS = ("read_in_order", "read_two_pages", "read_four_pages", "read_prefetched")


@dataclass(frozen=True)
class Loop:
    """Instructions an element: all of them, and what the arithmetic pipes execute."""

    instructions: float
    arithmetic: float


def main_loop(assembly: list[tuple[int, str]], itemsize: int) -> Loop:
    """The innermost loop with the most vector instructions; its prefetches to a cache, one for every 64 bytes, tell its
    elements.

    Args:
        assembly: address and text of each instruction of a function.
        itemsize: bytes of an element.
    """
    starts = {address: index for index, (address, _) in enumerate(assembly)}
    loops = []
    for index, (address, text) in enumerate(assembly):
        jump = re.match(r"j\w+\s+([0-9a-f]+)", text)
        begin = starts.get(int(jump[1], 16)) if jump else None
        if begin is not None and begin <= index and int(jump[1], 16) < address:
            loops.append([line for _, line in assembly[begin : index + 1]])
    innermost = [loop for loop in loops if sum(line.startswith("j") for line in loop) == 1]
    body = max(innermost, key=lambda loop: sum(line.startswith("v") for line in loop))
    prefetches = [line.split()[0] for line in body if line.startswith("prefetch")]
    elements = max(map(prefetches.count, prefetches)) * 64 / itemsize
    arithmetic = sum(line.startswith("v") and not line.startswith("vmov") for line in body)
    return Loop(len(body) / elements, arithmetic / elements)


def compiled(isa: str, folder: Path) -> Path:
    """The loops of an instruction set, as a library."""
    library = folder / f"{isa}.so"
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++").split()[0]
    source = str(Path(__file__).with_suffix(".cpp"))
    subprocess.run([compiler, *_FLAGS, f"-DERC_ISA={isa}", *_ISA_FLAGS[isa], source, "-o", library], check=True)
    return library


def functions(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Address and text of each instruction, by function."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    for line in listing.splitlines():
        if named := re.match(r"[0-9a-f]+ <(\w+)>:", line):
            current = found.setdefault(named[1], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\s+(.+)", line):
            current.append((int(instruction[1], 16), instruction[2]))
    return found


def _reads(library: ctypes.CDLL, logits: torch.Tensor) -> dict[str, Runner]:
    pointer, size = ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(logits.nbytes)
    return {name: Runner(partial(getattr(library, name), pointer, size)) for name in _READS}


def _seconds(runner: Runner) -> float:
    if runner.reset is not None:
        runner.reset()
    start = time.perf_counter()
    runner.call()
    return time.perf_counter() - start


def measure(path: Path, rounds: int) -> dict[str, float]:
    """Nanoseconds an element on this process's instruction set: of a row in the cache, of erc, and of the fastest plain
    read or copy. The least of all interleaved rounds, and the medians of the last two."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(path))
    library.in_cache.restype = ctypes.c_double
    nanoseconds = {
        f"{sweep}_{dtype}": library.in_cache(dtype == "bfloat16", sweep == "gradient")
        for dtype in _DTYPES
        for sweep in ("statistics", "gradient")
    }
    for dtype in _DTYPES:
        for operator, limit, own in (("stats", ours.READ, "erc cpu"), ("policy-loss", ours.COPY, "erc cpu, in place")):
            inputs = Inputs(Case(operator, dtype, _ROWS, _VOCAB, "" if operator == "stats" else "erc-dapo"))
            variants = {variant.name: variant for variant in (*ours.BASELINES, *ours.variants(("cpu",)))}
            runners = {name: variants[name].prepare(inputs) for name in (own, limit)}
            if operator == "stats":
                runners |= _reads(library, inputs.logits_master)
            times = {name: [] for name in runners}
            for _ in range(rounds):
                for name, runner in runners.items():
                    times[name].append(_seconds(runner))
            for kind, of in (("least", min), ("median", median)):
                found = {name: 1e9 * of(some) / (_ROWS * _VOCAB) for name, some in times.items()}
                nanoseconds[f"{kind} {operator} {dtype}"] = found.pop(own)
                nanoseconds[f"{kind} limit {operator} {dtype}"] = min(found.values())
    return nanoseconds


def _rows(isa: str, rounds: int) -> Iterator[tuple[str, ...]]:
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(isa, Path(folder))
        listing = functions(library)
        script = (
            "import json, pathlib; from benchmarks.cpu_loops import measure; "
            f"print(json.dumps(measure(pathlib.Path({str(library)!r}), {rounds})))"
        )
        measured = json.loads(
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=_ROOT, env=os.environ | {"ERC_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=True,
            ).stdout
        )  # fmt: skip
    for dtype in _DTYPES:
        itemsize = torch.finfo(getattr(torch, dtype)).bits // 8
        parts = [f"statistics_{dtype}", f"gradient_{dtype}"]
        for operator, sweeps in (("stats", parts[:1]), ("policy-loss", parts)):
            loops = [main_loop(listing[name], itemsize) for name in sweeps]
            alone = sum(measured[name] for name in sweeps)
            limit, own = (measured[f"least {kind}{operator} {dtype}"] for kind in ("limit ", ""))
            usual_limit, usual = (measured[f"median {kind}{operator} {dtype}"] for kind in ("limit ", ""))
            yield (
                isa, dtype, "statistics" if operator == "stats" else "erc-dapo loss in place",
                f"{sum(loop.instructions for loop in loops):.2f}", f"{sum(loop.arithmetic for loop in loops):.2f}",
                f"{alone:.3f}", f"{limit:.3f}", f"{alone / limit:.2f}", f"{alone / limit + 1:.2f}",
                f"{own / limit:.2f}", f"{usual / usual_limit:.2f}",
            )  # fmt: skip


def cpu_loops_block(rounds: int = 40) -> str:
    """The block `cpu-loops` of docs/benchmarks.md, measured on this machine.

    Args:
        rounds: calls of erc and of plain reads or the copy, in turns.
    """
    best = erc.backend.cpu_isa()
    sets = [isa for isa in _ISA_FLAGS if list(_ISA_FLAGS).index(isa) >= list(_ISA_FLAGS).index(best)]
    rows = [row for isa in sets for row in _rows(isa, rounds)]
    about = machine()
    text = (
        f"{about['cpu']}, one thread, {_ROWS} rows of {_VOCAB:,} logits; the least, and in the last column the median, "
        f"of {rounds} interleaved calls each. The plain read is the fastest of {len(_READS) + 1} loops."
    )
    return generated("cpu-loops", text, markdown_table(_HEADER, rows, left=3))
