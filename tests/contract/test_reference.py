"""The oracle itself, against formulas that share nothing with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import erc
from erc import reference
from tests.oracle import peaked_rows


def rows(*shape, seed=0):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "scaling", [{}, {"temperature": 0.7}, {"temperature": 2.0, "softcap": 5.0, "logit_scale": 1.5}]
)
def test_statistics_are_those_of_a_categorical_distribution(scaling):
    logits, labels = rows(4, 5, 17), torch.randint(17, (4, 5), generator=torch.Generator().manual_seed(1))
    x = logits * scaling.get("logit_scale", 1.0)
    if "softcap" in scaling:
        x = scaling["softcap"] * torch.tanh(x / scaling["softcap"])
    x = x / scaling.get("temperature", 1.0)
    expected = Categorical(logits=x)
    stats = reference.token_stats(logits, labels, **scaling)
    torch.testing.assert_close(stats.logprob, expected.log_prob(labels))
    torch.testing.assert_close(stats.entropy, expected.entropy())
    torch.testing.assert_close(stats.logsumexp, x.logsumexp(-1))


def test_divergences_are_those_of_categorical_distributions():
    new, old = rows(6, 11), rows(6, 11, seed=1)
    ratio = reference.entropy_ratio(new, old)
    p, q = Categorical(logits=new), Categorical(logits=old)
    torch.testing.assert_close(ratio.kl_new_old, kl_divergence(p, q))
    torch.testing.assert_close(ratio.kl_old_new, kl_divergence(q, p))
    torch.testing.assert_close(ratio.total_variation, (p.probs - q.probs).abs().sum(-1) / 2)
    torch.testing.assert_close(ratio.ratio, (p.entropy() + 1e-8) / (q.entropy() + 1e-8))


def test_a_peaked_rows_entropy_matches_exact_arithmetic():
    """Two tokens 14 nats apart: H = log1p(e) + 14 e / (1 + e) with e = exp(-14), by the series of log1p."""
    e = math.exp(-14)
    expected = (e - e**2 / 2 + e**3 / 3) + 14 * e / (1 + e)
    stats = reference.token_stats(torch.tensor([[0.0, -14.0]], dtype=torch.float64))
    assert float(stats.entropy) == pytest.approx(expected, rel=1e-13)


def test_small_divergences_keep_their_relative_accuracy():
    """Of two rows that differ by delta in one logit: KL = delta^2 p (1 - p) / 2 + O(delta^3)."""
    old = rows(1, 9)
    new = old.clone()
    delta = 1e-6
    new[0, 3] += delta
    p = torch.softmax(old, -1)[0, 3]
    kl = reference.entropy_ratio(new, old).kl_new_old
    torch.testing.assert_close(kl, (delta**2 * p * (1 - p) / 2)[None], rtol=1e-5, atol=0)


def test_gradients_by_finite_differences():
    labels = torch.tensor([0, 3, 5])
    logits = rows(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: tuple(reference.token_stats(z, labels, temperature=0.7, softcap=9.0)), logits
    )
    old = rows(3, 7, seed=1)
    assert torch.autograd.gradcheck(lambda z: tuple(reference.entropy_ratio(z, old)), logits)


@pytest.mark.parametrize("name", ["ppo", "gppo", "ce-gppo", "sapo", "dro", "no-clip", "reinforce"])
def test_losses_differentiate_as_finite_differences_where_they_are_smooth(name):
    """GPPO and CE-GPPO have no gradient of their value where they clip, so ratios stay inside."""
    labels = torch.tensor([[0, 3], [5, 1]])
    logits = rows(2, 2, 7).requires_grad_()
    stats = reference.token_stats(logits.detach(), labels)
    arguments = {
        "old_logprob": stats.logprob + torch.tensor([[0.05, -0.05], [0.1, -0.1]]),
        "advantages": torch.tensor([1.0, -0.5], dtype=torch.float64),
        "ref_logprob": stats.logprob - 0.2,
    }
    objective = erc.objective(name, kl=erc.KLPenalty("k3", 0.3), entropy_coef=0.1)
    loss = lambda z: reference.policy_loss(z, labels, objective=objective, **arguments).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(lambda z: loss(z.detach() + 1.01 * (z - z.detach())), logits)


def test_the_cpu_kernel_differentiates_as_finite_differences_in_float64():
    if erc.backends()["cpu"] != "available":
        pytest.skip("the cpu backend is not built")
    labels = torch.tensor([0, 3, 5])
    logits = rows(3, 7).requires_grad_()
    statistics = lambda z: tuple(erc.token_stats(z, labels, temperature=0.7, softcap=9.0, backend="cpu"))  # noqa: E731
    assert torch.autograd.gradcheck(statistics, logits)
    old = rows(3, 7, seed=1)
    assert torch.autograd.gradcheck(lambda z: tuple(erc.entropy_ratio(z, old, backend="cpu")), logits)


def test_float32_logits_get_the_float64_answer_rounded_once():
    logits = peaked_rows([1e-6, 1e-3, 1.0], 500)
    narrow, wide = reference.token_stats(logits), reference.token_stats(logits.double())
    assert narrow.entropy.dtype == torch.float32
    assert torch.equal(narrow.entropy, wide.entropy.float())
