"""The linear forms counted on meta tensors: what the plan says is what is launched, moved and held."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import erc
from benchmarks import linear_plans
from benchmarks.call import count
from benchmarks.linear_plans import H100, HEADS, ROWS, HeadShape, counted, ours, problem, seconds, stored
from erc.linear.plan import plan_of

SMALL = HeadShape("small", 64, 1000)
TOKENS, LENGTH = 256, 64
LOGITS = TOKENS * SMALL.vocab  # how many
PER_TOKEN = TOKENS * 200  # bytes: generous for a table, outputs and inputs of a token, little beside its logits


@pytest.mark.parametrize("rows", [None, 100, 7])  # in one chunk, a few, and many
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
def test_a_plan_is_what_is_counted(rows, logits_dtype):
    given = problem(SMALL, TOKENS, LENGTH)
    row_bytes = SMALL.vocab * (6 if logits_dtype == torch.float32 else 2)
    budget = None if rows is None else rows * row_bytes
    cost = count(lambda: ours(given, memory_budget=budget, logits_dtype=logits_dtype))
    like = torch.empty((), dtype=logits_dtype, device="meta").expand(TOKENS, SMALL.vocab)
    plan = plan_of(like, SMALL.width, torch.bfloat16, budget)
    chunks = plan.rows.chunks(plan.shape)
    windows = sum(
        -(-min(plan.rows.rows, TOKENS - start) // plan.rows.window) for start in range(0, TOKENS, plan.rows.rows)
    )
    assert (chunks == 1) == (rows is None) and windows >= chunks
    assert cost.flops == 6 * LOGITS * SMALL.width
    assert sum(launch.flops > 0 for launch in cost.launches) == windows + 2 * chunks
    assert sum(launch.name.endswith("loss_rows_") for launch in cost.launches) == windows
    weight, hidden = given.weight.nbytes, given.hidden.nbytes
    accumulator = 2 * weight if chunks > 1 else 0
    returned = weight + hidden
    buffers = plan.rows.buffer_bytes(plan.shape)
    assert buffers <= max(budget or 0, buffers if rows is None else 0)
    forward = buffers + hidden + (accumulator or weight)
    backward = accumulator + returned
    assert max(forward, backward) <= cost.peak <= max(forward, backward) + 2 * hidden + 2 * PER_TOKEN
    logit_bytes = logits_dtype.itemsize
    logits = LOGITS * (2 * logit_bytes + 2 + 2 * 2)  # written, read by the loss, whose gradient products read twice
    read = weight * (windows + chunks)
    summed = weight if chunks == 1 else 2 * weight + 4 * weight * (chunks - 1) + 3 * weight
    expected = logits + read + summed
    assert expected <= cost.bytes <= 1.01 * expected + 10 * hidden + 8 * PER_TOKEN


def test_a_frozen_weight_costs_two_products():
    given = problem(SMALL, TOKENS, LENGTH)
    weight = given.weight.detach()

    def call():
        loss = erc.linear_policy_loss(given.hidden, weight, given.labels, **given.arguments).loss
        torch.autograd.grad(loss, given.hidden)

    cost = count(call)
    assert cost.flops == 4 * LOGITS * SMALL.width
    assert cost.peak <= 6 * LOGITS + 2 * given.hidden.nbytes + 2 * PER_TOKEN, "no gradient of the weight is held"


@pytest.mark.parametrize("shape", HEADS, ids=lambda shape: shape.name)
def test_large_heads_stay_near_three_bare_products_by_the_model(shape):
    """By the count, and by the formula that chooses the plan; beyond gradients and accumulator, 1 GiB."""
    cost = counted("erc", shape)
    bare = 6 * ROWS * shape.width * shape.vocab / H100.flops
    like = torch.empty((), device="meta").expand(ROWS, shape.vocab)
    plan = plan_of(like, shape.width, torch.bfloat16, None)
    assert seconds(cost, H100) / bare == pytest.approx(plan.seconds.overlapped / plan.seconds.bare, rel=0.03)
    if shape.width >= 3584:
        assert seconds(cost, H100) <= 1.15 * bare
    given = problem(shape)
    accumulator = 2 * given.weight.nbytes
    assert cost.peak - accumulator <= 2**30 + given.returned + 2**20


def test_the_page_shows_the_present_plan():
    """Of erc; the peers' numbers change with their versions, and counting them takes a minute."""
    found = json.loads(Path(__file__, "../../../results/benchmarks/linear_plans.json").resolve().read_text())
    plans = {"erc": ours, "stored 16-bit logits": stored}
    with mock.patch.object(linear_plans, "PLANS", plans):
        times, counts = linear_plans.time_rows(), linear_plans.count_rows()
    assert [row[: len(times[0])] for row in found["times"]] == [list(row) for row in times]
    assert [row for row in found["counts"] if row[1] in plans] == [list(row) for row in counts]
