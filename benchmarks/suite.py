"""Which combinations are measured, quick or in full, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import ours
from benchmarks.accuracy import measure_accuracy
from benchmarks.memory import peaks
from benchmarks.peers import Unsupported, torch_linear
from benchmarks.results import Measurement, Results, Skip, new_results
from benchmarks.timing import Budget, interleave
from benchmarks.variants import all_variants
from benchmarks.workloads import TEMPERATURE, VOCABULARIES, Case, Inputs, entropy_quantiles

QWEN = VOCABULARIES["Qwen"]
OBJECTIVES = ("erc-dapo", "erc-gppo", "dapo")
PLAIN = ("eager PyTorch",)
TORCH_LINEAR = torch_linear.PEER.name


@dataclass(frozen=True)
class Entry:
    """A case with its time budget; `variants` limits who takes part (None: all), `memory` asks for the peak as well."""

    case: Case
    budget: Budget
    variants: tuple[str, ...] | None = None
    memory: bool = False


@dataclass(frozen=True)
class Selection:
    """What the command line asked for; None means everything that the plan has."""

    operators: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    peers: bool = True
    dtypes: tuple[str, ...] | None = None
    rows: int | None = None
    vocab: int | None = None
    seconds: float | None = None

    def apply(self, plan: Iterable[Entry]) -> list[Entry]:
        """The entries of `plan` that are asked for, in the asked sizes; each case once."""
        chosen: dict[Case, Entry] = {}
        for entry in plan:
            case = entry.case
            if self.operators is not None and case.operator not in self.operators:
                continue
            if self.dtypes is not None and case.dtype not in self.dtypes:
                continue
            case = replace(case, rows=self.rows or case.rows, vocab=self.vocab or case.vocab)
            budget = entry.budget if self.seconds is None else replace(entry.budget, seconds=self.seconds)
            chosen.setdefault(case, replace(entry, case=case, budget=budget))
        return list(chosen.values())


def quick_plan(device: str = "cpu") -> list[Entry]:
    """The targets of the CPU backend, under 5 minutes on 2 cores."""
    rows = 256 if device == "cpu" else 4096
    ours_only = tuple(f"erc {name}{form}" for name in ("cpu", "triton", "cuda") for form in ("", ", in place"))
    limits = (ours.READ, ours.COPY, ours.CLONE)
    plan = []
    for dtype in ("float32", "bfloat16"):
        full = Budget(seconds=14)
        plan.append(Entry(Case("stats", dtype, rows, QWEN, device=device), full))
        plan.append(
            Entry(Case("policy-loss", dtype, rows, QWEN, "erc-dapo", device=device), full, memory=dtype == "bfloat16")
        )
    short = Budget(seconds=3, min_rounds=3)
    for vocab in VOCABULARIES.values():
        for operator, objective in (("stats", ""), ("policy-loss", "erc-dapo")):
            case = Case(operator, "bfloat16", rows // 4, vocab, objective, device=device)
            plan.append(
                Entry(case, short, (*ours_only, *PLAIN, *limits), memory=vocab == QWEN and operator == "policy-loss")
            )
    case = Case("policy-loss", "bfloat16", rows // 2, QWEN, "erc-dapo", device=device)
    plan.append(Entry(case, short, (*ours_only, *PLAIN, *limits), memory=True))
    plan.append(Entry(Case("rules", "float32", rows // 4, QWEN, device=device), Budget(seconds=10, max_repeats=1)))
    return plan


def linear_plan(device: str = "cpu") -> list[Entry]:
    """The loss from hidden states: time and memory over N and D. Only what does not store the logits runs at the
    largest N, where float32 logits alone are 2.4 GB."""
    ours_only = tuple(f"erc {name}" for name in ("cpu", "triton", "cuda"))
    chunked = (*ours_only, "TRL")
    everyone = (*chunked, *(f"{name}, logits stored" for name in ours_only), *PLAIN, "torch.compile", ours.PRODUCTS)
    dtypes, scale = (("float32",), 1) if device == "cpu" else (("bfloat16",), 4)
    plan = []
    for dtype in dtypes:
        for count in (256, 1024, 4096):
            for hidden in (512, 1024):
                budget = Budget(seconds=10, min_rounds=2 if count == 4096 else 3, max_rounds=5, max_repeats=1)
                for objective in ("erc-dapo", "dapo"):
                    case = Case("linear", dtype, count * scale, QWEN, objective, hidden * scale, device=device)
                    variants = chunked if count == 4096 else everyone
                    if objective == "dapo":  # for the peers that give no entropy
                        variants = (*ours_only, "Liger", "cut-cross-entropy", TORCH_LINEAR)
                    plan.append(Entry(case, budget, variants, memory=True))
    return plan


def full_plan(device: str = "cpu") -> list[Entry]:
    """Every operator on the vocabularies of real models in three dtypes, and sweeps over N and V."""
    rows = 256 if device == "cpu" else 4096
    hidden = 1024 if device == "cpu" else 4096
    budget, short = Budget(seconds=15), Budget(seconds=6, min_rounds=3)
    plan = quick_plan(device)
    for vocab in VOCABULARIES.values():
        for dtype in ("float32", "bfloat16", "float16"):
            plan += [
                Entry(Case(name, dtype, rows, vocab, device=device), budget) for name in ("stats", "stats-backward")
            ]
            plan += [
                Entry(Case("policy-loss", dtype, rows, vocab, name, device=device), budget, memory=True)
                for name in OBJECTIVES
            ]
    for dtype in ("float32", "bfloat16"):
        plan.append(Entry(Case("entropy-ratio", dtype, rows // 2, QWEN, device=device), budget))
        case = Case("linear", dtype, rows, QWEN, "erc-dapo", hidden, device=device)
        plan.append(Entry(case, budget, memory=True))
        for operator, objective in (("stats", ""), ("policy-loss", "erc-dapo")):
            for count in (rows // 16, rows // 4, rows * 4):
                plan.append(
                    Entry(Case(operator, dtype, count, QWEN, objective, device=device), short, memory=bool(objective))
                )
            for vocab in (1024, 4096, 16_384, 65_536):
                plan.append(Entry(Case(operator, dtype, rows, vocab, objective, device=device), short))
    return plan + linear_plan(device)


def run(
    name: str,
    plan: list[Entry],
    selection: Selection,
    *,
    accuracy: bool = True,
    progress: Callable[[str], None] = lambda line: None,
) -> Results:
    """Measure every entry of `plan`.

    Args:
        progress: told in words what comes next.
    """
    results = new_results(name)
    device = plan[0].case.device if plan else "cpu"
    backends = tuple(b for b in selection.backends or ours.BACKENDS if device in ours.DEVICES[b])
    others = [b for b in selection.backends or ours.BACKENDS if b not in backends]
    results.skipped += [Skip("every case", f"erc {name}", f"does not run on {device}") for name in others]
    variants = all_variants(backends, selection.peers)
    entropies = []
    for number, entry in enumerate(plan, 1):
        case = entry.case
        progress(f"{number}/{len(plan)} {case}")
        inputs = Inputs(case)
        entropies.append(inputs.entropy)
        runners = {}
        for variant in variants:
            if case.operator not in variant.operators or (
                entry.variants is not None and variant.name not in entry.variants
            ):
                continue
            reason = variant.why_not(case)
            if reason is None:
                try:
                    runners[variant.name] = variant.prepare(inputs)
                    continue
                except Unsupported as unsupported:
                    reason = str(unsupported)
            results.skipped.append(Skip(str(case), variant.name, reason))
        spreads, failed = interleave(runners, case.device, entry.budget)
        results.skipped += [Skip(str(case), name, reason) for name, reason in failed.items()]
        extra = {}
        if entry.memory and spreads:
            runners.clear()
            measured = [name for name in spreads if name not in (ours.READ, ours.COPY)]
            extra = peaks(case, measured)
        for variant_name, spread in spreads.items():
            results.measurements.append(
                Measurement(
                    **_case_fields(case),
                    variant=variant_name,
                    median=spread.median,
                    q1=spread.q1,
                    q3=spread.q3,
                    samples=spread.samples,
                    gbps=case.essential_bytes / spread.median / 1e9,
                    peak_extra_bytes=extra.get(variant_name),
                )
            )
    if entropies:
        results.workload = {
            "temperature": TEMPERATURE,
            "entropy_nats": entropy_quantiles(torch.cat([e.cpu() for e in entropies])),
        }
    if accuracy:
        progress("accuracy against float64")
        results.accuracy = measure_accuracy(device, backends, selection.peers)
    return results


def _case_fields(case: Case) -> dict[str, Any]:
    return {
        name: getattr(case, name) for name in ("operator", "objective", "dtype", "rows", "vocab", "hidden", "device")
    }


def check_names(asked: tuple[str, ...] | None, known: Iterable[str], option: str) -> None:
    """Refuse a name that nothing carries.

    Raises:
        ValueError: naming the option.
    """
    known = tuple(known)
    for name in asked or ():
        if name not in known:
            raise ValueError(f"{option} must be among {', '.join(known)}, got {name!r}")
