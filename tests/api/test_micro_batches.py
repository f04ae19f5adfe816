"""k micro-batches that are given the counts of the whole batch add up to the loss and the gradient of one batch.

For every preset, every reduction, and every term that divides by a count of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import erc
from erc.surrogate.reductions import REDUCTIONS

B, T, VOCAB = 6, 5, 19
LENGTHS = torch.tensor([5, 3, 1, 4, 0, 2])  # one sequence has no active token
BY_BATCH = {"clip-cov", "kl-cov", "erc-clip-cov", "erc-kl-cov"}  # compare a token with the means of the call itself
TERMS = {
    "bonus": {"entropy_coef": 0.3},
    "bonus in the loss's reduction": {"entropy_coef": 0.3, "entropy_reduction": "loss"},
    "nll": {"nll_coef": 0.4},
    "kl": {"kl": erc.KLPenalty("k3", 0.5)},
    "all": {"entropy_coef": -0.2, "nll_coef": 0.4, "kl": erc.KLPenalty("k2", 0.5, importance_weighted=True)},
}


def problem(drift: float = 0.3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, T, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (B, T), generator=generator)
    labels[0, 2] = -100
    exact = erc.reference.token_stats(logits, labels)
    rows = {
        "old_logprob": exact.logprob + drift * torch.randn(B, T, generator=generator),
        "old_entropy": exact.entropy * (1 + 0.05 * torch.randn(B, T, generator=generator)),
        "ref_logprob": exact.logprob + 0.3 * torch.randn(B, T, generator=generator),
        "old_divergence": 0.3 * torch.rand(B, T, generator=generator),
        "advantages": torch.randn(B, generator=generator),
        "mask": (torch.arange(T) < LENGTHS[:, None]) * (0.5 + torch.rand(B, T, generator=generator)),
        "nll_mask": torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])[:, None].expand(B, T).contiguous(),
    }
    return logits, labels, {name: value.double() for name, value in rows.items()}


def counts(objective: erc.Objective, labels: Tensor, rows: dict[str, Tensor]) -> dict[str, float]:
    """What a trainer knows of the whole batch before its first micro-batch."""
    active = torch.where(labels == -100, 0.0, rows["mask"])
    tokens, sequences = float(active.sum()), float((active.sum(1) != 0).sum())
    if objective.reduction in ("none", "token-sum"):
        normalizer = 1.0
    else:
        normalizer = tokens if objective.reduction == "token-mean" else sequences
    known = {"entropy_normalizer": tokens, "nll_normalizer": float((active * rows["nll_mask"]).sum())}
    return {"normalizer": normalizer} | {name: known[name] for name in objective.own_normalizers}


def gradient(loss, logits, labels, rows, **settings) -> tuple[Tensor, Tensor]:
    """Of the summed loss by the logits, from `loss`, "policy_loss" or "linear_policy_loss"."""
    leaf = logits.clone().requires_grad_()
    if loss == "linear_policy_loss":  # an identity for a head
        out = erc.linear_policy_loss(leaf, torch.eye(VOCAB, dtype=leaf.dtype), labels, **rows, **settings)
    else:
        out = getattr(erc, loss)(leaf, labels, **rows, **settings)
    value = out.loss.sum()
    value.backward()
    return value.detach(), leaf.grad


def assert_micro_batches_add_up(objective: erc.Objective, loss: str = "policy_loss") -> None:
    # GSPO's widths are of a few 1e-4: with a larger drift every sequence is clipped, and nothing is left to compare.
    logits, labels, rows = problem(3e-4 if isinstance(objective.ratio, erc.GSPO) else 0.3)
    value, expected = gradient(loss, logits, labels, rows, objective=objective)
    assert expected.any()
    for cut in (1, 2, 4):  # sizes differ, and the last micro-batch of the last cut has a sequence without active tokens
        known = counts(objective, labels, rows)
        total, parts = 0.0, []
        for part in (slice(0, cut), slice(cut, B)):
            micro = {name: tensor[part] for name, tensor in rows.items()}
            part_value, part_gradient = gradient(loss, logits[part], labels[part], micro, objective=objective, **known)
            total += part_value
            parts.append(part_gradient)
        torch.testing.assert_close(total, value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", [name for name in erc.objectives() if name not in BY_BATCH])
def test_every_preset(name):
    assert_micro_batches_add_up(erc.objective(name))
    assert_micro_batches_add_up(erc.objective(name, **TERMS["all"]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("term", TERMS)
def test_every_term_and_reduction(term, reduction):
    assert_micro_batches_add_up(erc.objective("erc-dapo", reduction=reduction, **TERMS[term]))


@pytest.mark.parametrize("loss", ["linear_policy_loss", "policy_loss"])
@pytest.mark.parametrize("name", ["erc-dapo", "gspo"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_every_form(backend, name, loss):
    if erc.backends()[backend] != "available":
        pytest.skip(f"backend {backend}: {erc.backends()[backend]}")
    with erc.use_backend(backend):
        assert_micro_batches_add_up(erc.objective(name, **TERMS["all"]), loss)


def test_the_nll_term_is_a_mean_over_its_own_rows():
    """Not over all tokens, as it would be in the loss's own reduction; and independent of that."""
    logits, labels, rows = problem()
    covered = torch.where(labels == -100, 0.0, rows["mask"]) * rows["nll_mask"]
    for reduction in REDUCTIONS[:-1]:
        silent = rows | {"advantages": torch.zeros(B, dtype=torch.float64)}
        objective = erc.objective("reinforce", reduction=reduction, nll_coef=0.4)
        leaf = logits.clone().requires_grad_()
        out = erc.policy_loss(leaf, labels, objective=objective, **silent)
        expected = -0.4 * (covered * out.logprob).sum() / covered.sum()
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    objective = erc.objective("reinforce", reduction="none", nll_coef=0.4)
    out = erc.policy_loss(logits, labels, objective=objective, **silent)
    torch.testing.assert_close(out.loss, -0.4 * covered * out.logprob, rtol=1e-12, atol=0)


@pytest.mark.parametrize("term", ["bonus", "nll"])
@pytest.mark.parametrize("form", ["policy_loss", "linear_policy_loss", "objective_loss", "reference"])
def test_a_count_for_a_part_of_the_loss_only_is_refused(form, term):
    logits, labels, rows = problem()
    objective = erc.objective("erc-dapo", **TERMS[term])
    name = {"bonus": "entropy_normalizer", "nll": "nll_normalizer"}[term]

    def call(**counted):
        settings = {"objective": objective, **rows, **counted}
        if form == "objective_loss":
            stats = erc.reference.token_stats(logits, torch.where(labels < 0, 0, labels))
            return erc.objective_loss(stats.logprob, stats.entropy, **settings)
        if form == "linear_policy_loss":
            return erc.linear_policy_loss(logits, torch.eye(VOCAB, dtype=logits.dtype), labels, **settings)
        return (erc.reference if form == "reference" else erc).policy_loss(logits, labels, **settings)

    with pytest.raises(ValueError, match=f"{name} must be given with normalizer"):
        call(normalizer=10.0)
    assert call(normalizer=10.0, **{name: 10.0}).loss.isfinite()
    assert call(**{name: 10.0}).loss.isfinite()
    for bad in (-1.0, float("nan"), float("inf"), torch.tensor(-1.0), 0.0):
        with pytest.raises(ValueError, match=name):
            call(normalizer=10.0, **{name: bad})
    with pytest.raises(TypeError, match=name):
        call(normalizer=10.0, **{name: "10"})
    with pytest.raises(ValueError, match="0-d tensor"):
        call(normalizer=10.0, **{name: torch.ones(2)})


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor(0)])
def test_a_count_of_zero_is_right_where_nothing_is_active(zero, reduction):
    """A micro-batch of a batch without any active token: 0, and no NaN."""
    logits, labels, rows = problem()
    objective = erc.objective("erc-dapo", reduction=reduction, **TERMS["all"])
    empty = torch.full_like(labels, -100)
    known = dict.fromkeys(("normalizer", "entropy_normalizer", "nll_normalizer"), zero)
    value, grads = gradient("policy_loss", logits, empty, rows, objective=objective, **known)
    assert value == 0 and not grads.any()
    with pytest.raises(ValueError, match="normalizer must be positive where a token counts, got 0"):
        gradient("policy_loss", logits, labels, rows, objective=objective, **known)


def test_the_paper_s_recipe_over_two_ranks_is_one_batch():
    """Ranks whose gradients are averaged pass the global counts over the number of ranks."""
    logits, labels, rows = problem()
    objective = erc.objective("erc-gppo", nll_coef=0.1, entropy_coef=0.01)
    _, expected = gradient("policy_loss", logits, labels, rows, objective=objective)
    known = {name: count / 2 for name, count in counts(objective, labels, rows).items()}
    parts = []
    for part in (slice(0, 3), slice(3, B)):
        micro = {name: tensor[part] for name, tensor in rows.items()}
        parts.append(gradient("policy_loss", logits[part], labels[part], micro, objective=objective, **known)[1] / 2)
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-9, atol=1e-13)


def test_every_combination_of_terms_names_its_counts():
    for bonus, nll, reduction, shared in itertools.product((0.0, 0.1), (0.0, 0.1), REDUCTIONS, ("active-mean", "loss")):
        objective = erc.Objective(entropy_coef=bonus, nll_coef=nll, reduction=reduction, entropy_reduction=shared)
        expected = set()
        if reduction != "none":
            expected |= {"entropy_normalizer"} if bonus and shared == "active-mean" else set()
            expected |= {"nll_normalizer"} if nll else set()
        assert set(objective.own_normalizers) == expected
