"""Derivatives that a formula written down carelessly loses to cancellation: each against float64 on the same log-probs,
in the kernels, in plain PyTorch, and in compiled PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import erc

ROWS, VOCAB = 6, 67
INF = math.inf


class Case(NamedTuple):
    """An objective, what it compares the log-prob with, and its exact derivative by the log-prob."""

    objective: erc.Objective
    argument: str
    difference: list[float]  # log-prob minus the argument
    advantage: float
    derivative: Callable[[Tensor, Tensor], Tensor]


def _sapo(logprob: Tensor, old: Tensor) -> Tensor:
    r = (logprob - old).exp()
    return -4 * torch.sigmoid(1.25 * (r - 1)) * torch.sigmoid(-1.25 * (r - 1)) * r


CASES = {
    "k3": Case(
        erc.objective("reinforce", kl=erc.KLPenalty("k3", 1.0)),
        "ref_logprob",
        [3e-7, -3e-7, 1e-6, -2e-5, 3e-3, -0.7],
        0.0,
        lambda logprob, ref: -torch.expm1(ref - logprob),
    ),
    "sapo": Case(
        erc.objective("sapo", ratio=erc.SAPO(1.25, 1.25), reduction="token-mean"),
        "old_logprob",
        [2.0, 2.5, 2.8, 3.0, -3.0, 0.1],
        1.0,
        _sapo,
    ),
}


def problem(case: Case, logprob: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The arguments of a loss, in float32, and the exact derivative of its sum by each log-prob."""
    other = logprob - torch.tensor(case.difference)
    arguments = {"old_logprob": None, "advantages": torch.full((ROWS,), case.advantage), case.argument: other}
    return arguments, case.derivative(logprob.double(), other.double())


def assert_relative(tested: Tensor, exact: Tensor, bound: float) -> None:
    assert exact.any()
    error = (tested.double() - exact).abs()
    assert (error <= bound * exact.abs()).all(), (tested, exact)
    assert not ((0.99 * tested.double() - exact).abs() <= bound * exact.abs()).all(), (
        "a wrong gradient would be noticed"
    )


@pytest.mark.parametrize("name", CASES)
def test_the_kernels(name, kernels):
    """Against the gradient of the log-prob itself, times the exact derivative."""
    case = CASES[name]
    logits = 2 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(3))
    logits[0, 5] = 12.0  # nearly certain
    labels = torch.tensor([5, 1, 2, 3, 4, 60])
    leaf = logits.clone().requires_grad_()
    logprob = erc.token_stats(leaf, labels).logprob
    arguments, exact = problem(case, logprob.detach())
    (expected,) = torch.autograd.grad(logprob.double(), leaf, exact)
    tested = logits.clone().requires_grad_()
    erc.policy_loss(tested, labels, objective=case.objective, normalizer=1.0, **arguments).loss.backward()
    assert_relative(tested.grad.abs().amax(-1), expected.abs().amax(-1).double(), 2e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_plain_pytorch(name, compiled):
    case = CASES[name]
    logprob = -torch.tensor([1e-3, 0.1, 0.7, 2.0, 9.0, 30.0])
    arguments, exact = problem(case, logprob)
    leaf = logprob.clone().requires_grad_()

    def loss(value):
        return erc.objective_loss(value, torch.ones(ROWS), objective=case.objective, normalizer=1.0, **arguments).loss

    (torch.compile(loss, fullgraph=True) if compiled else loss)(leaf).backward()
    assert_relative(leaf.grad, exact, 2e-6)


def test_the_value_of_k3_keeps_its_precision(kernels):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 7, 9])
    logprob = erc.token_stats(logits, labels).logprob
    ref = logprob + torch.tensor([1e-6, -3e-5, 2e-3])
    x = (ref - logprob).double()
    out = erc.policy_loss(
        logits, labels, objective=CASES["k3"].objective, old_logprob=ref, ref_logprob=ref, advantages=torch.zeros(3)
    )
    torch.testing.assert_close(out.per_token_loss.double(), torch.expm1(x) - x, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.metrics["kl"].double(), (torch.expm1(x) - x).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.metrics["approx_kl"].double(), (torch.expm1(-x) + x).mean(), rtol=1e-6, atol=0)


NEAR_ONE = torch.tensor([-1e-9, -2e-8])
NEAR_ZERO = torch.tensor([-110.0, -130.0])


@pytest.mark.parametrize("kind", ["kl", "full-kl", "full-tv"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dppo_s_direction_where_both_probabilities_round_alike(kind, sign):
    """The exponentials are 1 on one side and 0 on the other; the policy has moved all the same."""
    logprob = torch.cat((NEAR_ONE, NEAR_ZERO)).requires_grad_()
    old = torch.cat((NEAR_ONE.flip(0), NEAR_ZERO.flip(0)))
    assert torch.equal(logprob.detach().exp(), old.exp())
    out = erc.objective_loss(
        logprob,
        torch.ones(4),
        old_logprob=old,
        advantages=torch.full((4,), sign),
        old_divergence=torch.ones(4),
        objective=erc.Objective(erc.DPPO(kind, 0.0, 0.0)),
    )
    (gradient,) = torch.autograd.grad(out.loss, logprob)
    moved_on = (logprob > old) if sign > 0 else (logprob < old)
    # Of two probabilities that float32 does not hold, the binary KL may round to the bound.
    decided = slice(0, 2 if kind == "kl" else 4)
    assert torch.equal((gradient == 0)[decided], moved_on[decided])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_dppo_s_direction_in_the_kernels(sign, kernels):
    logits = torch.tensor([[20.0, 0.0, -INF], [17.5, 0.0, -INF]], requires_grad=True)
    labels = torch.zeros(2, dtype=torch.long)
    old = erc.token_stats(logits.detach(), labels).logprob.flip(0)
    assert (old < 0).all() and (old.exp() == 1).all()
    out = erc.policy_loss(
        logits,
        labels,
        old_logprob=old,
        advantages=torch.full((2,), sign),
        objective=erc.Objective(erc.DPPO("kl", 0.0, 0.0)),
    )
    out.loss.backward()
    assert (logits.grad[:, 0] == 0).tolist() == [sign > 0, sign < 0]
