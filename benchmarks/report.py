"""The report of a run as Markdown, and the ratios that it and the README show."""

from __future__ import annotations

from math import isnan

from benchmarks import ours
from benchmarks.markdown import markdown_table
from benchmarks.results import AccuracyRow, Measurement, Results
from benchmarks.step_share import EFFICIENCY
from benchmarks.targets import TARGET_HEADER, Target, target_rows
from benchmarks.workloads import OPERATORS

BASELINES = (ours.READ, ours.COPY, ours.CLONE, ours.PRODUCTS)


PEAK = "data-sheet peak"


def _ratio(operator: str, dtype: str, against: str, bound: float, variant: str = "erc cpu") -> Target:
    """A bound on the ratio of `variant` and `against`: a speed-up over a peer and a share of the peak at least, a
    multiple of a plain read or copy at most."""
    at_least = against not in BASELINES
    words = f"speed-up over {against}" if at_least else f"time over that of a {against}"
    if against == PEAK:
        words = f"share of the {PEAK} bandwidth"

    def measured(results: Results) -> float | None:
        """In the case that says most."""
        peak = results.machine.get("gpu_peak_gbps")
        device = "cuda" if against == PEAK else "cpu"
        objective = "erc-dapo" if operator == "policy-loss" else ""
        keys = [k for k in results.cases() if k[:3] == (operator, objective, dtype) and k[6] == device]
        for key in sorted(keys, key=lambda key: _weight(results, key), reverse=True):
            case = results.of(key)
            if against == PEAK and peak and variant in case:
                return case[variant].gbps / peak
            if variant in case and against in case:
                ratio = speedup(case, variant, against)
                return ratio if at_least else 1 / ratio
        return None

    show = "{:.0%}".format if against == PEAK else times
    return Target(f"{operator}, {dtype}, {variant}: {words}", measured, bound, at_least, show)


def _weight(results: Results, key: tuple) -> tuple[int, int]:
    """A case says more the more variants meet in it, then the larger it is."""
    return len(results.of(key)), key[3] * key[4]


def main_cases(results: Results, operator: str, objectives: tuple[str, ...] = ("", "erc-dapo")) -> dict[str, tuple]:
    """The case of an operator that says most, in each dtype."""
    keys = [key for key in results.cases() if key[0] == operator and key[1] in objectives]
    return {
        dtype: max((key for key in keys if key[2] == dtype), key=lambda key: _weight(results, key))
        for dtype in dict.fromkeys(key[2] for key in keys)
    }


def speedup(case: dict[str, Measurement], variant: str, against: str) -> float:
    """How many times faster `variant` is than `against`."""
    return case[against].median / case[variant].median


def times(factor: float) -> str:
    """A factor in two digits, and never as a power of ten."""
    return f"{factor:.0f}x" if factor >= 99.5 else f"{factor:.2g}x"


TARGETS = (
    *(_ratio("stats", dtype, "eager PyTorch", 15) for dtype in ("float32", "bfloat16")),
    *(_ratio("stats", dtype, "torch.compile", 8) for dtype in ("float32", "bfloat16")),
    _ratio("stats", "float32", ours.READ, 2),
    _ratio("policy-loss", "float32", "eager PyTorch", 20),
    _ratio("policy-loss", "bfloat16", "eager PyTorch", 40),
    _ratio("policy-loss", "float32", ours.COPY, 3),
    _ratio("policy-loss", "float32", ours.CLONE, 3),
    _ratio("policy-loss", "float32", ours.COPY, 3, variant="erc cpu, in place"),
    # On a GPU: the share of the peak that the model of a training step counts on.
    *(
        _ratio(operator, dtype, PEAK, EFFICIENCY, variant)
        for variant in ("erc cuda", "erc triton")
        for operator in ("stats", "policy-loss")
        for dtype in ("float32", "bfloat16")
    ),
)


def case_title(key: tuple) -> str:
    operator, objective, dtype, rows, vocab, hidden, device = key
    head = f", D = {hidden:,}" if hidden else ""
    what = f"{objective}: " if objective else ""
    return f"{what}{OPERATORS[operator]}, {dtype}, N = {rows:,}, V = {vocab:,}{head}, {device}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def case_table(results: Results, key: tuple) -> str:
    """Every variant of a case, the fastest first, baselines last."""
    case = results.of(key)
    dtype_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[key[2]]
    logits_bytes = key[3] * key[4] * dtype_bytes
    baseline = next((name for name in BASELINES if name in case), None)
    fastest = min((m for m in case.values() if m.variant not in BASELINES), key=lambda m: m.median, default=None)
    peak = results.machine.get("gpu_peak_gbps") if key[6] == "cuda" else None
    limit = f"of {peak:,.0f} GB/s" if peak else f"x {baseline}" if baseline else ""
    header = [case_title(key), "median ms", "quartiles ms", "GB/s", "x fastest", limit, "extra memory / logits"]
    host = key[6] == "cuda"
    rows = []
    for m in sorted(case.values(), key=lambda m: (m.variant in BASELINES, m.median)):
        memory = "" if m.peak_extra_bytes is None else f"{m.peak_extra_bytes / logits_bytes:.2f}"
        cells = [
            m.variant,
            milliseconds(m.median),
            f"{milliseconds(m.q1)} to {milliseconds(m.q3)}",
            f"{m.gbps:.2f}",
            f"{m.median / fastest.median:.2f}" if fastest else "",
            f"{100 * m.gbps / peak:.0f} %" if peak else f"{m.median / case[baseline].median:.2f}" if baseline else "",
            memory,
            *(["" if m.host is None else f"{1e6 * m.host:.0f}"] if host else []),
        ]
        rows.append(cells)
    return markdown_table([*header, *(["host us"] if host else [])], rows)


def rule_costs(results: Results) -> list[tuple[str, str, float]]:
    """(backend and dtype, preset, time relative to plain DAPO on the same backend)."""
    rows = []
    for key in results.cases():
        if key[0] != "rules":
            continue
        case = results.of(key)
        for name, m in case.items():
            backend, preset = name.split(": ")
            rows.append((f"{backend}, {key[2]}", preset, m.median / case[f"{backend}: dapo"].median))
    return rows


def target_table(results: Results) -> str:
    """The targets beside what was measured; empty where nothing was."""
    rows = target_rows(TARGETS, results)
    return markdown_table(TARGET_HEADER, rows) if rows else ""


def accuracy_table(results: Results, dtype: str, of: str = "logits") -> str:
    """Flipped ERC decisions by implementation and entropy band."""
    rows = [row for row in results.accuracy if row.dtype == dtype]
    bands = list(dict.fromkeys(row.band for row in rows))
    counts = [next(row.rows for row in rows if row.band == band) for band in bands]
    header = ["implementation", *(f"{band} ({count} rows)" for band, count in zip(bands, counts, strict=True))]
    lines = []
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = {row.band: row for row in rows if row.implementation == name}
        flips = [flipped_share(mine[band]) for band in bands]
        lines.append([name, *flips, f"{mine['all'].entropy_max_error:.1e}"])
    title = f"**ERC decisions flipped, {dtype} {of}, by entropy in nats**"
    return f"{title}\n\n{markdown_table([*header, 'entropy error (relative, max)'], lines)}"


def flipped_share(row: AccuracyRow) -> str:
    if isnan(row.flipped):
        return "no entropy"
    return f"{100 * row.flipped:.1f} %" if row.flipped else "0"


def skip_table(results: Results) -> str:
    """Who did not take part, and why; one line a reason."""
    counts: dict[tuple[str, str], int] = {}
    for skip in results.skipped:
        counts[skip.variant, skip.reason] = counts.get((skip.variant, skip.reason), 0) + 1
    rows = [(*skip, count) for skip, count in counts.items()]
    return markdown_table(("skipped", "reason", "cases"), rows, left=2)


def full_report(results: Results) -> str:
    """Everything."""
    machine = results.machine
    header = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['isa']}"
        f"{', ' + machine['gpu'] if machine['gpu'] else ''}; load {machine['load']}; "
        f"commit {results.commit}; {results.date}\n\n"
        + ", ".join(f"{name} {version}" for name, version in results.versions.items())
    )
    if results.workload:
        nats = ", ".join(f"{name} {value:.2g}" for name, value in results.workload["entropy_nats"].items())
        header += f"\n\nlogits: temperature {results.workload['temperature']}, entropy in nats: {nats}"
    tables = [case_table(results, key) for key in results.cases() if key[0] != "rules"]
    costs = rule_costs(results)
    if costs:
        rows = [(where, preset, f"{100 * (cost - 1):+.1f} %") for where, preset, cost in costs]
        tables.append(markdown_table(("cost of a rule over plain DAPO (in place)", "preset", "cost"), rows, left=2))
    if targets := target_table(results):
        tables.append(targets)
    tables += [accuracy_table(results, dtype) for dtype in dict.fromkeys(row.dtype for row in results.accuracy)]
    if results.skipped:
        tables.append(skip_table(results))
    return "\n\n".join([header, *tables])
