"""Experiment: where entropy-ratio clipping helps a training run, and where it costs: a map over rules, step sizes and
data reuse.

Every cell trains from the same warm starts, on the same prompts and the same noise. The random drop is the control: it
drops as many tokens as the gate of 0.05 did, in the same run at the same update. `--transformer` repeats three cells
with the transformer of `examples.plain_trainer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import erc
from examples import palette
from examples.experiments.compare import Clock, interval, shown, write
from examples.experiments.policies import Optimizer, Policies, exponential, policy_update
from examples.experiments.words import LENGTH, VOCABULARY, WordTask, accuracy, dropped, sample, warm_start

RULES = ("dapo", "gppo", "no-clip")
BANDS = {"gate 0.05": 0.05, "gate 0.2": 0.2}
GATES = ("no gate", *BANDS, "random drop")
TRUST = "dppo-full-tv"
RATES = (4e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)
REUSE = (1, 4, 12)
MINIBATCHES = 8
PROMPTS, GROUP = 24, 8
BATCHES = 24


def objective_of(rule: str, gate: str) -> erc.Objective:
    """The objective of a cell."""
    if gate in BANDS:
        return erc.objective(f"erc-{rule}", entropy_ratio=erc.EntropyRatioClip(BANDS[gate], BANDS[gate]))
    return erc.objective(rule)


def train(
    task: WordTask, starts: Policies, rule: str, gate: str, reuse: int, batches: int, shares: list[Tensor]
) -> dict[str, Tensor]:
    """All warm starts at all learning rates: `measure: [warm start, learning rate]`.

    `shares` is filled by the gate of 0.05 and read by the random drop: the share of tokens dropped, per update and run.
    """
    objective, rates = objective_of(rule, gate), len(RATES)
    policies = starts.copies(rates)
    optimizer = Optimizer(policies, torch.tensor(RATES).repeat(starts.runs), max_norm=1.0)
    draws, order = torch.Generator().manual_seed(11), torch.Generator().manual_seed(12)
    known, seen = iter(shares), []
    for _ in range(batches):
        # The same prompts and noise for all learning rates of a warm start, and for every cell.
        asked = [value.repeat_interleave(rates, 0) for value in task.prompts((starts.runs, PROMPTS), draws)]
        noise = exponential((LENGTH, starts.runs, PROMPTS * GROUP, VOCABULARY), draws).repeat_interleave(rates, 1)
        batch = sample(task, policies, *(value.repeat_interleave(GROUP, 1) for value in asked), noise, GROUP)
        features, labels = batch.features.flatten(1, 2), batch.tokens.flatten(1)
        advantages = batch.advantages.repeat_interleave(LENGTH, 1)
        old_logits = policies.logits(features)
        old = erc.token_stats(old_logits, labels)
        rows = []
        for _ in range(reuse):
            for prompts in torch.randperm(PROMPTS, generator=order).chunk(MINIBATCHES):
                chosen = (prompts[:, None] * GROUP * LENGTH + torch.arange(GROUP * LENGTH)).flatten()
                arguments: dict[str, Any] = {
                    "old_logprob": old.logprob[:, chosen],
                    "old_entropy": old.entropy[:, chosen],
                    "advantages": advantages[:, chosen],
                }
                if gate == "random drop":
                    draw = torch.rand(policies.runs, len(chosen), generator=order)
                    arguments["mask"] = draw >= next(known)[:, None]
                if rule == TRUST:
                    logits = policies.logits(features[:, chosen])
                    pair = erc.entropy_ratio(logits, old_logits[:, chosen])
                    arguments["old_divergence"] = pair.total_variation
                out, norms = policy_update(
                    policies, optimizer, features[:, chosen], labels[:, chosen], objective=objective, **arguments
                )
                outside = dropped(out.entropy, arguments["old_entropy"], BANDS.get(gate, 0.05))
                if gate == "gate 0.05":
                    shares.append(outside.float().mean(1))
                rows.append(_update_measures(out, arguments, outside, norms))
        pair = erc.entropy_ratio(policies.logits(features), old_logits)
        row = {name: torch.stack([values[name] for values in rows]).mean(0) for name in rows[0]}
        row |= {
            "reward": batch.rewards.mean(1),
            "entropy": old.entropy.mean(1),
            "kl": pair.kl_old_new.mean(1),
            "total_variation": pair.total_variation.mean(1),
        }
        seen.append(row | {"norms": torch.stack([values["norm"] for values in rows])})
    norms = torch.cat([row.pop("norms") for row in seen])
    found = {name: torch.stack([row[name] for row in seen]).mean(0) for name in seen[0]}
    found |= {"final": accuracy(task, policies), "variation": norms.std(0) / norms.mean(0)}
    return {name: value.view(starts.runs, rates) for name, value in found.items()}


def _update_measures(
    out: erc.PolicyLoss, known: dict[str, Tensor], outside: Tensor, norms: Tensor
) -> dict[str, Tensor]:
    """Shares of tokens in one update of each run: outside the band, beyond DAPO's clip, and both among either."""
    ratio, advantage = (out.logprob - known["old_logprob"]).exp(), known["advantages"]
    clipped = ((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))
    either = (clipped | outside).float().sum(1).clamp(min=1)
    return {
        "outside": outside.float().mean(1),
        "clipped": clipped.float().mean(1),
        "overlap": (clipped & outside).float().sum(1) / either,
        "norm": norms,
    }


Cells = dict[tuple[str, str, int], dict[str, Tensor]]


def pairs() -> list[tuple[str, str]]:
    """The gates that are compared."""
    return [*((gate, "no gate") for gate in (*GATES[1:], TRUST)), ("gate 0.05", "random drop")]


def differences(cells: Cells, of: Callable[[dict[str, Tensor]], Tensor]) -> dict[str, Any]:
    """Intervals of `of` one cell minus that of another, which has another gate and the same rule and reuse: one of
    `[warm start]`, or for each learning rate one of `[warm start, learning rate]`."""
    found = {}
    for (first, second), rule, reuse in itertools.product(pairs(), RULES, REUSE):
        one = cells[TRUST, "no gate", reuse] if first == TRUST else cells[rule, first, reuse]
        gaps = of(one) - of(cells[rule, second, reuse])
        value = interval(gaps) if gaps.dim() == 1 else [interval(column) for column in gaps.T]
        found[f"{rule}, {first} - {second}, reuse {reuse}"] = value
    return found


def best_rate(final: Tensor) -> Tensor:
    """Per warm start, the final reward at the learning rate that is best for the *other* warm starts: a choice that the
    run itself had no part in. `[warm start, learning rate]` to `[warm start]`."""
    others = (final.sum(0) - final) / (len(final) - 1)
    return final.gather(1, others.argmax(1, keepdim=True))[:, 0]


def arms() -> list[tuple[str, str]]:
    """(rule, gate) of every arm; the gate of 0.05 before the random drop that copies its shares."""
    return [*itertools.product(RULES, GATES), (TRUST, "no gate")]


def summary(cells: Cells, before: Tensor) -> dict[str, Any]:
    """Everything that the docs quote."""
    best = {
        f"{rule}, {gate}, reuse {reuse}": interval(best_rate(cells[rule, gate, reuse]["final"]) - before)
        for rule, gate in arms()
        for reuse in REUSE
    }
    for cell in cells.values():
        cell["collapsed"] = (cell["final"] < before[:, None]).float()
    means = {
        f"{rule}, {gate}, reuse {reuse}": {name: value.mean(0) for name, value in cell.items()}
        for (rule, gate, reuse), cell in cells.items()
    }
    return {
        "reward of the warm starts": before,
        "learning rates": RATES,
        "differences of the final reward, per learning rate": differences(cells, lambda cell: cell["final"]),
        "gain over the warm start at the best learning rate": best,
        "differences at the best learning rate": differences(cells, lambda cell: best_rate(cell["final"])),
        "differences of means over learning rates": {
            name: differences(cells, lambda cell, name=name: cell[name].mean(1))
            for name in ("collapsed", "final", "kl", "variation")
        },
        "means over warm starts, per learning rate": means,
        "final reward, per warm start and learning rate": {
            ", ".join(map(str, key)): c["final"] for key, c in cells.items()
        },
    }


def heat_map(found: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    """Differences to no gate; bold where the interval leaves out 0."""
    figure, axes = palette.figure(7.2, 1, len(RULES), sharey=True)
    gates = (*GATES[1:], TRUST)
    columns = list(itertools.product(REUSE, RATES))
    for axis, rule in zip(axes, RULES, strict=True):
        rows = [
            [found[f"{rule}, {gate} - no gate, reuse {r}"][RATES.index(rate)] for r, rate in columns] for gate in gates
        ]
        values = torch.tensor([[cell[0] for cell in row] for row in rows]).T
        image = axis.imshow(values.tolist(), cmap="RdBu", vmin=-0.2, vmax=0.2, aspect="auto")
        for x, row in enumerate(rows):
            for y, (mean, low, high) in enumerate(row):
                sure = low > 0 or high < 0
                text = f"{round(100 * mean):+d}"
                color = "white" if abs(mean) > 0.13 else "black" if sure else "0.45"
                axis.text(x, y, text, ha="center", va="center", fontweight="bold" if sure else "normal", color=color)
        axis.set_xticks(range(len(gates)), [gate.replace(" ", "\n").replace("-full", "\nfull") for gate in gates])
        axis.set_title(f"{rule}")
        for reuse in range(1, len(REUSE)):
            axis.axhline(reuse * len(RATES) - 0.5, color="black", linewidth=1)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_yticks(range(len(columns)), [f"reuse {reuse}, lr {rate:g}" for reuse, rate in columns])
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("final reward minus that without a gate")
    palette.save(figure, path)


def bars(found: dict[str, tuple[float, float, float]], path: Path) -> None:
    """The gain over the warm start of every arm at its best learning rate, with intervals."""
    figure, axes = palette.figure(3.0, 1, len(REUSE), sharey=True, squeeze=False)
    for axis, reuse in zip(axes[0], REUSE, strict=True):
        for place, gate in enumerate(GATES):
            cells = [found[f"{rule}, {gate}, reuse {reuse}"] for rule in RULES]
            palette.bars(axis, [rule + 0.2 * (place - 1.5) for rule in range(len(RULES))], cells, gate, 0.18)
        palette.bars(axis, [len(RULES) - 0.3], [found[f"{TRUST}, no gate, reuse {reuse}"]], TRUST, 0.18)
        axis.set_xticks([*range(len(RULES)), len(RULES) - 0.3], [*RULES, "dppo"])
        axis.set_title(f"each token used {reuse} time{'s' if reuse > 1 else ''}")
        axis.axhline(0, color="black", linewidth=0.8)
    axes[0, 0].set_ylabel("reward gained over\nthe warm start")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    palette.save(figure, path)


def main(
    starts: Annotated[int, typer.Option(min=2, help="warm starts")] = 8,
    batches: Annotated[int, typer.Option(help="rollout batches of a run")] = BATCHES,
    threads: Annotated[int, typer.Option(help="results repeat for the same number")] = 1,
    output: Annotated[Path, typer.Option(help="folder for erc_regimes.json and its figures")] = Path(
        "output/experiments"
    ),
) -> None:
    """Train every cell, print the differences at the best learning rate, and write figures and numbers."""
    torch.set_num_threads(threads)
    clock, task = Clock(), WordTask()
    start = warm_start(task, starts)
    before = accuracy(task, start)
    typer.echo(f"reward of the warm starts {before.mean():.3f}")
    cells: Cells = {}
    for reuse in REUSE:
        for rule in (*RULES, TRUST):
            shares: list[Tensor] = []
            for gate in GATES if rule in RULES else GATES[:1]:
                cell = cells[rule, gate, reuse] = train(task, start, rule, gate, reuse, batches, shares)
                final = "  ".join(f"{value:.3f}" for value in cell["final"].mean(0))
                typer.echo(f"reuse {reuse:2} {rule}, {gate}: final reward by learning rate {final}  {clock.minutes()}")
    results = summary(cells, before)
    settings = {"starts": starts, "batches": batches, "prompts": PROMPTS, "group": GROUP, "minibatches": MINIBATCHES}
    write(output / "erc_regimes.json", "examples.experiments.erc_regimes", settings, results, clock)
    heat_map(results["differences of the final reward, per learning rate"], output / "erc_regimes.png")
    bars(results["gain over the warm start at the best learning rate"], output / "erc_regimes_best.png")
    for case, values in results["differences at the best learning rate"].items():
        typer.echo(f"{case:44} {shown(values)}")


if __name__ == "__main__":
    typer.run(main)
