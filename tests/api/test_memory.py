"""No memory that grows with V beyond the gradient itself."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import erc

ROWS, VOCAB = 256, 151_936
GRADIENT = ROWS * VOCAB * 4
SLACK = 24 * 2**20  # code pages, thread stacks and per-row tensors


def peak_growth(body: str) -> int:
    """Bytes by which `body` raises the peak of a fresh process over what `logits` took."""
    script = textwrap.dedent("""
        import torch, erc
        def peak():  # ru_maxrss would start at the size of the process that spawned this one
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        def loss(z, y, **kw):
            rows = len(y)
            return erc.policy_loss(z, y, old_logprob=torch.zeros(rows), advantages=torch.ones(rows),
                                   old_entropy=torch.ones(rows), **kw).loss
        rows, vocab = ROWS, VOCAB
        small = torch.randn(4, 300, requires_grad=True)
        loss(small, torch.zeros(4, dtype=torch.long)).backward()  # loads everything
        loss(small * 1, torch.zeros(4, dtype=torch.long), inplace_backward=True).backward()
        logits = torch.empty(rows, vocab).uniform_(-3, 3)
        labels = torch.randint(vocab, (rows,))
        before = peak()
    """)
    script = (
        script.replace("ROWS", str(ROWS)).replace("VOCAB", str(VOCAB))
        + textwrap.dedent(body)
        + "\nprint(peak() - before)"
    )
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


pytestmark = [
    pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built"),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"),
]


def test_statistics_take_no_memory():
    assert peak_growth("erc.token_stats(logits, labels)") < SLACK


def test_the_loss_takes_the_gradient_and_nothing_else():
    grown = peak_growth("loss(logits.requires_grad_(), labels).backward()")
    assert GRADIENT * 0.9 < grown < GRADIENT + SLACK


def test_an_inplace_loss_takes_no_memory():
    # The non-leaf shares the leaf's memory, so that only the loss itself can raise the peak.
    body = """
        class Identity(torch.autograd.Function):
            @staticmethod
            def forward(ctx, z): return z.detach()
            @staticmethod
            def backward(ctx, g): return None
        loss(Identity.apply(logits.requires_grad_()), labels, inplace_backward=True).backward()
    """
    assert peak_growth(body) < SLACK
