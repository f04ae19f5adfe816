"""What the CPU's sweeps do in their own way: equal terms, exponentials without a clamp, maxima in 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import erc
from erc.backend import cpu_isa
from tests.oracle import assert_entropy, assert_gradient_and_mutations, assert_logprob

V = 2 * 2048 + 45  # two segments, one of a few blocks, and a block that is not whole
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("cpu")


def assert_contract(logits: Tensor, labels: Tensor, relative: float = 1e-6) -> None:
    """Statistics, and the gradient of the log-prob."""
    leaf, exact_leaf = logits.clone().requires_grad_(), logits.double().requires_grad_()
    stats, exact = erc.token_stats(leaf, labels), erc.reference.token_stats(exact_leaf, labels)
    assert_entropy(stats.entropy, exact.entropy)
    assert_logprob(stats.logprob, exact.logprob, logits.double().abs().where(logits.isfinite(), 0).amax(-1))
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), leaf)
    (expected,) = torch.autograd.grad(exact.logprob.sum(), exact_leaf)
    assert_gradient_and_mutations(gradient, expected, relative=relative)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_background_of_one_value(dtype):
    """One token above thousands that are equal: the errors of their exponentials and of their sums are equal too, so
    nothing averages out."""
    gaps = torch.linspace(0.01, 30, 301)
    logits = torch.zeros(len(gaps), V)
    logits[:, 1:] = -gaps[:, None]
    # Elsewhere there are no registers for a second set of accumulators, and a sum is of twice as many terms.
    relative = 1e-6 if cpu_isa() == "avx512" else 2e-6
    assert_contract((logits + 3).to(dtype), torch.zeros(len(gaps), dtype=torch.long), relative=relative)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_far_below(dtype):
    """Where exponentials leave the range of float32, by way of its subnormal numbers, and where differences do."""
    generator = torch.Generator().manual_seed(0)
    depths = torch.tensor([60.0, 80, 88, 95, 104, 110, 120, 140, 160, 200, 300, 1e4, 1e20, 3e38])
    logits = torch.randn(len(depths), V, generator=generator)
    logits[:, ::3] -= depths[:, None]
    logits[:, 1] = 4
    labels = torch.tensor([1, 2] * (len(depths) // 2))
    assert_contract(logits.to(dtype), labels)
    forbidden = logits.clone()
    forbidden[:, 5::3] = -torch.inf
    assert_contract(forbidden.to(dtype), labels.clamp(max=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low", [-9.0, -3.0, 0.0, 2.0])
def test_the_maximum_comes_late(dtype, low):
    """Rows that rise through both zeros or on one side of them, so that every segment exceeds the one before."""
    rising = torch.linspace(low, low + 6, V).to(dtype)
    at_zero = torch.where(rising.abs() < 1, torch.zeros_like(rising), rising)
    rows = torch.stack([rising, rising.flip(0), at_zero, -at_zero.abs(), at_zero.abs() - 30])
    rows[2, 1::2] *= -1
    rows[3, ::2] = torch.where(rows[3, ::2] == 0, -0.0, rows[3, ::2])
    labels = torch.tensor([V - 1, 0, 7, V // 2, V - 1])
    assert_contract(rows, labels)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("position", [0, 1, 2048, V - 1])
def test_nan_of_either_sign_is_seen(sign, position):
    for dtype in DTYPES:
        logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).to(dtype)
        logits[1, position] = torch.copysign(torch.tensor(torch.nan), torch.tensor(float(sign))).to(dtype)
        stats = erc.token_stats(logits - 20, torch.tensor([3, 4, 5]))
        assert stats.entropy.isnan().tolist() == stats.logprob.isnan().tolist() == [False, True, False]


def test_subnormal_numbers_count_after_a_call():
    """A sweep may flush them, and must leave the thread as it found it."""
    tiny, logits = torch.full((64,), 1e-40), torch.randn(2, V).requires_grad_()
    labels = torch.tensor([0, 1])
    out = erc.policy_loss(logits, labels, old_logprob=None, advantages=torch.ones(2), objective="reinforce")
    out.loss.backward()
    erc.token_stats(logits.detach(), labels)
    assert (tiny * 0.5 != 0).all()
