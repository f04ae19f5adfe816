"""Error against float64, and how many ERC keep/drop decisions an implementation flips, by entropy band.

ERC keeps a token while H / H_old lies within 5 % of 1, so what counts is the *relative* error of H, and most tokens of
a trained policy have a small H. `H_old` is exact here, so every flip is the implementation's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

import erc
from benchmarks.ours import BACKENDS
from benchmarks.peers import compiled, eager, trl, verl
from benchmarks.peers.base import Variant
from benchmarks.results import AccuracyRow, Skip
from benchmarks.timing import reason_of
from benchmarks.workloads import DTYPES, Case
from erc.check import peaked_logits

VOCAB = 50_257  # GPT-2's: odd, so that rows are misaligned and end in a tail
ROWS = 768
BANDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 12.0)
RATIO_SIGMA = 0.04  # of H / H_old: about 21 % of the tokens fall outside ERC's band, as in the paper
_CHUNK = 64

Implementation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _in_logits_dtype(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """lse - sum p x without an upcast: the shortest code, and the least memory."""
    p = torch.softmax(logits, -1)
    lse = torch.logsumexp(logits, -1)
    return logits.gather(-1, labels[:, None]).squeeze(-1) - lse, lse - (p * logits).sum(-1)


def _uncentred(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """lse - sum p x in float32: what online kernels do that accumulate sum e^x x."""
    return _in_logits_dtype(logits.float(), labels)


def _of_peer(peer: Variant) -> Implementation:
    """A peer's log-prob and entropy without gradient, by the adapter that is timed."""

    def implementation(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        case = Case("stats", str(logits.dtype).removeprefix("torch."), *logits.shape, device=logits.device.type)
        return peer.prepare(SimpleNamespace(case=case, logits_master=logits, labels=labels)).call()

    return implementation


def implementations(
    device: str, backends: tuple[str, ...] = BACKENDS, peers: bool = True
) -> Iterator[tuple[str, Implementation]]:
    """Everything that can be compared on `device`."""
    for name in backends:
        runs_here = name == "torch" or (name == "cpu") == (device == "cpu")
        if runs_here and erc.backends()[name] == "available":
            yield f"erc {name}", lambda logits, labels, name=name: erc.token_stats(logits, labels, backend=name)[:2]
    yield "eager, logits' dtype", _in_logits_dtype
    yield "float32, uncentred", _uncentred
    yield "eager PyTorch", eager.statistics
    for peer in (compiled.PEER, trl.PEER, verl.PEER) if peers else ():
        if peer.why_not(Case("stats", "float32", 1, 1, device=device)) is None:
            yield peer.name, _of_peer(peer)


def measure_accuracy(
    device: str = "cpu",
    backends: tuple[str, ...] = BACKENDS,
    peers: bool = True,
    rows: int = ROWS,
    vocab: int = VOCAB,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> tuple[list[AccuracyRow], list[Skip]]:
    """Every implementation in every dtype and entropy band, the last row of each over all bands; and what failed."""
    generator = torch.Generator().manual_seed(0)
    table, failed = [], []
    logits = peaked_logits(rows, vocab, generator)
    labels = torch.where(
        torch.rand(rows, generator=generator) < 0.5,
        logits.argmax(-1),
        torch.randint(vocab, (rows,), generator=generator),
    )
    jitter = 1 + RATIO_SIGMA * torch.randn(rows, generator=generator, dtype=torch.float64)
    for dtype in dtypes:
        here, there = logits.to(device, DTYPES[dtype]), labels.to(device)
        chunks = list(zip(here.split(_CHUNK), there.split(_CHUNK), strict=True))
        exact = [erc.reference.token_stats(part.double(), index) for part, index in chunks]
        logprob, entropy = (torch.cat([e[i] for e in exact]) for i in (0, 1))
        old_entropy = entropy * jitter.to(device)
        for name, implementation in implementations(device, backends, peers):
            try:
                with torch.no_grad():
                    found = [implementation(part, index) for part, index in chunks]
            except Exception as error:  # a peer may fail in any way; the others are still measured
                failed.append(Skip(f"accuracy, {dtype}", name, reason_of(error)))
                continue
            got = tuple(torch.cat([f[i] for f in found]).double() for i in (0, 1))
            table += banded(name, dtype, got, (logprob, entropy), old_entropy)
    return table, failed


def banded(
    name: str, dtype: str, got: tuple[Tensor, Tensor | None], exact: tuple[Tensor, Tensor], old_entropy: Tensor
) -> list[AccuracyRow]:
    """An implementation's log-probs and entropies beside the exact ones, by band; the last row is of all bands.

    Where it gives no entropy, and cannot run ERC, everything that one decides is NaN.
    """
    gate = erc.objective("erc-dapo").entropy_ratio
    entropy = exact[1]
    difference = (got[0] - exact[0]).abs()
    relative = flipped = torch.full_like(entropy, torch.nan)
    if got[1] is not None:
        relative = (got[1] - entropy).abs() / entropy
        flipped = gate.dropped(got[1], old_entropy)[0] != gate.dropped(entropy, old_entropy)[0]
    table = []
    for low, high in [*pairwise(BANDS), (BANDS[0], BANDS[-1])]:
        inside = (entropy >= low) & (entropy < high)
        if not bool(inside.any()):
            continue
        table.append(
            AccuracyRow(
                implementation=name,
                dtype=dtype,
                band="all" if (low, high) == (BANDS[0], BANDS[-1]) else f"{low:g} to {high:g}",
                rows=int(inside.sum()),
                entropy_median_error=float(relative[inside].median()),
                entropy_max_error=float(relative[inside].max()),
                logprob_max_error=float(difference[inside].max()),
                flipped=float(flipped[inside].double().mean()),
            )
        )
    return table
