"""The README's tables and figures, generated from a results file; a test holds the README to it."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.plots import PLOTS, plot_path
from benchmarks.report import BASELINES, TARGETS, milliseconds, rule_costs, speedup
from benchmarks.results import Results

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
_CAPTIONS = {
    "speed_by_vocab": "Time per token over the vocabulary",
    "memory_by_rows": "Peak memory over the number of tokens",
    "bandwidth": "Share of the speed of a plain read or copy",
    "flips_by_entropy": "ERC decisions flipped, by entropy of the token",
}


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _largest(results: Results, operator: str, objective: str) -> dict[str, tuple]:
    """The largest case of an operator in each dtype."""
    found: dict[str, tuple] = {}
    for key in results.cases():
        if key[:2] == (operator, objective) and (
            key[2] not in found or key[3] * key[4] > found[key[2]][3] * found[key[2]][4]
        ):
            found[key[2]] = key
    return found


def _speed(results: Results, operator: str, objective: str, title: str) -> str:
    cases = _largest(results, operator, objective)
    if not cases:
        return ""
    measured = {dtype: results.of(key) for dtype, key in cases.items()}
    names = list(dict.fromkeys(name for case in measured.values() for name in case))
    slowest_first = sorted(names, key=lambda n: (n in BASELINES, not n.startswith("erc"), n))
    ours_name = next((n for n in ("erc cpu", "erc cuda", "erc triton", "erc torch") if n in names), None)
    header, rows = [title], []
    for dtype in cases:
        header += [f"{dtype}, ms", f"{ours_name} is faster by" if ours_name else ""]
    for name in slowest_first:
        row = [name]
        for case in measured.values():
            if name not in case:
                row += ["", ""]
                continue
            factor = speedup(case, ours_name, name) if ours_name in case else None
            row += [milliseconds(case[name].median), "" if factor is None or name == ours_name else f"{factor:.2g}x"]
        rows.append(row)
    key = next(iter(cases.values()))
    return _markdown(header, rows) + f"\n\n{key[3]} tokens, V = {key[4]:,}; medians of interleaved runs."


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        ratio = target.measured(results)
        if ratio is not None:
            what = f"{target.operator}, {target.dtype}, {target.variant}: " + (
                f"speed-up over {target.against}" if target.at_least else f"time over that of a {target.against}"
            )
            bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}x"
            rows.append([what, bound, f"{ratio:.2g}x", "yes" if target.holds(ratio) else "no"])
    return _markdown(["target", "bound", "measured", "holds"], rows) if rows else ""


def _accuracy(results: Results) -> str:
    rows = [row for row in results.accuracy if row.band == "all"]
    if not rows:
        return ""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    header = ["ERC decisions flipped; largest relative error of H", *(f"{dtype} logits" for dtype in dtypes)]
    lines = []
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = {row.dtype: row for row in rows if row.implementation == name}
        cells = [f"{100 * mine[d].flipped:.1f} %; {mine[d].entropy_max_error:.0e}" if d in mine else "" for d in dtypes]
        lines.append([name, *cells])
    return _markdown(header, lines) + f"\n\n{rows[0].rows} rows with entropies from 1e-6 to 12 nats, against float64."


def _memory(results: Results) -> str:
    found = [m for m in results.find(operator="policy-loss", objective="erc-dapo") if m.peak_extra_bytes is not None]
    if not found:
        return ""
    largest = max(m.rows * m.vocab for m in found)
    found = [m for m in found if m.rows * m.vocab == largest and m.variant not in BASELINES]
    size = {"float32": 4, "bfloat16": 2, "float16": 2}
    rows = [
        [
            m.variant,
            m.dtype,
            f"{m.peak_extra_bytes / 2**20:.1f}",
            f"{m.peak_extra_bytes / (m.rows * m.vocab * size[m.dtype]):.2f}",
        ]
        for m in found
    ]
    return _markdown(["peak memory of the loss beyond its inputs", "dtype", "MiB", "in units of the logits"], rows)


def _rules(results: Results) -> str:
    costs = rule_costs(results)
    if not costs:
        return ""
    worst = max(costs, key=lambda row: row[2])
    return (
        f"The dearest of {len(costs)} objectives that run in one pass, {worst[1]}, costs {100 * (worst[2] - 1):+.1f} % "
        f"over plain DAPO (in place, {worst[0]})."
    )


def block(results: Results, results_path: Path, readme: Path) -> str:
    """What stands between the markers, markers included."""
    machine = results.machine
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    relative = Path(os.path.relpath(results_path, readme.parent)).as_posix()
    nats = results.workload.get("entropy_nats", {})
    parts = [
        f"Measured on {where} with PyTorch {results.versions['torch']}, commit {results.commit}, {results.date}. "
        f"Logits like a trained policy's: temperature {results.workload.get('temperature')}, median entropy "
        f"{nats.get('p50', 0):.2g} nats, mean {nats.get('mean', 0):.2g}. Everything in [{relative}]({relative}).",
        _speed(results, "stats", "", "log-prob and entropy, no gradient"),
        _speed(results, "policy-loss", "erc-dapo", "erc-dapo loss, forward and backward"),
        _speed(results, "linear", "erc-dapo", "erc-dapo loss from hidden states and the lm_head"),
        _memory(results),
        _targets(results),
        _rules(results),
        _accuracy(results),
    ]
    for name in PLOTS:
        path = plot_path(results_path, name)
        if path.exists():
            link = Path(os.path.relpath(path, readme.parent)).as_posix()
            parts.append(f"![{_CAPTIONS[name]}]({link})")
    return "\n\n".join([BEGIN, *(part for part in parts if part), END])


def current_block(readme: Path) -> str:
    """What the README holds now, markers included.

    Raises:
        ValueError: where the markers are missing.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme} must hold {BEGIN} and, after it, {END}, once each")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


def rewrite(readme: Path, results_path: Path) -> None:
    """Put the block of a results file between the README's markers."""
    old = current_block(readme)
    readme.write_text(readme.read_text().replace(old, block(Results.load(results_path), results_path, readme)))
