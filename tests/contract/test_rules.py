"""Sequence-level and batch rules, filters, exact KL and rules of one's own, against formulas written out by hand."""

from __future__ import annotations

import doctest
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import erc
from erc.surrogate import entropy_control

B, T = 3, 7


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Log-ratios of a few tenths, both signs of the advantage, and a mask with sequences of 7, 4 and 1 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logprob = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    return {
        "logprob": logprob.requires_grad_(),
        "entropy": (2 * torch.rand(B, T, generator=generator, dtype=torch.float64)).requires_grad_(),
        "old_logprob": logprob.detach() + 0.4 * torch.randn(B, T, generator=generator, dtype=torch.float64),
        "advantages": torch.tensor([1.5, -1.0, 0.7], dtype=torch.float64),
        "mask": (torch.arange(T) < torch.tensor([[7], [4], [1]])).double(),
    }


def loss_and_gradient(objective: erc.Objective, given: dict[str, Tensor], **more) -> tuple[erc.PolicyLoss, Tensor]:
    arguments = {name: value for name, value in given.items() if name not in ("logprob", "entropy")} | more
    out = erc.objective_loss(given["logprob"], given["entropy"], objective=objective, **arguments)
    (gradient,) = torch.autograd.grad(out.loss, given["logprob"])
    return out, gradient


def assert_like(objective: erc.Objective, given: dict[str, Tensor], expected: Tensor, **more) -> None:
    """Value and gradient of `expected`; and a gradient of 1.001 times would not pass."""
    out, gradient = loss_and_gradient(objective, given, **more)
    (exact,) = torch.autograd.grad(expected, given["logprob"], retain_graph=True)
    assert exact.any()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, exact, rtol=1e-10, atol=1e-14)
    assert not torch.allclose(1.001 * gradient, exact, rtol=1e-10, atol=1e-14)


def test_gmpo_is_the_geometric_mean_of_ratios_clipped_on_one_side():
    given = tokens()
    d = given["logprob"] - given["old_logprob"]
    sign = given["advantages"].sign()[:, None]
    u = sign * torch.minimum(sign * d, sign * d.clamp(-0.3, 0.2))
    mean = (u * given["mask"]).sum(1) / given["mask"].sum(1)
    objective = erc.objective("gmpo", ratio=erc.GMPO(0.3, 0.2))
    assert_like(objective, given, (-given["advantages"] * mean.exp()).mean())
    assert 0 < loss_and_gradient(objective, given)[0].metrics["clip_fraction"] < 1


def test_luspo_is_gspo_times_the_length():
    given = tokens()
    lengths = given["mask"].sum(1)
    d = ((given["logprob"] - given["old_logprob"]) * given["mask"]).sum(1) / lengths
    s = d.exp()
    advantage = given["advantages"]
    clipped = torch.minimum(s * advantage, s.clamp(1 - 0.05, 1 + 0.05) * advantage)
    objective = erc.objective("luspo", ratio=erc.GSPO(0.05, 0.05))
    assert_like(objective, given, (-clipped * lengths).mean())


def test_vespo_weighs_by_a_gamma_function_of_the_sequence_ratio():
    given = tokens()
    weight = ((given["logprob"] - given["old_logprob"]).detach() * given["mask"]).sum(1).exp()
    k = torch.tensor([2.5, 3.5, 2.5], dtype=torch.float64)
    rate = torch.tensor([3.1, 2.1, 3.1], dtype=torch.float64)
    phi = rate.exp() * weight**k * (-rate * weight).exp()
    expected = -(phi * given["advantages"])[:, None] * given["logprob"] * given["mask"]
    objective = erc.objective("vespo", ratio=erc.VESPO(2.5, 3.1, 3.5, 2.1))
    assert_like(objective, given, expected.sum() / given["mask"].sum())


@pytest.mark.parametrize("kind", ["full-tv", "full-kl"])
def test_dppo_over_the_whole_vocabulary_blocks_beyond_the_bound_and_not_on_it(kind):
    given = tokens()
    distance = torch.linspace(0, 0.3, T, dtype=torch.float64).expand(B, T).contiguous()
    bound = float(distance[0, 3])
    d = given["logprob"].detach() - given["old_logprob"]
    advantage = given["advantages"][:, None]
    blocked = (distance > bound) & (advantage * d > 0)
    assert blocked.any() and ((distance > bound) & ~blocked).any()
    expected = torch.where(blocked, 0.0, -d.exp() * advantage * given["logprob"]) * given["mask"]
    objective = erc.Objective(erc.DPPO(kind, bound, bound))
    assert_like(objective, given, expected.sum() / given["mask"].sum(), old_divergence=distance)
    with pytest.raises(ValueError, match="old_divergence"):
        loss_and_gradient(objective, given)


def covariance(given: dict[str, Tensor]) -> Tensor:
    active = given["mask"] != 0
    advantage, logprob = given["advantages"][:, None].expand(B, T), given["logprob"].detach()
    return (advantage - advantage[active].mean()) * (logprob - logprob[active].mean())


def test_kl_cov_penalises_the_tokens_of_largest_covariance():
    given = tokens()
    active = given["mask"] != 0
    chosen = torch.zeros(B, T, dtype=torch.bool)
    threshold = covariance(given)[active].topk(3).values[-1]  # 25 % of 12 active tokens
    chosen[active] = covariance(given)[active] >= threshold
    d = given["logprob"] - given["old_logprob"]
    expected = -d.exp() * given["advantages"][:, None] + torch.where(chosen, 0.5 * d.abs(), 0.0)
    objective = erc.Objective(erc.KLCov(0.25, coef=0.5))
    assert_like(objective, given, (expected * given["mask"]).sum() / given["mask"].sum())


def test_clip_cov_draws_unclipped_tokens_of_the_band_and_silences_them():
    given = tokens()
    rule = erc.ClipCov(0.2, 0.2, fraction=0.1, low=-3.0, high=3.0)
    objective = erc.Objective(rule)
    draws = []
    for seed in (0, *range(8)):
        _, gradient = loss_and_gradient(objective, given, generator=torch.Generator().manual_seed(seed))
        _, plain = loss_and_gradient(erc.Objective(erc.PPOClip(0.2, 0.2)), given)
        drawn = (plain != 0) & (gradient == 0)
        assert torch.equal(gradient[~drawn], plain[~drawn]), "nothing else changes"
        c = covariance(given)
        assert drawn.sum() == 1 and ((c > -3.0) & (c < 3.0))[drawn].all()
        draws.append(drawn)
    assert torch.equal(draws[0], draws[1]), "a seed repeats its draw"
    assert any(not torch.equal(draws[0], other) for other in draws[2:])


def test_ipo_blocks_either_way_and_pays_for_every_log_ratio():
    given = tokens()
    d = given["logprob"] - given["old_logprob"]
    moved = (given["logprob"].exp() - given["old_logprob"].exp()).detach().abs()
    active = given["mask"] != 0
    kept = moved <= 0.05
    for sign in (1, -1):
        assert (kept & active & (d * sign > 0)).any() and (~kept & active & (d * sign > 0)).any()
    expected = torch.where(kept, -d.exp() * given["advantages"][:, None], 0.0) + 0.3 * d**2
    objective = erc.Objective(erc.IPO(0.05, 0.3))
    assert_like(objective, given, (expected * given["mask"]).sum() / given["mask"].sum())
    metrics = loss_and_gradient(objective, given)[0].metrics
    assert metrics["clip_fraction"] == pytest.approx(float((~kept & active).sum() / active.sum()))
    assert 0 < metrics["clip_fraction_low"] < metrics["clip_fraction"]


def test_topr_tapers_bad_tokens_alone():
    given = tokens()
    d = (given["logprob"] - given["old_logprob"]).detach()
    advantage = given["advantages"][:, None]
    weight = torch.where(advantage > 0, 1.0, d.exp().clamp(0, 1))
    assert ((weight == 1) & (advantage < 0)).any() and (weight < 1).any()
    expected = -weight * advantage * given["logprob"] * given["mask"]
    assert_like(erc.objective("topr"), given, expected.sum() / given["mask"].sum())


def test_kimi_is_a_policy_gradient_with_half_tau_times_the_squared_log_ratio():
    given = tokens()
    d = given["logprob"] - given["old_logprob"]
    expected = (-given["advantages"][:, None] * given["logprob"] + 0.05 * d**2) * given["mask"]
    assert_like(erc.objective("kimi-k1.5"), given, expected.sum() / given["mask"].sum())


def rollout(given: dict[str, Tensor], distance: float) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(B, T, generator=generator, dtype=torch.float64)
    return (given["old_logprob"] + distance * noise).clamp(max=-1e-7)


def test_the_geometric_mask_drops_sequences_and_leaves_weights_and_denominator():
    given = tokens()
    given["rollout_logprob"] = rollout(given, 0.3)
    w = (given["old_logprob"] - given["rollout_logprob"]).exp()
    mean = ((w.log() * given["mask"]).sum(1) / given["mask"].sum(1)).exp()
    low, high = sorted(mean.tolist())[0] - 1e-6, sorted(mean.tolist())[1] + 1e-6
    kept = ((mean >= low) & (mean <= high)).double()
    assert kept.sum() == 2 and (w > high).any(), "weights of kept tokens are not truncated"
    d = given["logprob"] - given["old_logprob"]
    expected = -d.exp() * given["advantages"][:, None] * w * kept[:, None] * given["mask"]
    correction = erc.RolloutCorrection("mask", low, high, level="geometric")
    objective = erc.Objective(erc.NoClip(), rollout_correction=correction)
    assert_like(objective, given, expected.sum() / given["mask"].sum())


def test_kpop_drops_tokens_that_either_binary_divergence_finds_far():
    given = tokens()
    given["rollout_logprob"] = rollout(given, 0.8)
    p, q = (given[name].exp().clamp(1e-6, 1 - 1e-6) for name in ("old_logprob", "rollout_logprob"))

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()

    active = given["mask"] != 0
    forward, backward = divergence(p, q), divergence(q, p)
    kept = (forward <= 0.1) & (backward <= 0.1)
    assert (kept & active).any() and (((forward > 0.1) != (backward > 0.1)) & active).any(), "both directions decide"
    w = (given["old_logprob"] - given["rollout_logprob"]).exp() * kept
    d = given["logprob"] - given["old_logprob"]
    expected = (-d.exp() * given["advantages"][:, None] * w * given["mask"]).sum() / given["mask"].sum()
    objective = erc.Objective(erc.NoClip(), rollout_correction=erc.RolloutCorrection("binary-kl"))
    assert_like(objective, given, expected)


def test_kpop_keeps_a_near_certain_token_that_the_engine_reports_as_certain():
    old = torch.tensor([[-1e-7, -1e-3]], dtype=torch.float64)
    weights = erc.RolloutCorrection("binary-kl").weights(old, torch.zeros_like(old), torch.ones_like(old), None)
    torch.testing.assert_close(weights, old.exp())


@pytest.mark.parametrize(
    ("kind", "level", "bounds"),
    [
        ("truncate", "token", (0.0, 2.0)),
        ("mask", "sequence", (0.5, 5.0)),
        ("mask", "geometric", (0.999, 1.002)),
        ("binary-kl", "token", (0.0, 0.1)),
    ],
)
def test_each_rollout_correction_has_the_bounds_of_its_source(kind, level, bounds):
    correction = erc.RolloutCorrection(kind, level=level)
    assert (correction.low, correction.high) == bounds
    assert erc.Objective(rollout_correction=correction).needs_sequences == (level != "token")


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "objective",
    [
        *(erc.objective(name) for name in ("erc-dapo", "grpo", "gspo", "gmpo", "vespo")),
        erc.Objective(rollout_correction=erc.RolloutCorrection(level="sequence")),
        erc.Objective(erc.NoClip(), off_policy_mask=erc.OffPolicySequenceMask(0.1)),
    ],
    ids=lambda objective: str(objective)[:60],
)
def test_sequences_without_tokens_have_loss_0_and_an_empty_gradient(objective, shape):
    logits, empty = torch.zeros(2, 0, 5, requires_grad=True), torch.zeros(2, 0)
    given = {"old_logprob": empty, "old_entropy": empty, "rollout_logprob": empty, "advantages": torch.ones(shape)}
    for function in (erc.policy_loss, erc.reference.policy_loss):
        out = function(logits, torch.zeros(2, 0, dtype=torch.long), objective=objective, **given)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        assert out.loss == 0 and gradient.shape == (2, 0, 5)


def test_the_high_entropy_mask_keeps_the_top_fraction_and_the_denominator():
    given = tokens()
    active = given["mask"] != 0
    threshold = torch.quantile(given["entropy"].detach()[active], 0.75)
    kept = (given["entropy"].detach() >= threshold) & active
    assert 0 < kept.sum() < active.sum()
    d = given["logprob"] - given["old_logprob"]
    expected = torch.where(kept, -d.exp() * given["advantages"][:, None], 0.0).sum() / given["mask"].sum()
    objective = erc.Objective(erc.NoClip(), high_entropy=erc.HighEntropyMask(0.25))
    assert_like(objective, given, expected)
    fixed = erc.Objective(erc.NoClip(), high_entropy=erc.HighEntropyMask(threshold=float(threshold)))
    assert_like(fixed, given, expected)
    metrics = loss_and_gradient(objective, given)[0].metrics
    assert metrics["filtered_fraction"] == pytest.approx(1 - float(kept.sum() / active.sum()))


def test_the_off_policy_mask_drops_sequences_that_the_policy_has_left():
    given = tokens()
    given["old_logprob"] = given["logprob"].detach() + torch.tensor([[0.5], [0.5], [-0.5]], dtype=torch.float64)
    d = given["logprob"] - given["old_logprob"]
    kept = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)  # only the second has A < 0 and a distance > 0.4
    expected = (-d.exp() * given["advantages"][:, None] * kept * given["mask"]).sum() / given["mask"].sum()
    assert_like(erc.Objective(erc.NoClip(), off_policy_mask=erc.OffPolicySequenceMask(0.4)), given, expected)
    within = erc.Objective(erc.NoClip(), off_policy_mask=erc.OffPolicySequenceMask(0.6))
    assert_like(within, given, (-d.exp() * given["advantages"][:, None] * given["mask"]).sum() / given["mask"].sum())


def test_filters_leave_kl_and_entropy_terms_alone_and_come_before_the_gate():
    given = tokens()
    objective = erc.Objective(
        erc.NoClip(), erc.EntropyRatioClip(0.0, 0.0), erc.KLPenalty("k2", 1.0), high_entropy=erc.HighEntropyMask(0.25)
    )
    ref = given["old_logprob"] - 0.1
    given["old_entropy"] = given["entropy"].detach() / 2  # the gate drops every token
    expected = (((given["logprob"] - ref) ** 2 / 2) * given["mask"]).sum() / given["mask"].sum()
    (exact,) = torch.autograd.grad(expected, given["logprob"])
    _, gradient = loss_and_gradient(objective, given, ref_logprob=ref)
    torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("reduction", ["token-mean", "none"])
def test_exact_kl_to_the_reference(name, reduction):
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, B, T, 301, generator=generator, dtype=torch.float64)
    labels = torch.randint(301, (B, T), generator=generator)
    objective = erc.objective(name, kl=erc.KLPenalty("full", 0.7), reduction=reduction)
    given = {"old_logprob": None, "advantages": torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)}

    plain = logits.clone().requires_grad_()
    p = plain.log_softmax(-1)
    kl = (p.exp() * (p - ref_logits.log_softmax(-1))).sum(-1)
    without = erc.reference.policy_loss(plain, labels, objective=erc.objective(name, reduction=reduction), **given)
    weight = 1.0 if reduction == "none" else 1 / (B * T)
    expected = without.loss + (0.7 * kl * weight if reduction == "none" else 0.7 * (kl * weight).sum())
    (exact,) = torch.autograd.grad(expected.sum(), plain)

    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        variable = logits.to(dtype).requires_grad_()
        ref_kl = erc.entropy_ratio(variable, ref_logits.to(dtype)).kl_new_old
        out = erc.policy_loss(variable, labels, objective=objective, ref_kl=ref_kl, **given)
        (gradient,) = torch.autograd.grad(out.loss.sum(), variable)
        torch.testing.assert_close(out.loss.double(), expected.detach(), rtol=bound, atol=bound)
        assert (gradient - exact).abs().max() <= bound * exact.abs().max()
        assert (gradient * 1.001 - exact).abs().max() > bound * exact.abs().max()
        torch.testing.assert_close(out.metrics["kl"].double(), kl.mean().detach(), rtol=bound, atol=bound)
    path = erc.explain(logits.requires_grad_(), objective, backend="cpu").path
    assert path == ("fused" if name == "dapo" else "two-phase")
    with pytest.raises(ValueError, match="ref_kl"):
        erc.policy_loss(logits, labels, objective=objective, **given)


def test_the_entropy_coefficient_follows_its_target():
    assert doctest.run_docstring_examples(entropy_control.AdaptiveEntropyCoef, {}) is None
    controller = erc.AdaptiveEntropyCoef(target=0.5, step=0.1, maximum=0.25)
    assert [controller.update(entropy) for entropy in (0.2, 0.2, 0.2, 0.2, 0.6, 0.5, 0.4)] == pytest.approx(
        [0.0, 0.1, 0.2, 0.25, 0.0, 0.15, 0.15]
    )
    assert controller.objective(erc.objective("dapo"), 0.1).entropy_coef == pytest.approx(0.25)
    resumed = erc.AdaptiveEntropyCoef(**vars(controller))
    assert resumed == controller


@dataclass(frozen=True)
class Focal(erc.RatioRule):
    """A rule that no kernel has, differentiable in log-prob and entropy."""

    power: float = 2.0

    def terms(self, inputs: erc.RatioInputs) -> erc.RatioTerms:
        loss = -inputs.advantage * inputs.logprob * (1 - inputs.logprob.exp()) ** self.power * (1 + inputs.entropy)
        nowhere = torch.zeros_like(loss, dtype=torch.bool)
        return erc.RatioTerms(loss, nowhere, nowhere)


def test_a_rule_of_ones_own_runs_two_phase_on_every_function():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 5, generator=generator), torch.randn(40, 5, generator=generator)
    labels, advantages = torch.arange(6), torch.linspace(-1, 1, 6)
    objective = erc.Objective(Focal(), erc.EntropyRatioClip(0.5, 0.5))
    given = {"old_logprob": None, "old_entropy": torch.linspace(1, 6, 6), "advantages": advantages}
    logits = (hidden.double() @ weight.double().t()).requires_grad_()
    doubles = {name: None if value is None else value.double() for name, value in given.items()}
    exact = erc.reference.policy_loss(logits, labels, objective=objective, **doubles)
    exact.loss.backward()
    assert 0 < exact.metrics["erc_fraction"] < 1

    tested = logits.detach().float().requires_grad_()
    out = erc.policy_loss(tested, labels, objective=objective, **given)
    out.loss.backward()
    linear_weight = weight.clone().requires_grad_()
    linear = erc.linear_policy_loss(hidden, linear_weight, labels, objective=objective, **given)
    linear.loss.backward()
    for loss in (out.loss, linear.loss):
        torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    for gradient, expected in ((tested.grad, logits.grad), (linear_weight.grad, logits.grad.t() @ hidden.double())):
        assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (gradient * 1.01 - expected).abs().max() > 1e-5 * expected.abs().max()
    assert "Focal" in erc.explain(tested, objective).path_reason


def test_the_how_to_runs():
    text = (Path(__file__).parents[2] / "docs" / "custom_rules.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    module = types.ModuleType("custom_rules")
    sys.modules["custom_rules"] = module  # where dataclasses look for the annotations of the class
    try:
        exec(code, vars(module))
    finally:
        del sys.modules["custom_rules"]
    assert module.logits.grad.any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: erc.GMPO(-0.1), "eps_low"),
        (lambda: erc.IPO(eps=-0.1), "eps"),
        (lambda: erc.IPO(tau=-1.0), "tau"),
        (lambda: erc.RolloutCorrection("truncate", level="geometric"), "level must be one of .* for kind 'truncate'"),
        (lambda: erc.RolloutCorrection("binary-kl", level="sequence"), "level"),
        (lambda: erc.RolloutCorrection(level="tokens"), "level"),
        (lambda: erc.VESPO(lambda_neg=0.0), "lambda_neg"),
        (lambda: erc.ClipCov(fraction=0.0), "fraction"),
        (lambda: erc.ClipCov(low=6.0), "low"),
        (lambda: erc.KLCov(coef=-1.0), "coef"),
        (lambda: erc.HighEntropyMask(1.5), "fraction"),
        (lambda: erc.HighEntropyMask(threshold=-1.0), "threshold"),
        (lambda: erc.OffPolicySequenceMask(-0.1), "delta"),
        (lambda: erc.KLPenalty("full", clamp=1.0), "clamp"),
        (lambda: erc.KLPenalty("full", importance_weighted=True), "importance_weighted"),
        (lambda: erc.AdaptiveEntropyCoef(step=0.0), "step"),
    ],
)
def test_bad_settings_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_arguments_are_named():
    given = tokens()
    with pytest.raises(ValueError, match="rows must be"):
        erc.objective_loss(
            torch.zeros(4), torch.zeros(4), objective="vespo", old_logprob=torch.zeros(4), advantages=torch.ones(4)
        )
    with pytest.raises(TypeError, match="generator"):
        loss_and_gradient(erc.Objective(erc.ClipCov()), given, generator=0)
    with pytest.raises(TypeError, match="ref_kl"):
        kl = erc.KLPenalty("full")
        loss_and_gradient(erc.Objective(kl=kl), given, ref_kl=torch.zeros(B, T, dtype=torch.int64))
