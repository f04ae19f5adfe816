"""Objectives are data: validated, printable, comparable, found by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

import erc


def test_every_preset_has_an_entropy_ratio_form():
    names = erc.objectives()
    plain = [name for name in names if not name.startswith("erc-")]
    assert {"ppo", "grpo", "dr-grpo", "dapo", "gppo", "ce-gppo", "cispo", "gspo", "sapo"} <= set(plain)
    for name in plain:
        assert erc.objective(name).entropy_ratio is None
        gated = erc.objective(f"erc-{name}")
        assert gated == dataclasses.replace(erc.objective(name), entropy_ratio=erc.EntropyRatioClip(0.05, 0.05))


def test_presets_have_the_published_numbers():
    assert erc.objective("dapo").ratio == erc.PPOClip(0.2, 0.28)
    assert erc.objective("dapo").reduction == "token-mean"
    assert erc.objective("gppo").ratio == erc.GPPO(0.2, 0.28)
    assert erc.objective("ce-gppo").ratio == erc.CEGPPO(0.2, 0.2, 0.5, 1.0)
    assert erc.objective("grpo").reduction == "seq-mean-token-mean"
    assert erc.objective("dr-grpo").reduction == "seq-mean-token-sum-norm"


def test_objectives_are_frozen_hashable_comparable_and_printable():
    objective = erc.objective("erc-dapo")
    assert objective == erc.objective("erc-dapo") and hash(objective) == hash(erc.objective("erc-dapo"))
    assert objective != erc.objective("dapo")
    assert "EntropyRatioClip(beta_low=0.05" in repr(objective)
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.entropy_coef = 1.0


def test_overrides_replace_fields():
    objective = erc.objective("erc-dapo", entropy_coef=0.1, kl=erc.KLPenalty("k2", 0.5))
    assert objective.entropy_coef == 0.1 and objective.kl.kind == "k2" and objective.ratio == erc.PPOClip(0.2, 0.28)
    with pytest.raises(TypeError):
        erc.objective("dapo", epsilon=0.2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: erc.PPOClip(-0.1), "eps_low"),
        (lambda: erc.PPOClip(0.1, math.inf), "eps_high"),
        (lambda: erc.PPOClip(dual_clip=1.0), "dual_clip"),
        (lambda: erc.PPOClip(0.2, 0.2, delta=1.1), "delta"),
        (lambda: erc.CISPO(ratio_min=6.0), "ratio_min"),
        (lambda: erc.SAPO(tau_pos=0.0), "tau_pos"),
        (lambda: erc.DPPO("js"), "divergence"),
        (lambda: erc.EntropyRatioClip(1.5), "beta_low"),
        (lambda: erc.EntropyRatioClip(beta_high=-0.1), "beta_high"),
        (lambda: erc.EntropyRatioClip(eps=0.0), "eps"),
        (lambda: erc.EntropyRatioClip(value="dropped"), "value"),
        (lambda: erc.KLPenalty("k4"), "kind"),
        (lambda: erc.KLPenalty(coef=-1.0), "coef"),
        (lambda: erc.KLPenalty(clamp=0.0), "clamp"),
        (lambda: erc.RolloutCorrection("drop"), "kind"),
        (lambda: erc.RolloutCorrection(low=3.0), "low"),
        (lambda: erc.Objective(reduction="mean"), "reduction"),
        (lambda: erc.Objective(entropy_coef=math.nan), "entropy_coef"),
        (lambda: erc.Objective(max_length=0), "max_length"),
        (lambda: erc.objective("best"), "objective must be one of"),
    ],
)
def test_bad_configurations_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("field", ["ratio", "entropy_ratio", "kl", "rollout_correction"])
def test_parts_of_the_wrong_type_are_named(field):
    with pytest.raises(TypeError, match=field):
        erc.Objective(**{field: "k3"})
