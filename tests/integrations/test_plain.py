"""The plain trainer: it trains, repeats, and under FSDP2 and torch.compile makes the steps of one eager process."""

from __future__ import annotations

import copy

import pytest
import torch

import erc
from examples.plain_trainer import (
    PROMPTS,
    UPDATES,
    Batch,
    Policy,
    labelled,
    old_statistics,
    shard,
    train,
    update,
    verify,
    warm_start,
)
from tests.processes import on_ranks

ADVANTAGES = torch.tensor([1.0, -0.5, 0.7, -1.0])


def make_policy() -> tuple[torch.nn.Module, Batch]:
    torch.manual_seed(0)
    model = Policy(width=32, layers=1)
    tokens = torch.randint(4, 12, (4, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], 1)
    labels[2:, :3] = -100  # ranks hold different numbers of tokens
    return model, Batch(tokens, labels)


def two_updates(model, batch: Batch, advantages: torch.Tensor, policy=None) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    old = old_statistics(model if policy is None else policy, batch)
    for _ in range(2):
        update(model if policy is None else policy, optimizer, batch, old, advantages, "erc-dapo")
    return [value.detach() for value in model.parameters()]


def run_rank(rank: int) -> list[torch.Tensor]:
    model, batch = make_policy()
    shard(model)
    rows = torch.tensor([0, 1]) + 2 * rank
    parameters = two_updates(model, batch.rows(rows), ADVANTAGES[rows])
    return [value.full_tensor() for value in parameters]


def check_equal(parameters: list[torch.Tensor]) -> None:
    model, batch = make_policy()
    before = [value.detach().clone() for value in model.parameters()]
    expected = two_updates(model, batch, ADVANTAGES)
    for ours, theirs in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(expected, before, strict=True)) > 1e-3


def test_fsdp2_on_two_processes_makes_the_updates_of_one():
    ranks = on_ranks(2, run_rank)
    for parameters in ranks:
        check_equal(parameters)


def test_a_compiled_model_makes_the_updates_of_an_eager_one():
    model, batch = make_policy()
    check_equal(two_updates(model, batch, ADVANTAGES, torch.compile(model, backend="aot_eager")))


def test_gradients_are_those_of_the_reference():
    model, batch = make_policy()
    parameters = two_updates(model, batch, ADVANTAGES)
    with erc.use_backend("torch"):
        check_equal(parameters)


def test_a_wrong_gradient_fails_the_comparison():
    model, batch = make_policy()
    with pytest.raises(AssertionError):
        check_equal(two_updates(model, batch, -ADVANTAGES))


def assert_same_log(ours: list[dict], theirs: list[dict]) -> None:
    """Losses, rewards and all metrics; every update hangs on the gradients of those before it."""
    for entry, expected in zip(ours, theirs, strict=True):
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=1e-2, abs=5e-4, nan_ok=True), name


@pytest.fixture(scope="module")
def warm():
    return warm_start(150)


def short_run(warm, objective: str) -> list[dict]:
    return train(copy.deepcopy(warm), 3, objective)


def test_three_batches_equal_those_of_the_reference(warm):
    ours, again = short_run(warm, "erc-dapo"), short_run(warm, "erc-dapo")
    with erc.use_backend("torch"):
        theirs = short_run(warm, "erc-dapo")
    assert_same_log(ours, theirs)
    with pytest.raises(AssertionError):  # as it would without the gate
        assert_same_log(short_run(warm, "dapo"), theirs)
    assert len(ours) == 3 * UPDATES and repr(again) == repr(ours)
    assert ours[0]["erc_fraction"] == 0, "the first update starts from the rollout policy"
    assert max(entry["erc_fraction"] for entry in ours) > 0.05


def test_answers_end_at_their_line_break_and_the_verifier_wants_one():
    rows = ["07+35=42\n1", "07+35=421\n", "07+35=\n\n\n\n", "07+35=4242"]
    batch = labelled(torch.tensor([["0123456789+=\n".index(character) for character in row] for row in rows]))
    assert (batch.labels != -100).sum(1).tolist() == [3, 4, 1, 4]
    assert verify(batch, torch.tensor([42] * 4)).tolist() == [1, 0, 0, 0]
    rows, at = (batch.labels != -100).nonzero(as_tuple=True)
    assert torch.equal(batch.tokens[rows, at + 1], batch.labels[rows, at])


@pytest.mark.slow
def test_the_reward_rises():
    """By three standard errors at least, even if all answers to one prompt were alike."""
    log = train(warm_start(), 30, "erc-dapo")
    rewards = [entry["reward"] for entry in log[::UPDATES]]
    before, after = rewards[0], sum(rewards[-5:]) / 5
    assert after - before > 3 * (0.25 / PROMPTS * (1 + 1 / 5)) ** 0.5, rewards
