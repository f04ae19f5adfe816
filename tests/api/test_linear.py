"""The linear forms: the loss and statistics of hidden @ weight.T without the logits."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import erc

ROWS, WIDTH, VOCAB = 13, 8, 301  # 301 = nine whole blocks of the CPU sweep and a tail


def make_head(dtype=torch.float32, rows=ROWS, vocab=VOCAB, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, WIDTH, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(vocab, generator=generator).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[2] = -100
    return hidden, weight, offset, labels


def token_arguments(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "old_logprob": -6 + 0.3 * torch.randn(rows, generator=generator),
        "advantages": torch.randn(rows, generator=generator),
        "old_entropy": 3 + 0.3 * torch.rand(rows, generator=generator),
        "mask": (torch.rand(rows, generator=generator) > 0.2).float(),
    }


def oracle_gradients(function, *tensors):
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    loss = function(*doubles)
    return loss, torch.autograd.grad(loss, [t for t in doubles if t is not None])


def assert_close_to_oracle(tested, exact, bound):
    for value, expected in zip(tested, exact, strict=True):
        scale = expected.abs().max()
        assert scale > 0, "a gradient that is zero everywhere tests nothing"
        assert (value.double() - expected).abs().max() <= bound * scale


@pytest.mark.parametrize("objective", ["erc-dapo", "gppo", "erc-gspo", "dr-grpo"])
@pytest.mark.parametrize(
    "budget", [None, 5 * VOCAB * 4]
)  # all rows in one chunk; five rows a chunk, the last one of three
def test_linear_policy_loss_matches_the_oracle(objective, budget):
    hidden, weight, bias, labels = make_head()
    shape = (1, ROWS)  # sequence-level objectives need rows of a sequence
    arguments = {name: value.view(shape) for name, value in token_arguments().items()}
    chosen = erc.objective(objective, entropy_coef=0.1)
    settings = {"objective": chosen, "temperature": 0.7, "softcap": 20.0, "logit_scale": 1.3}
    out = erc.linear_policy_loss(
        hidden.view(*shape, WIDTH), weight, labels.view(shape), bias=bias, memory_budget=budget, **arguments, **settings
    )
    grads = torch.autograd.grad(out.loss, (hidden, weight, bias))

    def reference(h, w, b):
        logits = torch.nn.functional.linear(h, w, b).view(*shape, VOCAB)
        doubles = {name: value.double() for name, value in arguments.items()}
        return erc.reference.policy_loss(logits, labels.view(shape), **doubles, **settings).loss

    loss, exact = oracle_gradients(reference, hidden, weight, bias)
    torch.testing.assert_close(out.loss.double(), loss, rtol=2e-5, atol=2e-6)
    assert_close_to_oracle(grads, exact, 3e-5)
    with pytest.raises(AssertionError):
        assert_close_to_oracle([g * 1.001 for g in grads], exact, 3e-5)


@pytest.mark.parametrize("budget", [None, 4 * VOCAB * 4])
def test_linear_token_stats_matches_the_oracle_in_all_three_outputs(budget):
    hidden, weight, bias, labels = make_head()
    stats = erc.linear_token_stats(hidden, weight, labels, bias=bias, temperature=0.7, memory_budget=budget)
    upstream = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(list(stats[:3]), (hidden, weight, bias), list(upstream))

    def reference(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        exact = erc.reference.token_stats(logits, labels, temperature=0.7)
        return sum((u.double() * stat).sum() for u, stat in zip(upstream, exact[:3], strict=True))

    _, exact = oracle_gradients(reference, hidden, weight, bias)
    assert_close_to_oracle(grads, exact, 3e-5)
    with pytest.raises(AssertionError):
        assert_close_to_oracle([torch.zeros_like(g) for g in grads], exact, 3e-5)


def test_statistics_without_labels_have_no_logprob():
    hidden, weight, _, _ = make_head(bias=False)
    stats = erc.linear_token_stats(hidden, weight)
    assert stats.logprob is None
    torch.testing.assert_close(stats.entropy, erc.token_stats(hidden @ weight.t()).entropy)


def test_fused_path_takes_six_nvd_flops_and_ignored_rows_none():
    hidden, weight, _, labels = make_head(bias=False)
    active = int((labels != -100).sum())
    arguments = token_arguments()
    arguments.pop("mask")
    with FlopCounterMode(display=False) as counter:
        erc.linear_policy_loss(hidden, weight, labels, objective="erc-dapo", **arguments).loss.backward()
    assert counter.get_total_flops() == 6 * active * VOCAB * WIDTH


def test_statistics_recompute_in_the_backward_and_only_there():
    hidden, weight, _, labels = make_head(bias=False)
    active = int((labels != -100).sum())
    with FlopCounterMode(display=False) as counter:
        stats = erc.linear_token_stats(hidden, weight, labels)
        assert counter.get_total_flops() == 2 * active * VOCAB * WIDTH
        stats.logprob.sum().backward()
    assert counter.get_total_flops() == 8 * active * VOCAB * WIDTH


def test_frozen_weight_costs_no_weight_gradient():
    hidden, weight, _, labels = make_head(bias=False)
    weight.requires_grad_(False)
    active = int((labels != -100).sum())
    with FlopCounterMode(display=False) as counter:
        erc.linear_policy_loss(
            hidden, weight, labels, objective="dapo", old_logprob=None, advantages=torch.ones(ROWS)
        ).loss.backward()
    assert counter.get_total_flops() == 4 * active * VOCAB * WIDTH
    assert hidden.grad is not None and weight.grad is None


def test_num_active_compacts_without_counting():
    hidden, weight, _, labels = make_head(bias=False)
    arguments = {"old_logprob": None, "advantages": torch.ones(ROWS), "objective": "dapo"}
    plain = erc.linear_policy_loss(hidden, weight, labels, **arguments)
    counted = erc.linear_policy_loss(hidden, weight, labels, num_active=ROWS - 1, **arguments)
    assert torch.equal(plain.loss, counted.loss)


def test_tied_embedding_accumulates_both_gradients():
    _, weight, _, labels = make_head(bias=False)
    tokens = torch.arange(ROWS)

    def loss(table, function):
        return function(table[tokens] * 2, table)

    fused = loss(
        weight,
        lambda h, w: (
            erc.linear_policy_loss(h, w, labels, old_logprob=None, advantages=torch.ones(ROWS), objective="dapo").loss
        ),
    )
    (tested,) = torch.autograd.grad(fused, weight)

    def reference(table):
        return loss(
            table,
            lambda h, w: (
                erc.reference.policy_loss(
                    h @ w.t(), labels, old_logprob=None, advantages=torch.ones(ROWS).double(), objective="dapo"
                ).loss
            ),
        )

    _, exact = oracle_gradients(reference, weight)
    assert_close_to_oracle([tested], exact, 3e-5)


@pytest.mark.parametrize("chunks", [0, 1, 2, 4])
def test_a_bfloat16_weight_gradient_of_any_number_of_chunks(chunks):
    """None gives zeros; one is never held in float32; a second one moves the sum there."""
    rows, vocab = 12, 64
    hidden, weight, _, _ = make_head(torch.bfloat16, rows, vocab, bias=False)
    labels = torch.full((rows,), -100) if chunks == 0 else torch.arange(rows)
    arguments = {"old_logprob": None, "advantages": torch.linspace(-1, 2, rows), "objective": "dapo", "normalizer": 4.0}
    budget = rows // max(chunks, 1) * vocab * 6  # a float32 logit and its 16-bit gradient
    erc.linear_policy_loss(hidden, weight, labels, memory_budget=budget, **arguments).loss.backward()
    assert weight.grad.dtype == torch.bfloat16
    if chunks == 0:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
        return
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    erc.reference.policy_loss(exact_hidden @ exact_weight.T, labels, **arguments).loss.backward()
    bound = 2.0**-6 * exact_weight.grad.abs().max()  # gradients of logits and products rounded to bfloat16
    assert (weight.grad.double() - exact_weight.grad).abs().max() <= bound
    assert (0.9 * weight.grad.double() - exact_weight.grad).abs().max() > bound, "a wrong gradient would be noticed"


def test_weight_gradient_accumulates_in_float32_across_bfloat16_chunks():
    """512 chunks of one row: accumulated in bfloat16 the sum would lose most of its terms."""
    rows, vocab = 512, 32
    hidden = torch.ones(rows, WIDTH, dtype=torch.bfloat16)
    weight = torch.zeros(vocab, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long)
    arguments = {"old_logprob": None, "advantages": torch.ones(rows), "objective": "dapo", "normalizer": 1.0}
    erc.linear_policy_loss(hidden, weight, labels, memory_budget=1, **arguments).loss.backward()
    # Uniform rows: each adds 1/V to every column but its label's, whose gradient is 1/V - 1.
    expected = torch.full((vocab,), rows / vocab)
    expected[0] -= rows
    assert torch.equal(weight.grad[:, 0].float(), expected)


def test_autocast_runs_the_gemms_in_its_dtype():
    hidden, weight, _, labels = make_head(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = erc.linear_policy_loss(
            hidden, weight, labels, old_logprob=None, advantages=torch.ones(ROWS), objective="dapo"
        )
    out.loss.backward()
    with torch.no_grad():
        exact = erc.token_stats(hidden.bfloat16().float() @ weight.bfloat16().float().t(), labels)
    torch.testing.assert_close(out.logprob, exact.logprob, rtol=1e-6, atol=1e-5)
    assert weight.grad.dtype == torch.float32


def test_upstream_gradient_scales_and_a_second_backward_raises():
    hidden, weight, _, labels = make_head(bias=False)
    arguments = {"old_logprob": None, "advantages": torch.ones(ROWS), "objective": "dapo"}
    (plain,) = torch.autograd.grad(erc.linear_policy_loss(hidden, weight, labels, **arguments).loss, weight)
    loss = erc.linear_policy_loss(hidden, weight, labels, **arguments).loss
    (tripled,) = torch.autograd.grad(3 * loss, weight, retain_graph=True)
    torch.testing.assert_close(tripled, 3 * plain)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_reduction_none_differentiates_every_row_by_its_own_upstream():
    hidden, weight, _, labels = make_head(bias=False)
    objective = erc.objective("dapo", reduction="none")
    upstream = torch.randn(ROWS)
    out = erc.linear_policy_loss(
        hidden, weight, labels, old_logprob=None, advantages=torch.ones(ROWS), objective=objective
    )
    grads = torch.autograd.grad(out.loss, (hidden, weight), upstream)
    dense = erc.policy_loss(
        hidden @ weight.t(), labels, old_logprob=None, advantages=torch.ones(ROWS), objective=objective
    )
    torch.testing.assert_close(grads, torch.autograd.grad(dense.loss, (hidden, weight), upstream), rtol=1e-4, atol=1e-5)


def test_no_grad_computes_no_gradient():
    hidden, weight, _, labels = make_head(bias=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = erc.linear_policy_loss(
            hidden, weight, labels, old_logprob=None, advantages=torch.ones(ROWS), objective="dapo"
        )
    assert not out.loss.requires_grad
    assert counter.get_total_flops() == 2 * (ROWS - 1) * VOCAB * WIDTH


def test_no_active_row_gives_zero():
    hidden, weight, _, labels = make_head(bias=False)
    labels = torch.full_like(labels, -100)
    out = erc.linear_policy_loss(
        hidden, weight, labels, old_logprob=None, advantages=torch.ones(ROWS), objective="dapo"
    )
    out.loss.backward()
    assert out.loss == 0 and not weight.grad.any() and not hidden.grad.any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": torch.zeros(5, WIDTH + 1)}, "hidden"),
        ({"bias": torch.zeros(VOCAB + 1)}, "bias"),
        ({"weight": torch.zeros(VOCAB, WIDTH, dtype=torch.float64)}, "weight"),
        ({"labels": torch.full((ROWS,), VOCAB)}, "labels"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"hidden": torch.zeros(ROWS, WIDTH, dtype=torch.int64)}, "hidden"),
    ],
)
def test_bad_arguments_are_named(change, match):
    hidden, weight, _, labels = make_head(bias=False)
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "old_logprob": None,
        "advantages": torch.ones(ROWS),
    }
    with pytest.raises((ValueError, TypeError, IndexError), match=match):
        erc.linear_policy_loss(**(arguments | change), objective="dapo")


def test_peak_memory_does_not_grow_with_rows_times_vocabulary():
    """1,024 rows x 50,257 columns are 206 MB of float32 logits; with a budget of 16 MB the peak rises by far less."""
    script = textwrap.dedent("""
        import resource, torch, erc
        rows, width, vocab = 1024, 16, 50257
        hidden = torch.randn(rows, width, requires_grad=True)
        weight = torch.randn(vocab, width, requires_grad=True)
        labels = torch.randint(vocab, (rows,))
        def step(count):
            rows = {"advantages": torch.ones(count), "old_logprob": None, "memory_budget": 16 * 2**20}
            erc.linear_policy_loss(hidden[:count], weight, labels[:count], objective="dapo", **rows).loss.backward()
        step(8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step(rows)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """)
    grown = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert grown < 64 * 2**20, f"the peak rose by {grown / 2**20:.0f} MiB"


def test_without_an_active_row_every_gradient_is_zero():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels, advantages = torch.full((3,), -100), torch.ones(3)
    for objective in ("dapo", "gspo"):
        out = erc.linear_policy_loss(
            hidden[None], weight, labels[None], old_logprob=None, advantages=advantages[None], objective=objective
        )
        for gradient in torch.autograd.grad(out.loss, (hidden, weight)):
            assert (gradient == 0).all()
