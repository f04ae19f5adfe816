"""Layer 2: row statistics from hidden states and the lm_head's weight, without ever holding the logits.

A chunk of logits lives between its GEMM and its sweep; the backward computes it again and reduces it right away.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc import reference
from erc.backend import operators, select
from erc.call import labels_explained
from erc.inputs import check_label_values, label_rows
from erc.kept import KeptRows
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
from erc.ops import contiguous, refuse_double_backward, refuse_forward_mode, stats_dtype
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
from erc.rows import RowScaling, row_scaling, scaling_params
from erc.support import SamplingSupport, check_support


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
    support: SamplingSupport | None = None,
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
            check_shardable(name, False, facts)
        leading = like.shape[:-1]
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        if labels is not None:
            labels = label_rows(labels, leading, hidden.device, ignore_index).reshape(-1).to(torch.int64)
            if vocab_shard is not None:
                check_label_values(labels.view(leading), like.shape[-1], ignore_index)
        if support is not None:
            check_support(support, leading, hidden.device, labels)
            facts.add(token_ids=support.token_ids, offsets=support.offsets)
        active = active_rows(labels, leading.numel(), ignore_index, num_active)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
        facts.add(memory_budget=memory_budget, num_active=num_active)
    with labels_explained(labels, leading, like.shape[-1], ignore_index):
        stats = linear_row_stats(
            hidden, weight, bias, labels, scaling, ignore_index, name, vocab_shard, memory_budget, active, support
        )
    return TokenStats.of_rows(*stats, leading)


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
    support: SamplingSupport | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy, logsumexp and, with a support, log-prob over the full vocabulary of checked arguments, `[N]`
    each."""
    params = scaling_params(scaling)
    if backend == "torch":
        rows = hidden.reshape(-1, hidden.shape[-1])
        if labels is not None:
            rows = rows.masked_fill((labels == ignore_index)[:, None], 0)
        logits = torch.nn.functional.linear(rows, weight, bias)[None]
        arguments = (logits, labels, scaling.temperature, params, ignore_index)
        if support is not None:
            return reference.support_statistics(*arguments, support)
        stats = operators(backend).stats_forward(*arguments)
        return (None if labels is None else stats[0]), *stats[1:3], None
    refuse_forward_mode(hidden, weight, bias)
    if vocab_shard is not None:
        weight, bias = vocab_shard.local_rows(weight), None if bias is None else vocab_shard.local_rows(bias)
    dtype = gemm_dtype(hidden)
    columns = len(weight) if vocab_shard is None else vocab_shard.even_share()
    kept = None
    if support is not None:
        like = hidden.new_empty((0, len(weight)), dtype=dtype)
        kept = KeptRows.of(operators(backend), labels, scaling, params, ignore_index, support, vocab_shard, like)
    rows = _Rows(
        operators(backend),
        labels,
        scaling.temperature,
        params,
        ignore_index,
        active,
        chunk_rows(columns, dtype, memory_budget),
        dtype,
        needs_grad(hidden, weight, bias),
        vocab_shard,
        kept,
    )
    logprob, entropy, logsumexp, full = _LinearStats.apply(hidden, weight, bias, rows)
    return (None if labels is None else logprob), entropy, logsumexp, full


class _Rows(NamedTuple):
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
    kept: KeptRows | None


class _LinearStats(torch.autograd.Function):
    """Statistics chunk by chunk; the backward computes each chunk of logits again and reduces it right away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows) -> tuple[Tensor, ...]:
        shard, real = rows.vocab_shard, stats_dtype(rows.dtype)
        arguments = (rows.labels, rows.temperature, rows.params, rows.ignore_index)
        with torch.autocast(hidden.device.type, enabled=False):
            head = cast_head(hidden, weight, bias, rows.dtype)
            count = len(head.hidden)
            size = max(1, min(rows.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=rows.dtype, device=hidden.device)
            # Of rows that are not read every statistic is 0, and the state that of a single certain token.
            stats = torch.zeros(6 if shard is None else 4, count, dtype=real, device=hidden.device)
            gathered, kept = [], rows.kept
            over_support = None if kept is None else torch.zeros_like(stats[0])
            # Of a shard the kernel looks for kept logits alone; the statistics come when all ranks' are there.
            full = stats if shard is None or kept is None else stats.new_zeros(6, count)
            full = (*full[:3], full[3:])
            for chunk in rows.active.chunks(size):
                logits, some = head.logits(rows.active.of(head.hidden, chunk), buffer), chunk[1:]
                if shard is None:
                    rows.operators.stats_forward_(logits, *arguments, *some, stats)
                else:
                    rows.operators.partial_stats_(logits, *arguments, *some, shard.start, stats)
                    gathered.append((chunk.index, shard.gather(stats[:, chunk.index])))
                if kept is not None:
                    kept.statistics_(logits, *some, full, over_support)
            for index, parts in gathered:
                temperature = None if rows.temperature is None else rows.temperature[index]
                stats[:, index] = merge_states(parts.wait(), rows.params, temperature)
        if shard is not None:
            stats = poisoned(stats, rows.labels, rows.ignore_index, shard.vocab_size)
        if shard is None:
            full = (*(stat.clone() for stat in stats[:3]), stats[3:])
        else:
            ignored = None if rows.labels is None else rows.labels == rows.ignore_index
            full = (*state_statistics(stats, rows.params, rows.temperature, ignored), stats[:3])
            if kept is not None:
                kept.gather_(full, over_support)
        ctx.save_for_backward(hidden, weight, bias, full[3], None if kept is None else full[0])
        ctx.rows = rows
        ctx.set_materialize_grads(False)
        return (*full[:3], None) if kept is None else (over_support, *full[1:3], full[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_token_stats, or a two-phase linear_policy_loss,")
        if all(grad is None for grad in grads):
            return None, None, None, None
        rows = ctx.rows
        hidden, weight, bias, saved, full = ctx.saved_tensors
        labels, ignore_index = rows.labels, rows.ignore_index
        kept, grads = rows.kept, tuple(map(contiguous, grads))
        upstream = (None if labels is None else grads[0], *grads[1:3])
        if kept is not None:
            labels, ignore_index, upstream = kept.dense(grads, len(weight))
        elif labels is not None and rows.vocab_shard is not None:
            labels, ignore_index = rows.vocab_shard.local_labels(labels, ignore_index, len(weight)), LOCAL_IGNORE_INDEX
        with torch.autocast(hidden.device.type, enabled=False):
            head = cast_head(hidden, weight, bias, rows.dtype)
            needs_hidden, needs_weight, needs_bias = rows.needs
            shard = rows.vocab_shard if needs_hidden else None
            gradients = HeadGradients(head, (needs_hidden and shard is None, needs_weight, needs_bias))
            count = len(head.hidden)
            size = max(1, min(rows.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=rows.dtype, device=hidden.device)
            reduced = []
            for chunk in rows.active.chunks(size):
                chunk_hidden = rows.active.of(head.hidden, chunk)
                logits = head.logits(chunk_hidden, buffer)
                rows.operators.stats_backward_(
                    logits, labels, rows.temperature, rows.params, ignore_index, chunk.row_index, chunk.first_token,
                    saved, *upstream, logits,
                )  # fmt: skip
                if kept is not None:
                    kept.gradient_(chunk.row_index, chunk.first_token, full, saved, grads, logits)
                if shard is not None:
                    reduced.append((chunk.index, shard.reduce(logits[0] @ head.weight)))
                gradients.add(head, chunk.index, chunk_hidden, logits[0])
            gradients.finish(head)
            if shard is not None:
                gradients.hidden = torch.zeros_like(head.hidden, dtype=torch.promote_types(rows.dtype, torch.float32))
            for index, total in reduced:
                gradients.hidden[index] = total.wait()
        results = [
            None if grad is None else grad.to(target.dtype).view(target.shape)
            for grad, target in zip(
                (gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True
            )
        ]
        return (*results, None)
