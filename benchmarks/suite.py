"""The run itself: every entry of a plan, kept as soon as it is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch

from benchmarks import ours
from benchmarks.accuracy import measure_accuracy
from benchmarks.memory import peaks
from benchmarks.peers import Runner, Unsupported, Variant
from benchmarks.plans import Entry, Selection
from benchmarks.results import Measurement, Results, Skip, new_results
from benchmarks.timing import interleave, reason_of
from benchmarks.variants import all_variants
from benchmarks.workloads import TEMPERATURE, Case, Inputs, entropy_quantiles


def run(
    name: str,
    plan: list[Entry],
    selection: Selection,
    *,
    accuracy: bool = True,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure every entry of `plan`. What fails is skipped with its reason, and never ends the run.

    Args:
        progress: told in words what comes next, and how long the rest takes.
        keep: given the results so far after every case.
    """
    results = new_results(name)
    device = plan[0].case.device if plan else "cpu"
    backends = tuple(b for b in selection.backends or ours.BACKENDS if device in ours.DEVICES[b])
    others = [b for b in selection.backends or ours.BACKENDS if b not in backends]
    results.skipped += [Skip("every case", f"erc {name}", f"does not run on {device}") for name in others]
    variants = all_variants(backends, selection.peers)
    if accuracy:
        progress("accuracy against float64")
        results.accuracy, failed = measure_accuracy(device, backends, selection.peers)
        results.skipped += failed
        keep(results)
    entropies = []
    remaining = _Remaining(plan)
    for number, entry in enumerate(plan, 1):
        progress(f"{number}/{len(plan)} {entry.case}; {remaining}")
        try:
            entropies.append(_measure(entry, variants, results))
        except Exception as error:  # such as a case that does not fit the machine
            results.skipped.append(Skip(str(entry.case), "all", reason_of(error)))
        if entropies:
            nats = entropy_quantiles(torch.cat(entropies))
            results.workload = {"temperature": TEMPERATURE, "entropy_nats": nats}
        remaining.done(entry)
        keep(results)
    return results


class _Remaining:
    """How long the rest of a plan takes: what was expected, corrected by how long its beginning took."""

    def __init__(self, plan: Iterable[Entry]) -> None:
        self.start = time.monotonic()
        self.expected = {entry.case: entry.expected_seconds() for entry in plan}
        self.passed = 0.0

    def done(self, entry: Entry) -> None:
        self.passed += self.expected.pop(entry.case)

    def __str__(self) -> str:
        pace = (time.monotonic() - self.start) / self.passed if self.passed else 1.0
        return f"about {max(1, round(pace * sum(self.expected.values()) / 60))} min left"


def _prepare(entry: Entry, variants: list[Variant], inputs: Inputs) -> tuple[dict[str, Runner], dict[str, str]]:
    """Everyone who takes part, ready to run; and why the others do not."""
    runners: dict[str, Runner] = {}
    reasons: dict[str, str] = {}
    for variant in variants:
        if entry.case.operator not in variant.operators or not entry.takes(variant.name):
            continue
        reason = variant.why_not(entry.case)
        if reason is None:
            try:
                runners[variant.name] = variant.prepare(inputs)
            except Unsupported as unsupported:
                reason = str(unsupported)
            except Exception as error:  # a peer may fail in any way; the others are still measured
                reason = reason_of(error)
        if reason is not None:
            reasons[variant.name] = reason
    return runners, reasons


def _measure(entry: Entry, variants: list[Variant], results: Results) -> torch.Tensor:
    """Time, and memory where it is asked for; returns the entropies of the rows."""
    case = entry.case
    inputs = Inputs(case)
    runners, reasons = _prepare(entry, variants, inputs)
    spreads, failed = interleave(runners, case.device, entry.budget)
    for name, reason in (reasons | failed).items():
        results.skipped.append(Skip(str(case), name, reason))
    entropy = inputs.entropy.cpu()
    runners.clear()
    del inputs  # the memory measurement makes its own
    extra: dict[str, int] = {}
    if entry.memory and spreads:
        try:
            extra = peaks(case, [name for name in spreads if name not in (ours.READ, ours.COPY)])
        except Exception as error:
            results.skipped.append(Skip(str(case), "peak memory", reason_of(error)))
    for name, spread in spreads.items():
        results.measurements.append(
            Measurement(
                **_case_fields(case),
                variant=name,
                median=spread.median,
                q1=spread.q1,
                q3=spread.q3,
                samples=spread.samples,
                gbps=case.essential_bytes / spread.median / 1e9,
                peak_extra_bytes=extra.get(name),
                host=spread.host,
            )
        )
    return entropy


def _case_fields(case: Case) -> dict[str, Any]:
    return {field.name: getattr(case, field.name) for field in fields(Case)}


def check_names(asked: tuple[str, ...] | None, known: Iterable[str], option: str) -> None:
    """Refuse a name that nothing carries.

    Raises:
        ValueError: naming the option.
    """
    known = tuple(known)
    for name in asked or ():
        if name not in known:
            raise ValueError(f"{option} must be among {', '.join(known)}, got {name!r}")
