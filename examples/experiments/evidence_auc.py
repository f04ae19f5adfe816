"""Experiment: how well a transformer's `erc.rlvr.EvidenceGain` tells sound solutions from those that are right by luck.

Chain sums with worked solutions, two warm starts of the small decoder: authors who are careless in every solution, and
the harder variant, in which careless authors slip in 60 % of their solutions and careful ones in 10 %. Of each held-out
question a sound solution and one with a single slip and the right result are compared.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from erc.rlvr import EvidenceGain
from examples import palette
from examples.experiments.compare import Clock, auc, interval, shown, write
from examples.in_context_trainer import InContextConfig, InContextTrainer
from examples.progress import reporting
from examples.worked import judge, solution

VARIANTS = {"careless authors": (0.0, 1.0), "single slips": (0.1, 0.6)}


def gains(trainer: InContextTrainer, queries: int, experts: int) -> tuple[Tensor, Tensor]:
    """Evidence Gain in nats per token of the sound and of the lucky solution to each question; and its standard errors.
    Both `[queries, 2]`."""
    rng, draws = random.Random(0), torch.Generator().manual_seed(0)
    evidence = EvidenceGain(
        trainer.model.eval(), trainer.tokenizer, trainer.sound_pool.sample(experts, draws), batch_size=experts
    )
    found = []
    for problem in {problem.question: problem for problem in trainer.held_out()}.values():
        traces = [solution(problem), solution(problem, rng, luck=1.0)]
        if judge(traces[1], problem).sound:  # forgetting a zero is no mistake
            continue
        estimate = evidence.estimate(problem.question, traces)
        found.append(torch.stack([estimate.gain, estimate.standard_error]))
        if len(found) == queries:
            break
    gain, error = torch.stack(found).unbind(1)
    return gain, error


def auc_interval(gain: Tensor, resamples: int = 1_000) -> tuple[float, float, float]:
    """The AUC over questions, with its bootstrap interval over questions."""
    generator = torch.Generator().manual_seed(0)
    drawn = [gain[torch.randint(len(gain), (len(gain),), generator=generator)] for _ in range(resamples)]
    values = torch.tensor([auc(rows[:, 0], rows[:, 1]) for rows in drawn])
    low, high = values.quantile(torch.tensor([0.025, 0.975])).tolist()
    return auc(gain[:, 0], gain[:, 1]), low, high


def plot(found: dict[str, Tensor], path: Path) -> None:
    """Histograms of both kinds of solution, a panel per variant."""
    figure, axes = palette.figure(2.6, 1, len(found), squeeze=False)
    for axis, (name, gain) in zip(axes[0], found.items(), strict=True):
        edges = torch.linspace(gain.min(), gain.max(), 30).tolist()
        for column, arm, label in ((0, "IC-DAPO, sound", "sound"), (1, "IC-DAPO, careless", "right by luck")):
            axis.hist(gain[:, column].tolist(), edges, alpha=0.65, color=palette.COLORS[arm], label=label)
        axis.set(title=f"{name}: AUC {auc(gain[:, 0], gain[:, 1]):.2f}", xlabel="Evidence Gain, nats a token")
    axes[0, 0].set_ylabel("solutions")
    axes[0, 0].legend(frameon=False)
    palette.save(figure, path)


def main(
    queries: Annotated[int, typer.Option(help="questions, with a sound and a lucky solution each")] = 100,
    experts: Annotated[int, typer.Option(min=2)] = 32,
    warm_start_steps: Annotated[int, typer.Option()] = 1600,
    threads: Annotated[int, typer.Option(help="results repeat for the same number")] = 1,
    output: Annotated[Path, typer.Option(help="folder for evidence_auc.{json,png}")] = Path("output/experiments"),
) -> None:
    """Warm up, measure, and write figure and numbers."""
    torch.set_num_threads(threads)
    clock, found = Clock(), {}
    results: dict[str, Any] = {}
    for name, rates in VARIANTS.items():
        config = InContextConfig(warm_start_steps=warm_start_steps, warm_start_batch=16, warm_start_rates=rates)
        trainer = InContextTrainer(config)
        with reporting(Console()) as report:
            trainer.warm_start(report)
        gain, error = gains(trainer, queries, experts)
        found[name] = gain
        results[name] = {
            "auc": auc_interval(gain),
            "gain of sound minus lucky": interval(gain[:, 0] - gain[:, 1]),
            "sound gains more": (gain[:, 0] > gain[:, 1]).float().mean().item(),
            "mean standard error of a gain": error.mean().item(),
        }
        typer.echo(f"{name}: AUC {shown(results[name]['auc'])}  {clock.minutes()}")
    settings = {"queries": queries, "experts": experts, "warm_start_steps": warm_start_steps, "slip rates": VARIANTS}
    write(output / "evidence_auc.json", "examples.experiments.evidence_auc", settings, results, clock)
    plot(found, output / "evidence_auc.png")


if __name__ == "__main__":
    typer.run(main)
