"""What each operator does per element when its compiled kernels run: the table of docs/kernels.md.

`python -m tests.ptx.counts` runs every operator on two rows of 151,936 bfloat16 logits on all three architectures and
rewrites the table. Unlike the machine code's counts these are of whole launches: tails, merges, the token's loss and
the waits between. They are PTX instructions, of which some (divisions, wide integers) are several machine
instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import erc
from benchmarks.markdown import generated, markdown_table, rewrite
from tests.ptx.machine import Counts
from tests.ptx.subjects import ARCHITECTURES, Subject, why_not

DOCUMENT = Path(__file__).parents[2] / "docs" / "kernels.md"
ROWS, VOCAB_SIZE, ELEMENT = 2, 151_936, 2
SECTOR = 32
HEADER = (
    "operator", "form", "GPU", "instructions", "FP32", "integer", "special functions", "moves, conversions", "memory",
    "sectors read", "sectors written", "barriers: block, cluster", "bulk copies in flight", "launches",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One operator on one subject. `reads` and `writes`: how often it must move every element."""

    operator: str
    subject: Subject
    reads: float
    writes: float
    counts: Counts
    launches: tuple[str, ...]
    passes: int  # a block's way through a row, or through its part of one

    def cells(self) -> list[str]:
        elements, c = ROWS * VOCAB_SIZE, self.counts
        pipes = {name: c.pipes[name] / elements for name in c.pipes}
        needed = elements * ELEMENT / SECTOR
        moved = [
            f"{(sectors + (c.copied / SECTOR if reading else 0)) / (needed * share):.3f}" if share else ""
            for sectors, share, reading in ((c.sectors_loaded, self.reads, 1), (c.sectors_stored, self.writes, 0))
        ]
        return [
            self.operator, f"{self.subject.backend}, {self.subject.form}", f"sm_{self.subject.architecture}",
            f"{c.instructions / elements:.2f}", f"{pipes.get('fp32', 0):.2f}", f"{pipes.get('integer', 0):.2f}",
            f"{pipes.get('special', 0):.3f}", f"{pipes.get('move', 0) + pipes.get('convert', 0):.2f}",
            f"{pipes.get('memory', 0):.2f}", *moved,
            f"{c.block_barriers / self.passes:.3g}, {c.cluster_barriers / self.passes:.3g}",
            f"{c.in_flight:,}" if c.in_flight else "", ", ".join(self.launches),
        ]  # fmt: skip


def _kernel(name: str) -> str:
    """A kernel's name without its namespaces and template arguments."""
    mangled = re.search(r"erc4cuda\d+(\w+?)_kernelI", name)
    return mangled.group(1) if mangled else name.removesuffix("_kernel")


def _inputs() -> tuple[torch.Tensor, torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(ROWS, VOCAB_SIZE, generator=generator)).bfloat16()
    labels = torch.randint(VOCAB_SIZE, (ROWS,), generator=generator)
    statistics = erc.reference.token_stats(logits.double(), labels)
    rollout = {
        "old_logprob": statistics.logprob.float() + torch.tensor([0.1, -0.1]),
        "old_entropy": statistics.entropy.float() * 1.01,
        "advantages": torch.tensor([0.7, -0.4]),
        "normalizer": 2.0,
    }
    return logits, labels, rollout


def _statistics(backend: str) -> Callable[[], None]:
    logits, labels, _ = _inputs()
    return lambda: erc.token_stats(logits, labels, backend=backend)


def _gradient(backend: str) -> Callable[[], None]:
    logits, labels, _ = _inputs()
    statistics = erc.token_stats(logits.requires_grad_(), labels, backend=backend)
    return lambda: (statistics.logprob + statistics.entropy).sum().backward()


def _loss(backend: str) -> Callable[[], None]:
    logits, labels, rollout = _inputs()
    logits.requires_grad_()
    return lambda: erc.policy_loss(logits, labels, **rollout, objective="erc-dapo", backend=backend)


def _pairs(backend: str) -> Callable[[], None]:
    logits, _, _ = _inputs()
    return lambda: erc.entropy_ratio(logits, logits.flip(0), backend=backend)


OPERATORS = {  # what runs, how often it must read and write every element, and in which forms it differs
    "statistics": (_statistics, 1, 0, ("block", "split")),
    "statistics' gradient": (_gradient, 1, 1, ("block",)),
    "fused loss": (_loss, 1, 1, ("cluster", "block", "split")),
    "pairs": (_pairs, 2, 0, ("block",)),
}


def lines(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Line]:
    """Runs everything that can run here."""
    for operator, (prepare, reads, writes, forms) in OPERATORS.items():
        for backend in ("cuda", "triton"):
            for form in forms:
                for architecture in architectures:
                    has_clusters = backend == "cuda" and architecture >= 90
                    if why_not(backend) is None and (form != "cluster" or has_clusters):
                        subject = Subject(backend, architecture, form)
                        yield measure(operator, prepare, subject, reads, writes)


def measure(operator: str, prepare: Callable, subject: Subject, reads: float, writes: float) -> Line:
    with subject.running() as engine:
        run = prepare(subject.name)
        engine.launches.clear()
        run()
    total, passes = Counts(), ROWS
    for launched in engine.launches:
        total.add(launched.counts)
        passes = max(passes, launched.shape.grid)
    names = tuple(_kernel(launched.kernel) for launched in engine.launches)
    return Line(operator, subject, reads, writes, total, names, passes)


if __name__ == "__main__":
    table = markdown_table(HEADER, [line.cells() for line in lines()], left=3)
    rewrite(DOCUMENT, generated("executed", table))
