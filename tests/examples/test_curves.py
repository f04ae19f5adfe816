"""The demo's curves: drawn from a run's history, with plain numbers on the axis of ratios."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from examples import palette, report


def history() -> report.History:
    found = report.History()
    for step in range(20):
        row = dict.fromkeys(report.METRICS, 0.1) | {"step": step, "reward": step / 20}
        found.steps.append(row | {"entropy_ratio": 1.0, "entropy_ratio_min": 0.3, "entropy_ratio_max": 4.0})
    return found


def test_the_curves_are_drawn_with_plain_numbers(tmp_path, monkeypatch):
    drawn = []
    save = palette.save
    monkeypatch.setattr(palette, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    report.plot(history(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    (figure,) = drawn
    (ratio,) = (axis for axis in figure.axes if axis.get_title().startswith("entropy ratio"))
    texts = [label.get_text() for label in ratio.yaxis.get_ticklabels()]
    assert {"0.5", "1", "2"} <= set(texts) and not any("^" in text for text in texts)
    assert len(figure.axes) == 4 and all(axis.get_xlabel() == "step" for axis in figure.axes)
