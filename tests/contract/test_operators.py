"""The operators as PyTorch sees them: opcheck, fakes, torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import erc
from erc.call import TokenArguments, loss_call
from erc.constants import NUM_PARAMS, PAIRED_OUTPUTS, header
from erc.ops import SCHEMAS
from erc.rows import row_scaling

pytestmark = pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built")
ROOT = Path(__file__).parents[2]
OUTER, INNER, VOCAB = 2, 3, 37
ROWS = OUTER * INNER


def test_the_constants_of_cpp_are_those_of_python():
    assert (ROOT / "csrc" / "common" / "constants.h").read_text() == header(), "python -m erc.constants > constants.h"


def a_call(logits):
    """A fused loss with every term that a kernel knows, past its checks."""
    shape = logits.shape[:-1]
    arguments = TokenArguments(
        old_logprob=torch.full(shape, -3.0),
        advantages=torch.ones(OUTER),
        mask=torch.rand(shape),
        old_entropy=torch.full(shape, 3.0),
        ref_logprob=torch.full(shape, -3.0),
        nll_mask=torch.ones(shape),
        grad_scale=torch.tensor(2.0),
    )
    objective = erc.objective("erc-dapo", kl=erc.KLPenalty(), entropy_coef=0.1, nll_coef=0.1)
    scaling = row_scaling(torch.ones(shape), None, 1.0, shape, logits)
    return loss_call(objective, arguments, torch.randint(VOCAB, shape), -100, logits, scaling, VOCAB, fused=True)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, requires_grad):
    logits = torch.randn(OUTER, INNER, VOCAB)
    operators, call = torch.ops.erc_cpu, a_call(logits)
    labels = torch.randint(VOCAB, (ROWS,))
    params = torch.tensor([0.9, 20.0, 1.1] + [0.0] * (NUM_PARAMS - 3), dtype=torch.float64)
    rows = (logits, labels, None, params, -100)
    some = (torch.tensor([5, -1, 0, 2, 3, 1]), 0)
    saved = operators.stats_forward(*rows)[3]
    paired = operators.paired_forward(logits, logits * 0.9, None, params)[1]
    grads = [torch.randn(ROWS) for _ in range(3)]
    loss = (call.scaling.temperature, *call.tokens, False, True)
    table, labels_left, counter = call.token_table(operators)
    per_token, flags = torch.zeros(4, ROWS), torch.zeros(ROWS, dtype=torch.int32)
    arguments = {
        "stats_forward": rows,
        "stats_forward_": (*rows, *some, torch.zeros(6, ROWS)),
        "stats_backward": (*rows, saved, *grads),
        "stats_backward_": (*rows, *some, saved, *grads, torch.zeros_like(logits, dtype=torch.bfloat16)),
        "partial_stats_": (*rows, None, 0, 0, torch.zeros(4, ROWS)),
        "token_table": (*call.tokens, VOCAB, False),
        "loss_rows_": (
            *(logits, labels_left, call.scaling.temperature, call.tokens.params, -100),
            *(*some, table, per_token, flags, torch.zeros_like(logits)),
        ),
        "token_losses": (
            *(-torch.rand(ROWS), torch.rand(ROWS), table, labels_left, call.tokens.params, -100),
            *(torch.randn(ROWS), torch.randn(ROWS), torch.rand(ROWS) < 0.5, None, torch.rand(ROWS) < 0.5),
        ),
        "token_summary": (per_token, flags, table, labels_left, counter, call.tokens.params, -100),
        "policy_loss": (logits, *loss),
        "policy_loss_": (logits, *loss),
        "scale_rows": (logits, torch.randn(ROWS)),
        "scale_rows_": (logits, torch.randn(())),
        "paired_forward": (logits, logits * 0.9, None, params),
        "paired_backward": (logits, logits * 0.9, None, params, paired, torch.randn(len(PAIRED_OUTPUTS), ROWS)),
    }[name]
    if requires_grad and name in ("stats_forward", "policy_loss", "paired_forward"):
        arguments = (logits.clone().requires_grad_(), *arguments[1:])
    opcheck(getattr(operators, name), arguments)


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
