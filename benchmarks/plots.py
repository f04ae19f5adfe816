"""PNG plots of a results file: speed by V, memory by N, roofline and bandwidth, flips by entropy band."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import ours
from benchmarks.report import BASELINES, main_cases
from benchmarks.results import Measurement, Results
from benchmarks.roofline import measured_roofline

_WIDTH, _HEIGHT = 7.0, 4.2


def _style(name: str) -> dict:
    if name in BASELINES:
        return {"linestyle": ":", "color": "0.5", "marker": "."}
    return {"linestyle": "-", "marker": "o", "linewidth": 2.2 if name.startswith("erc") else 1.2}


def _finish(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def _sweep(results: Results, operator: str, x: str, *, needs_memory: bool = False) -> tuple[list[Measurement], str]:
    """The measurements along the longest sweep over `x` with everything else fixed, and a title of what is fixed."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in results.measurements:
        if m.operator == operator and not (needs_memory and m.peak_extra_bytes is None):
            fixed = (m.objective, m.dtype, m.vocab if x == "rows" else m.rows, m.hidden, m.device)
            groups.setdefault(fixed, []).append(m)
    if not groups:
        return [], ""
    fixed, found = max(groups.items(), key=lambda item: (len({getattr(m, x) for m in item[1]}), item[0][2]))
    if len({getattr(m, x) for m in found}) < 2:
        return [], ""
    objective, dtype, other, _, device = fixed
    words = f"{operator} {objective}".strip()
    return found, f"{words}, {dtype}, {'V' if x == 'rows' else 'N'} = {other:,}, {device}"


def _lines(axes, found: list[Measurement], x: str, y) -> None:
    names = list(dict.fromkeys(m.variant for m in found))
    for name in sorted(names, key=lambda n: (n in BASELINES, not n.startswith("erc"))):
        points = sorted((getattr(m, x), y(m)) for m in found if m.variant == name)
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), label=name, **_style(name))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _speed_by(results: Results, x: str, label: str, path: Path) -> Path | None:
    sweeps = [_sweep(results, operator, x) for operator in ("stats", "policy-loss")]
    sweeps = [(found, title) for found, title in sweeps if found]
    if not sweeps:
        return None
    figure, axes = plt.subplots(1, len(sweeps), figsize=(_WIDTH * len(sweeps), _HEIGHT), squeeze=False)
    for ax, (found, title) in zip(axes[0], sweeps, strict=True):
        _lines(ax, found, x, lambda m: m.median / m.rows * 1e6)
        ax.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds per token", title=title)
    return _finish(figure, path)


def speed_by_vocab(results: Results, path: Path) -> Path | None:
    """Time per token over V for statistics and for the loss."""
    return _speed_by(results, "vocab", "vocabulary size V", path)


def speed_by_rows(results: Results, path: Path) -> Path | None:
    """Time per token over N for statistics and for the loss."""
    return _speed_by(results, "rows", "tokens N", path)


def memory_by_rows(results: Results, path: Path) -> Path | None:
    """Peak memory beyond the inputs over N."""
    found, title = _sweep(results, "policy-loss", "rows", needs_memory=True)
    if not found:
        return None
    figure, ax = plt.subplots(figsize=(_WIDTH, _HEIGHT))
    _lines(ax, found, "rows", lambda m: m.peak_extra_bytes / 2**20)
    ax.set(xlabel="tokens N", ylabel="peak memory beyond the inputs, MiB", title=title)
    return _finish(figure, path)


def bandwidth(results: Results, path: Path) -> Path | None:
    """Each variant beside a plain read or copy of the same bytes."""
    found = []
    for key in [key for name in ("stats", "policy-loss") for key in main_cases(results, name).values()]:
        case = results.of(key)
        limit = case.get(ours.READ) or case.get(ours.COPY)
        if limit:
            found.append((key, limit, sorted((m for m in case.values() if m is not limit), key=lambda m: -m.median)))
    if not found:
        return None
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), _HEIGHT), squeeze=False)
    for ax, (key, limit, bars) in zip(axes[0], found, strict=True):
        shares = [100 * limit.median / m.median for m in bars]
        ax.barh([m.variant for m in bars], shares, color=["C0" if m.variant.startswith("erc") else "0.7" for m in bars])
        ax.set(xlabel=f"% of the speed of a plain {limit.variant}", title=f"{key[0]} {key[2]}")
        for row, share in enumerate(shares):
            ax.text(share, row, f" {share:.1f}", va="center", fontsize=8)
        ax.margins(x=0.15)
    return _finish(figure, path)


def flips_by_band(results: Results, path: Path) -> Path | None:
    """Share of ERC decisions that differ from float64, by the entropy of the token."""
    dtypes = list(dict.fromkeys(row.dtype for row in results.accuracy))
    if not dtypes:
        return None
    of = "hidden states" if results.name == "hidden" else "logits"
    figure, axes = plt.subplots(1, len(dtypes), figsize=(_WIDTH * len(dtypes), _HEIGHT), squeeze=False)
    for ax, dtype in zip(axes[0], dtypes, strict=True):
        rows = [row for row in results.accuracy if row.dtype == dtype and row.band != "all"]
        bands = list(dict.fromkeys(row.band for row in rows))
        for name in dict.fromkeys(row.implementation for row in rows):
            flips = {row.band: 100 * row.flipped for row in rows if row.implementation == name}
            ax.plot(range(len(bands)), [flips.get(band, 0.0) for band in bands], label=name, **_style(name))
        ax.set_yscale("symlog", linthresh=0.1)
        ax.set_ylim(bottom=-0.02)
        ax.set_xticks(range(len(bands)), bands, rotation=30, ha="right", fontsize=8)
        ax.set(xlabel="entropy of the token, nats", ylabel="ERC decisions flipped, %", title=f"{dtype} {of}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return _finish(figure, path)


PLOTS = {
    "speed_by_vocab": speed_by_vocab,
    "speed_by_rows": speed_by_rows,
    "memory_by_rows": memory_by_rows,
    "roofline": measured_roofline,
    "bandwidth": bandwidth,
    "flips_by_entropy": flips_by_band,
}


def plot_path(results_path: Path, name: str) -> Path:
    """Where the plot `name` of a results file lies."""
    return results_path.with_name(f"{results_path.stem}_{name}.png")


def save_plots(results: Results, results_path: Path) -> list[Path]:
    """Every plot that `results` has the measurements for, beside the results file."""
    made = [draw(results, plot_path(results_path, name)) for name, draw in PLOTS.items()]
    return [path for path in made if path is not None]
