"""Which combinations are measured: the quick plan, the full one, and that of the linear forms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks import ours
from benchmarks.peers import (
    PEERS,
    compiled,
    cut_cross_entropy,
    eager,
    flash_attn,
    liger,
    quack,
    torch_linear,
    trl,
    verl,
)
from benchmarks.timing import Budget
from benchmarks.workloads import DTYPES, VOCABULARIES, Case

QWEN = VOCABULARIES["Qwen"]
OBJECTIVES = ("erc-dapo", "erc-gppo", "dapo")
FUSED = tuple(f"erc {name}" for name in ours.BACKENDS if name != "torch")
IN_PLACE = tuple(f"{name}, in place" for name in FUSED)
LIMITS = (ours.READ, ours.COPY, ours.CLONE)
PLAIN = (*FUSED, *IN_PLACE, eager.PEER.name, *LIMITS)
# Code with an interpreted loop over rows or a compiler to wait for takes most of a run: not in every case.
QUICKLY_READY = (*FUSED, *IN_PLACE, *(p.name for p in PEERS if p is not compiled.PEER), *LIMITS)
ALL_BUT_ORACLE = (*QUICKLY_READY, compiled.PEER.name)
WITHOUT_ENTROPY = (liger.PEER.name, liger.IN_PLACE.name, flash_attn.PEER.name, quack.PEER.name)
WITHOUT_ENTROPY_LINEAR = (liger.PEER.name, cut_cross_entropy.PEER.name)
SMALL_VOCABULARIES = (1024, 4096, 16_384, 65_536)


@dataclass(frozen=True)
class Entry:
    """A case with its time budget; `variants` limits who takes part (None: all), `memory` asks for the peak as well."""

    case: Case
    budget: Budget
    variants: tuple[str, ...] | None = None
    memory: bool = False

    def takes(self, variant: str) -> bool:
        return self.variants is None or variant in self.variants

    def merge(self, other: Entry) -> Entry:
        """One entry that measures what two of the same case do."""
        both = None
        if self.variants is not None and other.variants is not None:
            both = tuple(dict.fromkeys(self.variants + other.variants))
        budget = max(self.budget, other.budget, key=lambda budget: budget.seconds)
        return Entry(self.case, budget, both, self.memory or other.memory)

    def expected_seconds(self) -> float:
        """A guess for 2 cores: what making inputs, compiling, timing and measuring memory took, by and large."""
        size = self.case.rows * (self.case.vocab + 1000) / _scale(self.case.device)
        turn = size * (6e-9 + 1e-8 * sum(self.takes(peer.PEER.name) for peer in (eager, trl, verl)))
        seconds = 0.3 + size * 2.5e-8 + 2 * turn + max(self.budget.seconds, turn * self.budget.min_rounds)
        if self.case.operator != "rules":
            seconds += 6 if self.takes(compiled.PEER.name) else 0
            seconds += size * 5e-7 if self.variants is None else 0  # the float64 oracle
        if self.case.hidden:
            calls = self.budget.min_rounds + (4 if self.memory else 2)
            seconds += 5 * calls * size * self.case.hidden * 6 / 1.5e11  # five that take part, by and large
        return seconds + (20 + size * 3e-7 if self.memory else 0)


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
            budget = entry.budget
            if self.seconds is not None:
                fewest = budget.min_rounds if self.seconds >= budget.seconds else 2
                budget = replace(budget, seconds=self.seconds, min_rounds=fewest)
            entry = replace(entry, case=case, budget=budget)
            chosen[case] = chosen[case].merge(entry) if case in chosen else entry
        return list(chosen.values())


def _scale(device: str) -> int:
    """How many times the tokens of a CPU case a GPU gets, so that launches do not count."""
    return 1 if device == "cpu" else 16


def quick_plan(device: str = "cpu") -> list[Entry]:
    """The targets, under 5 minutes on 2 cores."""
    rows = 256 * _scale(device)
    plan = []
    for dtype, everyone in (("float32", None), ("bfloat16", ALL_BUT_ORACLE)):
        full = Budget(seconds=10)
        plan.append(Entry(Case("stats", dtype, rows, QWEN, device=device), full, everyone))
        case = Case("policy-loss", dtype, rows, QWEN, "erc-dapo", device=device)
        plan.append(Entry(case, full, everyone, memory=dtype == "bfloat16"))
    short = Budget(seconds=2, min_rounds=3)
    for vocab in VOCABULARIES.values():
        for operator, objective in (("stats", ""), ("policy-loss", "erc-dapo")):
            case = Case(operator, "bfloat16", rows // 4, vocab, objective, device=device)
            plan.append(Entry(case, short, PLAIN, memory=vocab == QWEN and operator == "policy-loss"))
    case = Case("policy-loss", "bfloat16", rows // 2, QWEN, "erc-dapo", device=device)
    plan.append(Entry(case, short, PLAIN, memory=True))
    plan.append(Entry(Case("rules", "float32", rows // 4, QWEN, device=device), Budget(seconds=10, max_repeats=1)))
    return plan


def full_plan(device: str = "cpu") -> list[Entry]:
    """Every operator on the vocabularies of real models in three dtypes, and sweeps over N and V.

    15 to 30 minutes on 2 cores: everybody meets everybody on Qwen's vocabulary, elsewhere the compiled and the
    float64 code stay away, and two of the three objectives meet plain code only.
    """
    budget = Budget(seconds=3, min_rounds=3)
    rows = 128 * _scale(device)
    plan = quick_plan(device)
    for vocab in VOCABULARIES.values():
        for dtype in DTYPES:
            everyone: tuple[str, ...] | None = QUICKLY_READY
            if vocab == QWEN:
                everyone = None if dtype == "float32" else ALL_BUT_ORACLE
            for operator in ("stats", "stats-backward"):
                plan.append(Entry(Case(operator, dtype, rows, vocab, device=device), budget, everyone))
            for objective in OBJECTIVES:
                here = everyone if objective == "erc-dapo" or vocab == QWEN else (*PLAIN, *WITHOUT_ENTROPY)
                case = Case("policy-loss", dtype, rows, vocab, objective, device=device)
                plan.append(Entry(case, budget, here, memory=vocab == QWEN and objective == "erc-dapo"))
    for dtype in DTYPES:
        plan.append(Entry(Case("entropy-ratio", dtype, rows // 2, QWEN, device=device), budget))
    return plan + _sweeps(device) + _linear_cases(device)


def _sweeps(device: str) -> list[Entry]:
    """How cost grows with N on Qwen's vocabulary, and with V below the real vocabularies."""
    short = Budget(seconds=2, min_rounds=3)
    plan = []
    for dtype in ("bfloat16", "float32"):
        for operator, objective in (("stats", ""), ("policy-loss", "erc-dapo")):
            for count in (16, 64, 128, 256, 1024):
                case = Case(operator, dtype, count * _scale(device), QWEN, objective, device=device)
                memory = operator == "policy-loss" and dtype == "bfloat16"
                plan.append(Entry(case, short, (*PLAIN, trl.PEER.name), memory))
            for vocab in SMALL_VOCABULARIES:
                case = Case(operator, dtype, 128 * _scale(device), vocab, objective, device=device)
                plan.append(Entry(case, short, QUICKLY_READY))
    return plan


def _linear_cases(device: str) -> list[Entry]:
    """The loss from hidden states beside every peer that has one, by dtype and over N.

    No float16 on a CPU: one of PyTorch's three products takes 40 s there, in bfloat16 0.03 s.
    """
    budget = Budget(seconds=3, min_rounds=2, max_rounds=5, max_repeats=1)
    scale = _scale(device)
    hidden = 512 if device == "cpu" else 4096
    chunked = (*FUSED, trl.PEER.name)
    stored = tuple(f"{name}, logits stored" for name in FUSED)
    everyone = (*chunked, *stored, eager.PEER.name, compiled.PEER.name, ours.PRODUCTS)
    plan = []
    for dtype, count in (("float32", 256), ("bfloat16", 64), *((("float16", 64),) if device == "cuda" else ())):
        memory = dtype == "float32"
        for objective, variants in (("erc-dapo", everyone), ("dapo", (*FUSED, *WITHOUT_ENTROPY_LINEAR))):
            case = Case("linear", dtype, count * scale, QWEN, objective, hidden, device=device)
            plan.append(Entry(case, budget, variants, memory))
    for count in (64, 1024):
        case = Case("linear", "float32", count * scale, QWEN, "erc-dapo", hidden, device=device)
        plan.append(Entry(case, budget, (*chunked, *stored, ours.PRODUCTS), memory=True))
    return plan


def linear_plan(device: str = "cpu") -> list[Entry]:
    """The loss from hidden states at length: time and memory over N and D. Only what does not store the logits runs at
    the largest N, where float32 logits alone are 2.4 GB."""
    chunked = (*FUSED, trl.PEER.name)
    stored = tuple(f"{name}, logits stored" for name in FUSED)
    everyone = (*chunked, *stored, eager.PEER.name, compiled.PEER.name, ours.PRODUCTS)
    dtype, scale = ("float32", 1) if device == "cpu" else ("bfloat16", 4)
    plan = []
    for count in (256, 1024, 4096):
        budget = Budget(seconds=10, min_rounds=2 if count == 4096 else 3, max_rounds=5, max_repeats=1)
        for hidden in (512, 1024):
            case = Case("linear", dtype, count * scale, QWEN, "erc-dapo", hidden * scale, device=device)
            plan.append(Entry(case, budget, chunked if count == 4096 else everyone, memory=True))
        # The peers that give no entropy; PyTorch's own takes minutes on a CPU for more tokens.
        without = (*WITHOUT_ENTROPY_LINEAR, torch_linear.PEER.name) if count == 256 else WITHOUT_ENTROPY_LINEAR
        case = Case("linear", dtype, count * scale, QWEN, "dapo", 512 * scale, device=device)
        plan.append(Entry(case, budget, (*FUSED, *without), memory=True))
    if device == "cpu":  # float32 logits from 16-bit operands, beside products and logits in bfloat16
        budget = Budget(seconds=10, min_rounds=3, max_rounds=5, max_repeats=1)
        for count, hidden in ((64, 512), (256, 1024), (1024, 1024)):
            case = Case("linear", "bfloat16", count, QWEN, "erc-dapo", hidden)
            plan.append(Entry(case, budget, (*chunked, *stored, ours.PRODUCTS), memory=True))
    return plan


PLANS = {"quick": quick_plan, "full": full_plan, "linear": linear_plan}
