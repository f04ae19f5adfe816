"""A freed gradient's memory is the next one's, and nobody else's while it lives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import erc

pytestmark = pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built")
ROWS, VOCAB = 8, 151_936  # 4.6 MiB of float32: large enough to be kept


def gradient_of(logits: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    advantages = torch.linspace(-1, 1, len(logits))
    erc.policy_loss(leaf, labels, old_logprob=None, advantages=advantages, objective="dapo", **options).loss.backward()
    return leaf.grad


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, VOCAB, generator=generator), torch.randint(VOCAB, (ROWS,), generator=generator)


@pytest.mark.sanitize
def test_nothing_of_the_last_gradient_shows_in_the_next(problem):
    logits, labels = problem
    expected = gradient_of(logits, labels, backend="torch")
    ignored = labels.clone()
    ignored[2] = -100
    for _ in range(3):
        gradient_of(logits * 2, labels)
        torch.testing.assert_close(gradient_of(logits, labels), expected, rtol=1e-5, atol=1e-9)
        assert gradient_of(logits, ignored)[2].eq(0).all()
    assert expected.abs().max() > 1e-3


@pytest.mark.sanitize
def test_living_gradients_share_nothing(problem):
    logits, labels = problem
    first = gradient_of(logits, labels)
    kept = first.clone()
    others = [gradient_of(factor * logits, labels) for factor in (2.0, 3.0)]
    assert torch.equal(first, kept)
    assert not any(torch.equal(first, other) for other in others)
    assert len({tensor.data_ptr() for tensor in (first, *others)}) == 3


@pytest.mark.sanitize
def test_gradients_of_any_size_follow_each_other(problem):
    """Larger, smaller and much smaller than the memory that is kept; the views of it outlive their gradient."""
    logits, labels = problem
    for rows in (8, 3, 8, 7, 1, 8):
        gradient = gradient_of(logits[:rows], labels[:rows])
        view = gradient[0, :10]
        expected = gradient_of(logits[:rows], labels[:rows], backend="torch")
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9)
        del gradient
        torch.testing.assert_close(view, expected[0, :10], rtol=1e-5, atol=1e-9)


def addresses(**environment: str) -> list[int]:
    """Where the gradients of two steps lie in a fresh process, with another large allocation between them."""
    script = textwrap.dedent("""
        import torch, erc
        logits = torch.randn(64, 151_936).requires_grad_()
        labels = torch.randint(151_936, (64,))
        for _ in range(2):
            advantages = torch.ones(64)
            erc.policy_loss(logits, labels, old_logprob=None, advantages=advantages, objective="dapo").loss.backward()
            print(logits.grad.data_ptr())
            logits.grad = None
            other = torch.empty(64, 151_936)
    """)
    printed = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [int(line) for line in printed.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="gradient memory is kept on Linux")
@pytest.mark.skipif(torch.__version__ < "2.11", reason="PyTorch 2.10 cannot say when a tensor is freed")
def test_a_training_step_reuses_the_last_gradient_unless_told_otherwise():
    first, second = addresses(ERC_CPU_KEEP_GRADIENT="1")
    assert first == second
    first, second = addresses(ERC_CPU_KEEP_GRADIENT="0")
    assert first != second
