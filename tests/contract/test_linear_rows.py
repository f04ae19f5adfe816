"""Which rows the linear forms compute: an upper bound, ignored rows, and what those may hold."""

from __future__ import annotations

import math

import pytest
import torch

import erc
from erc.linear import head

ROWS, WIDTH, VOCAB = 9, 6, 41
LABELS = torch.tensor([3, -100, 7, 40, -100, 0, 11, -100, 5])
MASK = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.5])
ACTIVE = 4  # labels and mask together; the labels alone leave 6


@pytest.fixture(params=["counted", "bounded"])
def values(request, monkeypatch):
    """Whether rows are counted, as on the CPU, or only bounded, as on a GPU, whose values nobody reads."""
    if request.param == "bounded":
        monkeypatch.setattr(head, "values_are_readable", lambda tensor: False)
    return request.param


def problem(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    arguments = {
        "old_logprob": -3 + 0.2 * torch.randn(ROWS, generator=generator),
        "advantages": torch.randn(ROWS, generator=generator),
        "mask": MASK,
    }
    return hidden, weight, arguments


def oracle(objective, hidden, weight, arguments):
    """Loss and gradients in float64; ignored rows at 0, since a NaN times 0 is NaN in a plain product."""
    hidden = torch.where(((LABELS != -100) & (MASK != 0))[:, None], hidden.detach(), 0).double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    arguments = {name: value.double().view(1, ROWS) for name, value in arguments.items()}
    logits = (hidden @ weight.t()).view(1, ROWS, VOCAB)
    out = erc.reference.policy_loss(logits, LABELS.view(1, ROWS), objective=objective, **arguments)
    return out, torch.autograd.grad(out.loss, (hidden, weight))


def assert_equal_to_oracle(tested, exact):
    for value, expected in zip(tested, exact, strict=True):
        bound = 1e-5 * expected.abs().max()
        assert bound > 0, "a gradient that is zero everywhere tests nothing"
        assert (value.double() - expected).abs().max() <= bound
        assert (1.01 * value.double() - expected).abs().max() > bound, "a wrong gradient would be noticed"


@pytest.mark.parametrize("num_active", [ACTIVE, 6, ROWS + 5, None])
@pytest.mark.parametrize("objective", ["dapo", "gspo"])  # fused, and two-phase
@pytest.mark.parametrize("poison", [0.0, math.nan])
def test_a_bound_that_is_too_large_changes_nothing(num_active, objective, poison, values, kernels):
    hidden, weight, arguments = problem()
    with torch.no_grad():
        hidden[(LABELS == -100) | (MASK == 0)] += poison
    expected, exact = oracle(objective, hidden, weight, arguments)
    shaped = {name: value.view(1, ROWS) for name, value in arguments.items()}
    for budget in (None, 3 * VOCAB * 4):  # one chunk, and chunks of at most three rows
        out = erc.linear_policy_loss(
            hidden.view(1, ROWS, WIDTH),
            weight,
            LABELS.view(1, ROWS),
            objective=objective,
            num_active=num_active,
            memory_budget=budget,
            **shaped,
        )
        torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(out.logprob.double(), expected.logprob, rtol=1e-5, atol=1e-6)
        assert out.metrics["tokens"] == ACTIVE
        assert_equal_to_oracle(torch.autograd.grad(out.loss, (hidden, weight)), exact)


@pytest.mark.parametrize("num_active", [6, 7, None])
def test_statistics_of_bounded_rows(num_active, values, kernels):
    hidden, weight, _ = problem()
    with torch.no_grad():
        hidden[LABELS == -100] = math.nan
    stats = erc.linear_token_stats(hidden, weight, LABELS, num_active=num_active, memory_budget=2 * VOCAB * 4)
    tested = torch.autograd.grad(stats.logprob.sum() - 2 * stats.entropy.sum(), (hidden, weight))
    clean = hidden.detach().nan_to_num().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    expected = erc.reference.token_stats(clean @ exact_weight.t(), LABELS)
    exact = torch.autograd.grad(expected.logprob.sum() - 2 * expected.entropy.sum(), (clean, exact_weight))
    for value, reference in zip(stats, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=1e-5, atol=1e-6)
    assert_equal_to_oracle(tested, exact)


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
@pytest.mark.parametrize("num_active", [0, ACTIVE - 1])
def test_a_bound_that_is_too_small_raises(num_active, objective, values, kernels):
    hidden, weight, arguments = problem()
    shaped = {name: value.view(1, ROWS) for name, value in arguments.items()}
    expected = ValueError if values == "counted" else RuntimeError  # an assertion on the device
    with pytest.raises(expected, match=r"num_active.*active rows"):
        erc.linear_policy_loss(
            hidden.view(1, ROWS, WIDTH),
            weight,
            LABELS.view(1, ROWS),
            objective=objective,
            num_active=num_active,
            **shaped,
        )
    with pytest.raises(expected, match=r"num_active.*active rows"):
        erc.linear_token_stats(hidden, weight, LABELS, num_active=num_active)


@pytest.mark.parametrize("num_active", [-1, True, 3.0, torch.tensor(9)])
def test_a_bound_that_is_no_count_is_named(num_active, kernels):
    hidden, weight, _ = problem()
    with pytest.raises(ValueError, match="num_active must be an int >= 0"):
        erc.linear_token_stats(hidden, weight, LABELS, num_active=num_active)
