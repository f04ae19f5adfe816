"""Batches of prompts and answers, and sampling them from a policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from examples.tasks import Problem, Task


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts followed by answers: `tokens`, `attention` and `labels` are `[B, L]`.

    Position t predicts `labels[:, t]`: the next token of the answer, -100 elsewhere.
    """

    tokens: Tensor
    attention: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> Batch:
        """The sequences of `index`."""
        return Batch(*(getattr(self, field.name)[index] for field in fields(self)))

    def logits(self, model: Any) -> Tensor:
        """`[B, L, V]`, with positions that count from each prompt's first token."""
        positions = (self.attention.cumsum(-1) - 1).clamp(min=0)
        output = model(input_ids=self.tokens, attention_mask=self.attention, position_ids=positions, use_cache=False)
        return output.logits


def encode_prompts(tokenizer: Any, problems: list[Problem], device: torch.device) -> dict[str, Tensor]:
    """The chat prompts of `problems`, left-padded."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.question}], tokenize=False, add_generation_prompt=True
        )
        for problem in problems
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def join(prompts: dict[str, Tensor], answers: Tensor, active: Tensor) -> Batch:
    """Prompts `[B, P]` with answers `[B, R]`; `active` marks the answer tokens up to and including the end token."""
    tokens = torch.cat([prompts["input_ids"], answers], 1)
    attention = torch.cat([prompts["attention_mask"], active.long()], 1)
    labels = torch.full_like(tokens, -100)
    start = prompts["input_ids"].shape[1]
    labels[:, start - 1 : -1] = torch.where(active, answers, -100)
    return Batch(tokens, attention, labels)


def supervised_batch(tokenizer: Any, problems: list[Problem], device: torch.device, answers: list[str]) -> Batch:
    """Problems with one answer each."""
    encoded = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    length = max(map(len, encoded)) + 1
    tokens = torch.full((len(problems), length), tokenizer.pad_token_id, device=device)
    active = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids) + 1] = torch.tensor([*ids, tokenizer.eos_token_id], device=device)
        active[row, : len(ids) + 1] = True
    return join(encode_prompts(tokenizer, problems, device), tokens, active)


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    task: Task,
    problems: list[Problem],
    *,
    max_new_tokens: int,
    temperature: float,
    device: torch.device,
) -> tuple[Batch, Tensor]:
    """One completion of each problem and its reward `[B]`; temperature 0 takes the likeliest token."""
    prompts = encode_prompts(tokenizer, problems, device)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    output = model.generate(
        **prompts,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **choice,
    )
    answers = output[:, prompts["input_ids"].shape[1] :]
    ended = (answers == tokenizer.eos_token_id).cumsum(-1)
    active = (ended == 0) | ((ended == 1) & (answers == tokenizer.eos_token_id))
    texts = tokenizer.batch_decode(torch.where(active, answers, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = torch.tensor([task.reward(text, problem) for text, problem in zip(texts, problems, strict=True)])
    return join(prompts, answers, active), rewards.to(device)
