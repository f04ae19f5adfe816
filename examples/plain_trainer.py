"""Reinforcement learning with erc in one file of plain PyTorch: `python -m examples.plain_trainer`, half a minute.

A small transformer imitates sums, half of which are wrong, and then finds out by its own verified answers which are
right. Each batch of rollouts gives several updates, so that all but the first are off-policy and the entropy ratio has
something to say. `torchrun --nproc-per-node 2 -m examples.plain_trainer --fsdp` shards the model by FSDP2, `--compile`
compiles it, and a run with `--checkpoint FILE` that was killed goes on from there to the numbers that it would have
given.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import erc

ALPHABET = "0123456789+=\n"  # a line break ends an answer
END = ALPHABET.index("\n")
PROMPT, ANSWER = 6, 4  # tokens: "07+35=", "42\n" and one to spare
PROMPTS, GROUP = 32, 8  # a batch of rollouts: prompts, answers to each
UPDATES = 4


class Policy(nn.Module):
    """A causal transformer: `tokens` `[B, T]` to logits `[B, T, V]`."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Embedding(PROMPT + ANSWER, width)
        block = {"nhead": 4, "dim_feedforward": 4 * width, "dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, **block) for _ in range(layers))
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        hidden = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        for layer in self.layers:
            hidden = layer(hidden, src_mask=causal, is_causal=True)
        return self.head(hidden)


class Batch(NamedTuple):
    """Prompts with answers, `[B, L]`: position t predicts `labels[:, t]`, -100 outside the answer."""

    tokens: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The sequences of `index`."""
        return Batch(self.tokens[index], self.labels[index])


def encode(text: str) -> list[int]:
    """Characters as tokens."""
    return [ALPHABET.index(character) for character in text]


def ask(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random problems: prompts `[count, PROMPT]` and the sums `[count]`."""
    terms = torch.randint(50, (count, 2), generator=generator)
    prompts = torch.tensor([encode(f"{a:02d}+{b:02d}=") for a, b in terms.tolist()])
    return prompts, terms.sum(1)


def labelled(tokens: Tensor) -> Batch:
    """Prompts followed by answers, of which the tokens up to the first line break count."""
    answers = tokens[:, PROMPT:]
    ended = (answers == END).long().cumsum(1) - (answers == END).long()
    labels = torch.full_like(tokens, -100)
    labels[:, PROMPT - 1 : -1] = torch.where(ended == 0, answers, -100)
    return Batch(tokens, labels)


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor) -> Batch:
    """An answer to each prompt, one token after the other."""
    tokens = prompts
    for _ in range(ANSWER):
        chosen = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1)
        tokens = torch.cat([tokens, chosen], 1)
    return labelled(tokens)


def verify(batch: Batch, sums: Tensor) -> Tensor:
    """1 for each right answer, else 0; `[B]`."""
    texts = ["".join(ALPHABET[token] for token in row) for row in batch.tokens[:, PROMPT:].tolist()]
    return torch.tensor(
        [float(text.startswith(f"{value}\n")) for text, value in zip(texts, sums.tolist(), strict=True)]
    )


def warm_start(steps: int = 400, seed: int = 0) -> Policy:
    """A policy after supervised steps on sums of which half are off by one or by ten."""
    torch.manual_seed(seed)
    model, generator = Policy(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        prompts, sums = ask(128, generator)
        sums += torch.tensor([0, 0, 1, 10])[torch.randint(4, sums.shape, generator=generator)]
        answers = torch.tensor([encode(str(value).ljust(ANSWER, "\n")) for value in sums.tolist()])
        batch = labelled(torch.cat([prompts, answers], 1))
        stats = erc.token_stats(model(batch.tokens), batch.labels)
        optimizer.zero_grad()
        (-stats.logprob.sum() / (batch.labels != -100).sum()).backward()
        optimizer.step()
    return model


def shard(model: Policy) -> None:
    """FSDP2: each layer, then what is left; parameters become DTensors in place."""
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)


def old_statistics(model: nn.Module, batch: Batch) -> erc.TokenStats:
    """Log-probs and entropies `[B, L]` of the rollout policy, one read of the logits."""
    with torch.no_grad():
        return erc.token_stats(model(batch.tokens), batch.labels)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    old: erc.TokenStats,
    advantages: Tensor,
    objective: str | erc.Objective,
) -> erc.PolicyLoss:
    """One step on `batch`; the token mean is over all ranks."""
    tokens = (batch.labels != -100).sum().float()
    if dist.is_initialized():  # gradients are averaged over ranks
        dist.all_reduce(tokens)
        tokens = tokens / dist.get_world_size()
    out = erc.policy_loss(
        model(batch.tokens),
        batch.labels,
        old_logprob=old.logprob,
        old_entropy=old.entropy,
        advantages=advantages,
        objective=objective,
        normalizer=tokens.clamp(min=1),
    )
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return out


def rollout(model: nn.Module, generator: torch.Generator) -> tuple[Batch, Tensor, Tensor]:
    """A batch of answers, their advantages and their rewards, as DAPO wants them: answers that fill the budget are
    punished, and groups that are all right or all wrong are left out."""
    prompts, sums = (value.repeat_interleave(GROUP, 0) for value in ask(PROMPTS, generator))
    batch = sample(model, prompts)
    rewards = verify(batch, sums)
    shaped = rewards + erc.rlvr.overlong_penalty((batch.labels != -100).sum(1), ANSWER, 1)
    informative = erc.rlvr.informative_groups(rewards, group_size=GROUP)
    batch = batch._replace(labels=torch.where(informative[:, None], batch.labels, -100))
    return batch, erc.rlvr.group_advantages(shaped, group_size=GROUP), rewards


def save(path: Path, **state: object) -> None:
    """Write everything that a resumed run needs; a run killed meanwhile leaves the file before it."""
    torch.save(state | {"random": torch.get_rng_state()}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(
    model: Policy,
    steps: int,
    objective: str,
    seed: int = 0,
    fsdp: bool = False,
    compiled: bool = False,
    checkpoint: Path | None = None,
    learning_rate: float = 2e-4,
) -> list[dict[str, float]]:
    """Returns loss, reward and metrics of each update. Problems differ by rank. With a `checkpoint` the state is kept
    after every batch of rollouts, and training goes on from the file if there is one.
    """
    rank = dist.get_rank() if fsdp else 0
    if fsdp:
        shard(model)
    policy = torch.compile(model, dynamic=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    torch.manual_seed(seed + rank)
    log = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        log = state["log"]
    for step in range(len(log) // UPDATES, steps):
        problems = torch.Generator().manual_seed((seed + 1) * 1_000_003 + 1_009 * step + rank)
        batch, advantages, rewards = rollout(policy, problems)
        old = old_statistics(policy, batch)
        for rows in torch.randperm(len(advantages)).chunk(UPDATES):
            part = erc.TokenStats(*(value[rows] for value in old))
            out = update(policy, optimizer, batch.rows(rows), part, advantages[rows], objective)
            metrics = {key: value.item() for key, value in out.metrics.items()}
            log.append({"loss": out.loss.item(), "reward": rewards.mean().item(), **metrics})
        if rank == 0:
            shown = ("reward", "entropy", "erc_fraction", "clip_fraction")
            print(f"step {step + 1:3}", *(f" {name} {log[-1][name]:.3f}" for name in shown), flush=True)
        if checkpoint is not None:
            save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), log=log)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="batches of rollouts")
    parser.add_argument("--objective", default="erc-dapo", help="a name from erc.objectives()")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="a file; not with --fsdp, where each rank holds a part")
    options = parser.parse_args()
    if options.fsdp and options.checkpoint:
        parser.error("--checkpoint keeps the state of one process: leave out --fsdp")
    if options.fsdp and "RANK" not in os.environ:
        parser.error("--fsdp needs torchrun: torchrun --nproc-per-node 2 -m examples.plain_trainer --fsdp")
    try:
        erc.objective(options.objective)
    except ValueError as error:
        parser.error(str(error))
    if options.fsdp:
        dist.init_process_group("gloo")
    log = train(
        warm_start(seed=options.seed),
        options.steps,
        options.objective,
        options.seed,
        options.fsdp,
        options.compile,
        options.checkpoint,
        options.learning_rate,
    )
    if int(os.environ.get("RANK", 0)) == 0:
        rewards = [entry["reward"] for entry in log[::UPDATES]]
        print(
            f"reward of the first batch {rewards[0]:.3f}, of the last five {sum(rewards[-5:]) / len(rewards[-5:]):.3f}"
        )
    if options.fsdp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
