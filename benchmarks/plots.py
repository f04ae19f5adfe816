"""PNG plots of a results file: speed by V and N, memory by N, roofline and bandwidth, flips by entropy band."""

from __future__ import annotations

from pathlib import Path

from benchmarks import ours
from benchmarks.report import BASELINES, main_cases
from benchmarks.results import Measurement, Results
from benchmarks.roofline import measured_roofline
from examples.palette import IMPLEMENTATIONS, figure, implementation_color, legend_below, plain_numbers, save

_HEIGHT = 3.6


def _style(name: str) -> dict:
    """Ours are wide; a variant of an implementation has its colour, with dashes and squares."""
    style = {"color": implementation_color(name), "marker": "o", "markersize": 4, "linestyle": "-", "linewidth": 1.2}
    if name in BASELINES:
        return style | {"linestyle": ":", "marker": "."}
    if "," in name and name not in IMPLEMENTATIONS:
        style |= {"linestyle": "--", "marker": "s"}
    return style | ({"linewidth": 2.4} if name.startswith("erc") else {})


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


def _apart(values: list[int], factor: float = 1.8) -> list[int]:
    """Those of ascending `values` whose labels have room on a logarithmic axis."""
    kept: list[int] = []
    for value in values:
        if not kept or value > factor * kept[-1]:
            kept.append(value)
    return kept


def _speed_by(results: Results, x: str, label: str, path: Path) -> Path | None:
    sweeps = [_sweep(results, operator, x) for operator in ("stats", "policy-loss")]
    sweeps = [(found, title) for found, title in sweeps if found]
    if not sweeps:
        return None
    drawn, axes = figure(_HEIGHT + 0.6, 1, len(sweeps), squeeze=False)
    for axis, (found, title) in zip(axes[0], sweeps, strict=True):
        _lines(axis, found, x, lambda m: m.median / m.rows * 1e6)
        axis.set(xscale="log", yscale="log", xlabel=label, title=title)
        plain_numbers(axis.xaxis, _apart(sorted({getattr(m, x) for m in found})))
        axis.tick_params(axis="x", rotation=45)
        plain_numbers(axis.yaxis)
    axes[0, 0].set_ylabel("microseconds per token")
    legend_below(drawn)
    save(drawn, path)
    return path


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
    drawn, axis = figure(_HEIGHT + 0.4)
    _lines(axis, found, "rows", lambda m: m.peak_extra_bytes / 2**20)
    axis.set(xlabel="tokens N", ylabel="peak memory beyond the inputs, MiB", title=title)
    legend_below(drawn)
    save(drawn, path)
    return path


def bandwidth(results: Results, path: Path) -> Path | None:
    """Each variant beside a plain read or copy of the same bytes: a row of panels per dtype."""
    cases = {name: main_cases(results, name) for name in ("stats", "policy-loss")}
    cases = {name: found for name, found in cases.items() if found}
    dtypes = list(dict.fromkeys(dtype for found in cases.values() for dtype in found))
    panels = {}
    for row, dtype in enumerate(dtypes):
        for column, (operator, found) in enumerate(cases.items()):
            case = results.of(found[dtype]) if dtype in found else {}
            limit = case.get(ours.READ) or case.get(ours.COPY)
            if limit:
                panels[row, column] = (operator, dtype, limit, case)
    if not panels:
        return None
    drawn, axes = figure(0.5 + 1.9 * len(dtypes), len(dtypes), len(cases), squeeze=False)
    for place, axis in (
        (place, axes[place]) for place in [(r, c) for r in range(len(dtypes)) for c in range(len(cases))]
    ):
        if place not in panels:
            axis.axis("off")
            continue
        operator, dtype, limit, case = panels[place]
        bars = sorted((m for m in case.values() if m is not limit), key=lambda m: -m.median)
        shares = [100 * limit.median / m.median for m in bars]
        axis.barh([m.variant for m in bars], shares, color=[implementation_color(m.variant) for m in bars])
        axis.set(title=f"{operator}, {dtype}", xlabel=f"% of the speed of a plain {limit.variant}")
        for row, share in enumerate(shares):
            axis.text(share, row, f" {share:.3g}", va="center", fontsize=8)
        axis.tick_params(axis="y", labelsize=8)
        axis.margins(x=0.15)
    save(drawn, path)
    return path


def flips_by_band(results: Results, path: Path) -> Path | None:
    """Share of ERC decisions that differ from float64, by the entropy of the token."""
    dtypes = list(dict.fromkeys(row.dtype for row in results.accuracy))
    if not dtypes:
        return None
    of = "hidden states" if results.name == "hidden" else "logits"
    drawn, axes = figure(_HEIGHT + 0.6, 1, len(dtypes), squeeze=False, sharey=True)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        rows = [row for row in results.accuracy if row.dtype == dtype and row.band != "all"]
        bands = list(dict.fromkeys(row.band for row in rows))
        curves: dict[tuple[float, ...], list[str]] = {}
        for name in dict.fromkeys(row.implementation for row in rows):
            flips = {row.band: 100 * row.flipped for row in rows if row.implementation == name}
            if not any(value != value for value in flips.values()):  # a peer without entropies decides nothing
                curves.setdefault(tuple(flips.get(band, 0.0) for band in bands), []).append(name)
        for values, names in sorted(curves.items(), key=lambda item: max(item[0]), reverse=True):
            for number, name in enumerate(names):  # equal curves share one line, dash by dash
                style = _style(name) | {"dash_capstyle": "butt", "linewidth": 2.2}
                if len(names) > 1:
                    style["linestyle"] = (4 * number, (4, 4 * (len(names) - 1)))
                axis.plot(range(len(bands)), values, **style, clip_on=False, zorder=3)
                axis.plot([], [], label=name, **_style(name))
        axis.set_yscale("symlog", linthresh=1)
        axis.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1", "2", "5", "10", "20", "50", "100"])
        axis.set_ylim(0, 110)
        axis.set_xticks(
            range(len(bands)), [band.replace("e-0", "e-") for band in bands], rotation=45, ha="right", fontsize=8
        )
        axis.set(xlabel="entropy of the token, nats", title=f"{dtype} {of}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ERC decisions flipped, %")
    legend_below(drawn)
    save(drawn, path)
    return path


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
