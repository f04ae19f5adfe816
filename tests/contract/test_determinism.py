"""Bitwise equality across runs, threads, batch composition and addresses; agreement of the instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import erc

pytestmark = pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built")
VOCAB = 50_257


def everything(logits, labels):
    leaf = logits.clone().requires_grad_()
    rows = len(labels)
    out = erc.policy_loss(
        leaf,
        labels,
        old_logprob=torch.full((rows,), -10.0),
        advantages=torch.ones(rows),
        old_entropy=torch.full((rows,), 9.0),
        objective=erc.objective("dapo", entropy_coef=0.01, entropy_reduction="loss"),
        normalizer=1.0,
    )
    out.loss.backward()
    return [*erc.token_stats(logits, labels)[:3], out.logprob, out.entropy, out.per_token_loss, leaf.grad]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def problem(request):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(5, VOCAB, generator=generator)).to(request.param)
    return logits, torch.randint(VOCAB, (5,), generator=generator)


def assert_bitwise(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_runs_and_thread_counts(problem):
    threads = torch.get_num_threads()
    expected = everything(*problem)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_bitwise(everything(*problem), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_see_its_batch(problem):
    logits, labels = problem
    expected = everything(logits, labels)
    for row in range(len(labels)):
        assert_bitwise(everything(logits[row : row + 1], labels[row : row + 1]), [e[row : row + 1] for e in expected])
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_bitwise(everything(logits[order], labels[order]), [e[order] for e in expected])


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_a_row_does_not_see_its_address(problem, offset):
    logits, labels = problem
    shifted = torch.empty(logits.numel() + offset, dtype=logits.dtype)[offset:].view_as(logits).copy_(logits)
    assert_bitwise(erc.token_stats(shifted, labels), erc.token_stats(logits, labels))


def test_statistics_and_losses_agree_bit_for_bit(problem):
    logprob, entropy, _, loss_logprob, loss_entropy, *_ = everything(*problem)
    assert torch.equal(logprob, loss_logprob) and torch.equal(entropy, loss_entropy)


def test_fused_and_two_phase_gradients_agree_bit_for_bit(problem):
    logits, labels = problem
    fused, phased = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    objective = erc.objective("reinforce", reduction="none")
    arguments = {"old_logprob": None, "advantages": torch.linspace(-1, 1, 5), "objective": objective}
    erc.policy_loss(fused, labels, **arguments).loss.sum().backward()
    stats = erc.token_stats(phased, labels)
    erc.objective_loss(stats.logprob, stats.entropy, **arguments).loss.sum().backward()
    assert torch.equal(fused.grad, phased.grad)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_meets_the_contract(isa):
    script = textwrap.dedent("""
        import torch
        from erc.backend import cpu_isa
        from erc.check import check_backend
        print(cpu_isa(), all(check_backend("cpu", d, "cpu").passed for d in (torch.float32, torch.bfloat16)))
    """)
    environment = os.environ | {"ERC_CPU_ISA": isa}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    ran, passed = printed.stdout.split()
    if ran != isa:
        pytest.skip(f"this processor does not run {isa}, but {ran}")
    assert passed == "True"
