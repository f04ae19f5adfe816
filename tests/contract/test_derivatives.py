"""Derivatives that the kernels do not have raise; PyTorch has them all, but for rules that bring their own."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import erc

ROWS, WIDTH, VOCAB = 3, 5, 13
LABELS = torch.tensor([0, 7, 12])


def token_arguments():
    return {"old_logprob": torch.full((ROWS,), -2.5), "advantages": torch.tensor([1.0, -1.0, 0.5])}


def hidden_and_weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randn(VOCAB, WIDTH, generator=generator)


def logits_and_loss(form):
    """The tensor that a loss is differentiated by, and the loss."""
    hidden, weight = hidden_and_weight()
    if form.startswith("linear"):
        if form == "linear_token_stats":
            return hidden, lambda h: erc.linear_token_stats(h, weight, LABELS).logprob.sum()
        chosen = "dapo" if form == "linear fused" else erc.objective("dapo", reduction="none")
        loss = {"objective": chosen, **token_arguments()}
        return hidden, lambda h: erc.linear_policy_loss(h, weight, LABELS, **loss).loss.sum()
    logits = hidden @ weight.t()
    if form == "entropy_ratio":
        old = logits.flip(0)
        return logits, lambda z: erc.entropy_ratio(z, old.to(z.dtype)).kl_new_old.sum()
    if form in ("logprob", "entropy", "logsumexp"):
        return logits, lambda z: getattr(erc.token_stats(z, LABELS), form).sum()
    if form == "in place":
        return logits, lambda z: erc.token_stats(z * 1, LABELS, inplace_backward=True).entropy.sum()
    objective = erc.objective("dapo" if form == "fused" else "kl-cov")
    return logits, lambda z: erc.policy_loss(z, LABELS, objective=objective, **token_arguments()).loss


FORMS = [
    "logprob",
    "entropy",
    "logsumexp",
    "in place",
    "entropy_ratio",
    "fused",
    "two-phase",
    "linear_token_stats",
    "linear fused",
    "linear two-phase",
]


@pytest.mark.parametrize("form", FORMS)
def test_double_backward(form, kernels):
    tensor, loss = logits_and_loss(form)
    leaf = tensor.double().requires_grad_() if kernels == "torch" else tensor.requires_grad_()
    if kernels != "torch" or form == "two-phase":
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)  # the plain one still works
        assert gradient.any() and not gradient.requires_grad
    elif not form.startswith("linear") and form != "in place":
        # A directional derivative of the gradient, against a difference of two gradients.
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=leaf.dtype)
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        step = 1e-6
        moved = [
            torch.autograd.grad(loss(point), point)[0]
            for sign in (1, -1)
            for point in ((leaf.detach() + sign * step * direction).requires_grad_(),)
        ]
        expected = (moved[0] - moved[1]) / (2 * step)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "in place"])
def test_forward_mode(form, kernels):
    tensor, loss = logits_and_loss(form)
    tensor = tensor.double() if kernels == "torch" else tensor
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor.dtype)
    if kernels == "torch" and form != "two-phase":
        if form.startswith("linear"):
            return
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(tensor, direction))).tangent
        leaf = tensor.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(tangent, (gradient * direction).sum())
        return
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss(forward_ad.make_dual(tensor, direction))
    with forward_ad.dual_level():
        assert loss(tensor).isfinite()  # without a tangent nothing is dropped
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(loss, (tensor,), (direction,))
