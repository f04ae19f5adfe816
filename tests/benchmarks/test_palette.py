"""One colour per implementation in every figure of the benchmarks."""

from __future__ import annotations

import pytest

for package in ("rich", "typer", "matplotlib"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}")

from benchmarks.peers import PEERS  # noqa: E402
from benchmarks.report import BASELINES  # noqa: E402
from examples.palette import BASELINE, IMPLEMENTATIONS, figure, implementation_color, plain_numbers  # noqa: E402


def test_every_peer_has_a_colour_that_no_other_has():
    colours = {peer.name: implementation_color(peer.name) for peer in PEERS if "," not in peer.name}
    colours |= {name: implementation_color(name) for name in ("erc cpu", "erc triton", "erc torch")}
    assert len(set(colours.values())) == len(colours) and BASELINE not in colours.values()
    assert implementation_color("erc cuda") not in {colours[peer.name] for peer in PEERS if peer.name in colours}


def test_variants_share_their_implementation_s_colour_and_baselines_are_grey():
    assert implementation_color("erc cpu, in place") == IMPLEMENTATIONS["erc cpu"]
    assert implementation_color("Liger, in place") == IMPLEMENTATIONS["Liger"]
    assert implementation_color("eager, logits' dtype") != implementation_color("eager PyTorch")
    assert {implementation_color(name) for name in BASELINES} == {BASELINE}


def test_logarithmic_axes_have_plain_numbers():
    drawn, axis = figure(2.0)
    axis.plot([0.3, 2000], [1, 2])
    axis.set_xscale("log")
    plain_numbers(axis.xaxis)
    drawn.canvas.draw()
    texts = [label.get_text() for label in axis.xaxis.get_ticklabels()]
    assert "0.5" in texts and "1,000" in texts and not any("^" in text for text in texts)
