"""The documents say what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import erc

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", [name for name in erc.objectives() if not name.startswith("erc-") or name.endswith("-paper")]
)
def test_every_preset_is_explained(name):
    for document in ("docs/objectives.md", "README.md"):
        assert f"`{name}`" in (ROOT / document).read_text(), document


def test_the_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    from examples import objective_plots

    path = tmp_path / "objectives.png"
    objective_plots.draw(path, points=9)
    assert path.stat().st_size > 20_000


def test_the_plot_of_supports_is_drawn_and_shows_what_it_says(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    import torch

    from examples import support_bias

    path = tmp_path / "support.png"
    support_bias.draw(path, count=50, vocab_size=300)
    assert path.stat().st_size > 20_000
    generator = torch.Generator().manual_seed(1)
    logits = support_bias.rows(200, 1000, generator)
    full, replayed, mass = support_bias.ratios(logits, support_bias.kept_tokens(logits, 0.9), generator)
    torch.testing.assert_close(replayed, torch.ones(200), rtol=1e-5, atol=0)
    torch.testing.assert_close(full, mass, rtol=1e-4, atol=0)
    assert full.mean() < 0.95


def test_the_curves_of_ppo():
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    import torch

    from examples import objective_plots

    ratios = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    loss, gradient = objective_plots.curve(erc.objective("ppo", reduction="none"), ratios, 1.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.2], dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target
