"""Rows of some tokens, gradients of a narrower dtype, and scaling: what the row operators of every backend can do
beyond what the public functions of logits ask of them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from erc.constants import Column, KLKind, Param, Present
from erc.ops import stats_dtype
from tests.backends import INTERPRETED, OnDevice, every_form, params, stored  # noqa: F401
from tests.oracle import random_logits

NAN, INF, IGNORE = math.nan, math.inf, -100
TOKENS = 7
SENTINEL = 77
LONG = 2056 if INTERPRETED else 24_576  # a row of several segments in every form of the CUDA kernels
SELECTIONS = {
    "some rows, in any order": [5, -1, 2, 0, -1, 6],
    "a run": [2, 3, 4],
    "no row of anybody": [-1, -1],
}


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, any NaN like any other."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(SENTINEL), b.nan_to_num(SENTINEL))


class Problem:
    """Logits of all tokens, and those of a selection as a chunk of rows."""

    def __init__(self, dtype: torch.dtype, V: int, selection: list[int]) -> None:
        real = stats_dtype(dtype)
        draw = torch.Generator("cpu").manual_seed(1)
        self.logits = random_logits(1, TOKENS, V, dtype=dtype)
        self.labels = torch.randint(0, V, (TOKENS,), generator=draw)
        self.labels[[2, 1]] = torch.tensor([IGNORE, int(self.logits[0, 1].argmax())])
        self.temperature = (0.5 + torch.rand(TOKENS, generator=draw)).to(real)
        self.grads = [torch.randn(TOKENS, generator=draw).to(real) for _ in range(3)]
        table = torch.randn(TOKENS, len(Column), generator=draw).to(real)
        table[:, Column.OLD_LOGPROB] = -2 - table[:, Column.OLD_LOGPROB].abs()
        table[:, Column.OLD_ENTROPY] = 2 + table[:, Column.OLD_ENTROPY].abs()
        self.table = table
        self.present = int(Present.OLD_LOGPROB | Present.OLD_ENTROPY | Present.REF_LOGPROB)
        self.params = params((0.2, 0.28, INF, INF), softcap=9.0 * (V % 2), present=self.present, kl_coef=0.1,
                             kl_id=KLKind.K3, beta_low=0.3, beta_high=0.3, gate_id=1)  # fmt: skip
        self.chunk = torch.full((1, len(selection), V), NAN, dtype=dtype)
        for row, token in enumerate(selection):
            if token >= 0:
                self.chunk[0, row] = self.logits[0, token]
        is_run = len(selection) > 1 and selection == list(range(selection[0], selection[0] + len(selection)))
        index = None if is_run and selection[0] >= 0 else torch.tensor(selection)
        self.rows = (self.labels, self.temperature, self.params, IGNORE)
        self.selection = (index, 0 if index is not None else selection[0])
        self.everybody = (None, 0)

    def filled(self, leading: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((leading, TOKENS), SENTINEL, dtype=dtype or self.table.dtype)


def assert_selected(some: Tensor, everything: Tensor, selection: list[int]) -> None:
    """Columns of the selected tokens as among all of them; the others as they were."""
    for token in range(TOKENS):
        if token in selection:
            assert same(some[..., token], everything[..., token]), token
        else:
            assert (some[..., token] == SENTINEL).all(), token


def assert_rows(some: Tensor, everything: Tensor, selection: list[int]) -> None:
    for row, token in enumerate(selection):
        assert same(some[0, row], everything[0, token]) if token >= 0 else (some[0, row] == 0).all()


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize(
    ("dtype", "V"), [(torch.float32, 1032), (torch.bfloat16, LONG), (torch.float16, 131), (torch.float64, 40)]
)
def test_rows_of_some_tokens(dtype, V, selection, every_form):  # noqa: F811
    """A chunk of rows writes the bits that its tokens get among all rows, at their places, and nothing else."""
    ops, p = every_form.ops, Problem(dtype, V, selection)
    results = []
    for logits, tokens in ((p.logits, p.everybody), (p.chunk, p.selection)):
        stats, state = p.filled(6), p.filled(4)
        ops.stats_forward_(logits, *p.rows, *tokens, stats)
        ops.partial_stats_(logits, *p.rows, *tokens, 0, state)
        gradient, loss_gradient = torch.full_like(logits, 5), torch.full_like(logits, 5)
        saved = results[0][0][3:].contiguous() if results else stats[3:].contiguous()
        ops.stats_backward_(logits, *p.rows, *tokens, saved, *p.grads, gradient)
        per_token, flags = p.filled(4), p.filled(1, torch.int32)
        ops.loss_rows_(logits, *p.rows, *tokens, p.table, per_token, flags[0], None, loss_gradient)
        results.append((stats, state, per_token, flags, gradient, loss_gradient))
    (*whole, gradient, loss_gradient), (*some, some_gradient, some_loss_gradient) = results
    for a, b in zip(some, whole, strict=True):
        assert_selected(a, b, selection)
    assert_rows(some_gradient, gradient, selection)
    assert_rows(some_loss_gradient, loss_gradient, selection)
    assert (gradient != 0).any() and (loss_gradient != 0).any()
    logprob, entropy, logsumexp, saved = ops.stats_forward(p.logits, *p.rows)
    assert same(whole[0], torch.cat([logprob[None], entropy[None], logsumexp[None], saved]))
    assert same(whole[2][2], logprob) and same(whole[2][3], entropy)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 5, 1032, 2053, LONG, LONG + 1])
def test_a_narrower_gradient_is_the_float32_gradient_rounded_once(V, narrow, every_form):  # noqa: F811
    """Of every form, with an ignored row, a broken one, forbidden tokens, and a gradient that float16 cannot hold."""
    ops, p = every_form.ops, Problem(torch.float32, V, [0, 1])
    if V > 5:
        p.logits[0, 3, V // 3] = NAN
        p.logits[0, 4, : V // 2] = -INF
        p.grads[0][5] = 1e6
        p.table[6, Column.WEIGHT] = 1e6
    saved = ops.stats_forward(p.logits, *p.rows)[3]
    for own_rows in (torch.empty_like, lambda x, dtype: torch.empty(1, TOKENS, V + 3, dtype=dtype)[:, :, 1 : V + 1]):
        gradients = []
        for dtype in (torch.float32, narrow):
            gradient, loss_gradient = own_rows(p.logits, dtype=dtype), own_rows(p.logits, dtype=dtype)
            ops.stats_backward_(p.logits, *p.rows, None, 0, saved, *p.grads, gradient)
            per_token, flags = p.filled(4), p.filled(1, torch.int32)
            ops.loss_rows_(p.logits, *p.rows, None, 0, p.table, per_token, flags[0], None, loss_gradient)
            gradients.append((gradient, loss_gradient, per_token))
        (exact, exact_loss, values), (rounded, rounded_loss, same_values) = gradients
        assert same(rounded, stored(exact, narrow)) and same(rounded_loss, stored(exact_loss, narrow))
        assert same(values, same_values)
        if V > 5:
            assert exact[0, 3].isnan().all() and (exact[0, 2] == 0).all() and (exact[0, 4] != 0).any()
            assert narrow == torch.bfloat16 or rounded.isinf().any()
            assert not same(rounded, (1.01 * exact).to(narrow))


def placed(values: Tensor, offset: int) -> Tensor:
    """The same rows, each `offset` elements behind a multiple of 16 bytes."""
    V = values.shape[2]
    stride = (V + 2 * 8 + 7) // 8 * 8
    memory = torch.full((TOKENS * stride + 8,), NAN, dtype=values.dtype)
    begin = -(memory.data_ptr() // memory.element_size()) % 8 + offset
    return memory[begin : begin + TOKENS * stride].view(1, TOKENS, stride)[:, :, :V].copy_(values)


@pytest.mark.parametrize("softcap", [0.0] if INTERPRETED else [0.0, 9.0])
@pytest.mark.parametrize("V", [1032] if INTERPRETED else [1032, LONG + 1])
def test_no_address_changes_a_bit_of_a_narrower_gradient(V, softcap, every_form):  # noqa: F811
    """Logits and gradient start anywhere, each for itself: what is read sixteen bytes at a time is shifted."""
    ops, p, results = every_form.ops, Problem(torch.float32, V, [0, 1]), []
    p.logits[0, 4, : V // 2] = -INF
    numbers = p.params.clone()
    numbers[Param.SOFTCAP] = softcap
    rows = (p.labels, p.temperature, numbers, IGNORE)
    for of_logits, of_gradient in ((0, 0), (1, 0), (0, 3), (2, 2), (3, 6)):
        logits = placed(p.logits, of_logits)
        saved = ops.stats_forward(logits, *rows)[3]
        gradient, loss_gradient = (placed(torch.empty_like(p.logits, dtype=torch.bfloat16), of_gradient) for _ in "ab")
        ops.stats_backward_(logits, *rows, None, 0, saved, *p.grads, gradient)
        per_token, flags = p.filled(4), p.filled(1, torch.int32)
        ops.loss_rows_(logits, *rows, None, 0, p.table, per_token, flags[0], None, loss_gradient)
        results.append((saved, per_token, flags, gradient.contiguous(), loss_gradient.contiguous()))
    assert gradient.any() and loss_gradient.any()
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_narrower_gradient_has_memory_of_its_own(every_form):  # noqa: F811
    if isinstance(every_form.ops, OnDevice):
        pytest.skip("its operators get copies")
    p = Problem(torch.float32, 64, [0])
    saved = every_form.ops.stats_forward(p.logits, *p.rows)[3]
    inside = p.logits.view(torch.bfloat16)[:, :, :64]
    wider = torch.empty(1, TOKENS, 64)
    for logits, gradient in ((p.logits, inside), (p.logits.bfloat16(), wider), (p.logits.half(), p.logits.bfloat16())):
        with pytest.raises((RuntimeError, ValueError)):
            every_form.ops.stats_backward_(logits, *p.rows, None, 0, saved, *p.grads, gradient)


def test_a_loss_without_a_gradient(every_form):  # noqa: F811
    p = Problem(torch.float32, LONG + 1, [0])
    results = []
    for gradient in (None, torch.empty_like(p.logits)):
        per_token, flags = p.filled(4), p.filled(1, torch.int32)
        every_form.ops.loss_rows_(p.logits, *p.rows, None, 0, p.table, per_token, flags[0], None, gradient)
        results.append((per_token, flags))
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# ---- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rows", "V"), [(4, 1), (4, 1032), (4, 2053), (60 if INTERPRETED else 2500, 7), (3, 2 * LONG)])
def test_scaling_rows(rows, V, dtype, every_form):  # noqa: F811
    """By one factor a row and by one for all, in place and not; more rows than a block reads factors at a time."""
    grad = random_logits(2, rows, V, dtype=dtype)[:, 1:]
    count = 2 * (rows - 1)
    factors = torch.linspace(-2, 2, count, dtype=stats_dtype(dtype))
    factors[::3] = 1
    for scale in (factors, factors[1], torch.ones_like(factors[0]), torch.zeros_like(factors[0])):
        expected = stored(grad.to(factors.dtype) * (scale.view(2, -1, 1) if scale.dim() else scale), dtype)
        assert torch.equal(every_form.ops.scale_rows(grad, scale), expected)
        overwritten = torch.full((2, rows, V), SENTINEL, dtype=dtype)
        overwritten[:, 1:] = grad
        every_form.ops.scale_rows_(overwritten[:, 1:], scale)
        assert torch.equal(overwritten[:, 1:], expected) and (overwritten[:, 0] == SENTINEL).all()
    assert not torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cuts", [(0, 700, 700, 1032), (0, 1, 131)])
def test_divergences_of_shards_add_up(cuts, dtype, every_form):  # noqa: F811
    """Sums over a shard's columns with the states of whole rows; and the shard's columns of the gradient."""
    ops, n, columns = every_form.ops, 3, cuts[-1]
    new, old = (random_logits(1, n, columns, dtype=dtype, seed=seed) for seed in (0, 1))
    new[0, 1, 0], old[0, 2, -1] = -INF, NAN  # a forbidden token, and a row without a distribution
    p = params(temperature=0.7)
    stats, saved = ops.paired_forward(new, old, None, p)
    assert stats[3:, :2].min() > 1e-2 and stats[3:, 2].isnan().all()
    states = saved[:6].contiguous()
    parts = [(new[..., a:b].contiguous(), old[..., a:b].contiguous()) for a, b in pairwise(cuts)]
    found = [ops.paired_forward(*part, None, p, states) for part in parts]
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 2e-6, "atol": 1e-7, "equal_nan": True}
    for whole, index in ((stats, (3, 4, 5)), (saved, (6, 7))):
        which = 0 if whole is stats else 1
        for k in index:
            total = sum(part[which][k].double() for part in found)
            torch.testing.assert_close(total, whole[k].double(), **tolerance)
    for part in found:
        assert same(part[0][:3], stats[:3]) and same(part[1][:6], states)
    grads = random_logits(6, n, seed=3).to(stats.dtype)
    whole = ops.paired_backward(new, old, None, p, saved, grads)
    shards = [ops.paired_backward(*part, None, p, saved, grads) for part in parts]
    torch.testing.assert_close(torch.cat(shards, -1), whole, rtol=1e-6, atol=1e-9, equal_nan=True)
    assert whole[0, :2].abs().max() > 1e-3
