"""Rooflines as PNG: logits per second over logits per byte, by a run or by what a GPU's machine code leaves reachable.

The unit of work is one logit. An operator decides how many logits a byte of necessary traffic is: one read of bfloat16
is half a logit a byte, a read and a write of float32 an eighth. Bandwidth is then a slanted roof, and what the
arithmetic allows a flat one.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks import ours
from benchmarks.hardware import GPUS
from benchmarks.report import BASELINES, main_cases
from benchmarks.results import Measurement, Results
from examples.palette import BASELINE, figure, implementation_color, legend_below, plain_numbers, save

_MARKERS = {"A100": "s", "H100": "o", "H200": "D", "B200": "^"}


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
    drawn, axes = figure(4.6, 1, len(kinds), squeeze=False)
    for axis, (operator, cases) in zip(axes[0], kinds, strict=True):
        axis.set(xscale="log", yscale="log")
        points = [m for key in cases.values() for m in results.of(key).values() if m.variant not in BASELINES]
        intensities = [logits_per_byte(m) for m in points]
        low, high = min(intensities) / 1.4, max(intensities) * 1.4
        peak = results.machine.get("gpu_peak_gbps") if points[0].device == "cuda" else None
        if peak:
            _roof(axis, peak * 1e9, f"data-sheet peak, {peak:,.0f} GB/s", low, high, color="k")
        for (dtype, key), style in zip(cases.items(), ("-", "--", ":"), strict=False):
            limit = next((m for m in results.of(key).values() if m.variant in (ours.READ, ours.COPY)), None)
            if limit and not peak:
                label = f"plain {limit.variant}, {dtype}: {limit.gbps:.0f} GB/s"
                _roof(axis, limit.gbps * 1e9, label, low, high, color="k", linewidth=1, linestyle=style)
        own = [m for m in results.find(operator=operator, device=points[0].device) if m.variant.startswith("erc ")]
        best = max((_logits_per_second(m) for m in own if m.variant != "erc torch"), default=None)
        if best:
            axis.axhline(best, color=BASELINE, linewidth=1.2, linestyle="-.", label="erc's best rate at any size")
        for name in sorted({m.variant for m in points}, key=lambda n: (not n.startswith("erc"), n)):
            mine = [m for m in points if m.variant == name]
            style = (
                {"s": 46, "marker": "D" if "," in name else "o"} if name.startswith("erc") else {"s": 26, "marker": "x"}
            )
            x, y = [logits_per_byte(m) for m in mine], [_logits_per_second(m) for m in mine]
            axis.scatter(x, y, label=name, color=implementation_color(name), zorder=3, **style)
        at = {f"1/{round(1 / logits_per_byte(m))}": logits_per_byte(m) for m in points}
        axis.set_xticks(list(at.values()), list(at), minor=False)
        axis.minorticks_off()
        dtypes = ", ".join(f"{dtype} N = {key[3]:,}" for dtype, key in cases.items())
        axis.set_xlabel("logits per byte of necessary traffic")
        axis.set_title(f"{operator}, V = {points[0].vocab:,}\n{dtypes}", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("logits per second")
    legend_below(drawn, columns=3)
    save(drawn, path)
    return path


def machine_code_roofline(document: dict, path: Path) -> Path | None:
    """What each kernel's instructions leave reachable on each GPU, beside the data-sheet bandwidth. Modelled.

    Args:
        document: what `machine-code --json` wrote, of bfloat16 kernels.
    """
    kernels = [kernel for kernel in document["kernels"] if kernel["reachable"]]
    gpus = [gpu.name for gpu in GPUS if any(gpu.name in kernel["reachable"] for kernel in kernels)]
    if not gpus:
        return None
    halves = [
        (title, list(dict.fromkeys((k["source"], k["name"]) for k in kernels if bool(k["gradient"]) == gradient)))
        for title, gradient in (("statistics: one read", False), ("gradients and losses: one read, one write", True))
    ]
    halves = [(title, names) for title, names in halves if names]
    ratios = {"height_ratios": [len(names) + 1 for _, names in halves]}
    height = 1.4 + 0.24 * sum(len(names) + 1 for _, names in halves)
    drawn, axes = figure(height, len(halves), 1, squeeze=False, sharex=True, gridspec_kw=ratios)
    for axis, (title, names) in zip(axes[:, 0], halves, strict=True):
        axis.axvline(1.0, color="k", linewidth=1)
        for gpu in gpus:
            mine = [k for k in kernels if gpu in k["reachable"] and (k["source"], k["name"]) in names]
            axis.scatter(
                [k["reachable"][gpu]["headroom"] for k in mine],
                [names.index((k["source"], k["name"])) for k in mine],
                marker=_MARKERS.get(gpu, "o"), s=30, color=[_color(k["source"], k["name"]) for k in mine],
            )  # fmt: skip
        axis.set_yticks(range(len(names)), [_words(*name) for name in names], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, loc="left")
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    for gpu in gpus:
        axes[0, 0].scatter([], [], marker=_MARKERS.get(gpu, "o"), color=BASELINE, label=gpu)
    plain_numbers(axes[-1, 0].xaxis, (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 4))
    axes[-1, 0].set_xlabel("rate that the instructions allow, over the data-sheet bandwidth (line: 1)")
    legend_below(drawn)
    save(drawn, path)
    return path


_PEERS = {"trl": "TRL", "liger": "Liger"}


def _words(source: str, name: str) -> str:
    return name if source == "peer" else f"{source}: {name}"


def _color(source: str, name: str) -> str:
    return implementation_color(_PEERS.get(name.split(" ")[0], "") if source == "peer" else f"erc {source}")
