"""Vocabulary shards under gloo: 1 to 4 processes against the result of one."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import erc
from erc.backend import register_namespace
from tests import processes
from tests.api.split_sequences import split_losses

ROWS, WIDTH, VOCAB = 9, 6, 67


def _bodies(rank: int, world: int) -> dict[str, Any]:
    bodies = {"dense loss": PolicyLossBody(world, linear=False), "linear loss": PolicyLossBody(world, linear=True)}
    bodies["sequences"] = partial(split_losses, world=world)
    bodies |= {"dense pair": PairBody(world, linear=False), "linear pair": PairBody(world, linear=True)}
    if world == 3:
        bodies["statistics"] = StatsBody()
    if world == 2:
        bodies |= {kind: MismatchBody(kind) for kind in MISMATCHES}
    return {name: body(rank) for name, body in bodies.items()}


@cache
def on_ranks(world: int) -> list[dict[str, Any]]:
    """What every body of `world` processes returns on each rank. They start once: that takes the time."""
    return processes.on_ranks(world, _bodies, world)


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    labels[1] = 0  # ignore_index below: a valid column index, which local labels must not confuse with it
    arguments = {
        "old_logprob": -4 + 0.3 * torch.randn(ROWS, generator=generator),
        "advantages": torch.randn(ROWS, generator=generator),
        "old_entropy": 2.5 + 0.5 * torch.rand(ROWS, generator=generator),
        "objective": erc.objective("erc-dapo", entropy_coef=0.1),
        "ignore_index": 0,
        "temperature": 0.8,
    }
    return hidden, weight, labels, arguments


BOUNDARIES = {
    1: (0, VOCAB),
    2: (0, 50, VOCAB),  # uneven
    3: (0, 20, 20, VOCAB),  # the second shard is empty
    4: (0, 17, 34, 51, VOCAB + 5),  # the last one is padded
}


def held_columns(matrix: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The rows of a weight that a rank holds, padding included."""
    padded = torch.cat([matrix, torch.full((5, *matrix.shape[1:]), 9.0, dtype=matrix.dtype)])
    return padded[BOUNDARIES[world][rank] : BOUNDARIES[world][rank + 1]].clone()


class PolicyLossBody:
    def __init__(self, world: int, linear: bool) -> None:
        self.world, self.linear = world, linear

    def __call__(self, rank: int):
        hidden, weight, labels, arguments = problem()
        shard = erc.VocabShard(None, BOUNDARIES[self.world][rank], VOCAB)
        local = held_columns(weight, rank, self.world).requires_grad_()
        hidden.requires_grad_()
        if self.linear:
            out = erc.linear_policy_loss(
                hidden, local, labels, vocab_shard=shard, validate=True, memory_budget=400, **arguments
            )
        else:
            out = erc.policy_loss(hidden @ local.t(), labels, vocab_shard=shard, validate=True, **arguments)
        out.loss.backward()
        if self.linear:  # the same, into a tensor of the caller's, and with a bound of active rows
            main_grad = torch.zeros_like(local)
            again = erc.linear_policy_loss(
                hidden.detach(), local, labels, vocab_shard=shard, validate=True, memory_budget=400, num_active=ROWS,
                main_grad=main_grad, **arguments,
            )  # fmt: skip
            kept = local.grad.clone()
            again.loss.backward()
            assert torch.equal(local.grad, kept) and torch.equal(again.loss, out.loss)
            torch.testing.assert_close(main_grad, kept, rtol=1e-6, atol=1e-7)
        else:
            dist.all_reduce(hidden.grad)
        metrics = {name: value.item() for name, value in out.metrics.items()}
        return out.loss.item(), metrics, out.logprob.tolist(), hidden.grad, local.grad


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_loss_equals_the_loss_of_one_process(world, linear):
    hidden, weight, labels, arguments = problem(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    exact = erc.reference.policy_loss(hidden @ weight.t(), labels, **doubles)
    exact.loss.backward()
    results = [rank["linear loss" if linear else "dense loss"] for rank in on_ranks(world)]
    losses = {repr(result[:3]) for result in results}
    assert len(losses) == 1, "loss, metrics and log-probs must be bitwise equal on every rank"
    assert results[0][0] == pytest.approx(exact.loss.item(), rel=1e-5)
    weight_grad = torch.cat([result[4] for result in results])
    assert not weight_grad[VOCAB:].any(), "padding takes no gradient"
    for tested, expected in ((weight_grad[:VOCAB], weight.grad), *((result[3], hidden.grad) for result in results)):
        scale = expected.abs().max()
        assert scale > 0
        assert (tested.double() - expected).abs().max() <= 1e-5 * scale
        assert (tested.double() * 1.01 - expected).abs().max() > 1e-5 * scale, "the bound must catch an error of 1 %"


def pair_problem(dtype=torch.float32):
    """New and old heads, and what their divergences are multiplied by."""
    hidden, weight, *_ = problem(dtype)
    generator = torch.Generator().manual_seed(4)
    old_hidden = hidden + 0.3 * torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    old_weight = weight + 0.1 * torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    return hidden, weight, old_hidden, old_weight, torch.rand(6, ROWS, generator=generator).to(dtype)


class PairBody:
    def __init__(self, world: int, linear: bool) -> None:
        self.world, self.linear = world, linear

    def __call__(self, rank: int):
        hidden, weight, old_hidden, old_weight, upstream = pair_problem()
        shard = erc.VocabShard(None, BOUNDARIES[self.world][rank], VOCAB)
        local, old_local = (held_columns(matrix, rank, self.world) for matrix in (weight, old_weight))
        local.requires_grad_()
        hidden.requires_grad_()
        options = {"vocab_shard": shard, "validate": True, "temperature": torch.full((ROWS,), 0.8), "softcap": 9.0}
        if self.linear:
            out = erc.linear_entropy_ratio(hidden, local, old_hidden, old_local, memory_budget=1000, **options)
        else:
            out = erc.entropy_ratio(hidden @ local.t(), old_hidden @ old_local.t(), **options)
        sum((u * stat).sum() for u, stat in zip(upstream, out, strict=True)).backward()
        if not self.linear:
            dist.all_reduce(hidden.grad)
        return [stat.tolist() for stat in out], hidden.grad, local.grad


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_sharded_divergences_equal_those_of_one_process(world, linear):
    hidden, weight, old_hidden, old_weight, upstream = pair_problem(torch.float64)
    hidden.requires_grad_()
    weight.requires_grad_()
    exact = erc.reference.entropy_ratio(
        hidden @ weight.t(), old_hidden @ old_weight.t(), temperature=torch.full((ROWS,), 0.8), softcap=9.0
    )
    sum((u * stat).sum() for u, stat in zip(upstream, exact, strict=True)).backward()
    results = [rank["linear pair" if linear else "dense pair"] for rank in on_ranks(world)]
    assert len({repr(result[0]) for result in results}) == 1, "every rank must hold the same, bit for bit"
    for name, tested, expected in zip(exact._fields, results[0][0], exact, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(torch.tensor(tested).double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    weight_grad = torch.cat([result[2] for result in results])
    assert not weight_grad[VOCAB:].any(), "padding takes no gradient"
    for tested, expected in ((weight_grad[:VOCAB], weight.grad), *((result[1], hidden.grad) for result in results)):
        bound = 1e-5 * expected.abs().max()
        assert (tested.double() - expected).abs().max() <= bound
        assert (tested.double() * 1.01 - expected).abs().max() > bound > 0, "the bound must catch an error of 1 %"


class StatsBody:
    def __call__(self, rank: int):
        hidden, weight, labels, _ = problem()
        shard = erc.VocabShard(None, BOUNDARIES[3][rank], VOCAB)
        local = held_columns(weight, rank, 3)
        stats = erc.token_stats(hidden @ local.t(), labels, vocab_shard=shard, temperature=0.8, ignore_index=0)
        linear = erc.linear_token_stats(
            hidden,
            local,
            labels,
            vocab_shard=shard,
            temperature=torch.full((ROWS,), 0.8),
            ignore_index=0,
            memory_budget=200,
        )
        leading = (3, ROWS // 3)  # sequences
        sequences = erc.token_stats(
            (hidden @ local.t()).unflatten(0, leading),
            labels.unflatten(0, leading),
            vocab_shard=shard,
            temperature=torch.full(leading, 0.8),
            ignore_index=0,
        )
        return [stat.flatten().tolist() for stat in (*stats, *linear, *sequences)]


def test_sharded_statistics_match_the_oracle():
    hidden, weight, labels, _ = problem(torch.float64)
    exact = erc.reference.token_stats(hidden @ weight.t(), labels, temperature=0.8, ignore_index=0)
    for rank in on_ranks(3):
        for tested, expected in zip(rank["statistics"], (*exact, *exact, *exact), strict=True):
            torch.testing.assert_close(torch.tensor(tested).double(), expected, rtol=2e-6, atol=1e-5)


class MismatchBody:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, rank: int):
        start, vocab, rows = rank * 10, 20, 4
        labels = torch.zeros(rows, dtype=torch.long)
        if rank == 1:
            start += {"gap": 1, "overlap": -1}.get(self.kind, 0)
            rows += self.kind == "rows"
            vocab += self.kind == "vocab_size"
            labels = torch.full((rows,), 99 if self.kind == "failed" else 0)
        labels = labels[:rows]
        shard = erc.VocabShard(None, start, vocab)
        try:
            if self.kind == "memory_budget":
                hidden, weight = torch.zeros(rows, 3), torch.zeros(10, 3)
                erc.linear_token_stats(hidden, weight, vocab_shard=shard, validate=True, memory_budget=40 + rank)
            backend = None
            if self.kind == "backend" and rank == 1:
                register_namespace(backend := "the same by another name", "erc_cpu")
            erc.token_stats(torch.zeros(rows, 10), labels, vocab_shard=shard, validate=True, backend=backend)
        except (ValueError, IndexError) as error:
            return str(error)
        return "no error"


MISMATCHES = {
    "gap": "gap between shards",
    "overlap": "overlap between shards",
    "rows": "rows must be the same",
    "vocab_size": "vocab_size must be the same",
    "memory_budget": "memory_budget must be the same",
    "backend": "backend must be the same on every rank, got ['cpu', 'the same by another name']",
    "failed": "rank(s) [1] did not pass",
}


@pytest.mark.parametrize("kind", MISMATCHES)
def test_every_rank_names_a_mismatch_instead_of_hanging(kind):
    messages = [rank[kind] for rank in on_ranks(2)]
    assert MISMATCHES[kind] in messages[0]
    assert (MISMATCHES[kind] if kind != "failed" else "labels must lie in") in messages[1]


def test_shard_arguments_are_checked():
    with pytest.raises(ValueError, match="start"):
        erc.VocabShard(None, -1, 10)
    with pytest.raises(ValueError, match="vocab_size"):
        erc.VocabShard(None, 0, 0)
    with pytest.raises(TypeError, match="vocab_shard"):
        erc.token_stats(torch.zeros(2, 3), vocab_shard=(0, 3))
