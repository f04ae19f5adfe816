"""The linear forms in 16 bit: exact logits, gradients rounded once, chunks of several windows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import erc
from erc.linear import loss as linear_loss
from erc.linear import products
from erc.linear import stats as linear_stats
from erc.linear.plan import RowPlan, modelled_seconds
from tests.oracle import ROUNDING

ROWS, WIDTH, VOCAB = 9, 8, 45
LABELS = torch.tensor([3, -100, 7, 40, 44, 0, 11, 12, 5])
HEADS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.fixture(params=["cpu product", "tiles"])
def small_tiles(request, monkeypatch):
    """Tiles of the weight, also where the processor multiplies bfloat16; and what this processor does."""
    monkeypatch.setattr(products, "TILE_ROWS", 16)
    if request.param == "tiles":
        monkeypatch.setattr(products, "_cpu_multiplies", lambda: False)
    elif not products._cpu_multiplies():
        pytest.skip("this processor does not multiply bfloat16")


def problem(hidden_dtype, weight_dtype, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = (4 * torch.randn(ROWS, WIDTH, generator=generator)).to(hidden_dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(weight_dtype).requires_grad_()
    offset = torch.randn(VOCAB, generator=generator).to(weight_dtype).requires_grad_() if bias else None
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), offset if offset is None else offset.double())
    logprob = erc.reference.token_stats(logits, LABELS).logprob.float().detach().view(1, ROWS)
    arguments = {
        "old_logprob": logprob + 0.2 * torch.randn(1, ROWS, generator=generator),
        "advantages": torch.randn(1, ROWS, generator=generator),
        "old_entropy": 1 + torch.rand(1, ROWS, generator=generator),
    }
    return (hidden, weight, offset), arguments


def loss_of(objective, head, arguments, **options):
    hidden, weight, bias = head
    labels = LABELS.view(1, ROWS)
    call = partial(erc.linear_policy_loss, bias=bias, objective=objective, **arguments, **options)
    return call(hidden.view(1, ROWS, WIDTH), weight, labels)


def exact_loss(objective, head, arguments):
    hidden, weight, bias = doubles = [None if t is None else t.detach().double().requires_grad_() for t in head]
    logits = torch.nn.functional.linear(hidden, weight, bias).view(1, ROWS, VOCAB)
    arguments = {name: value.double() for name, value in arguments.items()}
    out = erc.reference.policy_loss(logits, LABELS.view(1, ROWS), objective=objective, **arguments)
    leaves = [t for t in doubles if t is not None]
    return out, torch.autograd.grad(out.loss, leaves), logits.abs().max()


def assert_rounded_once(grads, exact, bound):
    """Products of gradients that were rounded once: within the rounding of each of their terms."""
    for value, expected in zip(grads, exact, strict=True):
        assert expected.abs().max() > 0, "a gradient that is zero everywhere tests nothing"
        assert (value.double() - expected).abs().max() <= bound * expected.abs().max()
        assert (0.97 * value.double() - expected).abs().max() > bound * expected.abs().max(), "a wrong one is noticed"


@pytest.mark.parametrize("objective", ["erc-dapo", "gspo"])  # fused, and two-phase
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtypes", HEADS, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_logits_of_16_bit_operands_are_float32(dtypes, bias, objective, kernels, small_tiles):
    head, arguments = problem(*dtypes, bias)
    chosen = erc.objective(objective, entropy_coef=0.1)
    exact, exact_grads, largest = exact_loss(chosen, head, arguments)
    options = {"grad_scale": 1.0} if dtypes[0] == torch.float16 else {}
    for rows in (None, 5):
        budget = None if rows is None else rows * VOCAB * (4 + (2 if dtypes[0] == dtypes[1] else 0))
        out = loss_of(chosen, head, arguments, memory_budget=budget, **options)
        assert (out.logprob.double() - exact.logprob).abs().max() <= 4e-7 * largest
        assert (out.entropy.double() - exact.entropy).abs().max() <= 4e-7 * largest
        grads = torch.autograd.grad(out.loss, [t for t in head if t is not None])
        assert [g.dtype for g in grads] == [t.dtype for t in head if t is not None]
        assert_rounded_once(grads, exact_grads, 2 * ROUNDING[dtypes[0]])


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_windows_of_a_chunk_change_nothing(objective, kernels, small_tiles, monkeypatch):
    head, arguments = problem(torch.bfloat16, torch.bfloat16)
    whole = loss_of(objective, head, arguments)
    expected = torch.autograd.grad(whole.loss, head)
    for module in (linear_loss, linear_stats):
        monkeypatch.setattr(module, "plan_rows", lambda *_: RowPlan(rows=8, window=3), raising=True)
    out = loss_of(objective, head, arguments)
    assert torch.equal(out.logprob, whole.logprob) and torch.equal(out.entropy, whole.entropy)
    for value, right in zip(torch.autograd.grad(out.loss, head), expected, strict=True):
        torch.testing.assert_close(value, right, rtol=2.0**-7, atol=2.0**-9 * float(right.abs().max()))


@pytest.mark.parametrize(
    ("dtypes", "logits_dtype"),
    [(dtypes, wide) for dtypes in (*HEADS, (torch.float32,) * 2) for wide in (None, torch.float32)]
    + [((torch.bfloat16,) * 2, torch.bfloat16)],
)
def test_the_plan_counts_conversions_of_the_weight_where_there_are_any(dtypes, logits_dtype, small_tiles, monkeypatch):
    converted = []
    by_tiles = products._write_by_tiles
    monkeypatch.setattr(products, "_write_by_tiles", lambda *given: converted.append(1) or by_tiles(*given))
    (hidden, weight, _), _ = problem(*dtypes, bias=False)
    erc.linear_token_stats(hidden, weight, LABELS, logits_dtype=logits_dtype, backend="cpu")
    plan = erc.explain(hidden, weight=weight, logits_dtype=logits_dtype, backend="cpu").plan
    assert plan.shape.converts == ("the weight is converted once per 9 rows" in str(plan)) == bool(converted)
    other = modelled_seconds(plan.rows, plan.shape._replace(converts=not plan.shape.converts), plan.machine)
    assert (plan.seconds.overlapped > other.overlapped) == bool(converted)


def test_16_bit_logits_are_what_a_16_bit_head_gives(kernels):
    (hidden, weight, _), _ = problem(torch.bfloat16, torch.bfloat16, bias=False)
    rounded = erc.token_stats(hidden @ weight.t(), LABELS)
    stats = erc.linear_token_stats(hidden, weight, LABELS, logits_dtype=torch.bfloat16)
    torch.testing.assert_close(stats.logprob, rounded.logprob, rtol=1e-6, atol=1e-6)
    exact = erc.linear_token_stats(hidden, weight, LABELS)
    assert (exact.logprob - stats.logprob).abs().max() > 1e-3, "rounding logits to bfloat16 shows"


def test_float16_without_a_scale_rounds_no_gradient_before_it():
    """Gradients near 2^-26 vanish in float16; times the loss scale of the upstream gradient they do not."""
    for weight_dtype in (torch.float16, torch.float32):
        head, arguments = problem(torch.float16, weight_dtype)
        arguments["advantages"] = arguments["advantages"] * 2.0**-26
        _, exact, _ = exact_loss("dapo", head, arguments)
        loss = loss_of("dapo", head, arguments).loss * 2.0**26
        grads = torch.autograd.grad(loss, head)
        assert_rounded_once(grads, [2.0**26 * g for g in exact], 2 * ROUNDING[torch.float16])


@pytest.mark.parametrize(
    ("dtypes", "logits_dtype"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.float16),
        ((torch.bfloat16, torch.float32), torch.bfloat16),
        ((torch.float32, torch.float32), torch.bfloat16),
    ],
)
def test_a_dtype_that_no_product_has_is_named(dtypes, logits_dtype):
    (hidden, weight, _), _ = problem(*dtypes)
    with pytest.raises(ValueError, match=r"logits_dtype must be None or torch\.float32"):
        erc.linear_token_stats(hidden, weight, logits_dtype=logits_dtype)


def test_a_narrower_weight_is_refused():
    (hidden, weight, _), _ = problem(torch.float32, torch.bfloat16)
    with pytest.raises(TypeError, match="weight must have the dtype of hidden"):
        erc.linear_token_stats(hidden, weight)


# ---- accumulation into the caller's tensor ---------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["dapo", "gspo"])  # fused, and two-phase
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_is_added_to_main_grad(dtype, rows, objective, kernels):
    head, arguments = problem(dtype, dtype)
    budget = None if rows is None else rows * VOCAB * (4 if dtype == torch.float32 else 6)
    before = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))
    main_grad = before.clone()
    (3 * loss_of(objective, head, arguments, memory_budget=budget, main_grad=main_grad).loss).backward()
    hidden, weight, bias = head
    assert weight.grad is None
    _, exact, _ = exact_loss(objective, head, arguments)
    bound = 1e-5 if dtype == torch.float32 else 2 * ROUNDING[dtype]
    assert_rounded_once((hidden.grad, main_grad - before, bias.grad), [3 * g for g in exact], bound)


def test_a_main_grad_that_cannot_take_the_gradient_is_named():
    head, arguments = problem(torch.bfloat16, torch.bfloat16)
    for main_grad, error in (
        (torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16), TypeError),
        (torch.zeros(VOCAB, WIDTH + 1), ValueError),
        (torch.zeros(VOCAB, 2 * WIDTH)[:, ::2], ValueError),
        ([0.0], TypeError),
    ):
        with pytest.raises(error, match="main_grad must be"):
            loss_of("dapo", head, arguments, main_grad=main_grad)
    head[1].requires_grad_(False)
    with pytest.raises(ValueError, match="main_grad must be None"):
        loss_of("dapo", head, arguments, main_grad=torch.zeros(VOCAB, WIDTH))
