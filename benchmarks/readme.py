"""The README's tables and figures, generated from a results file; a test holds the README to it."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.markdown import BEGIN, END, markdown_table
from benchmarks.plots import PLOTS, plot_path
from benchmarks.report import BASELINES, TARGETS, flipped_share, main_cases, milliseconds, rule_costs, speedup, times
from benchmarks.results import Measurement, Results
from benchmarks.step_share import HEADINGS, MODELS, step_share_rows

_CAPTIONS = {
    "speed_by_vocab": "Time per token over the vocabulary",
    "speed_by_rows": "Time per token over the number of tokens",
    "memory_by_rows": "Peak memory over the number of tokens",
    "roofline": "Roofline: logits per second under the measured bandwidth",
    "bandwidth": "Share of the speed of a plain read or copy",
    "flips_by_entropy": "ERC decisions flipped, by entropy of the token",
}


def _speed(results: Results, operator: str, objective: str, title: str) -> str:
    cases = main_cases(results, operator, (objective,))
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
            row += [milliseconds(case[name].median), "" if factor is None or name == ours_name else times(factor)]
        rows.append(row)
    sizes = dict.fromkeys((key[3], key[4], key[5]) for key in cases.values())
    words = [f"{n:,} tokens, V = {v:,}" + (f", D = {d:,}" if d else "") for n, v, d in sizes]
    return markdown_table(header, rows) + f"\n\n{'; '.join(words)}; medians of interleaved runs."


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        ratio = target.measured(results)
        if ratio is not None:
            what = f"{target.operator}, {target.dtype}, {target.variant}: {target.words}"
            bound = f"{'at least' if target.at_least else 'at most'} {target.show(target.bound)}"
            rows.append([what, bound, target.show(ratio), "yes" if target.holds(ratio) else "no"])
    return markdown_table(["target", "bound", "measured", "holds"], rows) if rows else ""


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
    return (
        markdown_table(header, lines) + f"\n\n{rows[0].rows} rows with entropies from 1e-6 to 12 nats, against float64."
    )


def _hidden_states(path: Path, readme: Path) -> str:
    """Flips from hidden states on: of all rows, and of the bands in which most tokens that ERC gates lie."""
    if not path.exists():
        return ""
    results = Results.load(path)
    bands = list(dict.fromkeys(row.band for row in results.accuracy))
    lines = []
    for name in dict.fromkeys(row.implementation for row in results.accuracy):
        mine = {row.band: row for row in results.accuracy if row.implementation == name}
        lines.append([name, *(flipped_share(mine[band]) for band in bands), f"{mine['all'].logprob_max_error:.0e}"])
    header = ["ERC decisions flipped from bfloat16 hidden states on, by entropy", *bands, "log-prob error"]
    machine, link = results.machine, Path(os.path.relpath(path, readme.parent)).as_posix()
    count = next(row.rows for row in results.accuracy if row.band == "all")
    return markdown_table(header, lines) + (
        f"\n\n{count:,} rows, against float64 products of the same operands; "
        f"{machine['gpu'] or machine['cpu']}, commit {results.commit}, [{link}]({link})."
    )


def _memory(results: Results) -> str:
    cases: dict[tuple, list[Measurement]] = {}
    for m in results.find(operator="policy-loss", objective="erc-dapo"):
        if m.peak_extra_bytes is not None and m.variant not in BASELINES:
            cases.setdefault(m.case_key, []).append(m)
    if not cases:
        return ""
    found = max(cases.values(), key=lambda case: (len(case), case[0].rows * case[0].vocab))
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
    return markdown_table(["peak memory of the loss beyond its inputs", "dtype", "MiB", "in units of the logits"], rows)


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
        _hidden_states(results_path.parent / "hidden.json", readme),
        _step_share_sentence(),
    ]
    for name in PLOTS:
        path = plot_path(results_path, name)
        if path.exists():
            link = Path(os.path.relpath(path, readme.parent)).as_posix()
            parts.append(f"![{_CAPTIONS[name]}]({link})")
    return "\n\n".join([BEGIN, *(part for part in parts if part), END])


def _step_share_sentence() -> str:
    """What the loss costs of a whole step, by the model, so that nobody is promised more than they get."""
    shares = {(row[0], row[1]): row[HEADINGS.index("loss / update")] for row in step_share_rows()}
    parts = [f"{shares[m.name, 'eager PyTorch']} and {shares[m.name, 'erc']} for {m.name}" for m in MODELS]
    return (
        "A loss is a small part of a step. Its share of an update on an H100, by a model of flops and bytes, in eager "
        f"PyTorch and with erc: {'; '.join(parts)}. The model, the method and how to compare runs: "
        "[docs/benchmarks.md](docs/benchmarks.md)."
    )
