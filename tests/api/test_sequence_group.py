"""Sequences split over 1 to 4 processes (context parallelism) against the loss of one process with whole sequences."""

from __future__ import annotations

import pytest
import torch

import erc
from tests.api import split_sequences as split
from tests.api.test_parallel import on_ranks

WORLDS = (1, 2, 3, 4)
BOUND = 1e-11


def whole(name: str) -> tuple[float, torch.Tensor]:
    return split.loss_and_gradient(split.OBJECTIVES[name], split.problem())


def of_ranks(world: int, *key: str) -> tuple[float, torch.Tensor]:
    """The sum of the ranks' losses, and their gradients side by side."""
    parts = [rank["sequences"][key] for rank in on_ranks(world)]
    if key[0] != "packed":
        return sum(loss for loss, _ in parts), torch.cat([gradient for _, gradient in parts], 1)
    gradient = torch.zeros(split.B, split.T, split.VOCAB, dtype=torch.float64)
    mask = split.problem()["mask"]
    for rank, (_, packed) in enumerate(parts):
        columns = split.part(gradient, rank, world)
        columns[split.part(mask, rank, world) != 0] = packed
    return sum(loss for loss, _ in parts), gradient


@pytest.mark.parametrize("name", split.OBJECTIVES)
@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_ranks_losses_add_up_to_that_of_one_process(world, form, name):
    loss, gradient = of_ranks(world, form, name)
    expected, exact = whole(name)
    assert loss == pytest.approx(expected, rel=BOUND)
    scale = exact.abs().max()
    assert scale > 0 and (gradient - exact).abs().max() <= BOUND * scale
    assert (1.001 * gradient - exact).abs().max() > BOUND * scale


@pytest.mark.parametrize("name", [name for name in split.OBJECTIVES if name not in ("erc-dapo", "dr-grpo")])
def test_without_the_group_the_sequences_are_cut(name):
    """The comparison above would see it."""
    loss, _ = of_ranks(3, "alone", name)
    assert loss != pytest.approx(whole(name)[0], rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_the_linear_form(world):
    hidden, weight = (tensor.requires_grad_() for tensor in split.head())
    given = split.problem()
    del given["logits"]
    exact = erc.linear_policy_loss(hidden, weight, objective=split.OBJECTIVES["erc-gspo"], **given)
    exact.loss.backward()
    parts = [rank["sequences"]["linear"] for rank in on_ranks(world)]
    assert sum(loss for loss, _, _ in parts) == pytest.approx(exact.loss.item(), rel=BOUND)
    torch.testing.assert_close(torch.cat([part for _, part, _ in parts], 1), hidden.grad, rtol=0, atol=1e-11)
    torch.testing.assert_close(sum(part for _, _, part in parts), weight.grad, rtol=0, atol=1e-11)
    assert hidden.grad.abs().max() > 1e-3


@pytest.mark.parametrize("world", WORLDS)
def test_from_log_probs(world):
    parts = [rank["sequences"]["objective_loss"] for rank in on_ranks(world)]
    assert sum(parts) == pytest.approx(whole("erc-gmpo")[0], rel=BOUND)


def test_what_does_not_go_with_split_sequences_is_refused():
    for rank in on_ranks(2):
        rows, length, batch, quantile = rank["sequences"]["errors"]
        assert "sequence_group needs rows [B, T] or cu_seqlens" in rows
        assert "max_length must be set" in length
        assert "sequence_group does not go with" in batch and "KLCov" in batch
        assert "sequence_group does not go with" in quantile and "HighEntropyMask" in quantile
    with pytest.raises(TypeError, match=r"sequence_group must be a torch\.distributed\.ProcessGroup"):
        split.loss_and_gradient(split.OBJECTIVES["grpo"], split.problem(), sequence_group="world")
