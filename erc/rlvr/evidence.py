"""Evidence Gain (arXiv 2603.09803): how much a reasoning trace helps an expert to his answer, made of log-probs
alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from erc.linear.stats import linear_token_stats
from erc.rlvr.demonstrations import Demonstration

Message = dict[str, str]


@torch.no_grad()
def answer_logprobs(
    model: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    shared_prefix: Sequence[int] = (),
) -> Tensor:
    """`log pi(answer | shared_prefix, prompt)` in nats, summed over the answer's tokens; float32 `[len(prompts)]`.

    Args:
        model: a transformers causal LM: `model.model` is its backbone and `get_output_embeddings()` its head, whose
            log-probs come from the fused linear kernel, so that no logits are stored.
        prompts, answers: token ids; an answer has at least one token, and `shared_prefix` plus prompt at least one.
        batch_size: sequences a forward pass. Padding stands on the right, where a causal model does not see it.
        shared_prefix: token ids in front of every prompt, computed once where the model can cache them.

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
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))  # little padding
    totals = torch.zeros(len(prompts), device=device)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [(list(prompts[i]), list(answers[i])) for i in chosen]
        totals[chosen] = _batch_logprobs(model, rows, list(shared_prefix), device)
    return totals


def _batch_logprobs(model: Any, rows: list[tuple[list[int], list[int]]], prefix: list[int], device: Any) -> Tensor:
    cache, cached = _cached_prefix(model, prefix, len(rows), device)
    if cached == 0:
        rows = [(prefix + prompt, answer) for prompt, answer in rows]
    elif any(not prompt for prompt, _ in rows):
        # The first answer token is predicted from the last prefix token: keep that one out of the cache.
        cache, cached = _cached_prefix(model, prefix[:-1], len(rows), device)
        rows = [(prefix[cached:] + prompt, answer) for prompt, answer in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), -100)
    attention = torch.zeros(len(rows), length, dtype=torch.long)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        attention[row, :end] = 1
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    attention = torch.cat([torch.ones(len(rows), cached, dtype=torch.long), attention], 1)
    hidden = model.model(
        input_ids=tokens.to(device),
        attention_mask=attention.to(device),
        position_ids=torch.arange(cached, cached + length, device=device)[None].expand(len(rows), -1),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    head = model.get_output_embeddings()
    settings = {
        "softcap": getattr(model.config, "final_logit_softcapping", None),
        "logit_scale": getattr(model.config, "logit_scale", None) or 1.0,
    }
    stats = linear_token_stats(hidden, head.weight, labels.to(device), bias=getattr(head, "bias", None), **settings)
    return stats.logprob.sum(-1)


def _cached_prefix(model: Any, prefix: list[int], copies: int, device: Any) -> tuple[Any, int]:
    """The prefix's key-value cache, repeated for each row, and its length; (None, 0) where the model keeps no such
    cache."""
    if not prefix:
        return None, 0
    tokens = torch.tensor([prefix], device=device)
    cache = getattr(model.model(input_ids=tokens, use_cache=True), "past_key_values", None)
    if cache is None or not hasattr(cache, "batch_repeat_interleave"):
        return None, 0
    cache.batch_repeat_interleave(copies)
    return cache, len(prefix)


def _encode(tokenizer: Any, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _common_prefix(first: list[int], *others: list[int]) -> int:
    length = min(len(ids) for ids in (first, *others))
    for index in range(length):
        if any(ids[index] != first[index] for ids in others):
            return index
    return length


@torch.no_grad()
def evidence_gain(
    model: Any,
    tokenizer: Any,
    query: str,
    traces: Sequence[str],
    demonstrations: Sequence[Demonstration],
    *,
    per_token: bool = True,
    batch_size: int = 8,
) -> Tensor:
    """`mean_e [log pi(a_e | q, o, q_e) - log pi(a_e | q_e)]` for each trace o: float32 `[len(traces)]`, in nats.

    How much more likely the expert's answer `a_e` becomes when the question and the trace are shown as an earlier turn.
    In-Context RLVR weighs rewards by `mean_e exp(EG_e)`, up to a factor that does not depend on o, without computing
    it.

    Args:
        model: a transformers causal LM with a chat template in `tokenizer`.
        query: the question q. traces: the reasoning traces o to be judged.
        demonstrations: the experts' `query` q_e and `answer` a_e; the paper takes 100.
        per_token: divide each gain by the number of tokens of `a_e`; False gives the sum, which the Bayes identity is
            about.
        batch_size: sequences a forward pass; changes nothing but speed and memory.

    Raises:
        ValueError: without traces or demonstrations.
    """
    if not traces or not demonstrations:
        raise ValueError("traces and demonstrations must not be empty")
    answers = [list(tokenizer(demo.answer, add_special_tokens=False)["input_ids"]) for demo in demonstrations]
    divisor = torch.tensor([len(answer) if per_token else 1 for answer in answers], dtype=torch.float32)
    questions = [{"role": "user", "content": demo.query} for demo in demonstrations]
    plain = answer_logprobs(model, [_encode(tokenizer, [q]) for q in questions], answers, batch_size=batch_size)
    gains = []
    for trace in traces:
        shown = [{"role": "user", "content": query}, {"role": "assistant", "content": trace}]
        contexts = [_encode(tokenizer, [*shown, question]) for question in questions]
        shared = _common_prefix(*contexts) if len(contexts) > 1 else 0
        conditioned = answer_logprobs(
            model,
            [context[shared:] for context in contexts],
            answers,
            batch_size=batch_size,
            shared_prefix=contexts[0][:shared],
        )
        gains.append(((conditioned - plain) / divisor.to(plain.device)).mean())
    return torch.stack(gains)
