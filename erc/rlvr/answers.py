"""Log-probs of answers under a transformers model: batches of any length, a shared prefix computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ATTENTION_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer"}


@torch.no_grad()
def answer_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    shared_prefix: Sequence[int] = (),
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """`log pi(answer | shared_prefix, prompt)` in nats, summed over the answer's tokens; float32 `[len(prompts)]`.

    Args:
        model: a transformers causal LM that `erc.integrations.transformers` can read. Its logits are never stored.
        prompts, answers: token ids; an answer has at least one token, and `shared_prefix` plus prompt at least one.
        batch_size: sequences a forward pass. Padding stands on the right, where a causal model does not see it.
        shared_prefix: token ids in front of every prompt, computed once where all layers are attention. Layers with a
            recurrent state compute it with every prompt.
        advance: called with the number of prompts that were done, for a progress bar.

    Raises:
        ValueError: for an empty answer or context.
    """
    if len(prompts) != len(answers):
        raise ValueError(f"answers must be one per prompt, {len(prompts)}, got {len(answers)}")
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(answer) == 0:
            raise ValueError(f"answers[{index}] has no tokens")
        if len(prompt) + len(shared_prefix) == 0:
            raise ValueError(f"prompts[{index}] is empty, and there is no shared_prefix")
    device = model.get_input_embeddings().weight.device
    prefix = _Prefix(model, list(shared_prefix), device)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))  # little padding
    totals = torch.zeros(len(prompts), device=device)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        totals[chosen] = _batch_logprobs(model, prefix, [(prompts[i], answers[i]) for i in chosen], device)
        if advance is not None:
            advance(len(chosen))
    return totals


class _Prefix:
    """A prefix of all rows: `tokens` that each row repeats, and `cached` ones whose keys and values are kept."""

    def __init__(self, model: Any, tokens: list[int], device: torch.device) -> None:
        self.tokens, self.cached = tokens, 0
        self.cache: Any = None
        parameters = inspect.signature(model.forward).parameters
        self.keyword = next((name for name in ("cache", "past_key_values") if name in parameters), None)
        if len(tokens) < 2 or self.keyword is None:
            return
        from transformers import DynamicCache

        from erc.integrations.transformers import head_inputs

        cache = DynamicCache(config=model.config)
        if not _only_attention(cache):
            return
        # The last token stays with the rows: the first token of an answer may be predicted from it.
        known = tokens[:-1]
        head_inputs(model, torch.tensor([known], device=device), **{self.keyword: cache})
        # Some models add their layers only now, and one that ignores the cache leaves it empty.
        if _only_attention(cache) and cache.get_seq_length() == len(known):
            self.tokens, self.cached, self.cache = tokens[-1:], len(known), cache

    def arguments(self, rows: int) -> dict[str, Any]:
        """The backbone's arguments for `rows` rows that follow the prefix. A forward pass writes into its cache, so
        each gets a copy."""
        if self.cache is None or self.keyword is None:
            return {}
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return {self.keyword: cache}


def _only_attention(cache: Any) -> bool:
    """Models with recurrent layers may start them anew when several tokens follow a cache."""
    return all(type(layer).__name__ in ATTENTION_LAYERS for layer in cache.layers)


def _batch_logprobs(
    model: Any, prefix: _Prefix, pairs: list[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> Tensor:
    from erc.integrations.transformers import head_inputs

    rows = [([*prefix.tokens, *prompt], list(answer)) for prompt, answer in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    attention = torch.zeros(len(rows), prefix.cached + length, dtype=torch.long)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        attention[row, : prefix.cached + end] = 1
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    head = head_inputs(model, tokens.to(device), attention.to(device), **prefix.arguments(len(rows)))
    active = sum(len(answer) for _, answer in rows)
    return head.token_stats(labels.to(device), num_active=active).logprob.sum(-1)
