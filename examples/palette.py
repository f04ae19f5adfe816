"""The colours of every figure: one per implementation in the benchmarks, one per arm in the experiments, one line style
per gate (Okabe and Ito's colours, which colour-blind readers tell apart)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = {
    "ppo": "#56B4E9",
    "dapo": "#0072B2",
    "gppo": "#D55E00",
    "no-clip": "#009E73",
    "dppo-full-tv": "#CC79A7",
    "no gate": "#999999",
    "gate 0.05": "#0072B2",
    "gate 0.2": "#56B4E9",
    "random drop": "#E69F00",
    "DAPO": "#0072B2",
    "IC-DAPO, sound": "#009E73",
    "IC-DAPO, both": "#999999",
    "IC-DAPO, careless": "#D55E00",
    "Evidence Gain weights": "#CC79A7",
}
IMPLEMENTATIONS = {
    "erc cpu": "#0072B2",
    "erc cuda": "#0072B2",
    "erc triton": "#56B4E9",
    "erc torch": "#99C7E0",
    "eager PyTorch": "#D55E00",
    "torch.compile": "#E69F00",
    "TRL": "#CC79A7",
    "verl": "#009E73",
    "Liger": "#8C564B",
    "cut-cross-entropy": "#6A3D9A",
    "PyTorch linear_cross_entropy": "#B8A800",
    "flash-attn": "#5B8C2A",
    "quack": "#1FBFB8",
    "eager, logits' dtype": "#F4A582",
    "float32, uncentred": "#4D4D4D",
}
"""`erc cpu` and `erc cuda` never meet in a figure. Variants of one implementation (`erc cpu, in place`) share its
colour; baselines are grey."""
BASELINE = "#999999"
POSITIVE, NEGATIVE, NEUTRAL = "#0072B2", "#D55E00", "#009E73"
"""Advantages above and below zero, and what has no sign."""
STYLES = {"no gate": "-", "gate 0.05": "--", "gate 0.2": "-.", "random drop": ":"}
WIDTH = 8.0
"""Inches: at 150 dots each, a figure scaled to the 800 pixels of a README page keeps 9-point text at 12 pixels."""


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure of README width and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False})
    return plt.subplots(rows, columns, figsize=(WIDTH, height), layout="constrained", **options)


def implementation_color(name: str) -> str:
    """The colour of an implementation, or of one of its variants after a comma or a colon; grey for baselines."""
    if name in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[name]
    return IMPLEMENTATIONS.get(name.split(", ")[0].split(": ")[0], BASELINE)


def legend_below(drawn: Any, columns: int = 4, title: str | None = None) -> None:
    """One legend for all panels, under them, where it hides nothing."""
    entries: dict[str, Any] = {}
    for axis in drawn.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    drawn.legend(entries.values(), entries, fontsize=8.5, title=title, title_fontsize=9, **place)


def plain_numbers(axis: Any, ticks: Any = None) -> None:
    """Ticks of a logarithmic axis, `axes.xaxis` or `axes.yaxis`, as 0.8, 1, 1.25 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if ticks is not None:
        axis.set_ticks(list(ticks))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def bars(axis: Any, places: Any, cells: list[tuple[float, float, float]], name: str, width: float) -> None:
    """Bars of means with their intervals, in the colour of `name`."""
    mean, low, high = zip(*cells, strict=True)
    errors = [[m - v for m, v in zip(mean, low, strict=True)], [v - m for m, v in zip(mean, high, strict=True)]]
    axis.bar(places, mean, width, color=COLORS[name], label=name)
    axis.errorbar(places, mean, errors, fmt="none", ecolor="black", linewidth=0.8)


def save(drawn: Any, path: Path) -> None:
    """Write the figure as a PNG that depends on nothing but its content."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(drawn)
