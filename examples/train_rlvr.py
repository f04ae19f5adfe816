"""Reinforcement learning with verifiable rewards, in one file a newcomer can read: the demo of `erc`.

A small decoder learns a reasoning-gym task a little by supervision, then by its own rollouts: groups of answers are
sampled and verified, and several off-policy mini-batches a rollout batch move the policy through `erc.policy_loss`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import erc
from erc.rlvr import group_advantages
from examples.model import load_policy
from examples.rollout import Batch, sample, supervised_batch
from examples.tasks import Task, slip

METRICS = (
    "clip_fraction",
    "erc_fraction",
    "entropy",
    "entropy_ratio",
    "entropy_ratio_min",
    "entropy_ratio_max",
    "ratio_max",
)


@dataclass(frozen=True)
class TrainConfig:
    """One run. The same configuration gives the same numbers on the same machine."""

    objective: str = "erc-dapo"
    task: str = "chain_sum"
    model: str | None = None
    steps: int = 150
    seed: int = 0
    learning_rate: float = 1e-4
    prompts: int = 64
    group_size: int = 8
    updates_per_batch: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 6
    warm_start_steps: int = 500
    warm_start_slips: float = 0.4
    warm_start_batch: int = 128
    warm_start_learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    eval_problems: int = 512


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


Report = Callable[[str, int, int, str], None]
"""Called with (phase, done, total, message)."""


def _silent(phase: str, done: int, total: int, message: str) -> None:
    pass


class Trainer:
    """A policy, its optimiser and the rollout-update loop."""

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = load_policy(config.model, self.device)
        self.task = Task(config.task, short=config.model is None)
        self.objective = erc.objective(config.objective)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.history = History()
        self.step = 0

    @contextmanager
    def timed(self, phase: str):
        """Add the time of the body to `history.seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.history.seconds[phase] += time.perf_counter() - start

    def warm_start(self, report: Report = _silent) -> None:
        """Supervised steps on answers of mixed quality, as found in the wild: a share of them contains a slip.

        What the policy imitates, verified rewards then have to sort out.
        """
        config = self.config
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.warm_start_learning_rate, weight_decay=0.0)
        steps = config.warm_start_steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.warm_start_learning_rate, max(steps, 2))
        for index in range(steps):
            problems = self.task.problems(config.warm_start_batch, seed=config.seed * 1_000_003 + index)
            careless = torch.rand(len(problems)) < config.warm_start_slips
            answers = [slip(p.answer) if wrong else p.answer for p, wrong in zip(problems, careless, strict=True)]
            batch = supervised_batch(self.tokenizer, problems, self.device, answers)
            stats = erc.token_stats(batch.logits(self.model), batch.labels)
            loss = -stats.logprob.sum() / (batch.labels != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report("warm start", index + 1, steps, f"loss {loss.item():.3f}")

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on held-out problems, of the likeliest answer and of sampled ones."""
        config = self.config
        problems = self.task.problems(config.eval_problems, seed=config.seed, held_out=True)
        results = {}
        for name, temperature in (("greedy", 0.0), ("sampled", config.temperature)):
            _, rewards = self._sample(problems, temperature)
            results[name] = float(rewards.mean())
        return results

    def _sample(self, problems: list, temperature: float) -> tuple[Batch, torch.Tensor]:
        return sample(
            self.model,
            self.tokenizer,
            self.task,
            problems,
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            device=self.device,
        )

    def train_step(self) -> dict[str, float]:
        """One batch of rollouts, then several off-policy updates on it."""
        config = self.config
        seed = (config.seed + 1) * 1_000_003 + self.step
        problems = [p for p in self.task.problems(config.prompts, seed=seed) for _ in range(config.group_size)]
        with self.timed("rollout"):
            batch, rewards = self._sample(problems, config.temperature)
        advantages = group_advantages(rewards, group_size=config.group_size)
        with self.timed("old log-probs"), torch.no_grad():
            old = erc.token_stats(batch.logits(self.model), batch.labels, temperature=config.temperature)
        row = defaultdict(float)
        for index in torch.randperm(len(problems)).chunk(config.updates_per_batch):
            for name, value in self._update(batch.rows(index), index, advantages, old).items():
                row[name] += value / config.updates_per_batch
        self.step += 1
        row |= {"step": self.step, "reward": float(rewards.mean())}
        self.history.steps.append(dict(row))
        return row

    def _update(self, batch: Batch, index: torch.Tensor, advantages: torch.Tensor, old: Any) -> dict[str, float]:
        with self.timed("model forward"):
            logits = batch.logits(self.model)
        with self.timed("loss"):
            out = erc.policy_loss(
                logits,
                batch.labels,
                old_logprob=old.logprob[index],
                old_entropy=old.entropy[index],
                advantages=advantages[index],
                objective=self.objective,
                temperature=self.config.temperature,
            )
        with self.timed("model backward"):
            self.optimizer.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        with self.timed("optimiser"):
            self.optimizer.step()
        return {name: out.metrics[name].item() for name in METRICS} | {"grad_norm": norm.item()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same numbers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history.numbers() | {"seconds": dict(self.history.seconds)},
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])
        self.history.seconds = defaultdict(float, state["history"]["seconds"])
        torch.set_rng_state(state["random"])


def train(config: TrainConfig, report: Report = _silent) -> History:
    """A whole run: warm start (for the small decoder), evaluation, reinforcement learning, evaluation."""
    trainer = Trainer(config)
    if config.model is None:
        trainer.warm_start(report)
    trainer.history.before = trainer.evaluate()
    for done in range(config.steps):
        row = trainer.train_step()
        report("rollouts and updates", done + 1, config.steps, f"reward {row['reward']:.2f}  H {row['entropy']:.2f}")
    trainer.history.after = trainer.evaluate()
    return trainer.history


def _window(history: History, name: str, last: bool) -> float:
    values = [row[name] for row in history.steps]
    part = values[-10:] if last else values[:10]
    return sum(part) / len(part)


def summary(config: TrainConfig, history: History) -> Table:
    """Before and after, and where the time of a step went."""
    table = Table(
        "", "before", "after", title=f"{config.objective} on {config.task}, {config.steps} steps, seed {config.seed}"
    )
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


DEFAULT = TrainConfig()


def main(
    objective: Annotated[str, typer.Option(help="a name from erc.objectives()")] = DEFAULT.objective,
    task: Annotated[str, typer.Option(help="a task family of reasoning-gym")] = DEFAULT.task,
    model: Annotated[
        str | None, typer.Option(help="any causal LM of transformers; default: a small one made here")
    ] = None,
    steps: Annotated[int, typer.Option(help="rollout batches")] = DEFAULT.steps,
    seed: Annotated[int, typer.Option()] = DEFAULT.seed,
    output: Annotated[Path, typer.Option(help="folder for curves.png and run.json")] = Path("output/demo"),
    learning_rate: Annotated[float, typer.Option()] = DEFAULT.learning_rate,
    prompts: Annotated[int, typer.Option(help="prompts a rollout batch")] = DEFAULT.prompts,
    group_size: Annotated[int, typer.Option(help="rollouts a prompt")] = DEFAULT.group_size,
    updates_per_batch: Annotated[
        int, typer.Option(help="off-policy mini-batches a rollout batch")
    ] = DEFAULT.updates_per_batch,
    temperature: Annotated[float, typer.Option()] = DEFAULT.temperature,
    max_new_tokens: Annotated[int, typer.Option()] = DEFAULT.max_new_tokens,
    warm_start_steps: Annotated[int, typer.Option()] = DEFAULT.warm_start_steps,
    eval_problems: Annotated[int, typer.Option()] = DEFAULT.eval_problems,
) -> None:
    """Train, print a table, and write curves and history."""
    config = TrainConfig(
        objective=objective,
        task=task,
        model=model,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        prompts=prompts,
        group_size=group_size,
        updates_per_batch=updates_per_batch,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        warm_start_steps=warm_start_steps,
        eval_problems=eval_problems,
    )
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars: dict[str, Any] = {}

        def report(phase: str, done: int, total: int, message: str) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(phase, total=total, note="")
            progress.update(bars[phase], completed=done, note=message)

        history = train(config, report)
    console.print(summary(config, history))
    record = {"config": asdict(config), **history.numbers(), "seconds": dict(history.seconds)}
    (output / "run.json").write_text(json.dumps(record, indent=1))
    if history.steps:
        plot(history, output / "curves.png")
        console.print(f"curves: {output / 'curves.png'}   history: {output / 'run.json'}")


if __name__ == "__main__":
    typer.run(main)
