"""entropy_ratio on every backend against the oracle: values, gradients, small and infinite divergences."""

from __future__ import annotations

import math

import pytest
import torch

import erc
from tests.backends import INTERPRETED
from tests.oracle import assert_entropy, assert_gradient_and_mutations, random_logits

FIELDS = erc.EntropyRatio._fields


LONG = 520 if INTERPRETED else 2053  # seconds a call in the interpreter, and several tiles there


def pair(dtype, vocab_size=LONG, distance=0.3, rows=6):
    old = random_logits(rows, vocab_size, spread=3.0)
    new = old + random_logits(rows, vocab_size, spread=distance, seed=1)
    return new.to(dtype), old.to(dtype)


def undecided(new, old, scaling):
    """The probability of tokens whose two probabilities are so near that rounding decides which one is larger."""

    def log_probs(z):
        cap = scaling.get("softcap", math.inf)
        z = z.detach().double() * scaling.get("logit_scale", 1)
        return ((cap * torch.tanh(z / cap) if cap < math.inf else z) / scaling.get("temperature", 1)).log_softmax(-1)

    new, old = log_probs(new), log_probs(old)
    return (new.exp() * ((new - old).abs() < 1e-4)).sum(-1, keepdim=True)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "scaling", [{}, {"temperature": 0.8}, {"temperature": 1.2, "softcap": 20.0, "logit_scale": 1.1}]
)
@pytest.mark.parametrize(
    ("dtype", "V"),
    [(torch.float32, LONG), (torch.bfloat16, LONG), (torch.bfloat16, 512), (torch.float16, 136), (torch.float64, 137)],
)
def test_values_and_every_gradient_match_the_oracle(V, dtype, scaling, machine):
    new, old = pair(dtype, V, rows=3)
    leaf, exact_leaf = new.clone().requires_grad_(), new.double().requires_grad_()
    tested = erc.entropy_ratio(leaf, old, **scaling)
    exact = erc.reference.entropy_ratio(exact_leaf, old.double(), **scaling)
    assert_entropy(tested.entropy.detach(), exact.entropy.detach(), scaling.get("softcap"))
    assert_entropy(tested.old_entropy.detach(), exact.old_entropy.detach(), scaling.get("softcap"))
    values = {"rtol": 1e-5, "atol": 1e-10} if machine.gradient == 1e-6 else {"rtol": 2e-5, "atol": 1e-7}
    for name in FIELDS:
        torch.testing.assert_close(getattr(tested, name).double(), getattr(exact, name), **values)
    # A divergence's gradient is a difference of log-probs, 0.3 on average here, times the probability: an error of the
    # former counts threefold or more, and a softcap has one of its own.
    relative = (1e-4 if INTERPRETED else 3e-5) * (1 + scaling.get("softcap", 0) / 5)
    for name in FIELDS:
        if name == "old_entropy":
            continue
        (gradient,) = torch.autograd.grad(getattr(tested, name).sum(), leaf, retain_graph=True)
        (expected,) = torch.autograd.grad(getattr(exact, name).sum(), exact_leaf, retain_graph=True)
        slack = (
            undecided(exact_leaf, old, scaling) / expected.abs().amax(-1, keepdim=True)
            if name == "total_variation"
            else 0.0
        )
        assert_gradient_and_mutations(gradient, expected, relative=relative + slack)


@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_small_divergences_are_not_differences_of_large_numbers(distance, kernels):
    new, old = pair(torch.float32, distance=distance)
    tested, exact = erc.entropy_ratio(new, old), erc.reference.entropy_ratio(new.double(), old.double())
    for name in ("kl_new_old", "kl_old_new", "total_variation"):
        value, expected = getattr(tested, name), getattr(exact, name)
        assert (value >= 0).all() and (expected > 0).all()
        # Rounding of the two log-probs, 2^-24 of 20 nats each, against a difference of `distance`.
        torch.testing.assert_close(value.double(), expected, rtol=2e-5 / distance, atol=0)


def test_equal_rows_do_not_diverge(machine):
    new, _ = pair(torch.float32)
    same = erc.entropy_ratio(new, new.clone())
    assert torch.equal(same.ratio, torch.ones(6))
    assert not same.kl_new_old.any() and not same.kl_old_new.any() and not same.total_variation.any()


def test_forbidden_tokens(machine):
    new, old = pair(torch.float32, vocab_size=40, rows=3)
    new[0, 5] = old[0, 5] = -math.inf  # forbidden in both: as if it were not there
    new[1, 5] = -math.inf  # only the old policy allows it
    old[2, 5] = -math.inf  # only the new one does
    out = erc.entropy_ratio(new, old)
    assert out.kl_new_old[:2].isfinite().all() and out.kl_new_old[2] == math.inf
    assert out.kl_old_new[[0, 2]].isfinite().all() and out.kl_old_new[1] == math.inf
    assert out.total_variation.isfinite().all() and out.ratio.isfinite().all()
    keep = torch.arange(40) != 5
    alone = erc.entropy_ratio(new[:1, keep], old[:1, keep])
    torch.testing.assert_close(out.kl_new_old[:1], alone.kl_new_old)


@pytest.mark.parametrize(
    ("old", "error", "match"),
    [
        (torch.zeros(2, 6), ValueError, "old_logits"),
        (torch.zeros(2, 5, dtype=torch.float64), ValueError, "old_logits"),
        (torch.zeros(2, 5, requires_grad=True), ValueError, "old_logits must not require grad"),
        ([[0.0]], TypeError, "old_logits"),
    ],
)
def test_bad_old_logits_are_named(old, error, match):
    with pytest.raises(error, match=match):
        erc.entropy_ratio(torch.zeros(2, 5), old)
