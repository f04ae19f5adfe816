"""Tables for the terminal, and the ratios that they and the README show."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.table import Table

from benchmarks import ours
from benchmarks.results import Measurement, Results
from benchmarks.workloads import OPERATORS

BASELINES = (ours.READ, ours.COPY, ours.CLONE, ours.PRODUCTS)


@dataclass(frozen=True)
class Target:
    """What the library set out to reach on 2 cores: a ratio of `variant` and `against`, at least or at most."""

    operator: str
    dtype: str
    against: str
    bound: float
    variant: str = "erc cpu"

    @property
    def at_least(self) -> bool:
        """Whether more is better: a speed-up over a peer, as opposed to a multiple of a plain read or copy."""
        return self.against not in BASELINES

    def measured(self, results: Results) -> float | None:
        """The ratio in the largest case of its kind, or None where it was not measured."""
        objective = "erc-dapo" if self.operator == "policy-loss" else ""
        keys = [k for k in results.cases() if k[:3] == (self.operator, objective, self.dtype) and k[6] == "cpu"]
        for key in sorted(keys, key=lambda k: -k[3] * k[4]):
            case = results.of(key)
            if self.variant in case and self.against in case:
                return (
                    speedup(case, self.variant, self.against)
                    if self.at_least
                    else 1 / speedup(case, self.variant, self.against)
                )
        return None

    def holds(self, ratio: float) -> bool:
        return ratio >= self.bound if self.at_least else ratio <= self.bound


TARGETS = (
    *(Target("stats", dtype, "eager PyTorch", 15) for dtype in ("float32", "bfloat16")),
    *(Target("stats", dtype, "torch.compile", 8) for dtype in ("float32", "bfloat16")),
    Target("stats", "float32", ours.READ, 2),
    Target("policy-loss", "float32", "eager PyTorch", 20),
    Target("policy-loss", "bfloat16", "eager PyTorch", 40),
    Target("policy-loss", "float32", ours.COPY, 3),
    Target("policy-loss", "float32", ours.CLONE, 3),
    Target("policy-loss", "float32", ours.COPY, 3, variant="erc cpu, in place"),
)


def speedup(case: dict[str, Measurement], variant: str, against: str) -> float:
    """How many times faster `variant` is than `against`."""
    return case[against].median / case[variant].median


def case_title(key: tuple) -> str:
    operator, objective, dtype, rows, vocab, hidden, device = key
    head = f", D = {hidden:,}" if hidden else ""
    what = f"{objective}: " if objective else ""
    return f"{what}{OPERATORS[operator]}\n{dtype}, N = {rows:,}, V = {vocab:,}{head}, {device}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def case_table(results: Results, key: tuple) -> Table:
    """Every variant of a case, the fastest first, baselines last."""
    case = results.of(key)
    dtype_bytes = {"float32": 4, "bfloat16": 2, "float16": 2}[key[2]]
    logits_bytes = key[3] * key[4] * dtype_bytes
    baseline = next((name for name in BASELINES if name in case), None)
    fastest = min((m for m in case.values() if m.variant not in BASELINES), key=lambda m: m.median, default=None)
    table = Table("", title=case_title(key), title_justify="left")
    for heading in ("median ms", "quartiles ms", "GB/s", "x fastest", f"x {baseline}", "extra memory / logits"):
        table.add_column(heading, justify="right")
    for m in sorted(case.values(), key=lambda m: (m.variant in BASELINES, m.median)):
        memory = "" if m.peak_extra_bytes is None else f"{m.peak_extra_bytes / logits_bytes:.2f}"
        table.add_row(
            m.variant,
            milliseconds(m.median),
            f"{milliseconds(m.q1)} to {milliseconds(m.q3)}",
            f"{m.gbps:.2f}",
            f"{m.median / fastest.median:.2f}" if fastest else "",
            f"{m.median / case[baseline].median:.2f}" if baseline else "",
            memory,
            style="dim" if m.variant in BASELINES else ("bold" if m.variant.startswith("erc") else ""),
        )
    return table


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


def target_table(results: Results) -> Table:
    """The targets of the CPU backend beside what was measured."""
    table = Table("operator", "dtype", "ratio", "target", "measured", title="targets", title_justify="left")
    for target in TARGETS:
        ratio = target.measured(results)
        if ratio is None:
            continue
        words = f"{target.variant}: " + (
            f"faster than {target.against}" if target.at_least else f"time of a {target.against}"
        )
        bound = f"{'>=' if target.at_least else '<='} {target.bound:g}x"
        style = "green" if target.holds(ratio) else "red"
        table.add_row(target.operator, target.dtype, words, bound, f"[{style}]{ratio:.2f}x[/{style}]")
    return table


def accuracy_table(results: Results, dtype: str) -> Table:
    """Flipped ERC decisions by implementation and entropy band."""
    rows = [row for row in results.accuracy if row.dtype == dtype]
    bands = list(dict.fromkeys(row.band for row in rows))
    table = Table("", title=f"ERC decisions flipped, {dtype} logits, by entropy in nats", title_justify="left")
    for band in bands:
        count = next(row.rows for row in rows if row.band == band)
        table.add_column(f"{band}\n({count} rows)", justify="right")
    table.add_column("entropy error\n(relative, max)", justify="right")
    for name in dict.fromkeys(row.implementation for row in rows):
        mine = {row.band: row for row in rows if row.implementation == name}
        flips = [f"{100 * mine[band].flipped:.1f} %" if mine[band].flipped else "0" for band in bands]
        table.add_row(name, *flips, f"{mine['all'].entropy_max_error:.1e}")
    return table


def skip_table(results: Results) -> Table:
    """Who did not take part, and why; one line a reason."""
    table = Table("variant", "reason", "cases", title="skipped", title_justify="left")
    counts: dict[tuple[str, str], int] = {}
    for skip in results.skipped:
        counts[skip.variant, skip.reason] = counts.get((skip.variant, skip.reason), 0) + 1
    for (variant, reason), count in counts.items():
        table.add_row(variant, reason, str(count))
    return table


def full_report(results: Results) -> Group:
    """Everything, for the terminal."""
    machine = results.machine
    header = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['isa']}"
        f"{', ' + machine['gpu'] if machine['gpu'] else ''}; load {machine['load']}; "
        f"commit {results.commit}; {results.date}\n"
        + ", ".join(f"{name} {version}" for name, version in results.versions.items())
    )
    if results.workload:
        nats = ", ".join(f"{name} {value:.2g}" for name, value in results.workload["entropy_nats"].items())
        header += f"\nlogits: temperature {results.workload['temperature']}, entropy in nats: {nats}"
    tables = [case_table(results, key) for key in results.cases() if key[0] != "rules"]
    costs = rule_costs(results)
    if costs:
        table = Table(
            "", "preset", "cost", title="cost of a ratio rule over plain DAPO (in place)", title_justify="left"
        )
        for where, preset, cost in costs:
            table.add_row(where, preset, f"{100 * (cost - 1):+.1f} %")
        tables.append(table)
    if any(target.measured(results) is not None for target in TARGETS):
        tables.append(target_table(results))
    tables += [accuracy_table(results, dtype) for dtype in dict.fromkeys(row.dtype for row in results.accuracy)]
    if results.skipped:
        tables.append(skip_table(results))
    return Group(header, *tables)
