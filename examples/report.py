"""What a run leaves: its history, a table and curves."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

METRICS = (
    "clip_fraction",
    "erc_fraction",
    "entropy",
    "entropy_ratio",
    "entropy_ratio_min",
    "entropy_ratio_max",
    "ratio_max",
)


@dataclass
class History:
    """What a run leaves: a row of numbers per step, and held-out accuracy before and after."""

    steps: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def numbers(self) -> dict[str, Any]:
        """Everything that the seed determines: all but the timings."""
        return {"steps": list(self.steps), "before": self.before, "after": self.after}


def _window(history: History, name: str, last: bool) -> float:
    values = [row[name] for row in history.steps]
    part = values[-10:] if last else values[:10]
    return sum(part) / len(part)


def summary(title: str, history: History) -> Table:
    """Before and after, and where the time of a step went."""
    table = Table("", "before", "after", title=title)
    for name in ("greedy", "sampled"):
        table.add_row(f"held-out reward, {name}", f"{history.before[name]:.3f}", f"{history.after[name]:.3f}")
    if history.steps:
        for name, label in (
            ("reward", "training reward"),
            ("entropy", "entropy (nats)"),
            ("clip_fraction", "tokens clipped by PPO"),
            ("erc_fraction", "tokens dropped by ERC"),
        ):
            table.add_row(label, f"{_window(history, name, False):.3f}", f"{_window(history, name, True):.3f}")
        total = sum(history.seconds.values())
        for phase, seconds in history.seconds.items():
            table.add_row(f"step time: {phase}", "", f"{seconds / total:.1%}")
    return table


def plot(history: History, path: Path) -> None:
    """Reward, entropy, entropy ratio and clip fractions over the steps."""
    from examples.palette import COLORS, NEUTRAL, POSITIVE, figure, plain_numbers, save

    steps = [row["step"] for row in history.steps]
    series = {name: [row[name] for row in history.steps] for name in ("reward", *METRICS)}
    drawn, axes = figure(5.2, 2, 2)
    axes[0, 0].plot(steps, series["reward"], color=NEUTRAL)
    axes[0, 0].set(title="reward of sampled rollouts", ylim=(0, 1))
    axes[0, 1].plot(steps, series["entropy"], color=NEUTRAL)
    axes[0, 1].set(title="entropy, nats", ylim=(0, None))
    axes[1, 0].plot(steps, series["entropy_ratio"], color=POSITIVE, label="mean")
    axes[1, 0].fill_between(
        steps,
        series["entropy_ratio_min"],
        series["entropy_ratio_max"],
        color=POSITIVE,
        alpha=0.2,
        linewidth=0,
        label="least to largest",
    )
    axes[1, 0].set(title="entropy ratio, new over old", yscale="log")
    plain_numbers(axes[1, 0].yaxis)
    axes[1, 1].plot(steps, series["erc_fraction"], color=COLORS["gate 0.05"], label="dropped by the gate")
    axes[1, 1].plot(steps, series["clip_fraction"], color=COLORS["gppo"], label="clipped by the ratio rule")
    axes[1, 1].set(title="share of tokens", ylim=(0, None))
    for axis in axes[1]:
        axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    save(drawn, path)
