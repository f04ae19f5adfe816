"""The tables of docs/kernels.md, generated from the checked-in report; a test holds the document to it.

`python -m benchmarks machine-code --json results/benchmarks/machine_code.json` measures anew, and
`python -m benchmarks readme results/benchmarks/cpu.json` rewrites this document with the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import loss_forms
from benchmarks.hardware import GPUS
from benchmarks.machine_code.expectation import ROWS
from benchmarks.machine_code.ordinary_row import VOCABULARY
from benchmarks.markdown import generated, markdown_table
from benchmarks.targets import TARGET_HEADER, Target, target_rows

_ROOT = Path(__file__).parents[2]
REPORT = _ROOT / "results" / "benchmarks" / "machine_code.json"
DOCUMENT = _ROOT / "docs" / "kernels.md"
NAME = "machine-code"
"""Of the generated block."""
_ARCHS = ("sm_80", "sm_90", "sm_100")
_MANY_ROWS = (2_048, 65_536)


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


def expected_share(report: dict, gpu: str) -> float:
    """Of the best form: the least share from 2,048 rows on, at the pessimistic end of the band."""
    lines = [line["shares"] for line in report["expected"] if line["gpu"] == gpu]
    return max(min(min(shares[str(n)]) for n in ROWS if n >= 2_048) for shares in lines)


def _of_kernel(
    text: str,
    source: str,
    kernel: str,
    figure: Callable[[dict], float],
    bound: float,
    archs: tuple[str, ...] = _ARCHS,
    at_least: bool = False,
) -> Target:
    """A bound on a kernel's figure on every architecture of `archs`: the worst counts."""

    def worst(report: dict) -> float:
        found = (k for k in report["kernels"] if (k["source"], k["name"]) == (source, kernel) and k["arch"] in archs)
        return (min if at_least else max)(map(figure, found))

    return Target(text, worst, bound, at_least)


def _of_model(gpu: str, bound: float) -> Target:
    text = f"{gpu}: modelled share of bandwidth, fused loss, from 2,048 rows on, latencies 30 % longer"
    return Target(text, lambda report: expected_share(report, gpu), bound, at_least=True, show="{:.0%}".format)


_FUSED, _CLUSTER, _SOFTCAP = "policy_loss erc-dapo+entropy", "loss, cluster", "stats, softcap"
_UNALIGNED = "loss, cluster, unaligned"
_HOPPER, _BLACKWELL = ("sm_90",), ("sm_100",)
# text, source and name of the kernel, figure, bound, architectures (all), at least (at most)
_KERNELS: tuple[tuple[Any, ...], ...] = (
    ("Triton, statistics: instructions, main loop", "triton", "stats_forward", _main_loops, 9),
    ("Triton, statistics: special functions, main loop", "triton", "stats_forward", _loop_mufu, 1.13),
    ("Triton, fused loss: instructions, main loops", "triton", _FUSED, _main_loops, 18),
    ("CUDA, statistics: instructions, main loop, sm_90", "cuda", "stats", _main_loops, 6.3, _HOPPER),
    ("CUDA, statistics: instructions, main loop, sm_100", "cuda", "stats", _main_loops, 5, _BLACKWELL),
    ("CUDA, statistics: special functions, main loop", "cuda", "stats", _loop_mufu, 1.04),
    ("CUDA, fused loss in a cluster: instructions, whole kernel, sm_90", "cuda", _CLUSTER, _whole, 17, _HOPPER),
    ("CUDA, fused loss in a cluster: instructions, whole kernel, sm_100", "cuda", _CLUSTER, _whole, 14, _BLACKWELL),
    ("CUDA, fused loss in a cluster: device-wide barriers", "cuda", _CLUSTER, _device_barriers, 0, _ARCHS[1:]),
    (
        "CUDA, fused loss in a cluster: share of bandwidth reachable",
        "cuda",
        _CLUSTER,
        _reachable,
        0.95,
        _ARCHS[1:],
        True,
    ),
    ("CUDA, fused loss in a cluster: clusters over 8 multiprocessors", "cuda", _CLUSTER, _blocks, 4, _ARCHS[1:], True),
    ("CUDA, fused loss in a block: instructions, main loops", "cuda", "loss, block", _main_loops, 13),
    ("CUDA, unaligned rows, cluster: instructions, main loops", "cuda", _UNALIGNED, _main_loops, 15, _ARCHS[1:]),
    ("CUDA, unaligned rows, block: instructions, main loops", "cuda", "loss, block, unaligned", _main_loops, 15),
    ("CUDA, softcap, statistics: instructions, whole kernel, sm_90", "cuda", _SOFTCAP, _whole, 30, _HOPPER),
    ("CUDA, softcap, statistics: special functions, whole kernel, sm_90", "cuda", _SOFTCAP, _whole_mufu, 2.1, _HOPPER),
    ("CUDA, statistics: resident blocks a multiprocessor", "cuda", "stats", _blocks, 4, _ARCHS, True),
)
TARGETS = (
    *(_of_kernel(*line) for line in _KERNELS),
    *(_of_model(gpu, bound) for gpu, bound in (("H100", 0.85), ("H200", 0.80), ("B200", 0.70))),
)


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
    return markdown_table(header, rows)


def _band(shares: list[float]) -> str:
    expected, optimistic, pessimistic = shares
    return f"{expected:.0%} ({pessimistic:.0%} to {optimistic:.0%})"


def _expected(report: dict) -> str:
    rows = []
    for line in report["expected"]:
        shares = [line["shares"].get(str(n)) for n in ROWS]
        cells = [_band(each) if each else "" for each in shares]
        rows.append([f"{line['source']}: {line['name']}", line["gpu"], *cells])
    return markdown_table(["form", "GPU", *(f"N = {n:,}" for n in ROWS)], rows)


def _forms(report: dict) -> str:
    """Of a GPU that has clusters: both forms side by side, and which one the launcher's table takes."""
    shares = {(line["gpu"], line["name"]): line["shares"] for line in report["expected"] if line["source"] == "cuda"}
    table = loss_forms.read_lines(loss_forms.TABLE.read_text())
    rows = []
    for gpu in (gpu for gpu in GPUS if (gpu.name, "loss, cluster") in shares):
        line = loss_forms.line_of(table, int(gpu.arch.removeprefix("sm_")), 2 * VOCABULARY)
        taken = f"{line.form[1:].lower()} ({line.source.split(':')[0]})" if line else "cluster"
        for n in _MANY_ROWS:
            cells = [shares[gpu.name, f"loss, {form}"][str(n)] for form in ("cluster", "block")]
            rows.append([gpu.name, f"{n:,}", *map(_band, cells), taken])
    return markdown_table(["GPU", "N", "cluster, modelled", "block, modelled", "taken"], rows)


def _gpus() -> str:
    header = ["GPU", "architecture", "SMs", "clock, GHz", "bandwidth, TB/s", "elements a clock and SM (2 bytes)"]
    header += ["issue", "FP32", "integer", "special functions", "shared memory", "L2 cache, TB/s"]
    rows = []
    for gpu in GPUS:
        sheet = [gpu.name, gpu.arch, str(gpu.multiprocessors), f"{gpu.clock / 1e9:g}", f"{gpu.bandwidth / 1e12:g}"]
        rates = (gpu.issue, gpu.fma, gpu.alu, gpu.mufu, gpu.shared)
        rows.append([*sheet, f"{gpu.elements_per_clock(2):.2f}", *map(str, rates), f"{gpu.cache_bandwidth / 1e12:g}"])
    return markdown_table(header, rows)


def block(report: dict) -> str:
    """The generated part of the document, markers included."""
    versions = ", ".join(f"{name} {version}" for name, version in report["toolchain"].items())
    parts = [
        f"Measured with {versions}; bfloat16 logits, V = 151,936, no GPU.",
        "### Targets",
        "The worst architecture counts.",
        markdown_table(TARGET_HEADER, target_rows(TARGETS, report)),
        "### CUDA",
        _kernels(report, "cuda"),
        "### Triton",
        _kernels(report, "triton"),
    ]
    if any(k["source"] == "peer" for k in report["kernels"]):
        parts += ["### Peers", _kernels(report, "peer")]
    parts += ["### Modelled share of the bandwidth", _expected(report)]
    parts += ["### Cluster or block", _forms(report)]
    parts += ["### The GPUs of the model", _gpus()]
    return generated(NAME, *parts)
