"""Tensors on another GPU than the current one: kernels go to the tensors' device and its stream, and the caller's
current device stays what it was."""

from __future__ import annotations

import pytest
import torch

import erc
from erc.backend import why_not

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no GPU, or only one: torch.cuda.device_count() < 2"),
]
VOCAB = 40_960  # rows that few programs share: every kernel of a backend takes part


@pytest.fixture(params=["cuda", "triton"])
def name(request):
    reason = why_not(request.param, torch.device("cuda", 1))
    if reason is not None:
        pytest.skip(reason)
    return request.param


def results(name: str, device: str, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCAB, generator=generator).bfloat16().to(device).requires_grad_()
    labels = torch.randint(VOCAB, (rows,), generator=generator).to(device)
    values = torch.ones(rows, device=device)
    given = {"old_logprob": -10 * values, "old_entropy": 10 * values, "advantages": values}
    out = erc.policy_loss(logits, labels, objective="erc-dapo", backend=name, **given)
    (3 * out.loss).backward()
    stats = erc.token_stats(logits, labels, backend=name)
    (pair,) = torch.autograd.grad(
        erc.entropy_ratio(logits, 2 * logits.detach(), backend=name).kl_new_old.sum(), [logits]
    )
    return [out.loss, out.logprob, out.entropy, logits.grad, *stats, pair]


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("current", [0, 1])
def test_the_current_device_does_not_matter(name, rows, current):
    expected = results(name, "cuda:0", rows)
    with torch.cuda.device(current):
        tested = results(name, "cuda:1", rows)
        assert torch.cuda.current_device() == current
    for a, b in zip(expected, tested, strict=True):
        assert b.device == torch.device("cuda", 1) and torch.equal(a.cpu(), b.cpu())
    assert tested[3].any()


def test_work_goes_to_the_stream_of_the_tensors_device(name):
    """A side stream of GPU 1, busy for long: the call returns at once, and what it writes comes after."""
    side, device = torch.cuda.Stream(1), torch.device("cuda", 1)
    logits, labels = torch.zeros(4, VOCAB, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    erc.token_stats(logits, labels, backend=name)
    torch.cuda.synchronize(1)
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        logits.fill_(1.0).scatter_(1, labels[:, None], 3.0)
        with torch.cuda.device(0):
            stats = erc.token_stats(logits, labels, backend=name)
        assert not side.query(), "the call waited for the GPU"
    side.synchronize()
    expected = torch.log_softmax(logits, -1)[:, 0]
    torch.testing.assert_close(stats.logprob, expected)
