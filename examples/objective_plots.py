"""Per-token loss and gradient of every ratio rule against the importance ratio: the figure of docs/objectives.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import erc
from erc.surrogate.sequences import Sequences
from examples.palette import NEGATIVE, NEUTRAL, POSITIVE, figure, legend_below, save

SAME_RULE = ("grpo", "dr-grpo", "luspo", "ic-dapo-paper")
"""Presets whose rule another one shows already; they differ in the reduction or by an NLL term."""
OLD_LOGPROB = -1.0
COLUMNS = 2
"""Panels per row: what stays readable at a page's width of 800 pixels."""
CORRECTIONS = {
    "TIS": erc.RolloutCorrection(),
    "IcePop": erc.RolloutCorrection("mask"),
    "geometric mask": erc.RolloutCorrection("mask", level="geometric"),
    "KPop": erc.RolloutCorrection("binary-kl"),
}
COLOURS = {1.0: POSITIVE, -1.0: NEGATIVE}


def curve(objective: erc.Objective, ratios: Tensor, advantage: float) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d logprob of one-token sequences at each of `ratios`, for one advantage."""
    logprob = (OLD_LOGPROB + ratios.log())[:, None].requires_grad_()
    out = erc.objective_loss(
        logprob,
        torch.ones_like(logprob),
        objective=objective,
        old_logprob=torch.full_like(logprob, OLD_LOGPROB).detach(),
        advantages=torch.full_like(ratios, advantage),
        old_divergence=(ratios - 1).abs()[:, None] * torch.tensor(OLD_LOGPROB).exp(),
    )
    out.loss.sum().backward()
    return out.loss.detach().squeeze(-1), logprob.grad.squeeze(-1)


def weights(correction: erc.RolloutCorrection, ratios: Tensor) -> Tensor:
    """The weight of the policy term of one-token sequences, at each ratio of old to rollout probability."""
    rollout_logprob = torch.full_like(ratios, OLD_LOGPROB)
    sequences = Sequences(len(ratios), length=1)
    return correction.weights(rollout_logprob + ratios.log(), rollout_logprob, torch.ones_like(ratios), sequences)


def presets() -> list[str]:
    """What is plotted: every rule once."""
    return [name for name in erc.objectives() if not name.startswith("erc-") and name not in SAME_RULE]


def draw(path: Path, points: int = 401) -> None:
    names = presets()
    panels = len(names) + len(CORRECTIONS)
    rows = -(-panels // COLUMNS)
    drawn, axes = figure(1.45 * rows + 0.8, rows, COLUMNS, sharex=True)
    ratios = torch.linspace(0.25, 2.2, points, dtype=torch.float64)
    for axis, name in zip(axes.flat, names, strict=False):
        objective = erc.objective(name, reduction="none")
        for advantage, colour in COLOURS.items():
            loss, gradient = curve(objective, ratios, advantage)
            axis.plot(ratios, loss, color=colour, alpha=0.4, linewidth=3, label=f"loss, A = {advantage:+.0f}")
            axis.plot(
                ratios, gradient, color=colour, linestyle="--", linewidth=1.2, label=f"gradient, A = {advantage:+.0f}"
            )
        axis.set_title(name)
        axis.set_ylim(-3.2, 3.2)
    for axis, (name, correction) in zip(axes.flat[len(names) :], CORRECTIONS.items(), strict=False):
        axis.plot(ratios, weights(correction, ratios), color=NEUTRAL, label="rollout weight")
        axis.set_title(f"weight: {name}")
        axis.set_ylim(-0.2, 2.4)
    for axis in axes.flat[:panels]:
        axis.axvline(1.0, color="grey", linewidth=0.5)
        axis.set_xticks([0.5, 1, 1.5, 2], ["0.5", "1", "1.5", "2"])
        axis.tick_params(labelbottom=True)
    for axis in axes.flat[panels:]:
        axis.axis("off")
    legend_below(drawn, columns=5, title="against the importance ratio of the token")
    save(drawn, path)


def main(
    output: Annotated[Path, typer.Option(help="where the figure goes")] = Path("docs/images/objectives.png"),
    points: Annotated[int, typer.Option(min=3)] = 401,
) -> None:
    """Draw the figure."""
    draw(output, points)
    typer.echo(f"wrote {output}")


if __name__ == "__main__":
    typer.run(main)
