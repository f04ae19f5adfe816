"""How advantages spread over tokens, and what the covariance rules make of a batch that is too small to have one."""

from __future__ import annotations

import math

import pytest
import torch

import erc


def weights_of(advantages: torch.Tensor, offsets: list[int] | None, shape: tuple[int, ...]) -> torch.Tensor:
    """The advantage that each token gets: REINFORCE's gradient by the log-prob is its negative."""
    logprob = torch.zeros(shape, requires_grad=True)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    erc.objective_loss(
        logprob,
        torch.ones(shape),
        old_logprob=None,
        advantages=advantages,
        cu_seqlens=cu_seqlens,
        objective=erc.objective("reinforce", reduction="token-sum"),
    ).loss.backward()
    return -logprob.grad


A = torch.tensor([1.0, -2.0, 3.0, 4.0])
SPREAD = torch.tensor([1.0, 1.0, 3.0, 4.0])  # the second of four sequences is empty


@pytest.mark.parametrize(
    ("advantages", "offsets", "shape", "expected"),
    [
        (A, None, (4,), A),
        (A[:2], None, (2, 2), torch.tensor([[1.0, 1.0], [-2.0, -2.0]])),
        (A[:2, None], None, (2, 2), torch.tensor([[1.0, 1.0], [-2.0, -2.0]])),
        (A, [0, 1, 2, 3, 4], (4,), A),
        (A[:, None], [0, 2, 2, 3, 4], (4,), SPREAD),
        (A, [0, 2, 2, 3, 4], (1, 4), SPREAD[None]),
        (A[None], [0, 2, 2, 3, 4], (1, 4), A[None]),
        (A, [0, 3, 4], (4,), A),
        (A[:2], [0, 3, 4], (4,), torch.tensor([1.0, 1.0, 1.0, -2.0])),
        (A[:2, None], [0, 3, 4], (1, 4), torch.tensor([[1.0, 1.0, 1.0, -2.0]])),
    ],
)
def test_advantages_per_token_and_per_sequence(advantages, offsets, shape, expected):
    assert torch.equal(weights_of(advantages, offsets, shape), expected)


def test_as_many_sequences_as_tokens_are_ambiguous():
    with pytest.raises(ValueError, match=r"advantages of shape \(4,\) may be one per token or one per sequence"):
        weights_of(A, [0, 2, 2, 3, 4], (4,))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (2, 1)])
def test_one_advantage_is_no_advantage_for_every_packed_sequence(shape):
    with pytest.raises(ValueError, match="advantages must have shape"):
        weights_of(torch.ones(shape), [0, 1, 2, 4], (1, 4)) if shape != (3,) else weights_of(
            torch.ones(shape), [0, 1, 4], (1, 4)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_cov_of_two_tokens_is_a_tie_that_the_first_one_wins(dtype):
    """(A - mean)(logprob - mean) of two tokens is one number, whatever rounding makes of it."""
    generator = torch.Generator().manual_seed(0)
    objective = erc.Objective(erc.KLCov(0.5, coef=1.0))
    for _ in range(200):
        logprob = (-3 * torch.rand(4, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        old = (logprob.detach() + 0.1).to(dtype)
        mask = torch.tensor([0.0, 1.0, 0.0, 1.0])
        advantages = torch.randn(4, generator=generator, dtype=torch.float64).to(dtype)
        out = erc.objective_loss(
            logprob, torch.ones(4, dtype=dtype), old_logprob=old, advantages=advantages, mask=mask, objective=objective
        )
        plain = -((logprob - old).exp() * advantages).detach()
        assert (out.per_token_loss - plain)[1] > 0.05 and (out.per_token_loss - plain)[3].abs() < 1e-6


def test_a_forbidden_token_leaves_the_covariance_of_the_others_alone():
    generator = torch.Generator().manual_seed(0)
    logprob, advantages = -3 * torch.rand(9, generator=generator), torch.randn(9, generator=generator)
    logprob[4] = -math.inf
    old = logprob.clone()
    old[:4] -= 0.1
    keep = torch.arange(9) != 4
    objective = erc.Objective(erc.KLCov(0.3, coef=1.0))

    def losses(chosen):
        given = {"old_logprob": old[chosen], "advantages": advantages[chosen], "objective": objective}
        return erc.objective_loss(logprob[chosen], torch.ones(9)[chosen], **given).per_token_loss

    assert torch.equal(losses(torch.arange(9))[keep], losses(keep))
