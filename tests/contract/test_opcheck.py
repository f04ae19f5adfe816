"""PyTorch's own checks of every operator on every backend: schema, autograd registration, fakes, functionalization."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import erc
from erc.call import TokenArguments, loss_call
from erc.constants import NUM_PARAMS, PAIRED_OUTPUTS
from erc.ops import SCHEMAS
from erc.rows import row_scaling
from tests.backends import INTERPRETED, OnDevice, operators  # noqa: F401
from tests.oracle import random_labels, random_logits

OUTER, INNER, VOCAB = 2, 3, 37
ROWS = OUTER * INNER


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


def support_arguments(labels: torch.Tensor) -> tuple[tuple, tuple]:
    """Ids and offsets of a support that holds the label and the next tokens, and what is written of it: kept logits,
    log-probs, state and dense labels."""
    support = erc.SamplingSupport.from_ids(torch.stack([labels, (labels + 1) % VOCAB, (labels + 5) % VOCAB], 1))
    outputs = (torch.zeros(3 * ROWS),), torch.zeros(ROWS), torch.zeros(3, ROWS), torch.zeros(ROWS, dtype=torch.long)
    return (support.token_ids, support.offsets), outputs


def operator_arguments(name: str, ops) -> tuple:
    """Arguments of an operator of `ops`, on the CPU."""
    logits = torch.randn(OUTER, INNER, VOCAB)
    call = a_call(logits)
    labels = torch.randint(VOCAB, (ROWS,))
    params = torch.tensor([0.9, 20.0, 1.1] + [0.0] * (NUM_PARAMS - 3), dtype=torch.float64)
    rows = (logits, labels, None, params, -100)
    some = (torch.tensor([5, -1, 0, 2, 3, 1]), 0)
    saved = ops.stats_forward(*rows)[3]
    paired = ops.paired_forward(logits, logits * 0.9, None, params)[1]
    grads = [torch.randn(ROWS) for _ in range(3)]
    loss = (call.scaling.temperature, *call.tokens, None, None, False, True)
    table, labels_left, counter = call.token_table(ops)
    kept, over = support_arguments(labels)
    full = ops.stats_forward(*rows)
    per_token, flags = torch.zeros(4, ROWS), torch.zeros(ROWS, dtype=torch.int32)
    return {
        "stats_forward": rows,
        "stats_forward_": (*rows, *some, torch.zeros(6, ROWS)),
        "stats_backward": (*rows, saved, *grads),
        "stats_backward_": (*rows, *some, saved, *grads, torch.zeros_like(logits, dtype=torch.bfloat16)),
        "partial_stats_": (*rows, None, 0, 0, torch.zeros(4, ROWS)),
        "support_forward_": (*rows, *some, 0, VOCAB, *kept, False, *over[0], *full, *over[1:]),
        "support_backward_": (
            *(labels, None, params, *some, 0, *kept, over[0][0], full[3], full[0], over[2], over[3]),
            *(grads[0], None, *grads[1:], torch.zeros_like(logits)),
        ),
        "token_table": (*call.tokens, VOCAB, False),
        "loss_rows_": (
            *(logits, labels_left, call.scaling.temperature, call.tokens.params, -100),
            *(*some, table, per_token, flags, None, torch.zeros_like(logits)),
        ),
        "token_losses": (
            *(-torch.rand(ROWS), torch.rand(ROWS), table, labels_left, call.tokens.params, -100),
            *(torch.randn(ROWS), torch.randn(ROWS), torch.rand(ROWS) < 0.5, None, torch.rand(ROWS) < 0.5),
        ),
        "token_summary": (per_token, -torch.rand(ROWS), flags, table, labels_left, counter, call.tokens.params, -100),
        "policy_loss": (logits, *loss),
        "policy_loss_": (logits, *loss),
        "scale_rows": (logits, torch.randn(ROWS)),
        "scale_rows_": (logits, torch.randn(())),
        "paired_forward": (logits, logits * 0.9, None, params),
        "paired_backward": (logits, logits * 0.9, None, params, paired, torch.randn(len(PAIRED_OUTPUTS), ROWS)),
    }[name]


def with_support(arguments: tuple) -> tuple:
    """Those of a fused loss, over a support."""
    (token_ids, offsets), _ = support_arguments(arguments[2].reshape(-1))
    return (*arguments[:-4], token_ids, offsets, *arguments[-2:])


@pytest.mark.parametrize("name", ["policy_loss", "policy_loss_"])
def test_opcheck_over_a_support(name, operators):  # noqa: F811
    arguments = with_support(operator_arguments(name, operators.ops))
    if isinstance(operators.ops, OnDevice):
        pytest.skip("copies to a device are no operator")
    if name == "policy_loss":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    opcheck(getattr(operators.ops, name), arguments)


@pytest.mark.parametrize("requires_grad", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name, requires_grad, operators):  # noqa: F811
    arguments = operator_arguments(name, operators.ops)
    if isinstance(operators.ops, OnDevice):
        pytest.skip("copies to a device are no operator")
    if requires_grad and name in ("stats_forward", "policy_loss", "paired_forward"):
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
    opcheck(getattr(operators.ops, name), arguments)


def test_compiles_into_one_graph(kernels):
    if kernels == "torch":
        pytest.skip("PyTorch's own operators read their params")
    logits, labels, advantages = random_logits(4, 70), random_labels(4, V=70), torch.ones(4)

    def forward(rows):
        loss = erc.policy_loss(rows, labels, old_logprob=None, advantages=advantages, objective="ppo").loss
        return loss + erc.token_stats(rows, labels).entropy.sum()

    eager, compiled = (logits.clone().requires_grad_(True) for _ in range(2))
    forward(eager).backward()
    torch._dynamo.reset()  # what was compiled for another backend
    torch.compile(forward, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(compiled.grad, eager.grad) and (eager.grad != 0).any()
