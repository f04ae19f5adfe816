"""Objectives are data: validated, printable, comparable, found by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

import erc

RECIPES = ("erc-dapo-paper", "erc-gppo-paper", "ic-dapo-paper")


def test_every_preset_has_an_entropy_ratio_form():
    names = [name for name in erc.objectives() if name not in RECIPES]
    plain = [name for name in names if not name.startswith("erc-")]
    assert len(names) == 2 * len(plain)
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


def test_recipes_have_the_settings_of_their_authors_scripts():
    """recipe/dapo/*_erc_1_05.sh of Kwai-Klear/ERC and recipe/dapo/run/run_icdapo_*.sh of Mithas-114/IC-DAPO."""
    dapo, gate = erc.PPOClip(0.2, 0.28, dual_clip=10.0), erc.EntropyRatioClip(0.05, 0.05, value="kept")
    assert erc.objective("erc-dapo-paper") == erc.Objective(dapo, gate, reduction="token-mean", nll_coef=0.1)
    gppo = erc.GPPO(0.2, 0.2, dual_clip=10.0)
    assert erc.objective("erc-gppo-paper") == erc.Objective(gppo, gate, reduction="token-mean", nll_coef=0.1)
    assert erc.objective("ic-dapo-paper") == erc.Objective(dapo, reduction="token-mean", nll_coef=0.1)


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


def test_an_unknown_field_lists_the_fields_and_those_of_their_parts():
    with pytest.raises(
        TypeError, match=r"no field 'clip_high'.*ratio=PPOClip\(eps_low, eps_high, .*max_length, .*nll_coef"
    ):
        erc.objective("erc-dapo", clip_high=0.3)
    with pytest.raises(TypeError, match=r"ratio=SAPO\(tau_pos, tau_neg\), entropy_ratio, kl"):
        erc.objective("sapo", epsilon=0.2, kl=None)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("erc_dapo", "'erc-dapo'"), ("ERC-DAPO", "'erc-dapo'"), ("gppo_erc", "'erc-gppo'"), ("erc-gsppo", "'erc-gspo'")],
)
def test_a_near_miss_of_a_name_suggests_it(name, meant):
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean .*{meant}") as error:
        erc.objective(name)
    assert len(str(error.value)) < 130, "and not every name"


@pytest.mark.parametrize("rule", [erc.PPOClip, erc.GPPO, erc.CEGPPO, erc.GSPO, erc.ClipCov])
def test_bounds_in_place_of_widths_are_refused_with_the_right_numbers(rule):
    with pytest.raises(ValueError, match=rf"widths around 1: for 0.8 to 1.28 write {rule.__name__}\(0.2, 0.28\)"):
        rule(1.28, 0.8)
    with pytest.warns(UserWarning, match=rf"write {rule.__name__}\(0.2, 0.28\); as given, the band is 0.2 to 2.28"):
        rule(0.8, 1.28)
    with pytest.raises(ValueError, match="eps_low must be at most 1"):
        rule(1.5, 0.2)


def test_bounds_and_widths_of_other_parts():
    with pytest.warns(UserWarning, match=r"for 0.95 to 1.05 write EntropyRatioClip\(0.05, 0.05\)"):
        erc.EntropyRatioClip(0.95, 1.05)
    with pytest.raises(ValueError, match=r"for widths 0.2 and 0.28 write CISPO\(0.8, 1.28\)"):
        erc.CISPO(0.2, 0.28)


@pytest.mark.parametrize(
    "make",
    [
        lambda: erc.PPOClip(1.0, 0.28),  # no lower bound
        lambda: erc.PPOClip(0.2, 5.0),
        lambda: erc.PPOClip(0.5, 1.5),
        lambda: erc.EntropyRatioClip(0.5, 1.0),
        lambda: erc.CISPO(None, 1.0),
    ],
)
def test_wide_bands_are_nobodys_business(make, recwarn):
    make()
    assert not recwarn.list


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
        (lambda: erc.objective("best"), "objective must be one of ppo, .*each also with erc- .* erc-dapo-paper"),
    ],
)
def test_bad_configurations_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("field", ["ratio", "entropy_ratio", "kl", "rollout_correction"])
def test_parts_of_the_wrong_type_are_named(field):
    with pytest.raises(TypeError, match=field):
        erc.Objective(**{field: "k3"})
