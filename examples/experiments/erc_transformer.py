"""Experiment: three cells of `erc_regimes` again, with the transformer of `examples.plain_trainer` and its sums.

Each batch of rollouts is gone through four times at large learning rates, where the small policies say that the gate
matters most: for GPPO with both bands, and for DAPO. Slow: every run trains by itself.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

import erc
from examples import plain_trainer as plain
from examples.experiments.compare import Clock, interval, shown, write
from examples.experiments.erc_regimes import objective_of

CELLS = (("gppo", "gate 0.05"), ("gppo", "gate 0.2"), ("dapo", "gate 0.05"))
RATES = (5e-4, 1e-3)
REUSE = 4


def accuracy(model: plain.Policy, count: int = 1024) -> float:
    """The share of right sampled answers to the same `count` problems."""
    prompts, sums = plain.ask(count, torch.Generator().manual_seed(99))
    torch.manual_seed(99)
    return plain.verify(plain.sample(model, prompts), sums).mean().item()


def train(model: plain.Policy, objective: erc.Objective, rate: float, batches: int, seed: int) -> dict[str, float]:
    """The accuracy after RL, and the mean share of tokens outside the band of 0.05."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(seed)
    outside = []
    for step in range(batches):
        problems = torch.Generator().manual_seed((seed + 1) * 1_000_003 + step)
        batch, advantages, _ = plain.rollout(model, problems)
        old = plain.old_statistics(model, batch)
        for _ in range(REUSE):
            for rows in torch.randperm(len(advantages)).chunk(plain.UPDATES):
                part = erc.TokenStats(*(value[rows] for value in old))
                out = plain.update(model, optimizer, batch.rows(rows), part, advantages[rows], objective)
                active = batch.labels[rows] != -100
                gate = erc.EntropyRatioClip()
                outside.append(gate.dropped(out.entropy[active], part.entropy[active])[0].float().mean().item())
    return {"final": accuracy(model), "outside": torch.tensor(outside).nanmean().item()}


def main(
    starts: Annotated[int, typer.Option(min=2, help="warm starts")] = 8,
    batches: Annotated[int, typer.Option(help="rollout batches of a run")] = 12,
    warm_start_steps: Annotated[int, typer.Option()] = 300,
    threads: Annotated[int, typer.Option(help="results repeat for the same number")] = 1,
    output: Annotated[Path, typer.Option(help="folder for erc_transformer.json")] = Path("output/experiments"),
) -> None:
    """Train, print the differences that the gate makes, and write the numbers."""
    torch.set_num_threads(threads)
    clock = Clock()
    rules = [*dict.fromkeys((rule, "no gate") for rule, _ in CELLS), *CELLS]
    arms = [(*arm, rate) for rate in RATES for arm in rules]
    found: dict[tuple[str, str, float], list[dict[str, float]]] = {arm: [] for arm in arms}
    before = []
    for seed in range(starts):
        model = plain.warm_start(warm_start_steps, seed)
        before.append(accuracy(model))
        for rule, gate, rate in arms:
            run = train(copy.deepcopy(model), objective_of(rule, gate), rate, batches, seed)
            found[rule, gate, rate].append(run)
            line = f"start {seed} ({before[-1]:.3f}) {rule}, {gate}, learning rate {rate:g}: {run['final']:.3f}"
            typer.echo(f"{line}  {clock.minutes()}")
    finals = {arm: torch.tensor([run["final"] for run in runs]) for arm, runs in found.items()}
    names = {(rule, gate, rate): f"{rule}, {gate}, learning rate {rate:g}" for rule, gate, rate in arms}

    def collapsed(final: Tensor) -> float:
        return (final < torch.tensor(before)).float().mean().item()

    results = {
        "reward of the warm starts": before,
        "final reward": {names[arm]: interval(final) for arm, final in finals.items()},
        "differences of the final reward": {
            f"{rule}, {gate} - no gate, learning rate {rate:g}": interval(
                finals[rule, gate, rate] - finals[rule, "no gate", rate]
            )
            for rate in RATES
            for rule, gate in CELLS
        },
        "ended below the warm start": {names[arm]: collapsed(final) for arm, final in finals.items()},
        "runs": {names[arm]: runs for arm, runs in found.items()},
    }
    settings = {"starts": starts, "batches": batches, "learning_rates": RATES, "reuse": REUSE}
    settings |= {"updates": plain.UPDATES, "warm_start_steps": warm_start_steps}
    write(output / "erc_transformer.json", "examples.experiments.erc_transformer", settings, results, clock)
    for case, value in results["differences of the final reward"].items():
        typer.echo(f"{case:48} {shown(value)}")


if __name__ == "__main__":
    typer.run(main)
