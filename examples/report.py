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
    """What a run leaves: a row of numbers a step, and held-out accuracy before and after."""

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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in history.steps]
    series = {name: [row[name] for row in history.steps] for name in ("reward", *METRICS)}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), constrained_layout=True)
    axes[0, 0].plot(steps, series["reward"])
    axes[0, 0].set(title="reward of sampled rollouts", ylim=(0, 1))
    axes[0, 1].plot(steps, series["entropy"])
    axes[0, 1].set(title="entropy (nats)")
    axes[1, 0].plot(steps, series["entropy_ratio"], label="mean")
    axes[1, 0].fill_between(
        steps, series["entropy_ratio_min"], series["entropy_ratio_max"], alpha=0.2, label="min to max"
    )
    axes[1, 0].set(title="entropy ratio", yscale="log")
    axes[1, 0].legend()
    axes[1, 1].plot(steps, series["erc_fraction"], label="dropped by ERC")
    axes[1, 1].plot(steps, series["clip_fraction"], label="clipped by PPO")
    axes[1, 1].set(title="share of tokens")
    axes[1, 1].legend()
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def objective_curves(histories: dict[tuple[str, float, int], dict[str, Any]], path: Path) -> None:
    """A row of panels a learning rate: reward, entropy, share of tokens outside the ERC band, gradient norm.

    `histories` is keyed by (objective, learning rate, seed); lines are means over seeds, bands their range.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    panels = {
        "reward": "reward of rollouts",
        "rollout_entropy": "entropy (nats)",
        "ratio_outside": "tokens outside the ERC band",
        "grad_norm": "gradient norm",
    }
    rates = sorted({rate for _, rate, _ in histories})
    names = list(dict.fromkeys(name for name, _, _ in histories))
    size = (3.2 * len(panels), 2.7 * len(rates))
    figure, axes = plt.subplots(len(rates), len(panels), figsize=size, constrained_layout=True, squeeze=False)
    for row, rate in zip(axes, rates, strict=True):
        for axis, (measure, title) in zip(row, panels.items(), strict=True):
            for color, name in enumerate(names):
                runs = [h["steps"] for (n, r, _), h in histories.items() if (n, r) == (name, rate)]
                values = np.array([[step[measure] for step in run] for run in runs])
                smooth = np.stack([np.convolve(v, np.ones(5) / 5, "valid") for v in values])
                steps = np.arange(smooth.shape[1]) + 5
                style = "--" if name.startswith("erc-") else "-"
                axis.plot(steps, smooth.mean(0), style, color=f"C{color}", label=name, linewidth=1.3)
                axis.fill_between(steps, smooth.min(0), smooth.max(0), color=f"C{color}", alpha=0.1, linewidth=0)
            axis.set_title(f"{title}, lr {rate:g}", fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=65)
    plt.close(figure)


def in_context_curves(
    ability: dict[str, Any], evidence: dict[str, Any], runs: dict[str, list[dict[str, Any]]], path: Path
) -> None:
    """In-context ability, Evidence Gain of the two kinds of solution, and plain rollouts in training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, 4, figsize=(14, 3), constrained_layout=True)
    places = np.arange(len(ability))
    for offset, name, label in ((-0.2, "right", "right"), (0.2, "sound", "right and sound")):
        axes[0].bar(places + offset, [row[name] for row in ability.values()], 0.4, label=label)
    axes[0].set_xticks(places, [name.replace(" ", "\n", 1) for name in ability])
    axes[0].set_title("before RL, by demonstrations shown", fontsize=9)
    edges = np.histogram_bin_edges(evidence["sound"] + evidence["lucky"], 24)
    for kind, label in (("sound", "sound"), ("lucky", "right by luck")):
        axes[1].hist(evidence[kind], edges, alpha=0.6, label=label)
    axes[1].set_title(f"Evidence Gain (nats a token), AUC {evidence['auc']:.2f}", fontsize=9)
    for axis, name, title in (
        (axes[2], "plain_reward", "right, bare rollouts in training"),
        (axes[3], "plain_sound", "right and sound, bare rollouts"),
    ):
        for method, found in runs.items():
            values = np.array([[step[name] for step in run["steps"]] for run in found])
            width = min(9, values.shape[1])
            smooth = np.stack([np.convolve(v, np.ones(width) / width, "valid") for v in values])
            steps = np.arange(smooth.shape[1]) + width
            (line,) = axis.plot(steps, smooth.mean(0), label=method)
            axis.fill_between(steps, smooth.min(0), smooth.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
    for axis in axes:
        axis.legend(fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=85)
    plt.close(figure)
