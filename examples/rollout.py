"""Batches of prompts and answers, and sampling them from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from examples.model import forward_precision
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

    def first(self, count: int) -> Batch:
        """The first `count` sequences."""
        return self.rows(torch.arange(count, device=self.tokens.device))

    def logits(self, model: Any) -> Tensor:
        """`[B, L, V]`, with positions that count from each prompt's first token."""
        positions = (self.attention.cumsum(-1) - 1).clamp(min=0)
        with forward_precision(self.tokens.device):
            return model(
                input_ids=self.tokens, attention_mask=self.attention, position_ids=positions, use_cache=False
            ).logits


def concatenate(batches: Sequence[Batch], pad: int) -> Batch:
    """The sequences of all batches, padded on the left to the longest; answers have the same room in each."""
    length = max(batch.tokens.shape[1] for batch in batches)
    fill = {"tokens": pad, "attention": 0, "labels": -100}

    def column(name: str) -> Tensor:
        values = [getattr(batch, name) for batch in batches]
        return torch.cat([functional.pad(value, (length - value.shape[1], 0), value=fill[name]) for value in values])

    return Batch(*(column(field.name) for field in fields(Batch)))


Conversation = list[dict[str, str]]


def plain_prompts(problems: list[Problem]) -> list[Conversation]:
    """Each question as the one message of a conversation."""
    return [[{"role": "user", "content": problem.question}] for problem in problems]


def encode_prompts(tokenizer: Any, conversations: list[Conversation], device: torch.device) -> dict[str, Tensor]:
    """The conversations under the tokenizer's chat template, left-padded."""
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
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
    return join(encode_prompts(tokenizer, plain_prompts(problems), device), tokens, active)


class Rollouts(NamedTuple):
    """Completions as a batch `[B, L]`, their rewards `[B]`, and their texts."""

    batch: Batch
    rewards: Tensor
    texts: list[str]


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
    conversations: list[Conversation] | None = None,
    batch_size: int | None = None,
) -> Rollouts:
    """One completion of each problem; temperature 0 takes the likeliest token.

    `conversations` holds the prompt of each problem, where that is more than its question; `batch_size` limits how many
    are generated at a time.
    """
    prompts = encode_prompts(tokenizer, conversations or plain_prompts(problems), device)
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    answers = torch.full((len(problems), max_new_tokens), tokenizer.pad_token_id, device=device)
    for rows in torch.arange(len(problems), device=device).split(batch_size or len(problems)):
        with forward_precision(device):
            output = model.generate(
                input_ids=prompts["input_ids"][rows],
                attention_mask=prompts["attention_mask"][rows],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **choice,
            )[:, prompts["input_ids"].shape[1] :]
        answers[rows, : output.shape[1]] = output
    ended = (answers == tokenizer.eos_token_id).cumsum(-1)
    active = (ended == 0) | ((ended == 1) & (answers == tokenizer.eos_token_id))
    texts = tokenizer.batch_decode(torch.where(active, answers, tokenizer.pad_token_id), skip_special_tokens=True)
    rewards = torch.tensor([task.reward(text, problem) for text, problem in zip(texts, problems, strict=True)])
    return Rollouts(join(prompts, answers, active), rewards.to(device), texts)
