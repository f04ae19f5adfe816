"""Rooflines as PNG: logits a second over logits a byte, measured by a run, or left reachable by a GPU's machine code.

The unit of work is one logit. An operator decides how many logits a byte of necessary traffic is: one read of bfloat16
is half a logit a byte, a read and a write of float32 an eighth. Bandwidth is then a slanted roof, and what the
arithmetic allows a flat one.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import ours
from benchmarks.hardware import GPUS
from benchmarks.report import BASELINES, main_cases
from benchmarks.results import Measurement, Results

_SIZE = (7.0, 4.4)
_LEGEND = {"fontsize": 7, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)}


def _logits_per_second(m: Measurement) -> float:
    return m.rows * m.vocab / m.median


def logits_per_byte(m: Measurement) -> float:
    """Of necessary traffic: the rate over the bandwidth that `gbps` already counts."""
    return _logits_per_second(m) / (m.gbps * 1e9)


def _roof(ax, bytes_per_second: float, label: str, low: float, high: float, **style: object) -> None:
    ax.plot([low, high], [low * bytes_per_second, high * bytes_per_second], label=label, **style)


def measured_roofline(results: Results, path: Path) -> Path | None:
    """Every variant in the main case of each dtype, under the roofs of the same run.

    On a CPU the slanted roof is the plain read or copy, on a GPU the data-sheet peak. The flat one is the highest rate
    that erc reached at any size: with its logits in the cache, that is what the arithmetic allows.
    """
    kinds = [(op, cases) for op in ("stats", "policy-loss") if (cases := main_cases(results, op))]
    if not kinds:
        return None
    figure, axes = plt.subplots(1, len(kinds), figsize=(_SIZE[0] * len(kinds), _SIZE[1]), squeeze=False)
    for ax, (operator, cases) in zip(axes[0], kinds, strict=True):
        ax.set(xscale="log", yscale="log")
        points = [m for key in cases.values() for m in results.of(key).values() if m.variant not in BASELINES]
        intensities = [logits_per_byte(m) for m in points]
        low, high = min(intensities) / 1.5, max(intensities) * 1.5
        peak = results.machine.get("gpu_peak_gbps") if points[0].device == "cuda" else None
        if peak:
            _roof(ax, peak * 1e9, f"data-sheet peak, {peak:,.0f} GB/s", low, high, color="k")
        for (dtype, key), style in zip(cases.items(), ("-", "--", ":"), strict=False):
            limit = next((m for m in results.of(key).values() if m.variant in (ours.READ, ours.COPY)), None)
            if limit and not peak:
                label = f"plain {limit.variant} of {dtype}, {limit.gbps:.0f} GB/s"
                _roof(ax, limit.gbps * 1e9, label, low, high, color="k", linestyle=style)
        own = [m for m in results.find(operator=operator, device=points[0].device) if m.variant.startswith("erc ")]
        best = max((_logits_per_second(m) for m in own if m.variant != "erc torch"), default=None)
        if best:
            ax.axhline(best, color="C3", linewidth=1, linestyle="-.", label="erc's best rate at any size")
        for name in sorted({m.variant for m in points}, key=lambda n: (not n.startswith("erc"), n)):
            mine = [m for m in points if m.variant == name]
            style = {"s": 60, "marker": "o"} if name.startswith("erc") else {"s": 30, "marker": "x"}
            ax.scatter([logits_per_byte(m) for m in mine], [_logits_per_second(m) for m in mine], label=name, **style)
        at = {f"1/{round(1 / logits_per_byte(m))}": logits_per_byte(m) for m in points}
        ax.set_xticks(list(at.values()), list(at), minor=False)
        ax.minorticks_off()
        sizes = ", ".join(f"{dtype} N={key[3]:,}" for dtype, key in cases.items())
        ax.set(xlabel="logits per byte of necessary traffic", ylabel="logits per second")
        ax.set_title(f"{operator}, V = {points[0].vocab:,}; {sizes}", fontsize=9)
        ax.grid(alpha=0.3, which="both")
        ax.legend(**_LEGEND)
    return _save(figure, path)


def machine_code_roofline(document: dict, path: Path) -> Path | None:
    """What each kernel's instructions leave reachable on each GPU, beside the data-sheet bandwidth.

    Args:
        document: what `machine-code --json` wrote, of bfloat16 kernels.
    """
    kernels = [kernel for kernel in document["kernels"] if kernel["reachable"]]
    gpus = [gpu for gpu in GPUS if any(gpu.name in kernel["reachable"] for kernel in kernels)]
    if not gpus:
        return None
    figure, axes = plt.subplots(1, len(gpus), figsize=(4.6 * len(gpus), _SIZE[1]), squeeze=False, sharey=True)
    sources = sorted({kernel["source"] for kernel in kernels})
    for ax, gpu in zip(axes[0], gpus, strict=True):
        _roof(ax, gpu.bandwidth, "data-sheet bandwidth", 0.16, 0.75, color="k")
        for number, source in enumerate(sources):
            mine = [kernel for kernel in kernels if kernel["source"] == source and gpu.name in kernel["reachable"]]
            # bfloat16: statistics read two bytes a logit, a loss reads and writes them. Sources stand side by side,
            # each as far from the roof as its headroom says.
            x = [(1 + 0.06 * number) / (4 if kernel["gradient"] else 2) for kernel in mine]
            headrooms = [kernel["reachable"][gpu.name]["headroom"] for kernel in mine]
            y = [headroom * gpu.bandwidth * at for headroom, at in zip(headrooms, x, strict=True)]
            ax.scatter(x, y, s=28, label=f"{source}: instructions allow")
        title = f"{gpu.name}, {gpu.bandwidth / 1e12:.2f} TB/s"
        ax.set(xscale="log", yscale="log", xlabel="logits per byte of necessary traffic", title=title)
        ax.set_xticks([1 / 4, 1 / 2], ["1/4: with gradient", "1/2: statistics"])
        ax.set_xticks([], minor=True)
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("logits per second")
    axes[0][0].legend(fontsize=7, loc="lower right")
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path
