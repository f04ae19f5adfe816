"""Row statistics from hidden states and the lm_head's weight, without ever holding the logits.

A window of logits lives between its GEMM and its sweep; the backward computes it again and reduces it right away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from erc import reference
from erc.backend import operators, select
from erc.call import labels_explained
from erc.inputs import check_label_values, label_rows
from erc.kept import KeptRows
from erc.linear.head import (
    ActiveRows,
    AddedToMainGrad,
    Buffers,
    Head,
    HeadGradients,
    active_rows,
    cast_head,
    check_head,
    check_main_grad,
    needs_grad,
    no_autocast,
    product_dtype,
    shape_of,
)
from erc.linear.plan import RowPlan, Shape, machine_of, memory_budget_of, plan_rows, window_rows
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

if TYPE_CHECKING:
    from erc.results import LabelledStats


@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    logits_dtype: torch.dtype | None = ...,
    support: SamplingSupport | None = ...,
    vocab_shard: VocabShard | None = ...,
    memory_budget: int | None = ...,
    main_grad: Tensor | None = ...,
    num_active: int | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> LabelledStats: ...
@overload
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: None = ...,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    logits_dtype: torch.dtype | None = ...,
    support: SamplingSupport | None = ...,
    vocab_shard: VocabShard | None = ...,
    memory_budget: int | None = ...,
    main_grad: Tensor | None = ...,
    num_active: int | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> TokenStats: ...
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
    logits_dtype: torch.dtype | None = None,
    support: SamplingSupport | None = None,
    vocab_shard: VocabShard | None = None,
    memory_budget: int | None = None,
    main_grad: Tensor | None = None,
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
        like = check_head(hidden, weight, bias, logits_dtype, vocab_shard, facts)
        budget = memory_budget_of(memory_budget, like.device)
        check_main_grad(main_grad, weight)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, False, facts)
        leading = like.shape[:-1]
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        if labels is not None:
            labels = label_rows(labels, leading, hidden.device, ignore_index).reshape(-1).to(torch.int64)
            if vocab_shard is not None:
                check_label_values(labels.view(leading), like.shape[-1], ignore_index)
        check_support(support, leading, hidden.device, labels, facts)
        active = active_rows(labels, leading.numel(), ignore_index, num_active)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
        facts.add(memory_budget=budget, logits_dtype=like.dtype, num_active=num_active)
    with labels_explained(labels, leading, like.shape[-1], ignore_index):
        stats = linear_row_stats(
            hidden,
            weight,
            bias,
            labels,
            scaling,
            ignore_index,
            name,
            vocab_shard,
            budget,
            active,
            like.dtype,
            main_grad,
            support,
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
    budget: int,
    active: ActiveRows,
    logits_dtype: torch.dtype,
    main_grad: Tensor | None,
    support: SamplingSupport | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy, logsumexp and, with a support, log-prob over the full vocabulary of checked arguments, `[N]`
    each."""
    params = scaling_params(scaling)
    if backend == "torch":
        flat = hidden.reshape(-1, hidden.shape[-1])
        if labels is not None:
            flat = flat.masked_fill((labels == ignore_index)[:, None], 0)
        operands = product_dtype(weight)
        flat, weight = (tensor.to(operands).to(logits_dtype) for tensor in (flat, weight))
        bias = None if bias is None else bias.to(operands).to(logits_dtype)
        if main_grad is not None:
            weight = AddedToMainGrad.apply(weight, main_grad)
        with no_autocast(hidden.device):
            logits = torch.nn.functional.linear(flat, weight, bias)[None]
        arguments = (scaling.temperature, params, ignore_index)
        if support is not None and labels is not None:
            return reference.support_statistics(logits, labels, *arguments, support)
        stats = operators(backend).stats_forward(logits, labels, *arguments)
        return (None if labels is None else stats[0]), *stats[1:3], None
    refuse_forward_mode(hidden, weight, bias)
    if vocab_shard is not None:
        local = vocab_shard.local_rows
        weight = local(weight)
        bias, main_grad = (None if tensor is None else local(tensor) for tensor in (bias, main_grad))
    kept = None
    if support is not None and labels is not None:
        like = hidden.new_empty((0, len(weight)), dtype=logits_dtype)
        kept = KeptRows.of(operators(backend), labels, scaling, params, ignore_index, support, vocab_shard, like)
    rows = _Rows(
        operators(backend), labels, scaling.temperature, params, ignore_index, active, budget, product_dtype(weight),
        logits_dtype, needs_grad(hidden, weight, bias), vocab_shard, main_grad, kept,
    )  # fmt: skip
    logprob, entropy, logsumexp, full = _LinearStats.apply(hidden, weight, bias, rows)
    return (None if labels is None else logprob), entropy, logsumexp, full


class _Rows(NamedTuple):
    operators: Any
    labels: Tensor | None
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    active: ActiveRows
    budget: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    needs: tuple[bool, bool, bool]
    vocab_shard: VocabShard | None
    main_grad: Tensor | None
    kept: KeptRows | None

    def shape(self, head: Head) -> Shape:
        """The shape for even shards, so that every rank's plan is the same."""
        columns = None if self.vocab_shard is None else self.vocab_shard.even_share()
        return shape_of(head, self.active, self.logits_dtype, columns)


class _LinearStats(torch.autograd.Function):
    """Statistics chunk by chunk; the backward computes each chunk of logits again and reduces it right away."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows
    ) -> tuple[Tensor | None, ...]:
        shard, real = rows.vocab_shard, stats_dtype(rows.logits_dtype)
        arguments = (rows.labels, rows.temperature, rows.params, rows.ignore_index)
        with no_autocast(hidden.device):
            head = cast_head(hidden, weight, bias, rows.dtype)
            count = len(head.hidden)
            size = window_rows(rows.shape(head), rows.budget)
            buffers = Buffers(RowPlan(size, size), head, rows.logits_dtype, gradient=False)
            # Rows that are not read have statistics of 0, and the state of a single certain token.
            stats = torch.zeros(6 if shard is None else 4, count, dtype=real, device=hidden.device)
            gathered, kept = [], rows.kept
            over_support = torch.zeros_like(stats[0] if kept is not None else stats[0, :0])
            # On a shard the kernel only looks for kept logits; the statistics come when those of all ranks are there.
            whole = stats if shard is None or kept is None else stats.new_zeros(6, count)
            full: tuple[Tensor, ...] = (*whole[:3], whole[3:])
            for chunk in rows.active.chunks(size):
                ((logits, *_),) = buffers.windows(head, rows.active.of(head, chunk), chunk)
                if shard is None:
                    rows.operators.stats_forward_(logits, *arguments, *chunk[1:], stats)
                else:
                    rows.operators.partial_stats_(logits, *arguments, *chunk[1:], shard.start, stats)
                    gathered.append((chunk.index, shard.gather(stats[:, chunk.index])))
                if kept is not None:
                    kept.statistics_(logits, *chunk[1:], full, over_support)
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
        with no_autocast(hidden.device):
            head = cast_head(hidden, weight, bias, rows.dtype)
            shape = rows.shape(head)
            plan = plan_rows(shape, rows.budget, machine_of(hidden.device))
            several = plan.chunks(shape) > 1
            gradients = HeadGradients(head, rows.needs, several, rows.main_grad, rows.vocab_shard)
            buffers = Buffers(plan, head, rows.logits_dtype)
            for chunk in rows.active.chunks(plan.rows):
                chunk_hidden = rows.active.of(head, chunk)
                for logits, some, grad_logits in buffers.windows(head, chunk_hidden, chunk):
                    rows.operators.stats_backward_(
                        logits, labels, rows.temperature, rows.params, ignore_index, some.row_index, some.first_token,
                        saved, *upstream, grad_logits,
                    )  # fmt: skip
                    if kept is not None:
                        kept.gradient_(some.row_index, some.first_token, full, saved, grads, grad_logits)
                gradients.add(head, chunk.index, chunk_hidden, buffers.gradient[: len(chunk_hidden)])
            gradients.finish()
        return (*gradients.like((hidden, weight, bias)), None)
