"""What nobody reads before the kernel runs: labels outside the vocabulary, and zero weights beside infinite losses."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import erc

INF, VOCAB, INT64_MIN = math.inf, 23, -(2**63)
LABELS = torch.tensor([4, -1, VOCAB, INT64_MIN, 2**40, 7, -100])
BROKEN = [False, True, True, True, True, False, False]


def logits_of(rows: int = len(LABELS), seed: int = 0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU, where reading a label would synchronise."""
    for name, module in list(sys.modules.items()):
        if name.startswith("erc.") and hasattr(module, "values_are_readable"):
            monkeypatch.setattr(module, "values_are_readable", lambda tensor: False)


def assert_broken_rows_alone_are_nan(stats, gradient):
    for name, value in stats.items():
        assert value.isnan().tolist() == BROKEN, name
    assert gradient.isnan().all(-1).tolist() == BROKEN
    assert gradient.isnan().any(-1).tolist() == BROKEN
    assert gradient[0].any() and not gradient[-1].any()


def functions(labels=LABELS):
    """Every function that takes labels, of logits or of hidden states."""
    weight = torch.randn(VOCAB, 5, generator=torch.Generator().manual_seed(2))
    rest = {"old_logprob": None, "advantages": torch.ones(1, len(labels))}

    def statistics(stats):
        return stats._asdict(), sum(stat.sum() for stat in stats)

    def loss(out):
        rows = {"logprob": out.logprob[0], "entropy": out.entropy[0], "loss": out.per_token_loss[0]}
        return rows, out.loss

    return {
        "token_stats": lambda z: statistics(erc.token_stats(z, labels)),
        "fused": lambda z: loss(erc.policy_loss(z[None], labels[None], objective="dapo", **rest)),
        "two-phase": lambda z: loss(erc.policy_loss(z[None], labels[None], objective="kl-cov", **rest)),
        "linear_token_stats": lambda z: statistics(erc.linear_token_stats(z[:, :5], weight, labels)),
        "linear fused": lambda z: loss(
            erc.linear_policy_loss(z[None, :, :5], weight, labels[None], objective="dapo", **rest)
        ),
    }


@pytest.mark.parametrize("form", functions())
def test_a_label_that_is_no_column_makes_its_row_nan(form, unread, kernels):
    """The CPU's kernels read labels, so they raise."""
    logits = logits_of().requires_grad_()
    if kernels == "cpu":
        with pytest.raises(RuntimeError):
            functions()[form](logits)
        return
    rows, value = functions()[form](logits)
    (gradient,) = torch.autograd.grad(value, logits)
    assert_broken_rows_alone_are_nan(rows, gradient[:, :5])


@pytest.mark.parametrize("label", [-1, VOCAB, INT64_MIN, 2**40])
def test_a_label_that_is_read_is_named(label, kernels):
    labels = torch.tensor([4, 0, 1, label, 2, 7, -100])
    for form, function in functions(labels).items():
        if kernels in ("cpu", "torch"):
            with pytest.raises(IndexError, match=rf"labels must lie in \[0, {VOCAB}\).*got {label} at position"):
                function(logits_of())
        else:
            rows, _ = function(logits_of())
            assert rows["logprob"].isnan().tolist() == [row == 3 for row in range(7)], form


def test_a_compiled_call_does_not_take_the_lowest_integer_for_another_shard_s_label():
    compiled = torch.compile(lambda z, labels: erc.token_stats(z, labels).logprob, fullgraph=True, backend="aot_eager")
    assert compiled(logits_of(), torch.zeros(7, dtype=torch.long)).isfinite().all()
    with pytest.raises(RuntimeError):
        compiled(logits_of(), torch.full((7,), INT64_MIN))


RULES = [erc.PPOClip(), erc.GPPO(), erc.CISPO(), erc.SAPO(), erc.DPPO("tv"), erc.DPPO("kl"), erc.Reinforce(), erc.DRO()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{type(rule).__name__}{getattr(rule, 'divergence', '')}")
@pytest.mark.parametrize("path", ["kernel", "two-phase"])
def test_a_weight_of_zero_silences_a_label_that_is_forbidden(rule, path, kernels):
    """IcePop drops a token: whatever its policy term was, nothing of it is left, and the other tokens keep theirs."""
    logits = logits_of(4)
    labels = torch.tensor([3, 4, 5, 6])
    logits[1, 4] = -INF
    old = erc.token_stats(logits, labels).logprob + torch.tensor([0.1, 0.0, -0.1, 0.2])
    old[1] = -2.0
    correction = erc.RolloutCorrection("mask", low=0.5, high=5.0)
    arguments = {
        "old_logprob": old,
        "rollout_logprob": old - torch.tensor([0.0, 3.0, 0.1, 0.2]),  # a weight of e^3, outside of the band
        "advantages": torch.tensor([1.0, -2.0, 0.5, -1.0]),
        "objective": erc.Objective(rule, rollout_correction=correction, kl=erc.KLPenalty("k2", coef=0.0)),
        "ref_logprob": old,
    }
    leaf = logits.clone().requires_grad_()
    if path == "kernel":
        out = erc.policy_loss(leaf, labels, **arguments)
    else:
        stats = erc.token_stats(leaf, labels)
        out = erc.objective_loss(stats.logprob, stats.entropy, **arguments)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert out.per_token_loss[1] == 0 and not gradient[1].any()

    keep = torch.tensor([0, 2, 3])
    rest = {name: value[keep] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    alone = logits[keep].clone().requires_grad_()
    expected = erc.policy_loss(alone, labels[keep], normalizer=4.0, **rest)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-7)
    (exact,) = torch.autograd.grad(expected.loss, alone)
    assert exact.any()
    torch.testing.assert_close(gradient[keep], exact, rtol=1e-5, atol=1e-7)
