"""`erc.diagnose` against counts by hand."""

from __future__ import annotations

import doctest
import math
import sys

import pytest
import torch

import erc


def batch():
    generator = torch.Generator().manual_seed(0)
    shape = (20, 50)
    old_logprob = -3 * torch.rand(shape, generator=generator)
    old_entropy = 2 * torch.rand(shape, generator=generator)
    stats = erc.TokenStats(
        old_logprob + 0.3 * torch.randn(shape, generator=generator),
        old_entropy * (1 + 0.1 * torch.randn(shape, generator=generator)),
        torch.zeros(shape),
    )
    given = {
        "old_logprob": old_logprob,
        "old_entropy": old_entropy,
        "advantages": torch.randn(20, generator=generator),
        "mask": torch.rand(shape, generator=generator) < 0.9,
    }
    return stats, given


@pytest.mark.parametrize("objective", ["erc-dapo", "dapo"])
def test_groups_and_histogram(objective):
    stats, given = batch()
    found = erc.diagnose(stats, objective=objective, bins=10, span=0.5, **given)
    active = given["mask"]
    ratio = (stats.logprob - given["old_logprob"]).exp()
    advantage = given["advantages"][:, None].expand(active.shape)
    clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
    rho = (stats.entropy + 1e-8) / (given["old_entropy"] + 1e-8)
    dropped = ~((rho > 0.95) & (rho < 1.05))
    counts = {
        "kept": ~clipped & ~dropped,
        "clipped": clipped & ~dropped,
        "dropped": dropped & ~clipped,
        "both": clipped & dropped,
        "all": torch.ones_like(active),
    }
    for name, tokens in counts.items():
        tokens, group = tokens & active, found.groups[name]
        assert group.tokens == int(tokens.sum()) > 0
        assert group.share == pytest.approx(group.tokens / int(active.sum()))
        assert group.entropy == pytest.approx(float(stats.entropy[tokens].mean()), rel=1e-5)
        assert group.median_entropy == pytest.approx(float(stats.entropy[tokens].median()), rel=1e-5)
        assert group.ratio == pytest.approx(float(ratio[tokens].mean()), rel=1e-5)
        assert group.entropy_ratio == pytest.approx(float(rho[tokens].mean()), rel=1e-5)
    caught = clipped | dropped
    assert found.overlap == pytest.approx(float((clipped & dropped & active).sum() / (caught & active).sum()))
    assert found.histogram.sum() == active.sum() and found.histogram.shape == (10, 10)
    high_ratio = (ratio.log() >= 0.4) & active
    assert found.histogram[-1].sum() == high_ratio.sum(), "the outermost bins hold what lies beyond"
    table = str(found)
    assert "median entropy" in table and f"{found.groups['both'].tokens}" in table and "caught by both" in table


def test_it_agrees_with_the_metrics_of_the_loss():
    generator = torch.Generator().manual_seed(1)
    logits, old_logits = torch.randn(2, 6, 30, 40, generator=generator)
    labels = torch.randint(40, (6, 30), generator=generator)
    old = erc.token_stats(logits + 0.1 * old_logits, labels)
    given = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.randn(6, generator=generator)}
    out = erc.policy_loss(logits, labels, objective="erc-gspo", **given)
    found = erc.diagnose(out, objective="erc-gspo", **given)
    assert found.groups["clipped"].share + found.groups["both"].share == pytest.approx(
        float(out.metrics["clip_fraction"])
    )
    assert found.groups["dropped"].share + found.groups["both"].share == pytest.approx(
        float(out.metrics["erc_fraction"])
    )


@pytest.mark.parametrize("old_temperature", [0.7, 1.4])
def test_old_statistics_at_another_temperature_are_named_as_the_cause(old_temperature):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(8, 25, 50, generator=generator)
    labels = torch.randint(50, (8, 25), generator=generator)
    old = erc.token_stats(logits, labels, temperature=old_temperature)
    given = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.linspace(-1, 1, 8)}
    found = erc.diagnose(erc.token_stats(logits, labels), **given)
    assert found.groups["dropped"].share + found.groups["both"].share > 0.9
    (cause,) = found.causes
    side = "rose" if old_temperature < 1 else "fell"
    assert f"because their entropy {side}" in cause and "temperature" in cause and "softcap" in cause
    assert cause in str(found)


def test_a_healthy_update_and_one_that_drifts_both_ways_have_no_such_cause():
    stats, given = batch()  # entropy ratios with a deviation of 0.1: most tokens dropped, on both sides
    found = erc.diagnose(stats, **given)
    assert found.groups["dropped"].share + found.groups["both"].share > 0.5
    assert found.causes == ()


def test_no_active_token():
    stats, given = batch()
    found = erc.diagnose(stats, **(given | {"mask": torch.zeros(20, 50)}))
    assert found.overlap == 0 and found.groups["all"].tokens == 0 and "nan" in str(found)


def test_the_plot_shows_both_trust_regions_the_shares_and_plain_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    stats, given = batch()
    path = tmp_path / "joint.png"
    found = erc.diagnose(stats, **given)
    figure = found.plot(str(path))
    (axes, _) = figure.axes
    assert path.stat().st_size > 5000 and axes.get_xlabel().startswith("entropy ratio")
    lines = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines}
    assert {x for (x, y) in ((x[0], y) for x, y in lines) if y == (0, 1)} == {0.95, 1.05}
    assert {y for (x, y) in ((x, y[0]) for x, y in lines) if x == (0, 1)} == {0.8, 1.28}
    (gate, rule) = (text.get_text() for text in axes.get_legend().get_texts())
    assert gate == "entropy-ratio gate: 0.95, 1.05" and rule == "PPOClip's bounds: 0.8, 1.28"
    for name in ("kept", "clipped", "dropped", "both"):
        assert f"{found.groups[name].share:.1%}" in axes.get_title()
    for axis in (axes.xaxis, axes.yaxis):
        texts = [axis.get_major_formatter()(tick) for tick in axis.get_ticklocs()]
        assert 4 <= len(texts) <= 10 and "1" in texts and all(float(text) > 0 for text in texts), texts


def test_a_rule_of_sequences_has_no_bounds_for_tokens():
    pytest.importorskip("matplotlib")
    stats, given = batch()
    figure = erc.diagnose(stats, objective="erc-gspo", **given).plot()
    assert len(figure.axes[0].lines) == 2, "the gate's alone"


@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_axes_fit_the_tokens_and_the_bounds(scale):
    stats, given = batch()
    moved = given["old_logprob"] + scale * (stats.logprob - given["old_logprob"])
    ratio_edges, entropy_edges = erc.diagnose(stats._replace(logprob=moved), **given).edges
    assert ratio_edges[-1] >= math.log(1.28) and entropy_edges[0] <= math.log(0.95)
    log_ratio = (moved - given["old_logprob"])[given["mask"]].abs()
    assert (log_ratio > ratio_edges[-1]).float().mean() <= 0.002 or ratio_edges[-1] == 20
    assert ratio_edges[-1] <= max(1.3 * math.log(1.28), 1.1 * log_ratio.max())


def test_bad_arguments_are_named():
    stats, given = batch()
    with pytest.raises(TypeError, match="stats"):
        erc.diagnose(stats.logprob, **given)
    with pytest.raises(TypeError, match="stats"):
        erc.diagnose(stats._replace(logprob=None), **given)
    with pytest.raises(ValueError, match="bins"):
        erc.diagnose(stats, bins=0, **given)
    with pytest.raises(ValueError, match="old_entropy"):
        erc.diagnose(stats, **(given | {"old_entropy": None}))


def test_the_example_runs():
    assert doctest.testmod(sys.modules["erc.diagnosis"]).failed == 0
