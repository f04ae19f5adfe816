"""What the README and docs/benchmarks.md show of a results file: one table and one plot there, everything here.

Tests hold both documents to the file."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.call import LENGTH, ROWS, VOCAB, calls, count
from benchmarks.markdown import generated, markdown_table
from benchmarks.plots import PLOTS, plot_path
from benchmarks.report import (
    BASELINES,
    flipped_share,
    main_cases,
    milliseconds,
    rule_costs,
    speedup,
    target_table,
    times,
)
from benchmarks.results import Measurement, Results
from benchmarks.step_share import ACCELERATORS, HEADINGS, MODELS, step_share_rows

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
        header += [f"{dtype}, ms", f"time over {ours_name}'s" if ours_name else ""]
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
        f"The most expensive of {len(costs)} objectives that run in one pass, {worst[1]}, costs "
        f"{100 * (worst[2] - 1):+.1f} % over plain DAPO (in place, {worst[0]})."
    )


def _machine(results: Results) -> str:
    machine = results.machine
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"


def _origin(results: Results, results_path: Path, document: Path) -> str:
    relative = Path(os.path.relpath(results_path, document.parent)).as_posix()
    nats = results.workload.get("entropy_nats", {})
    return (
        f"Measured on {_machine(results)} with PyTorch {results.versions['torch']}, commit {results.commit}, "
        f"{results.date}. Logits like a trained policy's: temperature {results.workload.get('temperature')}, median "
        f"entropy {nats.get('p50', 0):.2g} nats, mean {nats.get('mean', 0):.2g}. All figures: "
        f"[{results_path.name}]({relative})."
    )


_SHOWN = ("float32", "bfloat16")


def _overview(results: Results) -> str:
    """The one table of the README: what flips, what memory a loss takes, and its time, by implementation."""
    cases = main_cases(results, "policy-loss", ("erc-dapo",))
    dtypes = [dtype for dtype in _SHOWN if dtype in cases]
    if not dtypes:
        return ""
    measured = {dtype: results.of(cases[dtype]) for dtype in dtypes}
    flips = {(row.implementation, row.dtype): row for row in results.accuracy if row.band == "all"}
    header = ["erc-dapo loss, forward and backward"]
    header += [f"decisions flipped, {dtype}" for dtype in dtypes] if flips else []
    header += [f"extra memory, {dtypes[-1]}"] + [f"{dtype}, ms" for dtype in dtypes]
    names = dict.fromkeys(name for case in measured.values() for name in case if name != "erc torch")
    rows = []
    for name in sorted(names, key=lambda n: (n in BASELINES, not n.startswith("erc"), n)):
        base = name.split(", ")[0]
        row = [f"a plain {name}" if name in BASELINES else name]
        row += [flipped_share(flips[base, d]) if (base, d) in flips else "" for d in dtypes] if flips else []
        memory = _extra_memory(results, name, dtypes[-1])
        row += ["" if memory is None or name in BASELINES else f"{memory:.1f}x"]
        row += [milliseconds(measured[d][name].median) if name in measured[d] else "" for d in dtypes]
        rows.append(row)
    counts = {dtype: f"{cases[dtype][3]:,} tokens" for dtype in dtypes}
    same = len(set(counts.values())) == 1
    sizes = counts[dtypes[0]] if same else ", ".join(f"{count} of {dtype}" for dtype, count in counts.items())
    words = f"{sizes}, V = {cases[dtypes[0]][4]:,}. Extra memory is the peak beyond the inputs, in units of the logits."
    return f"{markdown_table(header, rows)}\n\n{words}"


def _extra_memory(results: Results, variant: str, dtype: str) -> float | None:
    """Peak memory of the erc-dapo loss beyond its inputs, in units of the logits, in the largest case there is."""
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    known = [
        (m.rows * m.vocab, m.peak_extra_bytes / (m.rows * m.vocab * size))
        for m in results.find(operator="policy-loss", objective="erc-dapo", variant=variant, dtype=dtype)
        if m.peak_extra_bytes is not None
    ]
    return max(known)[1] if known else None


def _plot(results_path: Path, name: str, document: Path) -> str:
    path = plot_path(results_path, name)
    link = Path(os.path.relpath(path, document.parent)).as_posix()
    return f"![{_CAPTIONS[name]}]({link})" if path.exists() else ""


def block(results: Results, results_path: Path, readme: Path) -> str:
    """What stands between the README's markers, markers included: one table and one plot."""
    plot = _plot(results_path, "flips_by_entropy", readme)
    hidden = _head_costs(results_path.parent / "hidden.json")
    parts = [_overview(results), plot, _origin(results, results_path, readme), hidden, _on_gpus()]
    return generated("benchmarks", *filter(None, parts))


def _head_costs(path: Path) -> str:
    """What a 16-bit head has already cost before a kernel runs."""
    if not path.exists():
        return ""
    results = Results.load(path)
    flips = {row.implementation: row for row in results.accuracy if row.band == "all"}
    named = {"TRL, chunked": "TRL", "eager PyTorch": "eager bfloat16", "eager PyTorch, float32 head": "a float32 head"}
    others = ", ".join(f"{label} {flipped_share(flips[name])}" for name, label in named.items() if name in flips)
    rounded = max(row.logprob_max_error for row in flips.values())
    return (
        "A 16-bit head decides by its rounding before any kernel runs. Flipped from bfloat16 hidden states on: "
        f"{others}, and {flipped_share(flips['erc cpu'])} with `erc.linear_policy_loss`, which makes float32 logits; "
        f"16-bit logits are off by up to {rounded:.2f} in log-prob "
        "([details](docs/parallel.md#what-a-16-bit-head-has-already-cost))."
    )


def _on_gpus() -> str:
    """What a GPU would take for the call of the table, by count and model."""
    cost = count(calls()["policy_loss and backward: erc-dapo"])
    logits = ROWS * LENGTH * VOCAB
    modelled = ", ".join(f"{1e3 * cost.seconds(device):.1f} ms on {device.name}" for device in ACCELERATORS)
    return (
        f"On a GPU, **modelled**: the same call is {cost.kernels} launches and moves {cost.bytes / logits:.1f} bytes "
        f"per bfloat16 logit (a read and a write are 4); {ROWS * LENGTH:,} tokens take {modelled}."
    )


def measured_sections(results: Results, results_path: Path, document: Path) -> str:
    """Every table and figure of a results file, for docs/benchmarks.md."""
    apart = ("memory_by_rows", "flips_by_entropy")
    sections = {
        f"Measured on {_machine(results)}": [
            _origin(results, results_path, document),
            _speed(results, "stats", "", "log-prob and entropy, no gradient"),
            _speed(results, "policy-loss", "erc-dapo", "erc-dapo loss, forward and backward"),
            _speed(results, "linear", "erc-dapo", "erc-dapo loss from hidden states and the lm_head"),
            _rules(results),
            *(_plot(results_path, name, document) for name in PLOTS if name not in apart),
        ],
        "Memory": [_memory(results), _plot(results_path, "memory_by_rows", document)],
        "Targets, measured": [target_table(results)],
        "Flipped decisions": [
            _accuracy(results),
            _plot(results_path, "flips_by_entropy", document),
            _hidden_states(results_path.parent / "hidden.json", document),
        ],
    }
    parts = []
    for title, section in sections.items():
        found = [part for part in section if part]
        parts += [f"## {title}", *found] if found else []
    return "\n\n".join(parts)


def step_share_sentence() -> str:
    """What the loss costs of a whole step, by the model, so that nobody is promised more than they get."""
    shares = {(row[0], row[1]): row[HEADINGS.index("loss / update")] for row in step_share_rows()}
    parts = [f"{shares[m.name, 'eager PyTorch']} and {shares[m.name, 'erc']} for {m.name}" for m in MODELS]
    return (
        "A loss is a small part of a step. Its share of an update on an H100, by a model of flops and bytes, in eager "
        f"PyTorch and with erc: {'; '.join(parts)}."
    )
