"""ERC decisions flipped between bfloat16 hidden states and the loss: by the head's product, before any kernel reads it.

The exact logits are float64 products of the same bfloat16 operands, so every flip is rounding of the implementation.
Rows that no sum in float32 decides are left out (`decidable`), a few of a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import erc
from benchmarks.accuracy import RATIO_SIGMA, banded
from benchmarks.ours import BACKENDS
from benchmarks.peers import eager, liger, trl
from benchmarks.peers.base import Variant
from benchmarks.results import AccuracyRow
from benchmarks.workloads import Case

ROWS, WIDTH, VOCAB = 1536, 256, 32_768
_CHUNK = 256

Implementation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def peaked_head(rows: int, width: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """bfloat16 `hidden` `[rows, width]` and `weight` `[vocab, width]` whose logits have entropies from about 1e-6 to 10
    nats: each hidden state points at one token, some at a second one nearly as far."""
    weight = torch.randn(vocab, width, generator=generator) / width**0.5
    first, second = torch.randint(vocab, (2, rows), generator=generator)
    far = torch.linspace(1.0, 34.0, rows)
    behind = far - 14 * torch.rand(rows, generator=generator)
    near = torch.where(torch.rand(rows, generator=generator) < 0.5, behind.clamp(min=0.0), 0.0)
    noise = torch.randn(rows, width, generator=generator)
    hidden = far[:, None] * weight[first] + near[:, None] * weight[second] + noise
    return hidden.bfloat16(), weight.bfloat16()


def implementations(device: str, peers: bool = True) -> Iterator[tuple[str, Implementation]]:
    """Log-prob and entropy of `(hidden, weight, labels)` by everything that can be compared; None in place of the
    entropy that a peer does not give, so that it cannot run ERC at all."""
    for name in BACKENDS:
        runs_here = name == "torch" or (name == "cpu") == (device == "cpu")
        if not runs_here or erc.backends()[name] != "available":
            continue
        yield f"erc {name}", lambda h, w, y, name=name: erc.linear_token_stats(h, w, y, backend=name)[:2]
        if name != "torch":
            yield (
                f"erc {name}, logits_dtype=torch.bfloat16",
                lambda h, w, y, name=name: erc.linear_token_stats(h, w, y, logits_dtype=torch.bfloat16, backend=name)[
                    :2
                ],
            )
    yield "eager PyTorch, float32 head", lambda h, w, y: eager.statistics(h.float() @ w.float().t(), y)
    yield "eager PyTorch", lambda h, w, y: eager.statistics(h @ w.t(), y)
    if peers and _runs(trl.PEER, device):
        yield "TRL, chunked", trl.statistics_of_head
    if peers and _runs(liger.PEER, device):
        yield "Liger, chunked", liger.logprob_of_head


def _runs(peer: Variant, device: str) -> bool:
    return peer.why_not(Case("linear", "bfloat16", 1, 1, hidden=1, device=device)) is None


def decidable(entropy: Tensor, old_entropy: Tensor, largest: Tensor) -> Tensor:
    """Where the exact ratio of entropies is further from ERC's bounds than sums in float32 may move it.

    They move a logit by about 1e-7 of the row's `largest`, and a small entropy relatively by as much: ten times that.
    """
    gate = erc.objective("erc-dapo").entropy_ratio
    ratio = (entropy + gate.eps) / (old_entropy + gate.eps)
    nearest = torch.minimum((ratio - (1 - gate.beta_low)).abs(), (ratio - (1 + gate.beta_high)).abs())
    return nearest > 2.5e-6 + 1e-6 * largest


@torch.no_grad()
def measure_hidden_states(
    device: str = "cpu", peers: bool = True, rows: int = ROWS, width: int = WIDTH, vocab: int = VOCAB
) -> list[AccuracyRow]:
    """Every implementation in every entropy band, the last row of each over all bands."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (t.to(device) for t in peaked_head(rows, width, vocab, generator))
    labels = torch.randint(vocab, (rows,), generator=generator).to(device)
    jitter = 1 + RATIO_SIGMA * torch.randn(rows, generator=generator, dtype=torch.float64)
    exact_weight = weight.double()
    parts = []
    for h, y in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True):
        logits = h.double() @ exact_weight.t()
        stats = erc.reference.token_stats(logits, y)
        parts.append((stats.logprob, stats.entropy, logits.abs().amax(-1)))
    logprob, entropy, largest = map(torch.cat, zip(*parts, strict=True))
    old_entropy = entropy * jitter.to(device)
    sure = decidable(entropy, old_entropy, largest)
    exact, old_entropy = (logprob[sure], entropy[sure]), old_entropy[sure]
    table = []
    for name, implementation in implementations(device, peers):
        found = implementation(hidden, weight, labels)
        got = tuple(value if value is None else value.double()[sure] for value in found)
        table += banded(name, "bfloat16", got, exact, old_entropy)
    return table
