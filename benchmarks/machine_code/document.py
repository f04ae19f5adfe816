"""The tables of docs/kernels.md, generated from the checked-in report; a test holds the document to it.

`python -m benchmarks.machine_code.document` rewrites the document after
`python -m benchmarks machine-code --json results/benchmarks/machine_code.json` has measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_code.expectation import ROWS
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


def _whole(kernel: dict) -> float:
    return kernel["whole"]["instructions"]


def _whole_mufu(kernel: dict) -> float:
    return kernel["whole"]["mufu"]


def _main_loops(kernel: dict) -> float:
    return kernel["instructions"]


def _loop_mufu(kernel: dict) -> float:
    return kernel["mufu"]


def _device_barriers(kernel: dict) -> float:
    return kernel["device_barriers"]


def _reachable(kernel: dict) -> float:
    return min(gpu["share"] for gpu in kernel["reachable"].values())


def _blocks(kernel: dict) -> float:
    return kernel["occupancy"]["blocks"]


_FUSED = "policy_loss erc-dapo+entropy"
_HOPPER, _BLACKWELL = ("sm_90",), ("sm_100",)
TARGETS = (
    Target("Triton, statistics: instructions, main loop", "triton", "stats_forward", _main_loops, 9),
    Target("Triton, statistics: special functions, main loop", "triton", "stats_forward", _loop_mufu, 1.13),
    Target("Triton, fused loss: instructions, main loops", "triton", _FUSED, _main_loops, 18),
    Target("CUDA, statistics: instructions, main loop, sm_90", "cuda", "stats", _main_loops, 6.3, _HOPPER),
    Target("CUDA, statistics: instructions, main loop, sm_100", "cuda", "stats", _main_loops, 5, _BLACKWELL),
    Target("CUDA, statistics: special functions, main loop", "cuda", "stats", _loop_mufu, 1.04),
    Target("CUDA, fused loss in a cluster: instructions, whole kernel, sm_90", "cuda", "loss, cluster", _whole, 17,
           _HOPPER),
    Target("CUDA, fused loss in a cluster: instructions, whole kernel, sm_100", "cuda", "loss, cluster", _whole, 14,
           _BLACKWELL),
    Target("CUDA, fused loss in a cluster: device-wide barriers", "cuda", "loss, cluster", _device_barriers, 0,
           _ARCHS[1:]),
    Target("CUDA, fused loss in a cluster: share of bandwidth reachable", "cuda", "loss, cluster", _reachable, 0.95,
           _ARCHS[1:], at_least=True),
    Target("CUDA, fused loss in a cluster: clusters over 8 multiprocessors", "cuda", "loss, cluster", _blocks, 4,
           _ARCHS[1:], at_least=True),
    Target("CUDA, fused loss in a block: instructions, main loops", "cuda", "loss, block", _main_loops, 13),
    Target("CUDA, unaligned rows, fused loss in a cluster: instructions, main loops", "cuda",
           "loss, cluster, unaligned", _main_loops, 15, _ARCHS[1:]),
    Target("CUDA, unaligned rows, fused loss in a block: instructions, main loops", "cuda", "loss, block, unaligned",
           _main_loops, 15),
    Target("CUDA, softcap, statistics: instructions, whole kernel, sm_90", "cuda", "stats, softcap", _whole, 30,
           _HOPPER),
    Target("CUDA, softcap, statistics: special functions, whole kernel, sm_90", "cuda", "stats, softcap", _whole_mufu,
           2.1, _HOPPER),
    Target("CUDA, statistics: resident blocks a multiprocessor", "cuda", "stats", _blocks, 4, at_least=True),
)  # fmt: skip

# The modelled share of bandwidth of the best form, from 2,048 rows on and at the pessimistic end of the band.
EXPECTED = {"H100": 0.85, "H200": 0.80, "B200": 0.70}


def expected_share(report: dict, gpu: str) -> float:
    """Of the best form: the least share from 2,048 rows on, at the pessimistic end of the band."""
    lines = [line["shares"] for line in report["expected"] if line["gpu"] == gpu]
    return max(min(min(shares[str(n)]) for n in ROWS if n >= 2_048) for shares in lines)


def unmet(report: dict) -> list[str]:
    """The targets that the report does not meet."""
    missed = [target.text for target in TARGETS if not target.holds(report)]
    return missed + [_share_text(gpu) for gpu, bound in EXPECTED.items() if expected_share(report, gpu) < bound]


def _share_text(gpu: str) -> str:
    return f"{gpu}: modelled share of bandwidth, fused loss, from 2,048 rows on, latencies 30 % longer"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _targets(report: dict) -> str:
    rows = []
    for target in TARGETS:
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        rows.append([target.text, bound, f"{target.measured(report):.4g}", "yes" if target.holds(report) else "no"])
    for gpu, least in EXPECTED.items():
        share = expected_share(report, gpu)
        rows.append([_share_text(gpu), f"at least {least:.0%}", f"{share:.0%}", "yes" if share >= least else "no"])
    return _markdown(["target (the worst architecture counts)", "bound", "measured", "holds"], rows)


def _bits(loops: list[dict]) -> str:
    loads = sorted({bits for loop in loops for bits in loop["load_bits"]})
    stores = sorted({bits for loop in loops for bits in loop["store_bits"]})
    return "/".join(map(str, loads)) + (" → " + "/".join(map(str, stores)) if stores else "")


def _kernels(report: dict, source: str) -> str:
    header = ["kernel", "GPU", "statistics loop", "gradient loop", "whole kernel", "in the loops", "special functions"]
    header += ["bits loaded → stored", "device-wide barriers", "registers", "shared memory", "blocks x threads an SM"]
    header += ["bandwidth reachable, headroom"]
    rows = []
    for k in report["kernels"]:
        if k["source"] != source:
            continue
        loops = [loop for loop in (k["statistics"], k["gradient"]) if loop]
        sweeps = [f"{loop['instructions']:.2f}" if loop else "" for loop in (k["statistics"], k["gradient"])]
        whole = k["whole"]
        sweeps += [f"{whole['instructions']:.2f}", f"{whole['main_loops'] / whole['instructions']:.0%}"]
        reachable = (f"{g} {r['share']:.0%}, {r['headroom']:.2f}x ({r['resource']})" for g, r in k["reachable"].items())
        occupancy = f"{k['occupancy']['blocks']} x {k['threads']}"
        if k["cluster"] > 1:
            occupancy += f", clusters of {k['cluster']}"
        code = [k["name"], k["arch"], *sweeps, f"{whole['mufu']:.2f}", _bits(loops), str(k["device_barriers"])]
        rows.append([*code, str(k["registers"]), f"{k['dynamic_shared']:,}", occupancy, "; ".join(reachable)])
    return _markdown(header, rows)


def _expected(report: dict) -> str:
    rows = []
    for line in report["expected"]:
        shares = [line["shares"].get(str(n)) for n in ROWS]
        cells = [f"{each[0]:.0%} ({each[2]:.0%} to {each[1]:.0%})" if each else "" for each in shares]
        rows.append([f"{line['source']}: {line['name']}", line["gpu"], *cells])
    return _markdown(["form", "GPU", *(f"N = {n:,}" for n in ROWS)], rows)


def _gpus() -> str:
    header = ["GPU", "architecture", "SMs", "clock, GHz", "bandwidth, TB/s", "elements a clock and SM (2 bytes)"]
    header += ["issue", "FP32", "integer", "special functions", "shared memory", "L2 cache, TB/s"]
    rows = []
    for gpu in GPUS:
        sheet = [gpu.name, gpu.arch, str(gpu.multiprocessors), f"{gpu.clock / 1e9:g}", f"{gpu.bandwidth / 1e12:g}"]
        rates = (gpu.issue, gpu.fma, gpu.alu, gpu.mufu, gpu.shared)
        rows.append([*sheet, f"{gpu.elements_per_clock(2):.2f}", *map(str, rates), f"{gpu.cache_bandwidth / 1e12:g}"])
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
    parts += ["### Modelled share of the bandwidth", _expected(report)]
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
