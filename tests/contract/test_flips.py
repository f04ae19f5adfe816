"""The library's promise: the kernel never decides a token. And the forms that break it, so that the test can fail."""

from __future__ import annotations

import pytest
import torch

import erc
from tests.oracle import peaked_rows

VOCAB, ROWS = 8192, 240
GATE = erc.EntropyRatioClip()


def decisions(entropy, old_entropy):
    return GATE.dropped(entropy.double(), old_entropy.double())[0]


@pytest.fixture(scope="module")
def old_and_new():
    """Rows with H from 1e-6 to 9, and their updates: half of the entropy ratios lie within 0.1 % of a bound of the
    band."""
    targets = [10.0 ** (-6 + 6.95 * i / (ROWS - 1)) for i in range(ROWS)]
    new = peaked_rows(targets, VOCAB)
    generator = torch.Generator().manual_seed(4)
    entropy = erc.reference.token_stats(new.double()).entropy
    bound = torch.where(torch.rand(ROWS, generator=generator) < 0.5, 0.95, 1.05)
    near = bound * (1 + 1e-3 * (2 * torch.rand(ROWS, generator=generator) - 1))
    wide = 0.8 + 0.4 * torch.rand(ROWS, generator=generator)
    rho = torch.where(torch.rand(ROWS, generator=generator) < 0.5, near, wide)
    return new, (entropy / rho).float()


def outside_the_contract_band(entropy, old_entropy):
    """Where the oracle's own ratio leaves no doubt: further than the entropy's error from each bound."""
    rho = (entropy + GATE.eps) / (old_entropy.double() + GATE.eps)
    return ((rho - 0.95).abs() > 2.5e-6) & ((rho - 1.05).abs() > 2.5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_no_decision_flips(old_and_new, dtype, temperature):
    new, old_entropy = old_and_new
    logits = new.to(dtype)
    exact = erc.reference.token_stats(logits.double(), temperature=temperature).entropy
    if dtype != torch.float32 or temperature != 1:  # the same ratios around these logits' own entropies
        base = erc.reference.token_stats(new.double()).entropy
        old_entropy = (exact * (old_entropy.double() / base)).float()
    sure = outside_the_contract_band(exact, old_entropy)
    assert sure.float().mean() > 0.9
    expected = decisions(exact, old_entropy)
    assert 0.2 < expected.float().mean() < 0.8
    tested = erc.token_stats(logits, temperature=temperature).entropy
    assert torch.equal(decisions(tested, old_entropy)[sure], expected[sure])
    out = erc.policy_loss(
        logits,
        logits.argmax(-1),
        old_logprob=None,
        advantages=torch.ones(ROWS),
        old_entropy=old_entropy,
        objective=erc.objective("erc-dapo", reduction="none"),
        temperature=temperature,
    )
    assert torch.equal(out.entropy, tested)


def test_eager_and_uncentred_forms_do_flip(old_and_new):
    new, old_entropy = old_and_new
    exact = erc.reference.token_stats(new.double()).entropy
    sure, expected = outside_the_contract_band(exact, old_entropy), decisions(exact, old_entropy)

    def flips(entropy):
        return int((decisions(entropy, old_entropy) != expected)[sure].sum())

    x = new.float()
    uncentred = x.logsumexp(-1) - (torch.softmax(x, -1) * x).sum(-1)
    assert flips(uncentred) > 0
    low = new.bfloat16()
    eager = low.logsumexp(-1) - (torch.softmax(low, -1) * low).sum(-1)
    assert flips(eager.float()) > 10
    assert flips(erc.token_stats(new).entropy) == 0
