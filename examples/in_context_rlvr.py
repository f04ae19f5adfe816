"""Experiment: In-Context RLVR and Evidence Gain (arXiv 2603.09803) on chain sums with worked solutions.

1. The warm start gives the small model in-context ability: it goes on as carefully as what it was shown.
2. Evidence Gain tells sound solutions from those that are right by luck, without looking at their steps (AUC).
3. IC-DAPO, where 6 of 8 rollouts see a sound demonstration, against DAPO: accuracy and soundness of bare answers.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from erc.rlvr import evidence_gain, with_demonstrations
from examples.experiment import (
    auc,
    check_preset,
    default_workers,
    markdown_table,
    reinforce,
    run_cells,
    spread,
    write_results,
)
from examples.in_context_trainer import InContextConfig, InContextTrainer
from examples.progress import Report
from examples.report import in_context_curves
from examples.rollout import plain_prompts
from examples.train_rlvr import warm_up
from examples.worked import judge, solution

DEFAULT = InContextConfig()
PAPER = InContextConfig(
    objective="ic-dapo-paper",
    steps=300,
    prompts=128,
    updates_per_batch=8,  # mini-batches of 16 prompts
    learning_rate=1e-6,
    max_new_tokens=1024,
    terms=6,
    digits=3,
    template="in-context",
    micro_batch=4,
    generation_batch=256,
)
METHODS = {"DAPO": 0, "IC-DAPO": 6}
MEASURES = {"right": "held-out accuracy", "sound": "right and sound", "quality": "sound among right"}


class Stage:
    """A cell of the experiment; picklable, for worker processes."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def trainer(self, config: InContextConfig, report: Report) -> InContextTrainer:
        """A trainer at the shared warm start."""
        trainer = InContextTrainer(config)
        warm_up(trainer, report, self.work / "warm.pt")
        return trainer


class Ability(Stage):
    """What demonstrations in the prompt do to held-out answers before any RL."""

    def __call__(self, config: InContextConfig, report: Report) -> dict[str, Any]:
        """`right`, `sound` and `quality` for each kind and number of demonstrations."""
        trainer = self.trainer(config, report)
        problems = trainer.held_out()
        prompts = plain_prompts(problems)
        found = {"no demonstration": trainer.judged(problems, prompts)}
        for kind, pool in (("sound", trainer.pool()), ("lucky", trainer.pool(lucky=True))):
            for count in (1, 3):
                draws = torch.Generator().manual_seed(config.seed)
                shown = [with_demonstrations(p, pool.sample(count, draws), config.template) for p in prompts]
                found[f"{count} {kind}"] = trainer.judged(problems, shown)
                report("in-context ability", len(found), 5, "")
        return found


class Evidence(Stage):
    """Evidence Gain of a sound and of a lucky solution of each of `queries` held-out problems."""

    queries, demonstrations = 100, 32

    def __call__(self, config: InContextConfig, report: Report) -> dict[str, Any]:
        """The gains in nats a token, and how well they separate the two kinds."""
        trainer = self.trainer(config, report)
        rng, draws = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
        pool = trainer.sound_pool
        experts = pool.sample(min(self.demonstrations, len(pool)), draws)
        pairs = []
        for problem in {problem.question: problem for problem in trainer.held_out()}.values():
            traces = [solution(problem), solution(problem, rng, luck=1.0)]
            if not judge(traces[1], problem).sound:  # forgetting a zero is no mistake
                pairs.append((problem.question, traces))
        gains = []
        for question, traces in pairs[: self.queries]:
            gains.append(evidence_gain(trainer.model, trainer.tokenizer, question, traces, experts, batch_size=32))
            report("Evidence Gain", len(gains), min(len(pairs), self.queries), "")
        sound, lucky = (column.contiguous() for column in torch.stack(gains).cpu().unbind(1))
        return {
            "sound": sound.tolist(),
            "lucky": lucky.tolist(),
            "auc": auc(sound, lucky),
            "same_question": (sound > lucky).float().mean().item(),
        }


class Training(Stage):
    """One run of RL."""

    def __call__(self, config: InContextConfig, report: Report) -> dict[str, Any]:
        """The history, with bare held-out answers judged before and after."""
        return reinforce(self.trainer(config, report), report)


def main(
    preset: Annotated[str, typer.Option(help='"laptop", or "paper" for the settings of the paper')] = "laptop",
    model: Annotated[str | None, typer.Option(help="any causal LM of transformers, instead of the small one")] = None,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int | None, typer.Option(help="rollout batches a run")] = None,
    prompts: Annotated[int | None, typer.Option(help="prompts a rollout batch")] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    warm_start_steps: Annotated[int, typer.Option()] = DEFAULT.warm_start_steps,
    eval_problems: Annotated[int, typer.Option()] = DEFAULT.eval_problems,
    workers: Annotated[int | None, typer.Option(help="processes; default: one a core")] = None,
    work: Annotated[Path, typer.Option(help="cells and the warm start; kept, so that a second call goes on")] = Path(
        "output/in_context_rlvr"
    ),
    output: Annotated[Path, typer.Option(help="tables, figure and summary")] = Path("results"),
) -> None:
    """Run what is missing, then write `in_context_rlvr.{md,json,png}`."""
    check_preset(preset)
    console, workers = Console(), workers or default_workers(model)
    base = replace(PAPER if preset == "paper" else DEFAULT, model=model, warm_start_steps=warm_start_steps)
    base = replace(base, steps=steps or base.steps, prompts=prompts or base.prompts, eval_problems=eval_problems)
    base = replace(base, learning_rate=learning_rate or base.learning_rate)
    cells = work / "cells"
    work.mkdir(parents=True, exist_ok=True)
    ability = run_cells({"ability": base}, Ability(work), cells, console=console)["ability"]
    evidence = run_cells({"evidence": base}, Evidence(work), cells, console=console)["evidence"]
    grid = {
        f"{method}-seed{seed}": replace(base, demonstrated=demonstrated, seed=seed)
        for seed in range(seeds)
        for method, demonstrated in METHODS.items()
    }
    histories = run_cells(grid, Training(work), cells, workers, console)
    runs = {method: [histories[f"{method}-seed{seed}"] for seed in range(seeds)] for method in METHODS}
    outcome = {
        method: {
            when: {name: spread(run[when][name] for run in found) for name in MEASURES} for when in ("before", "after")
        }
        for method, found in runs.items()
    }
    gain = {
        "auc": evidence["auc"],
        "same_question": evidence["same_question"],
        **{kind: spread(evidence[kind]) for kind in ("sound", "lucky")},
    }
    results = {"ability": ability, "evidence_gain": gain, "training": outcome}
    text = tables(ability, gain, outcome)
    write_results(output, "in_context_rlvr", base, seeds, results, text)
    in_context_curves(ability, evidence, runs, output / "in_context_rlvr.png")
    console.print(text, markup=False)


def tables(ability: dict[str, Any], gain: dict[str, Any], outcome: dict[str, Any]) -> str:
    """The three results as Markdown."""
    shown = [
        {"shown before the question": context} | {label: f"{row[name]:.3f}" for name, label in MEASURES.items()}
        for context, row in ability.items()
    ]
    trained = [
        {"method": f"{method}, {when}"}
        | {label: "{:.3f} ± {:.3f}".format(*row[name]) for name, label in MEASURES.items()}
        for method, found in outcome.items()
        for when, row in found.items()
    ]
    separation = (
        f"Evidence Gain, nats a token: sound {gain['sound'][0]:.3f} ± {gain['sound'][1]:.3f}, right by luck "
        f"{gain['lucky'][0]:.3f} ± {gain['lucky'][1]:.3f}; AUC {gain['auc']:.3f}; the sound solution of a question "
        f"gains more in {gain['same_question']:.1%} of questions.\n"
    )
    return "\n".join([markdown_table(shown), separation, markdown_table(trained)])


if __name__ == "__main__":
    typer.run(main)
