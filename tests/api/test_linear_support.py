"""`support=` of the linear forms, and of both forms with vocabulary shards, against the logits form and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import erc
from tests import processes
from tests.oracle import gradients_that_must_fail

ROWS, WIDTH, VOCAB = 9, 6, 67
ENDS = {2: (0, 50, VOCAB), 3: (0, 20, 20, VOCAB + 5)}  # uneven; the second shard empty, the last one padded


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Rows not cut, of one token, of all of them, padded, and an ignored one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(VOCAB, (ROWS,), generator=generator)
    ids = torch.full((ROWS, VOCAB), -1)
    for row, size in enumerate((5, 0, 1, VOCAB, 30, 2, 9, 17, 3)):
        others = torch.randperm(VOCAB, generator=generator)
        ids[row, :size] = torch.cat([labels[row : row + 1], others[others != labels[row]]])[:size]
    labels[7] = -100
    return hidden, weight, {"labels": labels, "support": erc.SamplingSupport.from_ids(ids), "temperature": 0.8}


LOSS = {
    "old_logprob": torch.full((ROWS,), -2.0),
    "advantages": torch.linspace(-1, 1.2, ROWS),
    "ref_logprob": torch.full((ROWS,), -3.0),
    "mask": torch.tensor([1, 1, 1, 0, 1, 1, 1, 1, 1]),
    "objective": erc.objective("dapo", kl=erc.KLPenalty("k3", 0.2), entropy_coef=0.1),
}
WEIGHTS = [torch.linspace(low, 1, ROWS) for low in (-1, 0.3, -0.2, 0.7)]


def outcome(form: str, hidden: torch.Tensor, weight: torch.Tensor, given: dict[str, Any], **more: Any) -> list:
    """Statistics, the loss and its metric, and the gradients by hidden and weight of each, by one of the functions."""
    results = []
    for loss in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        source = erc.reference if form == "reference" else erc
        name = ("linear_" if form == "linear" else "") + ("policy_loss" if loss else "token_stats")
        first = leaves if form == "linear" else (leaves[0] @ leaves[1].T,)
        out = getattr(source, name)(*first, **given, **(LOSS if loss else {}), **more)
        if loss:
            values, total = [out.loss, out.logprob_full, out.metrics["kept_mass"]], out.loss
        else:
            values = list(out)
            total = sum((w.to(stat.dtype) * stat).sum() for w, stat in zip(WEIGHTS, out, strict=True))
        total.backward()
        results += [*(value.detach() for value in values), leaves[0].grad, leaves[1].grad]
    return results


def close(tested: torch.Tensor, exact: torch.Tensor) -> bool:
    """Within what float32 products of this size leave, relative to the largest value."""
    if tested.shape != exact.shape or not exact.numel():
        return tested.shape == exact.shape
    error = (tested.double() - exact.double()).abs().amax()
    return bool(error <= 3e-6 * exact.abs().amax().clamp(min=1e-3))


@pytest.mark.parametrize("budget", [None, 3 * VOCAB * 4])
def test_linear_forms_meet_the_oracle(budget):
    hidden, weight, given = problem()
    tested = outcome("linear", hidden, weight, given, memory_budget=budget)
    exact = outcome("reference", hidden.double(), weight.double(), given)
    assert erc.explain(hidden, LOSS["objective"], weight=weight, support=True).path == "fused"
    assert all(close(*pair) for pair in zip(tested, exact, strict=True))
    for i in (4, 5, 9, 10):
        assert not any(close(wrong, exact[i]) for wrong in gradients_that_must_fail(tested[i]))


def test_without_kernels_too():
    hidden, weight, given = problem()
    tested = outcome("linear", hidden, weight, given, backend="torch")
    assert all(close(*pair) for pair in zip(tested, outcome("linear", hidden, weight, given), strict=True))


def test_a_support_of_everything_changes_no_bit():
    hidden, weight, given = problem()
    everything = erc.SamplingSupport.from_ids(torch.arange(VOCAB).expand(ROWS, VOCAB))
    runs = []
    for support in (None, everything):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = erc.linear_token_stats(*leaves, given["labels"], support=support)
        (stats.logprob + stats.entropy).sum().backward()
        runs.append([*(stat.detach() for stat in stats), leaves[0].grad, leaves[1].grad])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_what_does_not_fit_is_named():
    hidden, weight, given = problem()
    for function, more in ((erc.linear_token_stats, {}), (erc.linear_policy_loss, LOSS)):
        with pytest.raises(ValueError, match="one row per row of logits, 8, got 9"):
            function(hidden[:8], weight, given["labels"][:8], support=given["support"], **more)
        wrong = given["labels"].clone()
        wrong[2] = (wrong[2] + 1) % VOCAB
        with pytest.raises(IndexError, match="that of row 2 lacks"):
            function(hidden, weight, wrong, support=given["support"], **more)


def _on_rank(rank: int, world: int) -> list:
    hidden, weight, given = problem()
    start, end = ENDS[world][rank : rank + 2]
    local = torch.cat([weight, weight.new_full((5, WIDTH), 7.0)])[start:end]
    shard = erc.VocabShard(None, start, VOCAB)
    mine = given
    if rank == 1:
        ids = given["support"].token_ids.view(ROWS, -1).clone()
        ids[1, -1] = given["labels"][1]  # a row that the other ranks leave uncut
        mine = given | {"support": erc.SamplingSupport.from_ids(ids)}
    messages = []
    for form in ("logits", "linear"):
        try:
            outcome(form, hidden, local, mine, vocab_shard=shard, validate=True)
        except ValueError as error:
            messages.append(str(error))
    return [*(outcome(form, hidden, local, given, vocab_shard=shard) for form in ("logits", "linear")), messages]


@pytest.mark.parametrize("world", ENDS)
def test_shards_merge_to_the_result_of_one_process(world):
    hidden, weight, given = problem()
    expected = outcome("logits", hidden, weight, given)
    ranks = processes.on_ranks(world, _on_rank, world)
    for rank, (*forms, messages) in enumerate(ranks):
        assert len(messages) == 2 and all("token_ids must be the same on every rank" in text for text in messages)
        start, end = ENDS[world][rank : rank + 2]
        for form, results in zip(("logits", "linear"), forms, strict=True):
            for i, (result, whole) in enumerate(zip(results, expected, strict=True)):
                if i in (4, 9):  # hidden's gradient: of the logits form each rank holds its columns' part
                    result = result if form == "linear" else sum(parts[0][i] for parts in ranks)
                elif i in (5, 10):
                    whole, result = whole[start:end], result[: min(end, VOCAB) - start]
                assert close(result, whole), f"{form} {i} on rank {rank}"
            bits = [torch.equal(results[i], ranks[0][form == "linear"][i]) for i in (0, 1, 2, 3, 6, 7, 8)]
            assert all(bits), "the same bits on every rank"
