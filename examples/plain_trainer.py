"""Reinforcement learning with erc in a plain PyTorch loop: `python -m examples.plain_trainer`.

Two updates on each batch of rollouts, so that the second one is off-policy and the entropy ratio has something to say.
`torchrun --nproc-per-node 2 -m examples.plain_trainer --fsdp` shards the model by FSDP2, `--compile` compiles it, and
a run with `--checkpoint FILE` that was killed goes on from there to the numbers that it would have given.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import erc
from examples.model import character_tokenizer, small_decoder
from examples.rollout import Batch, sample
from examples.tasks import Task

GROUP = 8


def shard(model: Any) -> None:
    """FSDP2: each layer, then what is left; parameters become DTensors in place."""
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    register_fsdp_forward_method(model, "generate")


def old_statistics(model: Any, batch: Batch) -> erc.TokenStats:
    """Log-probs and entropies `[B, L]` of the rollout policy, one read of the logits."""
    with torch.no_grad():
        return erc.token_stats(batch.logits(model), batch.labels)


def update(
    model: Any, optimizer: torch.optim.Optimizer, batch: Batch, old: erc.TokenStats, advantages: torch.Tensor, name: str
) -> erc.PolicyLoss:
    """One step on `batch` with the objective `name`; the token mean is over all ranks."""
    tokens = (batch.labels != -100).sum().float()
    if dist.is_initialized():  # gradients are averaged over ranks
        dist.all_reduce(tokens)
        tokens = tokens / dist.get_world_size()
    out = erc.policy_loss(
        batch.logits(model),
        batch.labels,
        old_logprob=old.logprob,
        old_entropy=old.entropy,
        advantages=advantages,
        objective=name,
        normalizer=tokens,
    )
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return out


def save(path: Path, **state: Any) -> None:
    """Write everything that a resumed run needs; a run killed meanwhile leaves the file before it."""
    torch.save(state | {"random": torch.get_rng_state()}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def train(
    steps: int,
    objective: str,
    seed: int = 0,
    fsdp: bool = False,
    compiled: bool = False,
    checkpoint: Path | None = None,
) -> list[dict]:
    """Train a small decoder on sums; returns loss, reward and metrics of each update. Seeds and problems differ by
    rank. With a `checkpoint` the state is kept after every batch, and training goes on from the file if there is one.
    """
    torch.manual_seed(seed)
    tokenizer, task, device = character_tokenizer(), Task("chain_sum", short=True), torch.device("cpu")
    model = small_decoder(tokenizer, width=32, layers=1)
    rank = dist.get_rank() if fsdp else 0
    if fsdp:
        shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    policy = torch.compile(model, dynamic=True) if compiled else model
    problems = task.problems(steps * 2 * (rank + 1), seed)[rank * steps * 2 :]
    torch.manual_seed(seed + rank)
    log = []
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        log = state["log"]
    for step in range(len(log) // 2, steps):
        asked = [problem for problem in problems[2 * step : 2 * step + 2] for _ in range(GROUP)]
        rollouts = sample(model, tokenizer, task, asked, max_new_tokens=5, temperature=1.0, device=device)
        digits = torch.tensor([sum(c.isdigit() for c in text) / 5 for text in rollouts.texts])  # a first slope to climb
        advantages = erc.rlvr.group_advantages(rollouts.rewards.float() + digits, group_size=GROUP)
        old = old_statistics(policy, rollouts.batch)
        for _ in range(2):
            out = update(policy, optimizer, rollouts.batch, old, advantages, objective)
            metrics = {key: value.item() for key, value in out.metrics.items()}
            log.append({"loss": out.loss.item(), "reward": rollouts.rewards.float().mean().item(), **metrics})
        if checkpoint is not None:
            save(checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(), log=log)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--objective", default="erc-dapo", choices=erc.objectives())
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", type=Path, help="a file; not with --fsdp, where each rank holds a part")
    arguments = parser.parse_args()
    if arguments.fsdp and arguments.checkpoint:
        parser.error("--checkpoint keeps the state of one process: leave out --fsdp")
    if arguments.fsdp:
        dist.init_process_group("gloo")
    log = train(
        arguments.steps, arguments.objective, 0, arguments.fsdp, arguments.compile, checkpoint=arguments.checkpoint
    )
    for number, entry in enumerate(log):
        if int(os.environ.get("RANK", 0)) == 0:
            shown = ("loss", "reward", "entropy", "erc_fraction", "clip_fraction")
            print(number, *(f"{name} {entry[name]:.4f}" for name in shown))
    if arguments.fsdp:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
