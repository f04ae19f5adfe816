"""The loss from hidden states by plan: flops, bytes and memory counted on meta tensors, and a modelled time.

Ours, logits stored whole, TRL's fused head and Liger's run as on a GPU, on tensors that have a shape and no memory.
Every launch takes the longer of its arithmetic and its traffic (`benchmarks.call` counts both), at the share of the
data-sheet peaks that `erc.linear.plan` assumes of an H100. Three bare products take their arithmetic alone. It is a
model: nobody measured it, and a GPU may reach other shares. In favour of the peers, TRL's Triton kernels count as one
read of a tile (forward) and one read and write (backward), and Liger's float32 products as 16-bit ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import erc
from benchmarks.call import LAUNCH, Cost, count, register
from benchmarks.markdown import markdown_table
from benchmarks.step_share import ACCELERATORS
from erc.linear.plan import H100, Machine, plan_of

ROWS, LENGTH = 8192, 512


class HeadShape(NamedTuple):
    name: str
    width: int
    vocab: int


HEADS = (
    HeadShape("Qwen2.5-1.5B", 1536, 151_936),
    HeadShape("Qwen2.5-7B", 3584, 152_064),
    HeadShape("Qwen2.5-32B", 5120, 152_064),
    HeadShape("Llama-3-70B", 8192, 128_256),
    HeadShape("Gemma-2-9B", 3584, 256_000),
)


def machines() -> Iterator[Machine]:
    """H100, H200 and B200, at the same shares of their peaks."""
    sheet = ACCELERATORS[0]
    for gpu in ACCELERATORS:
        flops, bandwidth = H100.flops * gpu.flops / sheet.flops, H100.bandwidth * gpu.bandwidth / sheet.bandwidth
        yield Machine(gpu.name, flops, bandwidth)


class Problem(NamedTuple):
    """bfloat16 `hidden` `[B, T, D]` and `weight` `[V, D]`, and what a loss needs beside them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    arguments: dict[str, Any]

    @property
    def returned(self) -> int:
        """Bytes of the gradients that the caller gets."""
        return self.hidden.nbytes + self.weight.nbytes


def problem(shape: HeadShape, rows: int = ROWS, length: int = LENGTH) -> Problem:
    register()
    batch = rows // length

    def tensor(*sizes: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta", requires_grad=grad)

    hidden = tensor(batch, length, shape.width, dtype=torch.bfloat16, grad=True)
    weight = tensor(shape.vocab, shape.width, dtype=torch.bfloat16, grad=True)
    arguments = {name: tensor(batch, length) for name in ("old_logprob", "old_entropy")}
    arguments |= {"advantages": tensor(batch), "normalizer": tensor(), "objective": "erc-dapo", "backend": "meta"}
    return Problem(hidden, weight, tensor(batch, length, dtype=torch.long), arguments)


def ours(given: Problem, **options: Any) -> None:
    out = erc.linear_policy_loss(given.hidden, given.weight, given.labels, **given.arguments, **options)
    torch.autograd.grad(out.loss, (given.hidden, given.weight))


def stored(given: Problem) -> None:
    """16-bit logits whole, and their gradient beside them."""
    out = erc.policy_loss(given.hidden @ given.weight.t(), given.labels, **given.arguments)
    torch.autograd.grad(out.loss, (given.hidden, given.weight))


def trl(given: Problem) -> None:
    """TRL's chunked head: logits twice, in tiles, each tile's products added to float32 sums."""
    from trl.kernels import ChunkedLogProbFunction

    from benchmarks.peers.trl import VOCAB_CHUNK

    rows = given.hidden.view(-1, given.hidden.shape[-1])
    arguments = (rows, given.weight, None, given.labels.view(-1), 1.0, VOCAB_CHUNK, None, 1.0, ("entropy",))
    with _trl_as_on_a_gpu(ChunkedLogProbFunction):
        logprob, *_ = ChunkedLogProbFunction.apply(*arguments)
        torch.autograd.grad(logprob, (given.hidden, given.weight), torch.empty_like(logprob))


@contextmanager
def _trl_as_on_a_gpu(function: Any) -> Iterator[None]:
    """Its Triton kernels as one launch each, and its products with a float32 result, as where a GPU is found."""
    module = sys.modules[function.__module__]
    parts = {
        "_forward_tile": lambda tile, *_, **__: tile.amax(),
        "_backward_tile": lambda tile, *_, **__: tile.mul_(1.0),
        "_addmm_fp32": lambda total, a, b: torch.addmm(total, a, b, out_dtype=torch.float32, out=total),
    }
    with mock.patch.multiple(module, **parts), mock.patch("torch.is_autocast_enabled", lambda *_: False):
        yield


def liger(given: Problem) -> None:
    """Liger's fused GRPO loss: logits twice, in tiles, by sequences, whose weight gradients add up in 16 bit."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    total, parts = torch.zeros_like(given.weight), []
    for hidden, labels in zip(given.hidden, given.labels, strict=True):
        logprob = LigerFusedLinearPPOBase.chunk_forward(hidden[None], given.weight, labels[None])
        gradient, of_weight = torch.autograd.grad(logprob, (hidden, given.weight), torch.empty_like(logprob))
        total.add_(of_weight)
        parts.append(gradient)
    torch.stack(parts)


PLANS: dict[str, Callable[[Problem], None]] = {"erc": ours, "stored 16-bit logits": stored, "TRL": trl, "Liger": liger}


@cache
def counted(name: str, shape: HeadShape) -> Cost:
    given = problem(shape)
    return count(lambda: PLANS[name](given))


def seconds(cost: Cost, machine: Machine) -> float:
    """Each launch takes the longer of its arithmetic and its traffic."""
    return sum(
        max(launch.kernels * LAUNCH, launch.flops / machine.flops, launch.bytes / machine.bandwidth)
        for launch in cost.launches
    )


def bare_seconds(shape: HeadShape, machine: Machine) -> float:
    return 6 * ROWS * shape.width * shape.vocab / machine.flops


HEADINGS = ("head", "GPU", "three bare products, ms", "erc", "erc, added up", *list(PLANS)[1:])


def time_rows() -> list[tuple[str, ...]]:
    """Modelled time of each plan, as multiples of three bare products, by `HEADINGS`."""
    rows = []
    for shape in HEADS:
        like = torch.empty((), device="meta").expand(ROWS, shape.vocab)
        for machine in machines():
            bare = bare_seconds(shape, machine)
            plan = plan_of(like, shape.width, torch.bfloat16, None, machine=machine)
            times = {name: f"{seconds(counted(name, shape), machine) / bare:.2f}" for name in PLANS}
            ours = times.pop("erc")
            added = f"{plan.seconds.additive / plan.seconds.bare:.2f}"
            rows.append((shape.name, machine.name, f"{1e3 * bare:.1f}", ours, added, *times.values()))
    return rows


COUNT_HEADINGS = ("head", "plan", "launches", "Tflop", "GB moved", "GiB beyond the returned gradients")


def count_rows() -> list[tuple[str, ...]]:
    """What each plan launches, computes, moves and needs, by `COUNT_HEADINGS`."""
    rows = []
    for shape in HEADS:
        returned = problem(shape).returned
        for name in PLANS:
            cost = counted(name, shape)
            numbers = (cost.flops / 1e12, cost.bytes / 1e9, (cost.peak - returned) / 2**30)
            rows.append((shape.name, name, f"{cost.kernels:,}", *(f"{number:,.1f}" for number in numbers)))
    return rows


def save(path: Path) -> None:
    path.write_text(json.dumps({"times": time_rows(), "counts": count_rows()}, indent=1) + "\n")


def linear_plans_block(path: Path) -> str:
    """The section of docs/benchmarks.md, from what `save` wrote."""
    found = json.loads(path.read_text())
    times, counts = (
        markdown_table(HEADINGS, found["times"]),
        markdown_table(COUNT_HEADINGS, found["counts"]),
    )
    flops, bandwidth = H100.flops / ACCELERATORS[0].flops, H100.bandwidth / ACCELERATORS[0].bandwidth
    return (
        f"A model, nothing measured: the erc-dapo loss, forward and backward, from bfloat16 hidden states of {ROWS:,} "
        f"tokens in sequences of {LENGTH}, as multiples of three bare products.\n\n{times}\n\n"
        f"Each launch takes the longer of its arithmetic, at {flops:.0%} of the peak flops, and its traffic, at "
        f'{bandwidth:.0%} of the peak bandwidth; "added up": nothing overlaps. The plan of erc has float32 logits, and '
        "1 GiB for them and their gradient; stored logits, TRL's and Liger's are rounded to 16 bit. In favour of the "
        "peers, TRL's kernels count as one read of a tile, or one read and write, and Liger's float32 products as "
        f"16-bit ones; Liger's has no entropy.\n\n{counts}\n\nCounted on meta tensors, with the peers' own code. "
        "`python -m benchmarks linear-plans` prints both tables; its `--output` is what this page reads."
    )
