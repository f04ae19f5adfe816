"""Experiment: what In-Context RLVR (arXiv 2603.09803) makes of sound and careless demonstrations, where the verifier
prefers sound answers, cannot tell them from careless ones, or prefers careless ones.

Eight arms of RL from the same warm starts: DAPO; six of eight rollouts behind sound demonstrations, with the four ways
to condition current and old log-probs; behind careless ones, and behind those of both kinds of author (the control:
demonstrations without a preference); and rewards weighted by Evidence Gain itself. Judged by bare answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from erc.rlvr import group_advantages
from examples import palette
from examples.experiments.authors import (
    HELD_OUT,
    LENGTH,
    TRAINING,
    Authors,
    Demonstration,
    evidence_gains,
    features_of,
    logprobs,
    sample,
    warm_start,
)
from examples.experiments.compare import Clock, auc, interval, shown, write
from examples.experiments.policies import Optimizer, Policies, policy_update

GROUP, DEMONSTRATED = 8, 6
LUCK = {"prefers soundness": (0.9, 0.3), "is blind": (0.6, 0.6), "prefers luck": (0.5, 0.7)}
"""The verifier, and the probability of a right result after sound and after careless steps."""

CONTROL, STYLES = "IC-DAPO, both", ("sound", "careless")


class Arm(NamedTuple):
    """`authors`: how many of the demonstrations are careful authors', None for no demonstrations; `train`, `old`: the
    prompt that the log-probs are conditioned on; `evidence`: rewards weighted by exponentiated Evidence Gain."""

    authors: float | None = None
    train: str = "demonstrated"
    old: str = "demonstrated"
    evidence: bool = False


ARMS = {
    "DAPO": Arm(),
    "IC-DAPO, sound": Arm(1.0),
    "IC-DAPO, both": Arm(0.5),
    "IC-DAPO, careless": Arm(0.0),
    "Evidence Gain weights": Arm(evidence=True),
    "IC-DAPO, sound, old original": Arm(1.0, old="original"),
    "IC-DAPO, sound, train original": Arm(1.0, train="original"),
    "IC-DAPO, sound, both original": Arm(1.0, train="original", old="original"),
}


def demonstrated_groups(
    authors: Authors, share: float | None, runs: int, prompts: int, generator: torch.Generator
) -> Demonstration:
    """What a rollout batch sees: six demonstrations, drawn once and shared by its prompts; two of eight rollouts see
    none. `share` of the six are by careful authors; None shows nothing to any rollout."""
    shape = (runs, prompts * GROUP)
    if share is None:
        return Demonstration.none(shape)
    slot = torch.arange(prompts * GROUP) % GROUP
    asked = HELD_OUT[torch.randint(len(HELD_OUT), (runs, DEMONSTRATED), generator=generator)]
    careful = torch.arange(DEMONSTRATED).expand(runs, -1) < round(share * DEMONSTRATED)
    drawn = authors.demonstrations(asked, careful, generator)
    return drawn.rows(slot.clamp(max=DEMONSTRATED - 1)).where((slot < DEMONSTRATED).expand(shape))


def train(authors: Authors, starts: Policies, arm: Arm, batches: int, rate: float, prompts: int = 32) -> Policies:
    """Every run through `batches` rollout batches of 8 updates each."""
    policies, runs = starts.copies(1), starts.runs
    optimizer = Optimizer(policies, torch.full((runs,), rate), max_norm=1.0)
    draws, order = torch.Generator().manual_seed(21), torch.Generator().manual_seed(22)
    for _ in range(batches):
        question = TRAINING[torch.randint(len(TRAINING), (runs, prompts), generator=order)].repeat_interleave(GROUP, 1)
        demonstrated = demonstrated_groups(authors, arm.authors, runs, prompts, draws)
        bare = Demonstration.none(question.shape)
        with torch.no_grad():
            answer = sample(policies, demonstrated, question, draws)
            rewards, _ = authors.judge(question, answer)
            if arm.evidence:
                weights = evidence_gains(policies, authors, question, answer, HELD_OUT[::4]).exp().mean(-1)
                groups = weights.view(runs, prompts, GROUP).mean(-1).repeat_interleave(GROUP, 1)
                rewards = rewards * weights / groups
            advantages = group_advantages(rewards.flatten(), group_size=GROUP).view(runs, -1)
            conditions = {"demonstrated": demonstrated, "original": bare}
            old = logprobs(policies, conditions[arm.old], question, answer)
        for chosen in torch.randperm(prompts, generator=order).chunk(8):
            rows = (chosen[:, None] * GROUP + torch.arange(GROUP)).flatten()
            condition = conditions[arm.train].rows(rows)
            policy_update(
                policies,
                optimizer,
                features_of(condition, question[:, rows], answer[:, rows]),
                answer[:, rows].flatten(1),
                old_logprob=old[:, rows].flatten(1),
                advantages=advantages[:, rows].repeat_interleave(LENGTH, 1),
                objective="dapo",
            )
    return policies


@torch.no_grad()
def evaluate(authors: Authors, policies: Policies, careful: bool | None = None, count: int = 1536) -> dict[str, Tensor]:
    """Of sampled answers to training questions, bare or behind a demonstration: the share that is right, and the sound
    ones among the right; `[R]`."""
    generator = torch.Generator().manual_seed(77)
    shape = (policies.runs, count)
    question = TRAINING[torch.randint(len(TRAINING), (1, count), generator=generator)].expand(shape)
    asked = HELD_OUT[torch.randint(len(HELD_OUT), (1, count), generator=generator)].expand(shape)
    condition = Demonstration.none(shape)
    if careful is not None:
        condition = authors.demonstrations(asked, torch.full(shape, careful), generator)
    right, sound = authors.judge(question, sample(policies, condition, question, generator))
    return {"right": right.mean(1), "sound among right": (right * sound).sum(1) / right.sum(1).clamp(min=1)}


def separation(authors: Authors, policies: Policies) -> Tensor:
    """The AUC of Evidence Gain between the sound and a lucky answer, both right, to each training question; `[R]`."""
    question = TRAINING.expand(policies.runs, -1)
    slips = torch.ones(2, *question.shape, dtype=torch.bool)
    if authors.single_slips:
        slips[0, :, ::2], slips[1, :, 1::2] = False, False
    gains = []
    for careless in (torch.zeros_like(slips), slips):
        answer = torch.stack([*authors.steps(question, careless), authors.result[question]], -1)
        gains.append(evidence_gains(policies, authors, question, answer, HELD_OUT).mean(-1))
    return torch.tensor([auc(sound, lucky) for sound, lucky in zip(*gains, strict=True)])


def by_luck(values: Tensor, starts: int) -> dict[str, Tensor]:
    """`[R]`, the settings one after the other, as `{setting: [starts]}`."""
    return dict(zip(LUCK, values.view(len(LUCK), starts), strict=True))


def plot(results: dict[str, Any], path: Path) -> None:
    """Soundness after RL in each setting, per arm; right answers beside it."""
    names = [name for name in ARMS if name.count(",") < 2]
    figure, axes = palette.figure(3.6, 1, 2)
    for axis, measure in zip(axes, ("sound among right", "right"), strict=True):
        for place, name in enumerate(names):
            cells = [results["after RL"][name][luck][measure] for luck in LUCK]
            mean, low, high = torch.tensor(cells).unbind(1)
            places = torch.arange(len(LUCK)) + 0.16 * (place - 2)
            axis.bar(places, mean, 0.15, color=palette.COLORS[name], label=name)
            axis.errorbar(
                places, mean, torch.stack([mean - low, high - mean]), fmt="none", ecolor="black", linewidth=0.8
            )
        for place, luck in enumerate(LUCK):
            start = results["before RL"]["bare"][luck][measure][0]
            axis.plot([place - 0.42, place + 0.42], [start, start], color="black", linestyle=":", linewidth=1)
        axis.set_xticks(range(len(LUCK)), [f"verifier\n{luck}" for luck in LUCK])
        axis.set(ylim=(0, 1), title=f"{measure}, bare answers (dotted: before RL)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    palette.save(figure, path)


def means(authors: Authors, policies: Policies, starts: int, careful: bool | None = None) -> dict[str, Any]:
    """`{setting: {measure: mean and interval}}`."""
    found = {name: by_luck(values, starts) for name, values in evaluate(authors, policies, careful).items()}
    return {luck: {name: interval(values[luck]) for name, values in found.items()} for luck in LUCK}


def differences(finals: dict[str, dict[str, dict[str, Tensor]]], name: str, other: str) -> dict[str, Any]:
    """`{setting: {measure: mean and interval of arm `name` minus arm `other`}}`."""
    return {
        luck: {m: interval(values[luck] - finals[other][m][luck]) for m, values in finals[name].items()}
        for luck in LUCK
    }


def main(
    starts: Annotated[int, typer.Option(min=2, help="warm starts of each setting")] = 8,
    batches: Annotated[int, typer.Option(help="rollout batches of a run")] = 40,
    rate: Annotated[float, typer.Option(help="learning rate")] = 3e-3,
    warm_start_steps: Annotated[int, typer.Option()] = 2500,
    threads: Annotated[int, typer.Option(help="results repeat for the same number")] = 1,
    output: Annotated[Path, typer.Option(help="folder for in_context.{json,png}")] = Path("output/experiments"),
) -> None:
    """Train every arm, print the differences to DAPO, and write figure and numbers."""
    torch.set_num_threads(threads)
    clock = Clock()
    sound, careless = (torch.tensor(column).repeat_interleave(starts) for column in zip(*LUCK.values(), strict=True))
    seeds = [seed for _ in LUCK for seed in range(starts)]
    authors = Authors(sound, careless)
    policies = warm_start(authors, seeds, warm_start_steps)
    contexts = {"bare": None, "sound demonstration": True, "careless demonstration": False}
    before = {name: means(authors, policies, starts, careful) for name, careful in contexts.items()}
    separations = {"careless authors": interval(separation(authors, policies).view(len(LUCK), starts)[1])}
    slipping = Authors(sound[:starts] * 0 + 0.6, careless[:starts] * 0 + 0.6, single_slips=True)
    slipped = warm_start(slipping, seeds[:starts], warm_start_steps)
    separations["single slips"] = interval(separation(slipping, slipped))
    for name, value in separations.items():
        typer.echo(f"AUC of Evidence Gain, {name}: {shown(value)}")
    trained, finals = {}, {}
    for name, arm in ARMS.items():
        trained[name] = evaluate(authors, train(authors, policies, arm, batches, rate))
        finals[name] = {m: by_luck(values, starts) for m, values in trained[name].items()}
        line = "  ".join(f"{luck} {finals[name]['sound among right'][luck].mean():.3f}" for luck in LUCK)
        typer.echo(f"{name}: sound among right, verifier {line}  {clock.minutes()}")
    results = {
        "before RL": before,
        "AUC of Evidence Gain": separations,
        "after RL": {
            name: {luck: {m: interval(values[luck]) for m, values in found.items()} for luck in LUCK}
            for name, found in finals.items()
        },
        "minus DAPO": {name: differences(finals, name, "DAPO") for name in finals if name != "DAPO"},
        f"minus {CONTROL}": {f"IC-DAPO, {kind}": differences(finals, f"IC-DAPO, {kind}", CONTROL) for kind in STYLES},
    }
    for name, found in results["minus DAPO"].items():
        typer.echo(f"{name} - DAPO, sound among right")
        for luck, values in found.items():
            typer.echo(f"  verifier {luck:18} {shown(values['sound among right'])}   right {shown(values['right'])}")
    settings = {
        "starts": starts,
        "batches": batches,
        "learning_rate": rate,
        "warm_start_steps": warm_start_steps,
        "luck": LUCK,
    }
    write(output / "in_context.json", "examples.experiments.in_context", settings, results, clock)
    plot(results, output / "in_context.png")


if __name__ == "__main__":
    typer.run(main)
