"""Layer 2: row statistics from hidden states and the lm_head's weight, without ever holding the logits.

A chunk of logits lives between its GEMM and its sweep; the backward computes it again and reduces it right away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc import reference
from erc.backend import operators, select
from erc.derivatives import refuse_double_backward, refuse_forward_mode
from erc.inputs import RowScaling, check_labels, row_scaling
from erc.linear.head import (
    ActiveRows,
    HeadGradients,
    active_rows,
    cast_head,
    check_head,
    chunk_rows,
    gemm_dtype,
    needs_grad,
)
from erc.ops import stats_dtype
from erc.parallel import (
    LOCAL_IGNORE_INDEX,
    VocabShard,
    agreement,
    check_shardable,
    merge_states,
    poisoned,
    state_statistics,
)
from erc.results import TokenStats
from erc.rows import params_tensor


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_shard: VocabShard | None = None,
    memory_budget: int | None = None,
    num_active: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` of `hidden @ weight.T + bias`, whose logits are never stored whole.

    Args: as `linear_policy_loss` and `token_stats`.

    Returns:
        TokenStats of `[*]`, differentiable in `hidden`, `weight` and `bias`; the backward computes each chunk of
        logits again (8 N V D flops in all). Without grad: one sweep, 2 N V D.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.

    >>> import torch, erc
    >>> erc.linear_token_stats(torch.zeros(2, 3), torch.zeros(4, 3)).entropy
    tensor([1.3863, 1.3863])
    """
    with agreement(vocab_shard, validate) as facts:
        like = check_head(hidden, weight, bias, vocab_shard, facts)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward=False)
        leading = tuple(like.shape[:-1])
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        if labels is not None:
            labels = check_labels(labels, leading, hidden.device, like.shape[-1], ignore_index)
        active = active_rows(labels, like.shape[:-1].numel(), ignore_index, num_active)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
        facts.add(memory_budget=memory_budget, num_active=num_active)
    stats = linear_row_stats(
        hidden, weight, bias, labels, scaling, ignore_index, name, vocab_shard, memory_budget, active
    )
    return TokenStats(*(None if stat is None else stat.view(leading) for stat in stats))


def linear_row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    scaling: RowScaling,
    ignore_index: int,
    backend: str,
    vocab_shard: VocabShard | None,
    memory_budget: int | None,
    active: ActiveRows,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp of checked arguments, `[N]` each."""
    if backend == "torch":
        rows = hidden.reshape(-1, hidden.shape[-1])
        if labels is not None:
            rows = rows.masked_fill((labels == ignore_index)[:, None], 0)
        logits = torch.nn.functional.linear(rows, weight, bias)
        return reference.row_stats(logits, labels, scaling, ignore_index)
    refuse_forward_mode(hidden, weight, bias)
    if vocab_shard is not None:
        weight, bias = vocab_shard.local_rows(weight), None if bias is None else vocab_shard.local_rows(bias)
    dtype = gemm_dtype(hidden)
    columns = len(weight) if vocab_shard is None else vocab_shard.even_share()
    call = _StatsCall(
        operators(backend),
        labels,
        scaling.temperature,
        params_tensor(scaling),
        ignore_index,
        active,
        chunk_rows(columns, dtype, memory_budget),
        dtype,
        needs_grad(hidden, weight, bias),
        vocab_shard,
        len(weight),
    )
    logprob, entropy, logsumexp = _LinearStats.apply(hidden, weight, bias, call)
    return (None if labels is None else logprob), entropy, logsumexp


class _StatsCall(NamedTuple):
    operators: Any
    labels: Tensor | None
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    active: ActiveRows
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool, bool]
    vocab_shard: VocabShard | None

    columns: int  # of the local weight

    @property
    def start(self) -> int:
        return 0 if self.vocab_shard is None else self.vocab_shard.start

    @property
    def vocab_size(self) -> int:
        return self.columns if self.vocab_shard is None else self.vocab_shard.vocab_size

    def arguments(self, index: Tensor | slice, labels: Tensor | None, ignore_index: int) -> tuple:
        """What the statistics operators take after the logits, for the rows of `index`."""
        temperature = None if self.temperature is None else self.temperature[index]
        return None if labels is None else labels[index], temperature, self.params, ignore_index


class _LinearStats(torch.autograd.Function):
    """Statistics chunk by chunk; the backward computes each chunk of logits again and reduces it right away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _StatsCall) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = cast_head(hidden, weight, bias, call.dtype)
            count = len(head.hidden)
            # Rows that are not read keep the state of a single certain token: every statistic 0.
            state = torch.zeros(4, count, dtype=stats_dtype(call.dtype), device=hidden.device)
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            gathered = []
            for index in call.active.chunks(size):
                logits = head.logits(call.active.of(head.hidden, index), buffer)
                arguments = call.arguments(index, call.labels, call.ignore_index)
                part = call.operators.partial_stats(logits, *arguments, call.start)
                if call.vocab_shard is None:
                    state[:, index] = part
                else:
                    gathered.append((index, call.vocab_shard.gather(part)))
            for index, parts in gathered:
                temperature = None if call.temperature is None else call.temperature[index]
                state[:, index] = merge_states(parts.wait(), call.params, temperature)
            state = poisoned(state, call.labels, call.ignore_index, call.vocab_size)
            ignored = None if call.labels is None else call.labels == call.ignore_index
            logprob, entropy, logsumexp = state_statistics(state, call.params, call.temperature, ignored)
        ctx.save_for_backward(hidden, weight, bias, state)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return logprob, entropy, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if all(grad is None for grad in grads):
            return None, None, None, None
        call = ctx.call
        hidden, weight, bias, state = ctx.saved_tensors
        labels, ignore_index = call.labels, call.ignore_index
        if labels is None:
            grads = (None, *grads[1:])
        elif call.vocab_shard is not None:
            labels, ignore_index = call.vocab_shard.local_labels(labels, ignore_index, len(weight)), LOCAL_IGNORE_INDEX
        with torch.autocast(hidden.device.type, enabled=False):
            head = cast_head(hidden, weight, bias, call.dtype)
            needs_hidden, needs_weight, needs_bias = call.needs
            shard = call.vocab_shard if needs_hidden else None
            gradients = HeadGradients(head, (needs_hidden and shard is None, needs_weight, needs_bias))
            count = len(head.hidden)
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            reduced = []
            for index in call.active.chunks(size):
                rows = call.active.of(head.hidden, index)
                logits = head.logits(rows, buffer)
                chunk_grads = [None if grad is None else grad[index].contiguous() for grad in grads]
                saved = state[:3, index].contiguous()
                arguments = call.arguments(index, labels, ignore_index)
                call.operators.stats_backward_(logits, *arguments, saved, *chunk_grads)
                if shard is not None:
                    reduced.append((index, shard.reduce(logits[0] @ head.weight)))
                gradients.add(head, index, rows, logits[0])
            gradients.finish(head)
            if shard is not None:
                gradients.hidden = torch.zeros_like(head.hidden, dtype=torch.promote_types(call.dtype, torch.float32))
            for index, total in reduced:
                gradients.hidden[index] = total.wait()
        results = [
            None if grad is None else grad.to(target.dtype).view(target.shape)
            for grad, target in zip(
                (gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True
            )
        ]
        return (*results, None)
