"""One colour per arm and one line style per gate, in every figure of the experiments (Okabe and Ito's colours, which
colour-blind readers tell apart)."""

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
