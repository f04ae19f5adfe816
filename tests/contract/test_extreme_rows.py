"""Rows that a fast form gets wrong: forbidden tokens on one side of a pair, huge logits, the lowest finite number.

Sizes: 3 is less than a vector, 301 has a ragged end on every backend, 2,053 is prime and more than one segment of the
CPU's sweep and of a Triton program of 32 lanes.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import erc
from tests.oracle import ROUNDING, assert_entropy, assert_gradient_and_mutations, assert_logprob

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def random_rows(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0, spread: float = 3.0) -> Tensor:
    return (spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))).to(dtype)


def gradients(function, logits: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Of `sum(upstream * function(logits))`: as tested, and of the oracle in float64."""
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = function(erc, leaf)
    (tested,) = torch.autograd.grad((upstream.to(value.dtype) * value).sum(), leaf)
    (expected,) = torch.autograd.grad((upstream.double() * function(erc.reference, exact)).sum(), exact)
    return tested, expected


def assert_paired_gradient(tested: Tensor, expected: Tensor, upstream: Tensor, softcap: float | None = None) -> None:
    """Divergences are made of probabilities: their rounding stays where a gradient is the difference of two."""
    rounding = 4 * 2.0**-24 * upstream.abs().double()[:, None] * (1 if tested.dtype != torch.float64 else 2.0**-29)
    error = (tested.double() - expected).abs()
    assert tested.isfinite().all()
    relative = 3e-6 if softcap is None else 3e-6 + 2.0**-23 * softcap
    bound = rounding + relative * expected.abs().amax(-1, keepdim=True) + ROUNDING[tested.dtype] * expected.abs()
    assert (error <= bound).all()
    moving = expected.abs().amax(-1) > 1e-3 * upstream.abs()
    assert moving.any()
    for wrong in (torch.zeros_like(tested), 1.01 * tested.double(), tested.double().roll(1, -1)):
        assert ((wrong - expected).abs() > bound)[moving].any(), "the bound does not notice a wrong gradient"


# ---- pairs of rows -------------------------------------------------------------------------------------------------


def test_a_token_that_only_the_old_policy_forbids_by_hand(kernels):
    new, old = torch.tensor([0.3, 1.0, -0.5], requires_grad=True), torch.tensor([0.1, 0.2, -INF])
    pair = erc.entropy_ratio(new, old)
    assert pair.kl_new_old == INF
    (gradient,) = torch.autograd.grad(pair.entropy, new, retain_graph=True)
    torch.testing.assert_close(gradient, torch.tensor([0.08757, -0.23071, 0.14314]), rtol=0, atol=1e-5)
    p, q = new.detach().softmax(-1), old.softmax(-1)
    (gradient,) = torch.autograd.grad(pair.total_variation, new)
    signs = torch.sign(p - q) / 2
    torch.testing.assert_close(gradient, p * (signs - (p * signs).sum()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("vocab", "dtype", "softcap"),
    [
        (3, torch.float32, None),
        (2053, torch.float32, None),
        (301, torch.float32, 20.0),
        (301, torch.bfloat16, None),
        (301, torch.float64, None),
        (301, torch.float64, 20.0),
    ],
)
def test_an_infinite_divergence_leaves_the_other_gradients_alone(vocab, dtype, softcap, kernels):
    vocab = min(vocab, 301) if kernels == "triton" else vocab  # its interpreter takes seconds, and segments are shorter
    logits, old = random_rows(4, vocab, dtype), random_rows(4, vocab, dtype, seed=1)
    old[0, 1], old[1, -1], old[2, : vocab // 2] = -INF, -INF, -INF
    old[3] = logits[3] + 0.5 * old[3]
    old[3, 0], logits[3, 0] = -INF, -INF  # forbidden on both sides: the divergence is finite
    pair = erc.entropy_ratio(logits, old, softcap=softcap)
    assert pair.kl_new_old.isinf().tolist() == [True, True, True, False]
    upstream = torch.tensor([0.7, -1.3, 2.0, 1.0])
    scaling = {"temperature": 0.8, "softcap": softcap}
    for output in ("entropy", "ratio", "total_variation", "kl_old_new"):
        tested, expected = gradients(
            lambda api, z, output=output: getattr(api.entropy_ratio(z, old.to(z.dtype), **scaling), output),
            logits,
            upstream,
        )
        assert_paired_gradient(tested, expected, upstream / 0.8, softcap)


def test_a_token_that_only_the_new_policy_forbids(kernels):
    logits, old = random_rows(3, 301, torch.float32), random_rows(3, 301, torch.float32, seed=1)
    logits[:, 7] = -INF
    pair = erc.entropy_ratio(logits, old)
    assert pair.kl_old_new.isinf().all() and pair.kl_new_old.isfinite().all()
    for output in ("entropy", "ratio", "total_variation", "kl_new_old"):
        tested, expected = gradients(
            lambda api, z, output=output: getattr(api.entropy_ratio(z, old.to(z.dtype)), output),
            logits,
            torch.tensor([1.0, -2.0, 0.5]),
        )
        assert_paired_gradient(tested, expected, torch.tensor([1.0, -2.0, 0.5]))
        assert not tested[:, 7].any()


# ---- huge logits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_keep_their_entropy(sign, kernels):
    """Rows equal to their maximum; with neighbours of it as near as float32 has them; and half of them far below."""
    vocab, sizes = 301, torch.tensor([1e5, 1e6, 1e7, 1.5e7, 1e8, 1e9, 1e30])
    top = sign * sizes[:, None, None]
    step = (top.abs() - torch.nextafter(top.abs(), torch.zeros(()))).expand(-1, 3, 1).reshape(-1, 1)
    logits = top.expand(-1, 3, vocab).clone()
    logits[:, 1, 100:] -= step[::3]
    logits[:, 1, 200:] -= 2 * step[::3]
    logits[:, 2, ::2] -= 40 * step[::3]
    logits = logits.view(-1, vocab)
    labels = torch.tensor([5, 250, 0]).repeat(len(sizes))
    for temperature in (torch.full((len(logits),), 0.87), (1.9 * step.squeeze(-1)).clamp(max=2.0**39)):
        exact = erc.reference.token_stats(logits.double(), labels, temperature=temperature.double())
        stats = erc.token_stats(logits, labels, temperature=temperature)
        assert_entropy(stats.entropy, exact.entropy)
        assert_logprob(stats.logprob, exact.logprob, logits.abs().amax(-1) / temperature)
        tested, expected = gradients(
            lambda api, z, t=temperature: api.token_stats(z, labels, temperature=t.to(z.dtype)).logprob,
            logits,
            temperature,  # of x rather than of the logits: numbers of a size
        )
        assert_gradient_and_mutations(tested, expected, relative=2e-6)


@pytest.mark.parametrize("path", ["statistics", "fused"])
def test_the_entropy_gradient_of_huge_logits(path, kernels):
    """Peaked rows: the gradient is as small as the entropy, so nothing of the maximum's size may round into it."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([300.0, 1e4, 1e6, 1e8])[:, None, None]
    step = torch.nextafter(sizes, torch.full((), INF)) - sizes
    distance = torch.randint(1, 40, (4, 4, 301), generator=generator) * step.clamp(min=0.25)
    logits = sizes - distance - torch.tensor([0.0, 4.0, 8.0, 12.0])[:, None]
    logits[..., 17] = sizes[..., 0]
    logits = logits.view(-1, 301)
    labels = torch.tensor([17, 17, 5, 6]).repeat(4)

    def entropy(api, z):
        if path == "statistics":
            return api.token_stats(z, labels).entropy
        chosen = erc.objective("dapo", entropy_coef=-1.0, reduction="none")
        return api.policy_loss(z, labels, old_logprob=None, advantages=torch.zeros(16), objective=chosen).loss

    tested, expected = gradients(entropy, logits, torch.ones(16))
    assert_gradient_and_mutations(tested, expected, relative=3e-6)


# ---- forbidden tokens, and the lowest finite number -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lowest", [-INF, "finfo.min"])
@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 9.0, "logit_scale": 1.7}])
def test_what_has_no_probability_has_no_gradient(scaling, lowest, dtype, kernels):
    if lowest != -INF:
        lowest = torch.finfo(dtype).min
    logits = random_rows(6, 301, dtype)
    logits[:2, 3], logits[2:4, 40:250], logits[4, 1:] = lowest, lowest, lowest
    labels = torch.tensor([3, 3, 4, 4, 0, 5])
    allowed = logits != lowest
    weights = torch.tensor([1.5, 1e4, 1e-3, 40.0, 1e4, 1e4])
    advantages = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, -1.0])
    objective = erc.objective("reinforce", entropy_coef=1.0, entropy_reduction="loss", reduction="token-sum")

    def loss(api, z):
        arguments = {"old_logprob": None, "advantages": advantages, "mask": weights, "objective": objective}
        return api.policy_loss(z, labels, **arguments, **scaling).loss

    relative = 3e-6 if "softcap" not in scaling else 5e-6
    entropy = gradients(lambda api, z: api.token_stats(z, **scaling).entropy, logits, weights)
    for tested, expected in (entropy, gradients(loss, logits, torch.ones(()))):
        assert tested.isfinite().all()
        if "softcap" not in scaling:  # a softcap brings a finite number back
            assert not tested[~allowed].any()
        assert_gradient_and_mutations(tested, expected, relative=relative)
