"""The operators as PyTorch sees them: constants, fakes, torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import erc
from erc.constants import NUM_PARAMS, header

pytestmark = pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built")
ROOT = Path(__file__).parents[2]
OUTER, INNER, VOCAB = 2, 3, 37


def test_the_constants_of_cpp_are_those_of_python():
    assert (ROOT / "csrc" / "common" / "constants.h").read_text() == header(), "python -m erc.constants > constants.h"


def everything(logits, old_logits, labels, rollout, temperature, objective):
    stats = erc.token_stats(logits, labels, temperature=temperature)
    ratio = erc.entropy_ratio(logits, old_logits, temperature=temperature)
    out = erc.policy_loss(logits, labels, objective=objective, temperature=temperature, **rollout)
    total = out.loss + stats.logprob.mean() + stats.entropy.sum() + stats.logsumexp.mean() + ratio.kl_new_old.sum()
    return total, out.metrics["erc_fraction"]


def problem(rows=INNER):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(OUTER, rows, VOCAB, generator=generator)
    labels = torch.randint(VOCAB, (OUTER, rows), generator=generator)
    stats = erc.token_stats(logits, labels)
    rollout = {
        "old_logprob": stats.logprob + 0.2 * torch.randn(OUTER, rows, generator=generator),
        "old_entropy": stats.entropy * (1 + 0.05 * torch.randn(OUTER, rows, generator=generator)),
        "advantages": torch.randn(OUTER, generator=generator),
    }
    return logits, logits + 0.1 * torch.randn(OUTER, rows, VOCAB, generator=generator), labels, rollout


def check_against_eager(compiled, arguments, temperature, objective):
    logits, *others = arguments
    results = []
    for function in (everything, compiled):
        leaf = logits.clone().requires_grad_()
        total, fraction = function(leaf, *others, temperature, objective)
        total.backward()
        results.append((total.detach(), fraction, leaf.grad))
    for tested, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(tested, expected, rtol=1e-5, atol=1e-6)
    assert results[0][2].any()


@pytest.mark.parametrize("objective", ["erc-dapo", "erc-gspo"])
def test_compile_fullgraph_equals_eager(objective):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True)
    check_against_eager(compiled, problem(), torch.tensor(0.8), objective)


def test_a_temperature_in_a_tensor_and_a_changing_length_compile_nothing_new():
    """Dynamo may widen its guards once, at the second length; after that nothing compiles."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for rows, temperature in ((3, 1.0), (5, 0.9), (8, 0.7), (13, 0.6)):
        check_against_eager(compiled, problem(rows), torch.tensor(temperature), "erc-dapo")
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1] == counts[2] == counts[3] <= counts[0] + 1, counts


def test_fake_tensors_have_the_real_shapes_and_dtypes():
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(2, 3, 5, dtype=torch.bfloat16)
        labels = torch.empty(6, dtype=torch.long)
        params = torch.empty(NUM_PARAMS, dtype=torch.float64)
        logprob, entropy, logsumexp, saved = torch.ops.erc_cpu.stats_forward(logits, labels, None, params, -100)
        assert logprob.shape == entropy.shape == logsumexp.shape == (6,) and saved.shape == (3, 6)
        assert entropy.dtype == torch.float32
