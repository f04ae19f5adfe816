"""The tables of docs/kernels.md, generated from the checked-in report; a test holds the document to it.

`python -m benchmarks.machine_code.document` rewrites the document after
`python -m benchmarks machine-code --json results/benchmarks/machine_code.json` has measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_code.roofline import GPUS

_ROOT = Path(__file__).parents[2]
REPORT = _ROOT / "results" / "benchmarks" / "machine_code.json"
DOCUMENT = _ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- machine-code:begin -->", "<!-- machine-code:end -->"
_ARCHS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Target:
    """A bound on a kernel's figure, on every architecture of `archs`."""

    text: str
    source: str
    kernel: str
    figure: Callable[[dict], float]
    bound: float
    archs: tuple[str, ...] = _ARCHS
    at_least: bool = False

    def measured(self, report: dict) -> float:
        """The worst architecture's figure."""
        figures = [
            self.figure(k)
            for k in report["kernels"]
            if (k["source"], k["name"]) == (self.source, self.kernel) and k["arch"] in self.archs
        ]
        return (min if self.at_least else max)(figures)

    def holds(self, report: dict) -> bool:
        measured = self.measured(report)
        return measured >= self.bound if self.at_least else measured <= self.bound


def _instructions(kernel: dict) -> float:
    return kernel["instructions"]


def _mufu(kernel: dict) -> float:
    return kernel["mufu"]


def _reachable(kernel: dict) -> float:
    return min(gpu["share"] for gpu in kernel["reachable"].values())


def _blocks(kernel: dict) -> float:
    return kernel["occupancy"]["blocks"]


_FUSED = "policy_loss erc-dapo+entropy"
TARGETS = (
    Target("Triton, statistics: instructions an element", "triton", "stats_forward", _instructions, 9),
    Target("Triton, statistics: special-function operations", "triton", "stats_forward", _mufu, 1.13),
    Target("Triton, fused loss, both sweeps: instructions", "triton", _FUSED, _instructions, 18),
    Target("Triton, fused loss: share of bandwidth reachable", "triton", _FUSED, _reachable, 0.95, at_least=True),
    Target("CUDA, statistics, sm_90: instructions", "cuda", "stats", _instructions, 6.3, ("sm_90",)),
    Target("CUDA, statistics: special-function operations", "cuda", "stats", _mufu, 1.04),
    Target("CUDA, statistics, sm_100: instructions", "cuda", "stats", _instructions, 5, ("sm_100",)),
    Target("CUDA, statistics: share of bandwidth reachable", "cuda", "stats", _reachable, 0.95, at_least=True),
    Target("CUDA, fused loss in a cluster: instructions", "cuda", "loss, cluster", _instructions, 13, _ARCHS[1:]),
    Target("CUDA, fused loss in a block: instructions", "cuda", "loss, block", _instructions, 13),
    Target("CUDA, fused loss in a cluster: share of bandwidth reachable", "cuda", "loss, cluster", _reachable, 0.95,
           _ARCHS[1:], at_least=True),
    Target("CUDA, fused loss in a block: share of bandwidth reachable", "cuda", "loss, block", _reachable, 0.95,
           at_least=True),
    Target("CUDA, statistics: resident blocks a multiprocessor", "cuda", "stats", _blocks, 2, at_least=True),
    Target("CUDA, fused loss in a cluster: resident clusters over 8 multiprocessors", "cuda", "loss, cluster", _blocks,
           1, _ARCHS[1:], at_least=True),
    Target("CUDA, fused loss in a block: resident blocks a multiprocessor", "cuda", "loss, block", _blocks, 2,
           at_least=True),
)  # fmt: skip


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _targets(report: dict) -> str:
    rows = []
    for target in TARGETS:
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        rows.append([target.text, bound, f"{target.measured(report):.4g}", "yes" if target.holds(report) else "no"])
    return _markdown(["target (the worst architecture counts)", "bound", "measured", "holds"], rows)


def _bits(loops: list[dict]) -> str:
    loads = sorted({bits for loop in loops for bits in loop["load_bits"]})
    stores = sorted({bits for loop in loops for bits in loop["store_bits"]})
    return "/".join(map(str, loads)) + (" → " + "/".join(map(str, stores)) if stores else "")


def _kernels(report: dict, source: str) -> str:
    header = ["kernel", "GPU", "statistics", "gradient", "special functions", "bits loaded → stored", "waits"]
    header += ["registers", "shared memory", "blocks x threads an SM", "bandwidth reachable, headroom"]
    rows = []
    for k in report["kernels"]:
        if k["source"] != source:
            continue
        loops = [loop for loop in (k["statistics"], k["gradient"]) if loop]
        sweeps = [f"{loop['instructions']:.2f}" if loop else "" for loop in (k["statistics"], k["gradient"])]
        reachable = (f"{g} {r['share']:.0%}, {r['headroom']:.2f}x ({r['resource']})" for g, r in k["reachable"].items())
        waits = sum(loop["barriers"] + loop["shuffles"] for loop in loops)
        occupancy = f"{k['occupancy']['blocks']} x {k['threads']}"
        if k["cluster"] > 1:
            occupancy += f", clusters of {k['cluster']}"
        code = [k["name"], k["arch"], *sweeps, f"{k['mufu']:.2f}", _bits(loops), str(waits)]
        rows.append([*code, str(k["registers"]), f"{k['dynamic_shared']:,}", occupancy, "; ".join(reachable)])
    return _markdown(header, rows)


def _gpus() -> str:
    header = ["GPU", "architecture", "SMs", "clock, GHz", "bandwidth, TB/s", "elements a clock and SM (2 bytes)"]
    header += ["issue", "FP32", "integer", "special functions", "shared memory"]
    rows = []
    for gpu in GPUS:
        sheet = [gpu.name, gpu.arch, str(gpu.multiprocessors), f"{gpu.clock / 1e9:g}", f"{gpu.bandwidth / 1e12:g}"]
        rates = (gpu.issue, gpu.fma, gpu.alu, gpu.mufu, gpu.shared)
        rows.append([*sheet, f"{gpu.elements_per_clock(2):.2f}", *map(str, rates)])
    return _markdown(header, rows)


def block(report: dict) -> str:
    """The generated part of the document."""
    versions = ", ".join(f"{name} {version}" for name, version in report["toolchain"].items())
    parts = [
        f"Measured with {versions}; bfloat16 logits, V = 151,936, no GPU.",
        "### Targets",
        _targets(report),
        "### CUDA",
        _kernels(report, "cuda"),
        "### Triton",
        _kernels(report, "triton"),
    ]
    if any(k["source"] == "peer" for k in report["kernels"]):
        parts += ["### Peers", _kernels(report, "peer")]
    parts += ["### The GPUs of the model", _gpus()]
    return "\n\n".join(parts)


def current_block(document: Path) -> str:
    """Raises ValueError unless the document holds the two markers."""
    _, found, rest = document.read_text().partition(BEGIN)
    inside, ended, _ = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{document} needs the lines {BEGIN} and {END}")
    return inside.strip("\n")


def rewrite(document: Path = DOCUMENT, report: Path = REPORT) -> None:
    current_block(document)
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    new = block(json.loads(report.read_text()))
    document.write_text(f"{before}{BEGIN}\n\n{new}\n\n{END}{after}")


if __name__ == "__main__":
    rewrite()
    print(f"rewrote the tables of {DOCUMENT.name} from {REPORT.relative_to(_ROOT)}")
