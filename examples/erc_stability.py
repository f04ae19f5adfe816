"""Experiment: strongly off-policy RL with and without entropy-ratio clipping (ERC, arXiv 2512.05591).

Every objective trains from the same warm starts, with the same seeds, at a learning rate that is safe and at one that
is not. Cells are files under `--work`; the table, the figure and the summary go to `--output`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import erc
from examples.experiment import (
    check_preset,
    default_workers,
    markdown_table,
    reinforce,
    run_cells,
    spread,
    write_results,
)
from examples.progress import Report
from examples.report import objective_curves
from examples.train_rlvr import TrainConfig, Trainer, warm_up

OBJECTIVES = ("ppo", "dapo", "gppo", "erc-dapo", "erc-gppo")
DEFAULT = TrainConfig(steps=50, prompts=32, updates_per_batch=16, eval_problems=256)
LEARNING_RATES = (5e-5, 2e-4)
PAPER = replace(
    DEFAULT,
    steps=500,
    prompts=128,
    updates_per_batch=8,  # mini-batches of 16 prompts
    learning_rate=1e-6,
    max_new_tokens=4096,
    micro_batch=4,
    generation_batch=256,
)
COLUMNS = {
    "reward_end": "reward, last fifth",
    "accuracy": "held-out accuracy",
    "drop": "fall from the best fifth",
    "entropy_end": "entropy, last fifth",
    "fluctuation": "entropy fluctuation",
    "outside": "tokens outside the ERC band",
    "ratio_span": "entropy ratio, 5 % to 95 %",
    "erc": "dropped by ERC",
    "clip": "clipped by PPO",
    "grad_norm": "gradient norm",
}


def paper_objective(name: str) -> dict[str, Any]:
    """The overrides of `--preset paper`: the rule and the NLL term of the authors' recipe, whose gate (0.95 to 1.05) is
    the presets' own. PPO keeps its widths."""
    recipe = erc.objective("erc-gppo-paper" if name.endswith("gppo") else "erc-dapo-paper")
    rule = replace(erc.objective("ppo").ratio, dual_clip=recipe.ratio.dual_clip) if name == "ppo" else recipe.ratio
    return {"ratio": rule, "nll_coef": recipe.nll_coef}


def warm_file(config: TrainConfig, work: Path) -> Path:
    """Where the warm start of the cell's seed is kept."""
    return work / f"warm-{config.seed}.pt"


class Cell:
    """A run of one objective, learning rate and seed; picklable, for worker processes."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def __call__(self, config: TrainConfig, report: Report) -> dict[str, Any]:
        """The history of the run: from the seed's warm start to the held-out accuracy after the last step."""
        trainer = Trainer(config)
        warm_up(trainer, report, warm_file(config, self.work))
        return reinforce(trainer, report)


class WarmStart(Cell):
    """The warm starts, ahead of the cells that share them."""

    def __call__(self, config: TrainConfig, report: Report) -> dict[str, Any]:
        """Leaves the weights in their file."""
        warm_up(Trainer(config), report, warm_file(config, self.work))
        return {}


def measures(history: dict[str, Any]) -> dict[str, float]:
    """The table's numbers of one run; windows are fifths of the steps."""
    steps = history["steps"]
    fifth = max(1, len(steps) // 5)

    def mean(name: str, rows: list[dict[str, float]]) -> float:
        return sum(row[name] for row in rows) / len(rows)

    windows = [mean("reward", steps[first : first + fifth]) for first in range(0, len(steps) - fifth + 1, fifth)]
    entropies = [row["rollout_entropy"] for row in steps]
    moves = [abs(after - before) for before, after in pairwise(entropies)]
    return {
        "reward_end": windows[-1],
        "accuracy": history["after"]["sampled"],
        "gain": history["after"]["sampled"] - history["before"]["sampled"],
        "drop": max(windows) - windows[-1],
        "entropy_end": mean("rollout_entropy", steps[-fifth:]),
        "fluctuation": sum(moves) / max(len(moves), 1),
        "outside": mean("ratio_outside", steps),
        "ratio_span": mean("ratio_p95", steps) - mean("ratio_p05", steps),
        "erc": mean("erc_fraction", steps),
        "clip": mean("clip_fraction", steps),
        "grad_norm": mean("grad_norm", steps),
    }


def main(
    preset: Annotated[str, typer.Option(help='"laptop", or "paper" for the settings of the paper')] = "laptop",
    model: Annotated[str | None, typer.Option(help="any causal LM of transformers, instead of the small one")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="rollout batches a run")] = None,
    learning_rate: Annotated[list[float] | None, typer.Option(help="may be repeated")] = None,
    objective: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
    task: Annotated[str, typer.Option(help="a task family of reasoning-gym")] = DEFAULT.task,
    prompts: Annotated[int | None, typer.Option(help="prompts a rollout batch")] = None,
    warm_start_steps: Annotated[int, typer.Option()] = DEFAULT.warm_start_steps,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    work: Annotated[Path, typer.Option(help="cells and warm starts; kept, so that a second call goes on")] = Path(
        "output/erc_stability"
    ),
    output: Annotated[Path, typer.Option(help="table, figure and summary")] = Path("results"),
) -> None:
    """Run what is missing of the grid, then write `erc_stability.{md,json,png}`."""
    check_preset(preset)
    paper, console = preset == "paper", Console()
    base = replace(PAPER if paper else DEFAULT, model=model, task=task, warm_start_steps=warm_start_steps)
    base = replace(base, steps=steps or base.steps, prompts=prompts or base.prompts)
    rates = learning_rate or ((PAPER.learning_rate,) if paper else LEARNING_RATES)
    names, workers = objective or OBJECTIVES, workers or default_workers(model)
    cells = {
        (name, rate, seed): replace(
            base, objective=name, overrides=paper_objective(name) if paper else {}, learning_rate=rate, seed=seed
        )
        for rate in rates
        for seed in range(seeds)
        for name in names
    }
    if model is None:
        starts = {f"warm-{seed}": replace(base, seed=seed) for seed in range(seeds)}
        run_cells(starts, WarmStart(work), work, workers, console)
    files = {"{}-lr{:g}-seed{}".format(*key): config for key, config in cells.items()}
    found = run_cells(files, Cell(work), work / "cells", workers, console)
    histories = dict(zip(cells, found.values(), strict=True))
    runs = {key: measures(history) for key, history in histories.items()}
    summary = [
        {"learning_rate": rate, "objective": name}
        | {column: spread(runs[name, rate, seed][column] for seed in range(seeds)) for column in runs[name, rate, 0]}
        for rate in rates
        for name in names
    ]
    rows = [
        {"learning rate": f"{row['learning_rate']:g}", "objective": row["objective"]}
        | {label: "{:.3f} ± {:.3f}".format(*row[column]) for column, label in COLUMNS.items()}
        for row in summary
    ]
    table = markdown_table(rows)
    write_results(output, "erc_stability", base, seeds, {"mean_and_deviation": summary}, table)
    objective_curves(histories, output / "erc_stability.png")
    console.print(table, markup=False)


if __name__ == "__main__":
    typer.run(main)
