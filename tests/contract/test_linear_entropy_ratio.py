"""Divergences between two heads without their logits."""

from __future__ import annotations

import pytest
import torch

import erc
from erc.linear import products

ROWS, WIDTH, OLD_WIDTH, VOCAB = 7, 8, 12, 45
FIELDS = erc.EntropyRatio._fields
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def problem(dtype, old_dtype=None, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    new = [draw(ROWS, WIDTH), draw(VOCAB, WIDTH), draw(VOCAB) if bias else None]
    old_dtype = old_dtype or dtype
    old = [draw(ROWS, OLD_WIDTH, dtype=old_dtype), draw(VOCAB, OLD_WIDTH, dtype=old_dtype)]
    old.append(draw(VOCAB, dtype=old_dtype) if bias else None)
    for tensor in new:
        if tensor is not None:
            tensor.requires_grad_()
    return new, old, torch.rand(len(FIELDS), ROWS, generator=generator)


def call(new, old, **options):
    (hidden, weight, bias), (old_hidden, old_weight, old_bias) = new, old
    return erc.linear_entropy_ratio(hidden, weight, old_hidden, old_weight, bias=bias, old_bias=old_bias, **options)


def exact(new, old, upstream, **options):
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in new]
    logits, old_logits = (
        torch.nn.functional.linear(*(t if t is None else t.double() for t in h)) for h in (doubles, old)
    )
    out = erc.reference.entropy_ratio(logits, old_logits, **options)
    loss = sum((u.double() * value).sum() for u, value in zip(upstream, out, strict=True))
    return out, torch.autograd.grad(loss, [t for t in doubles if t is not None])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, 3])  # one chunk, and several
def test_values_and_gradients_are_the_oracle_s(dtype, bias, rows, kernels, monkeypatch):
    monkeypatch.setattr(products, "TILE_ROWS", 16)
    new, old, upstream = problem(dtype, bias=bias)
    scaling = {"temperature": torch.linspace(0.5, 2.0, ROWS), "softcap": 20.0, "logit_scale": 1.3}
    row_bytes = 12 + (2 if dtype != torch.float32 else 0)
    out = call(new, old, memory_budget=None if rows is None else rows * VOCAB * row_bytes, **scaling)
    expected, exact_grads = exact(new, old, upstream, **scaling)
    for name, value, right in zip(FIELDS, out, expected, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=2e-5, atol=2e-6, msg=name)
    loss = sum((u * value).sum() for u, value in zip(upstream, out, strict=True))
    grads = torch.autograd.grad(loss, [t for t in new if t is not None])
    for value, right in zip(grads, exact_grads, strict=True):
        bound = TOLERANCE[dtype] * right.abs().max()
        assert bound > 0, "a gradient that is zero everywhere tests nothing"
        assert (value.double() - right).abs().max() <= bound
        assert (0.97 * value.double() - right).abs().max() > bound, "a wrong gradient would be noticed"


@pytest.mark.parametrize("field", ["kl_new_old", "kl_old_new", "total_variation", "entropy"])
def test_each_output_has_its_own_gradient(field, kernels):
    new, old, upstream = problem(torch.float32)
    chosen = torch.zeros_like(upstream)
    chosen[FIELDS.index(field)] = upstream[0]
    _, exact_grads = exact(new, old, chosen)
    grads = torch.autograd.grad(getattr(call(new, old), field), new, upstream[0])
    for value, right in zip(grads, exact_grads, strict=True):
        assert (value.double() - right).abs().max() <= 2e-5 * right.abs().max()
        assert right.abs().max() > 0 and (1.01 * value.double() - right).abs().max() > 2e-5 * right.abs().max()


def test_of_one_head_with_itself_nothing_differs(kernels):
    new, *_ = problem(torch.bfloat16)
    out = call(new, [t.detach() for t in new])
    assert torch.equal(out.entropy, out.old_entropy) and not out.kl_new_old.any() and not out.total_variation.any()


def test_heads_of_different_dtypes_meet_in_float32(kernels):
    new, old, upstream = problem(torch.bfloat16, torch.float32)
    expected, _ = exact(new, old, upstream)
    torch.testing.assert_close(call(new, old).kl_old_new.double(), expected.kl_old_new, rtol=2e-5, atol=2e-6)
    with pytest.raises(TypeError, match="old_weight must give logits of"):
        call(new, [t.double() for t in old])


def test_a_frozen_head_costs_no_gradient_and_memory_is_bounded(kernels):
    new, old, _ = problem(torch.float32, bias=False)
    new[1].requires_grad_(False)
    call(new, old).kl_new_old.sum().backward()
    assert new[1].grad is None and new[0].grad.abs().max() > 0
    empty = call([new[0][:0], *new[1:]], [old[0][:0], *old[1:]])
    assert empty.ratio.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"old_hidden": torch.zeros(ROWS + 1, OLD_WIDTH)}, ValueError, "old_hidden and old_weight"),
        ({"old_weight": torch.zeros(VOCAB + 1, OLD_WIDTH)}, ValueError, "old_hidden and old_weight"),
        ({"old_weight": torch.zeros(VOCAB, OLD_WIDTH + 1)}, ValueError, "old_hidden must be"),
        ({"old_weight": torch.zeros(VOCAB, OLD_WIDTH, requires_grad=True)}, ValueError, "old_weight must not"),
        ({"old_bias": torch.zeros(3)}, ValueError, "old_bias must be"),
        ({"old_hidden": "x"}, TypeError, "old_hidden must be a torch.Tensor"),
        ({"hidden": torch.zeros(ROWS, WIDTH + 1)}, ValueError, "hidden must be"),
        ({"memory_budget": 0}, ValueError, "memory_budget"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    (hidden, weight, _), (old_hidden, old_weight, _), _ = problem(torch.float32, bias=False)
    given = {"hidden": hidden, "weight": weight, "old_hidden": old_hidden, "old_weight": old_weight}
    with pytest.raises(error, match=match):
        erc.linear_entropy_ratio(**(given | change))
