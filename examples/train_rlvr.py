"""Reinforcement learning with verifiable rewards, in one file a newcomer can read: the demo of `erc`.

A small decoder learns a reasoning-gym task a little by supervision, then by its own rollouts: groups of answers are
sampled and verified, and several off-policy mini-batches a rollout batch move the policy through `erc.policy_loss`.
What DAPO adds to the loss is there too: groups without an advantage are sampled anew, overlong answers are punished.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import erc
from erc.rlvr import group_advantages, informative_groups, overlong_penalty
from examples.model import load_policy
from examples.progress import Report, reporting, silent
from examples.report import METRICS, History, plot, summary
from examples.rollout import Batch, Conversation, Rollouts, concatenate, plain_prompts, sample, supervised_batch
from examples.tasks import Problem, Task, check_family, slip

BAND = 0.05
"""The half-width of the entropy-ratio band in which the curves count tokens, whatever the objective drops."""


@dataclass(frozen=True)
class TrainConfig:
    """One run. The same configuration gives the same numbers on the same machine.

    `overrides` are fields of `erc.Objective` in place of the preset's, `band` is the half-width of the entropy-ratio
    gate. Each rollout batch is gone through `epochs` times in `updates_per_batch` mini-batches. Groups that are all
    right or all wrong are replaced by those of fresh prompts, up to `resample` times; answers that leave less than
    `overlong_cache` tokens of `max_new_tokens` are punished. `micro_batch` sequences pass through the model at a time
    in updates, `generation_batch` in rollouts; None takes all.
    """

    objective: str = "erc-dapo"
    overrides: dict[str, Any] = field(default_factory=dict)
    task: str = "chain_sum"
    model: str | None = None
    steps: int = 150
    seed: int = 0
    learning_rate: float = 1e-4
    prompts: int = 64
    group_size: int = 8
    updates_per_batch: int = 8
    epochs: int = 1
    band: float | None = None
    optimizer: str = "adamw"
    resample: int = 3
    overlong_cache: int = 2
    temperature: float = 1.0
    max_new_tokens: int = 6
    warm_start_seed: int | None = None
    warm_start_steps: int = 500
    warm_start_slips: float = 0.4
    warm_start_batch: int = 128
    warm_start_learning_rate: float = 2e-3
    max_grad_norm: float = 1.0
    eval_problems: int = 512
    micro_batch: int | None = None
    generation_batch: int | None = None

    @property
    def start_seed(self) -> int:
        """The seed of the first weights and of the warm start: the run's own, unless runs share a warm start."""
        return self.seed if self.warm_start_seed is None else self.warm_start_seed

    def checked_objective(self) -> erc.Objective:
        """The objective of the run.

        Raises:
            ValueError: naming the setting that is wrong or does not go with the others.
        """
        check_family(self.task)
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f'optimizer must be "adamw" or "sgd", got {self.optimizer!r}')
        objective = erc.objective(self.objective, **self.overrides)
        if self.band is not None:
            if objective.entropy_ratio is None:
                raise ValueError(f"band needs an objective with the entropy-ratio gate, got {self.objective!r}")
            objective = replace(objective, entropy_ratio=erc.EntropyRatioClip(self.band, self.band))
        if self.micro_batch and objective.reduction != "token-mean":
            raise ValueError(f'micro_batch needs the reduction "token-mean", got {objective.reduction!r}')
        return objective


class Trainer:
    """A policy, its optimiser and the rollout-update loop."""

    def __init__(self, config: TrainConfig) -> None:
        self.objective = config.checked_objective()
        torch.manual_seed(config.start_seed)
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = load_policy(config.model, self.device)
        self.task = self.make_task()
        self.optimizer = make_optimizer(config, self.model)
        self.history = History()
        self.step = 0

    def make_task(self) -> Task:
        """The task family; other trainers override it, as they do `warm_batch` and `prompts`."""
        return Task(self.config.task, short=self.config.model is None)

    def prompts(self, problems: list[Problem]) -> list[Conversation]:
        """What the policy sees of each problem in training: the bare question."""
        return plain_prompts(problems)

    @contextmanager
    def timed(self, phase: str):
        """Add the time of the body to `history.seconds[phase]`."""
        start = time.perf_counter()
        yield
        self.history.seconds[phase] += time.perf_counter() - start

    def warm_start(self, report: Report = silent) -> None:
        """Supervised steps. What the policy imitates, verified rewards then have to sort out."""
        config = self.config
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.warm_start_learning_rate, weight_decay=0.0)
        steps = config.warm_start_steps
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.warm_start_learning_rate, max(steps, 2))
        for index in range(steps):
            batch = self.warm_batch(index)
            stats = erc.token_stats(batch.logits(self.model), batch.labels)
            loss = -stats.logprob.sum() / (batch.labels != -100).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report("warm start", index + 1, steps, f"loss {loss.item():.3f}")

    def warm_batch(self, index: int) -> Batch:
        """Answers of mixed quality, as found in the wild: a share of them contains a slip."""
        config = self.config
        problems = self.task.problems(config.warm_start_batch, seed=config.start_seed * 1_000_003 + index)
        careless = torch.rand(len(problems)) < config.warm_start_slips
        answers = [slip(p.answer) if wrong else p.answer for p, wrong in zip(problems, careless, strict=True)]
        return supervised_batch(self.tokenizer, problems, self.device, answers)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Accuracy on held-out problems, of the likeliest answer and of sampled ones."""
        problems = self.held_out()
        return {
            name: float(self.rollouts(problems, plain_prompts(problems), temperature).rewards.mean())
            for name, temperature in (("greedy", 0.0), ("sampled", self.config.temperature))
        }

    def held_out(self) -> list[Problem]:
        """The problems of evaluations: the same ones for every seed, none of them in training."""
        return self.task.problems(self.config.eval_problems, seed=0, held_out=True)

    def rollouts(self, problems: list[Problem], prompts: list[Conversation], temperature: float) -> Rollouts:
        """A completion of each problem under its prompt."""
        return sample(
            self.model,
            self.tokenizer,
            self.task,
            problems,
            max_new_tokens=self.config.max_new_tokens,
            temperature=temperature,
            device=self.device,
            conversations=prompts,
            batch_size=self.config.generation_batch,
        )

    def train_step(self) -> dict[str, float]:
        """One batch of rollouts, then several off-policy updates on it."""
        config = self.config
        with self.timed("rollout"):
            batch, rewards, row = self.informative_rollouts()
        groups = {"group_size": config.group_size}
        lengths = (batch.labels != -100).sum(1)
        shaped = rewards + overlong_penalty(lengths, config.max_new_tokens, config.overlong_cache)
        advantages = group_advantages(shaped, **groups)
        with self.timed("old log-probs"):
            old = self._old_stats(batch)
        seen, updates = defaultdict(float), config.epochs * config.updates_per_batch
        for _ in range(config.epochs):
            for index in torch.randperm(len(rewards)).to(self.device).chunk(config.updates_per_batch):
                for name, value in self._update(batch, index, advantages, old, rewards).items():
                    seen[name] += value / updates
        self.step += 1
        active = batch.labels != -100
        row |= seen | {"step": self.step, "rollout_entropy": float(old.entropy[active].mean())}
        self.history.steps.append(dict(row))
        return row

    def informative_rollouts(self) -> tuple[Batch, torch.Tensor, dict[str, float]]:
        """Rollouts and rewards of `config.prompts` groups, and the numbers of the first batch of them.

        Groups without an advantage make room for those of fresh prompts, which are sampled up to `resample` times
        (DAPO's dynamic sampling). Where even that finds too few, uninformative groups fill the batch: they count in the
        mean over tokens and change nothing else.
        """
        config = self.config
        wanted, groups = config.prompts * config.group_size, {"group_size": config.group_size}
        kept, spare, row = [], [], {}
        for attempt in range(config.resample + 1):
            missing = wanted - sum(len(rewards) for _, rewards in kept)
            if missing == 0:
                break
            seed = (config.seed + 1) * 1_000_003 + self.step * (config.resample + 1) + attempt
            problems = self.task.problems(missing // config.group_size, seed=seed)
            problems = [problem for problem in problems for _ in range(config.group_size)]
            batch, rewards, texts = self.rollouts(problems, self.prompts(problems), config.temperature)
            informative = informative_groups(rewards, **groups)
            kept.append((batch.rows(informative), rewards[informative]))
            spare.append((batch.rows(~informative), rewards[~informative]))
            if attempt == 0:
                row = {"reward": float(rewards.mean()), "informative": float(informative.float().mean())}
                row |= self.observe(problems, texts, rewards)
        batches, rewards = zip(*kept, *spare, strict=True)
        return concatenate(batches, self.tokenizer.pad_token_id).first(wanted), torch.cat(rewards)[:wanted], row

    def observe(self, problems: list[Problem], texts: list[str], rewards: torch.Tensor) -> dict[str, float]:
        """More numbers of a step's rollouts, for trainers that override it."""
        return {}

    def _micro_batches(self, index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return index.split(self.config.micro_batch or len(index))

    @torch.no_grad()
    def _old_stats(self, batch: Batch) -> erc.TokenStats:
        """Log-probs and entropies of the policy that made the rollouts; `[B, L]`."""
        parts = []
        for rows in self._micro_batches(torch.arange(len(batch.tokens), device=self.device)):
            part = batch.rows(rows)
            parts.append(erc.token_stats(part.logits(self.model), part.labels, temperature=self.config.temperature))
        return erc.TokenStats(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _update(
        self,
        batch: Batch,
        index: torch.Tensor,
        advantages: torch.Tensor,
        old: erc.TokenStats,
        rewards: torch.Tensor,
    ) -> dict[str, float]:
        """One optimiser step on the rollouts of `index`; what it saw, averaged over their tokens."""
        tokens = (batch.labels[index] != -100).sum()
        # The papers' recipes (`-paper`) also imitate the rollouts with reward 1, in the mean over their tokens.
        right = (rewards == 1).float()[:, None].expand(batch.labels.shape)
        imitated = (right[index] * (batch.labels[index] != -100)).sum()
        seen, ratios = defaultdict(float), []
        self.optimizer.zero_grad()
        for rows in self._micro_batches(index):
            part = batch.rows(rows)
            with self.timed("model forward"):
                logits = part.logits(self.model)
            with self.timed("loss"):
                out = erc.policy_loss(
                    logits,
                    part.labels,
                    old_logprob=old.logprob[rows],
                    old_entropy=old.entropy[rows],
                    advantages=advantages[rows],
                    objective=self.objective,
                    temperature=self.config.temperature,
                    nll_mask=right[rows],
                    normalizer=tokens if self.config.micro_batch else None,
                    nll_normalizer=imitated if self.config.micro_batch else None,
                )
            with self.timed("model backward"):
                out.loss.backward()
            share = (out.metrics["tokens"] / tokens).item()
            for name in METRICS:
                seen[name] += share * out.metrics[name].item()
            active = part.labels != -100
            ratios.append((out.entropy[active] + 1e-8) / (old.entropy[rows][active] + 1e-8))
        with self.timed("optimiser"):
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
        return seen | {"grad_norm": norm.item()} | _distribution(torch.cat(ratios))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on with the same numbers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history.numbers() | {"seconds": dict(self.history.seconds)},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.history = History(**state["history"])
        self.history.seconds = defaultdict(float, state["history"]["seconds"])
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["random_cuda"])


def make_optimizer(config: TrainConfig, model: Any) -> torch.optim.Optimizer:
    """AdamW without weight decay, or SGD without momentum."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=config.learning_rate)
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)


def _distribution(ratio: torch.Tensor) -> dict[str, float]:
    """The entropy ratio's 5 %, 50 % and 95 % quantiles, and the share of tokens outside the band."""
    low, median, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95], device=ratio.device)).tolist()
    outside = ((ratio - 1).abs() >= BAND).float().mean().item()
    return {"ratio_p05": low, "ratio_p50": median, "ratio_p95": high, "ratio_outside": outside}


def save(value: Any, path: Path) -> None:
    """Write a tensor file so that no interruption leaves half of it."""
    part = path.with_suffix(".part")
    torch.save(value, part)
    part.replace(path)


def warm_up(trainer: Trainer, report: Report = silent, checkpoint: Path | None = None) -> None:
    """The warm start of the small decoder, or what it left in `checkpoint`.

    Afterwards the random state is the seed's, so that objectives are compared on the same draws.
    """
    config = trainer.config
    if config.model is None:
        chosen = {f.name: getattr(config, f.name) for f in fields(config) if f.name.startswith("warm_start")}
        task = {"task": config.task, **trainer.task.settings}
        made_by = {**chosen, **task, "seed": config.start_seed, "trainer": type(trainer).__name__}
        found = torch.load(checkpoint) if checkpoint and checkpoint.exists() else None
        if found and found["made_by"] == made_by:
            trainer.model.load_state_dict(found["model"])
        else:
            trainer.warm_start(report)
            if checkpoint:
                save({"made_by": made_by, "model": trainer.model.state_dict()}, checkpoint)
    torch.manual_seed(config.seed)


def train(config: TrainConfig, report: Report = silent, checkpoint: Path | None = None, every: int = 10) -> History:
    """A whole run: warm start (for the small decoder), evaluation, reinforcement learning, evaluation.

    With `checkpoint` the state is written there after every `every` steps, and a run of the same configuration, but for
    the number of steps, goes on from it.
    """
    trainer = Trainer(config)
    made_by = asdict(config) | {"steps": None}
    found = torch.load(checkpoint) if checkpoint and checkpoint.exists() else None
    if found and found["made_by"] == made_by:
        trainer.load_state_dict(found["state"])
    else:
        warm_up(trainer, report)
        trainer.history.before = trainer.evaluate()
    while trainer.step < config.steps:
        row = trainer.train_step()
        report(
            "rollouts and updates", trainer.step, config.steps, f"reward {row['reward']:.2f}  H {row['entropy']:.2f}"
        )
        if checkpoint and (trainer.step % every == 0 or trainer.step == config.steps):
            save({"made_by": made_by, "state": trainer.state_dict()}, checkpoint)
    trainer.history.after = trainer.evaluate()
    return trainer.history


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
    group_size: Annotated[int, typer.Option(help="rollouts per prompt")] = DEFAULT.group_size,
    updates_per_batch: Annotated[
        int, typer.Option(help="off-policy mini-batches a rollout batch")
    ] = DEFAULT.updates_per_batch,
    epochs: Annotated[int, typer.Option(min=1, help="times each rollout batch is gone through")] = DEFAULT.epochs,
    band: Annotated[float | None, typer.Option(help="half-width of the gate; default: the objective's own")] = None,
    optimizer: Annotated[str, typer.Option(help='"adamw" or "sgd"')] = DEFAULT.optimizer,
    resample: Annotated[int, typer.Option(help="times that groups without advantage are replaced")] = DEFAULT.resample,
    overlong_cache: Annotated[
        int, typer.Option(help="tokens before the limit in which an answer is punished")
    ] = DEFAULT.overlong_cache,
    temperature: Annotated[float, typer.Option()] = DEFAULT.temperature,
    max_new_tokens: Annotated[int, typer.Option()] = DEFAULT.max_new_tokens,
    warm_start_steps: Annotated[int, typer.Option()] = DEFAULT.warm_start_steps,
    eval_problems: Annotated[int, typer.Option()] = DEFAULT.eval_problems,
    micro_batch: Annotated[int | None, typer.Option(help="sequences at a time in updates; default: all")] = None,
    generation_batch: Annotated[int | None, typer.Option(help="sequences at a time in rollouts; default: all")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the last checkpoint in the output folder")] = False,
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
        epochs=epochs,
        band=band,
        optimizer=optimizer,
        resample=resample,
        overlong_cache=overlong_cache,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        warm_start_steps=warm_start_steps,
        eval_problems=eval_problems,
        micro_batch=micro_batch,
        generation_batch=generation_batch,
    )
    try:
        config.checked_objective()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.pt"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    with reporting(console) as report:
        history = train(config, report, checkpoint)
    title = f"{objective} on {task}, {steps} steps, seed {seed}"
    console.print(summary(title, history))
    record = {"config": asdict(config), **history.numbers(), "seconds": dict(history.seconds)}
    (output / "run.json").write_text(json.dumps(record, indent=1))
    if history.steps:
        plot(history, output / "curves.png")
        console.print(f"curves: {output / 'curves.png'}   history: {output / 'run.json'}")


if __name__ == "__main__":
    typer.run(main)
