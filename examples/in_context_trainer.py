"""The demo's trainer for In-Context RLVR: `python -m examples.in_context_trainer`, here or with any causal LM.

Sums are answered by their steps. The verifier sees the result alone; arithmetic on every step tells afterwards which
right answers were also sound. The small decoder's warm start makes it go on as carefully as what it was shown.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import erc
from erc.rlvr import DemonstrationPool, group_prompts
from examples.progress import reporting
from examples.rollout import Batch, Conversation, plain_prompts
from examples.tasks import Problem, Task
from examples.train_rlvr import TrainConfig, Trainer, warm_up
from examples.worked import WorkedSums, demonstration, judge, solution

POOL_SEED = 1
"""Seed of the demonstrations' problems; the evaluation's is 0."""


@dataclass(frozen=True)
class InContextConfig(TrainConfig):
    """`demonstrated` of each group's rollouts see `per_rollout` demonstrations; 0 is plain RLVR.

    In the warm start an author writes `warm_start_examples` solutions a document. For the share `warm_start_sound` of
    the steps all authors are careful; then a share `warm_start_slips` of them is careless. The two kinds slip in the
    shares `warm_start_rates` of their solutions, and are right all the same, by luck, with probability
    `warm_start_luck`.
    """

    objective: str = "dapo"
    steps: int = 60
    prompts: int = 32
    updates_per_batch: int = 4
    learning_rate: float = 1e-4
    max_new_tokens: int = 16
    warm_start_seed: int | None = 0
    warm_start_steps: int = 1600
    warm_start_batch: int = 32
    warm_start_slips: float = 0.5
    warm_start_examples: int = 4
    warm_start_sound: float = 0.25
    warm_start_luck: float = 0.7
    warm_start_rates: tuple[float, float] = (0.0, 1.0)
    eval_problems: int = 384
    terms: int = 3
    digits: int = 1
    demonstrated: int = 0
    per_rollout: int = 1
    template: str = "multi-round"
    pool_size: int = 128


class InContextTrainer(Trainer):
    """Groups in which some rollouts see a demonstration of the pool and the others none."""

    config: InContextConfig

    def __init__(self, config: InContextConfig) -> None:
        super().__init__(config)
        self.sound_pool = self.pool()
        self.draws = torch.Generator().manual_seed(config.seed)

    def make_task(self) -> Task:
        """Chain sums answered by worked solutions."""
        config = self.config
        settings = {
            "min_terms": config.terms,
            "max_terms": config.terms,
            "min_digits": config.digits,
            "max_digits": config.digits,
        }
        return WorkedSums("chain_sum", short=config.model is None, settings=settings)

    def pool(self, *, lucky: bool = False) -> DemonstrationPool:
        """Worked solutions of held-out problems that no evaluation asks, all sound or all right by luck alone."""
        rng = random.Random(POOL_SEED) if lucky else None
        asked = {problem.question for problem in self.held_out()}
        problems = self.task.problems(4 * self.config.pool_size, POOL_SEED, held_out=True)
        fresh = {problem.question: problem for problem in problems if problem.question not in asked}
        made = [(problem, demonstration(problem, rng)) for problem in fresh.values()]
        chosen = [demo for problem, demo in made if judge(demo.answer, problem).sound != lucky]
        return DemonstrationPool(tuple(chosen[: self.config.pool_size]))

    def warm_batch(self, index: int) -> Batch:
        """Documents, each of one author: who was sound so far will be so again."""
        config = self.config
        seed = config.start_seed * 1_000_003 + index
        rng = random.Random(seed)
        careless_share = config.warm_start_slips if index >= config.warm_start_steps * config.warm_start_sound else 0.0
        problems = self.task.problems(config.warm_start_batch * config.warm_start_examples, seed)
        rows = []
        for first in range(0, len(problems), config.warm_start_examples):
            rate = config.warm_start_rates[rng.random() < careless_share]
            chosen = problems[first : first + config.warm_start_examples]
            slips = [rng if rng.random() < rate else None for _ in chosen]
            pairs = zip(chosen, slips, strict=True)
            rows.append([(problem.question, solution(problem, s, config.warm_start_luck)) for problem, s in pairs])
        return dialogue_batch(self.tokenizer, rows, self.device)

    def prompts(self, problems: list[Problem]) -> list[Conversation]:
        """`demonstrated` of each group see demonstrations, drawn once per batch and shared by its prompts."""
        config = self.config
        demos = self.sound_pool.sample(config.demonstrated * config.per_rollout, self.draws)
        return [
            prompt
            for messages in plain_prompts(problems[:: config.group_size])
            for prompt in group_prompts(
                messages,
                demos,
                config.group_size,
                config.demonstrated,
                per_rollout=config.per_rollout,
                template=config.template,
            ).rollout
        ]

    def observe(self, problems: list[Problem], texts: list[str], rewards: Tensor) -> dict[str, float]:
        """Reward and quality of the step's plain rollouts, the ones that later use will look like."""
        plain = [i for i in range(len(texts)) if i % self.config.group_size >= self.config.demonstrated]
        verdicts = [judge(texts[i], problems[i]) for i in plain]
        right = sum(verdict.right for verdict in verdicts)
        return {
            "plain_reward": right / max(len(plain), 1),
            "plain_sound": sum(verdict.sound for verdict in verdicts) / max(len(plain), 1),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Sampled held-out answers to bare questions: `right`, `sound`, and `quality`, the sound share of the right."""
        problems = self.held_out()
        return self.judged(problems, plain_prompts(problems))

    def judged(self, problems: list[Problem], prompts: list[Conversation]) -> dict[str, float]:
        """What sampled answers to `prompts` are worth."""
        texts = self.rollouts(problems, prompts, self.config.temperature).texts
        verdicts = [judge(text, problem) for text, problem in zip(texts, problems, strict=True)]
        right, sound = (sum(column) / len(verdicts) for column in zip(*verdicts, strict=True))
        return {"right": right, "sound": sound, "quality": sound / right if right else 0.0}


def dialogue_batch(tokenizer: Any, rows: list[list[tuple[str, str]]], device: torch.device) -> Batch:
    """Documents of questions and answers under the small decoder's chat template; every answer is a label."""
    texts = {text for row in rows for pair in row for text in pair} | {" "}
    encode = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
    documents = []
    for row in rows:
        tokens, targets = [], []
        for question, answer in row:
            asked, told = [*encode[question], *encode[" "]], [*encode[answer], tokenizer.eos_token_id]
            tokens += asked + told
            targets += [-100] * len(asked) + told
        documents.append((tokens, [*targets[1:], -100]))
    length = max(len(tokens) for tokens, _ in documents)
    batch = Batch(
        torch.full((len(rows), length), tokenizer.pad_token_id),
        torch.zeros(len(rows), length, dtype=torch.long),
        torch.full((len(rows), length), -100),
    )
    for index, (tokens, labels) in enumerate(documents):
        batch.tokens[index, : len(tokens)] = torch.tensor(tokens)
        batch.attention[index, : len(tokens)] = 1
        batch.labels[index, : len(tokens)] = torch.tensor(labels)
    return Batch(batch.tokens.to(device), batch.attention.to(device), batch.labels.to(device))


PAPER = InContextConfig(
    overrides={"ratio": erc.PPOClip(0.2, 0.28, dual_clip=10.0)},
    steps=300,
    prompts=128,
    updates_per_batch=8,  # mini-batches of 16 prompts
    learning_rate=1e-6,
    max_new_tokens=1024,
    overlong_cache=256,
    terms=6,
    digits=3,
    template="in-context",
    micro_batch=4,
    generation_batch=256,
)


def main(
    preset: Annotated[str, typer.Option(help='"laptop", or "paper" for the settings of the paper')] = "laptop",
    model: Annotated[str | None, typer.Option(help="any causal LM of transformers, instead of the small one")] = None,
    demonstrated: Annotated[int, typer.Option(help="rollouts of each group that see a demonstration; 0 is DAPO")] = 6,
    steps: Annotated[int | None, typer.Option(help="rollout batches")] = None,
    prompts: Annotated[int | None, typer.Option(help="prompts a rollout batch")] = None,
    warm_start_steps: Annotated[int | None, typer.Option()] = None,
    eval_problems: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path, typer.Option(help="folder for in_context.json")] = Path("output/in_context"),
) -> None:
    """Train, and print how many bare held-out answers are right, and sound, before and after."""
    if preset not in ("laptop", "paper"):
        raise typer.BadParameter(f'preset must be "laptop" or "paper", got {preset!r}')
    chosen = {"steps": steps, "prompts": prompts, "warm_start_steps": warm_start_steps, "eval_problems": eval_problems}
    config = replace(
        PAPER if preset == "paper" else InContextConfig(),
        model=model,
        demonstrated=demonstrated,
        seed=seed,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    trainer, console = InContextTrainer(config), Console()
    with reporting(console) as report:
        warm_up(trainer, report)
        trainer.history.before = trainer.evaluate()
        for step in range(config.steps):
            row = trainer.train_step()
            report("RL", step + 1, config.steps, f"reward {row['reward']:.2f}  sound {row['plain_sound']:.2f}")
        trainer.history.after = trainer.evaluate()
    for when in ("before", "after"):
        numbers = getattr(trainer.history, when).items()
        console.print(f"{when}: " + "  ".join(f"{name} {value:.3f}" for name, value in numbers), highlight=False)
    output.mkdir(parents=True, exist_ok=True)
    (output / "in_context.json").write_text(json.dumps(trainer.history.numbers(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
