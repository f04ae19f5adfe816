"""The library's promise: the kernel never decides a token. And the forms that break it, so that the test can fail."""

from __future__ import annotations

import pytest
import torch

import erc
from benchmarks.hidden_states import decidable, peaked_head
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


# ---- from hidden states ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bfloat16_head():
    """Hidden states, weight and labels in bfloat16, and log-probs, entropies and max |x| of their exact logits, for
    entropies from 1e-5 to 10 nats."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = peaked_head(600, 128, VOCAB, generator)
    labels = torch.randint(VOCAB, (len(hidden),), generator=generator)
    logits = hidden.double() @ weight.double().t()
    exact = erc.reference.token_stats(logits, labels)
    rows = (exact.entropy > 1e-5) & (exact.entropy < 10)
    assert rows.sum() > 300 and (exact.entropy[rows] < 1e-3).sum() > 40
    return hidden[rows], weight, labels[rows], exact.logprob[rows], exact.entropy[rows], logits[rows].abs().amax(-1)


def test_no_decision_flips_from_bfloat16_hidden_states(bfloat16_head, kernels):
    hidden, weight, labels, logprob, entropy, largest = bfloat16_head
    generator = torch.Generator().manual_seed(5)
    rho = 1 + 0.06 * (2 * torch.rand(len(entropy), generator=generator, dtype=torch.float64) - 1)
    old_entropy = (entropy / rho).float()
    sure = decidable(entropy, old_entropy.double(), largest)
    assert sure.double().mean() > 0.9
    expected = decisions(entropy, old_entropy)
    assert 0.1 < expected.float().mean() < 0.9

    def flipped(stats):
        return (decisions(stats.entropy, old_entropy) != expected)[sure].float().mean()

    stats = erc.linear_token_stats(hidden, weight, labels)
    assert flipped(stats) == 0
    assert ((stats.logprob.double() - logprob).abs() <= 4e-7 * largest.clamp(min=1)).all()
    rounded = erc.linear_token_stats(hidden, weight, labels, logits_dtype=torch.bfloat16)
    assert flipped(rounded) > 0.05, "what a bfloat16 head decides by rounding"
    assert (rounded.logprob.double() - logprob).abs().max() > 1e-2
    stored = erc.token_stats(hidden @ weight.t(), labels)
    assert flipped(stored) > 0.05
