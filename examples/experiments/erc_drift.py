"""Experiment: how far many updates on one batch of rollouts carry the policy, with and without the entropy-ratio gate.

No training loop: the batch stays, so that all that moves is the policy. After each number of updates the exact distance
of the whole distributions is read by `erc.entropy_ratio`, beside what a ratio clip cannot see, the probability that
moved among tokens that were not sampled. The control drops as many tokens as the gate does, chosen at random.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import erc
from examples import palette
from examples.experiments.compare import Clock, interval, shown, write
from examples.experiments.policies import Optimizer, Policies, exponential, policy_update
from examples.experiments.words import LENGTH, VOCABULARY, Rollouts, WordTask, dropped, sample, warm_start

RULES = ("dapo", "gppo", "no-clip")
GATES = ("no gate", "gate 0.05", "random drop")
OPTIMIZERS = {"sgd": 1.0, "adam": 3e-3}
READINGS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
MEASURES = {
    "kl": "KL(old || new), nats",
    "unsampled": "TV, un-sampled tokens",
    "entropy_change": "|entropy change|, bits",
    "outside": "tokens outside band",
}


def rollouts(task: WordTask, policies: Policies, prompts: int, group: int = 8) -> Rollouts:
    """The frozen batch of each run."""
    generator = torch.Generator().manual_seed(1)
    drawn = task.prompts((policies.runs, prompts), generator)
    a, b = (value.repeat_interleave(group, 1) for value in drawn)
    return sample(
        task, policies, a, b, exponential((LENGTH, policies.runs, prompts * group, VOCABULARY), generator), group
    )


def drift(
    start: Policies, batch: Rollouts, rule: str, gate: str, optimizer: str, shares: list[Tensor]
) -> dict[str, Any]:
    """`measure: [reading][run]` over full-batch updates by `rule` under `gate`.

    `shares` holds the share of tokens that each update drops: the gate appends to it, and the random drop, which comes
    after it, drops as many tokens of the same run at the same update.
    """
    policies = start.copies(1)
    steps = Optimizer(policies, torch.full((policies.runs,), OPTIMIZERS[optimizer]), optimizer)
    features, labels = batch.features.flatten(1, 2), batch.tokens.flatten(1)
    advantages = batch.advantages.repeat_interleave(LENGTH, 1)
    old_logits = policies.logits(features)
    old = erc.token_stats(old_logits, labels)
    arguments = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": advantages}
    generator = torch.Generator().manual_seed(2)
    found: dict[str, list[list[float]]] = {}
    for update in range(READINGS[-1] + 1):
        if update in READINGS:
            for measure, values in reading(policies.logits(features), old_logits, labels).items():
                found.setdefault(measure, []).append(values.tolist())
        if gate == "random drop":
            arguments["mask"] = torch.rand(labels.shape, generator=generator) >= shares[update][:, None]
        name = f"erc-{rule}" if gate == "gate 0.05" else rule
        out, _ = policy_update(policies, steps, features, labels, objective=name, **arguments)
        if gate == "gate 0.05":
            shares.append(dropped(out.entropy, old.entropy, 0.05).float().mean(1))
    return found


def reading(logits: Tensor, old_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Means over each run's tokens; `[R]`."""
    pair = erc.entropy_ratio(logits, old_logits)
    moved = (logits.softmax(-1) - old_logits.softmax(-1)).gather(-1, labels[..., None])[..., 0]
    low, high = pair.ratio.quantile(torch.tensor([0.05, 0.95]), 1)
    return {
        "kl": pair.kl_old_new.mean(1),
        "total_variation": pair.total_variation.mean(1),
        "unsampled": (pair.total_variation - moved.abs() / 2).mean(1),
        "entropy_change": (pair.entropy - pair.old_entropy).abs().mean(1) / math.log(2),
        "outside": dropped(pair.entropy, pair.old_entropy, 0.05).float().mean(1),
        "rho_low": low,
        "rho_high": high,
    }


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A row of panels per optimiser, a colour per rule, a line style per gate."""
    figure, axes = palette.figure(5.4, len(found), len(MEASURES), sharex=True)
    for row, (optimizer, runs) in enumerate(found.items()):
        for column, (measure, title) in enumerate(MEASURES.items()):
            axis = axes[row, column]
            for name, values in runs.items():
                rule, gate = name.split(", ")
                mean = torch.tensor(values[measure])[1:].mean(1).tolist()
                axis.plot(READINGS[1:], mean, palette.STYLES[gate], color=palette.COLORS[rule], label=name)
            axis.set(xscale="log", title=title if row == 0 else "")
            axis.grid(alpha=0.3)
            if measure == "kl":
                axis.set(yscale="log", ylabel={"sgd": "SGD", "adam": "Adam"}[optimizer])
            if row == len(found) - 1:
                axis.set_xlabel("updates on one batch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(RULES), frameon=False)
    palette.save(figure, path)


def comparisons(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """After the last update: differences of each pair of gates, over warm starts."""

    def last(optimizer: str, rule: str, gate: str, measure: str) -> Tensor:
        return torch.tensor(found[optimizer][f"{rule}, {gate}"][measure][-1])

    return {
        f"{optimizer}, {rule}, {gate} - {other}": {
            measure: interval(last(optimizer, rule, gate, measure) - last(optimizer, rule, other, measure))
            for measure in MEASURES
        }
        for optimizer in found
        for rule in RULES
        for gate, other in (GATES[1::-1], GATES[::-2], GATES[1:])
    }


def main(
    starts: Annotated[int, typer.Option(min=2, help="warm starts")] = 8,
    prompts: Annotated[int, typer.Option(help="prompts of the frozen batch, with 8 answers each")] = 24,
    threads: Annotated[int, typer.Option(help="results repeat for the same number")] = 1,
    output: Annotated[Path, typer.Option(help="folder for erc_drift.{json,png}")] = Path("output/experiments"),
) -> None:
    """Run, print the differences that the gate makes, and write figure and numbers."""
    torch.set_num_threads(threads)
    clock, task = Clock(), WordTask()
    start = warm_start(task, starts)
    batch = rollouts(task, start, prompts)
    found: dict[str, dict[str, Any]] = {}
    for optimizer in OPTIMIZERS:
        for rule in RULES:
            shares: list[Tensor] = []
            for gate in GATES:
                values = drift(start, batch, rule, gate, optimizer, shares)
                found.setdefault(optimizer, {})[f"{rule}, {gate}"] = values
                typer.echo(f"{optimizer:4} {rule}, {gate}: KL {torch.tensor(values['kl'][-1]).mean():.4f}")
    differences = comparisons(found)
    for case, measures in differences.items():
        typer.echo(f"{case}, after {READINGS[-1]} updates")
        for measure, values in measures.items():
            typer.echo(f"  {MEASURES[measure]:38} {shown(values)}")
    settings = {"starts": starts, "prompts": prompts, "learning_rates": OPTIMIZERS, "readings": READINGS}
    results = {"differences": differences, "measures": found}
    write(output / "erc_drift.json", "examples.experiments.erc_drift", settings, results, clock)
    plot(found, output / "erc_drift.png")
    typer.echo(f"{output / 'erc_drift.png'}  {clock.minutes()}")


if __name__ == "__main__":
    typer.run(main)
