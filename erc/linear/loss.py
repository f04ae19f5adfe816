"""The policy loss from hidden states and the lm_head's weight, without ever holding the logits.

Rows are processed in chunks: GEMMs make float32 logits window by window, the fused kernel turns each window into its
gradient, and two GEMMs turn a chunk of that into gradients of `hidden` and `weight` right away (`erc.linear.plan`). No
logit is computed twice: 6 NVD flops forward and backward, where designs that recompute in the backward need 8.
Gradients of `weight` and `bias` accumulate in float32 across chunks. The GEMMs are PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erc.backend import operators, select
from erc.call import LossCall, TokenArguments, choose_route, loss_call
from erc.inputs import resolve_objective
from erc.kept import KeptRows
from erc.linear.head import (
    ActiveRows,
    Buffers,
    HeadGradients,
    active_rows,
    cast_head,
    check_head,
    check_main_grad,
    narrowest_dtype,
    needs_grad,
    no_autocast,
    product_dtype,
    shape_of,
)
from erc.linear.plan import RowPlan, machine_of, memory_budget_of, plan_rows, window_rows
from erc.linear.stats import linear_row_stats
from erc.ops import refuse_double_backward, refuse_forward_mode, stats_dtype
from erc.parallel import VocabShard, agreement, check_shardable
from erc.results import PolicyLoss, TokenCall, add_exact_kl, loss_result, two_phase_result
from erc.rows import row_scaling
from erc.support import SamplingSupport, check_support
from erc.surrogate.objective import Objective


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    old_logprob: Tensor | None,
    advantages: Tensor,
    objective: str | Objective = "erc-dapo",
    mask: Tensor | None = None,
    old_entropy: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    nll_mask: Tensor | None = None,
    old_divergence: Tensor | None = None,
    ref_kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    grad_scale: float | Tensor | None = None,
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
) -> PolicyLoss:
    """`policy_loss` of `hidden @ weight.T + bias`, whose logits are never stored whole.

    Args:
        hidden: `[*, D]`; position `t` must predict `labels[t]`. Under autocast the GEMMs' operands have its dtype.
        weight: `[V, D]`, the lm_head or a tied embedding, in the dtype of `hidden`, or in float32 with 16-bit `hidden`;
            a shard of its rows with `vocab_shard`. A weight without requires_grad (LoRA) costs no weight gradient.
            DTensors are refused: pass the local tensor.
        bias: `[V]` in the dtype of `weight`, or None.
        logits_dtype: float32 by default, of 16-bit operands too; their own dtype rounds every logit before its loss is
            computed, which decides ERC tokens by rounding. The gradient of the logits has the dtype of the operands,
            rounded once.
        vocab_shard: as `token_stats`; runs two-phase, with one all-reduce of the gradient of `hidden` in the backward.
        memory_budget: bytes of logits and of their gradient that exist at a time (by default 1 GiB on a GPU, 256 MiB on
            a CPU). Beyond them and the returned gradients, memory is the float32 accumulator of `weight`'s gradient,
            unless there is one chunk.
        main_grad: `[V, D]` float32. The backward adds the gradient of `weight` there, and returns none for it.
        num_active: an upper bound of the rows that labels and mask leave active. Ignored rows cost no flops: on the CPU
            always, on a GPU, where counting them would synchronise, only with this number. Too large a one costs flops;
            too small a one raises, on a GPU by an assertion on the device.
        validate: with `vocab_shard`, check that the ranks agree, at the price of one more collective.
        support: as `policy_loss`.
        The others: as `policy_loss`.

    Returns:
        PolicyLoss. `loss` is differentiable once, in `hidden`, `weight` and `bias`. Token-level objectives with a
        scalar loss take 6 N V D flops; sequence-level ones, reduction "none" and float16 without `grad_scale` take the
        two-phase path, 8 N V D.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.

    >>> import torch, erc
    >>> hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    >>> labels, advantages = torch.arange(5), torch.ones(5)
    >>> out = erc.linear_policy_loss(hidden, weight, labels, old_logprob=None, advantages=advantages, objective="dapo")
    >>> out.loss.backward()
    >>> weight.grad.shape
    torch.Size([11, 8])
    """
    with agreement(vocab_shard, validate) as facts:
        like = check_head(hidden, weight, bias, logits_dtype, vocab_shard, facts)
        budget = memory_budget_of(memory_budget, like.device)
        check_main_grad(main_grad, weight)
        objective = resolve_objective(objective)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, False, facts)
        arguments = TokenArguments(
            old_logprob=old_logprob, advantages=advantages, mask=mask, old_entropy=old_entropy,
            ref_logprob=ref_logprob, rollout_logprob=rollout_logprob, nll_mask=nll_mask,
            old_divergence=old_divergence, ref_kl=ref_kl, cu_seqlens=cu_seqlens, normalizer=normalizer,
            entropy_normalizer=entropy_normalizer, nll_normalizer=nll_normalizer, grad_scale=grad_scale,
            generator=generator, sequence_group=sequence_group,
        )  # fmt: skip
        scaling = row_scaling(temperature, softcap, logit_scale, like.shape[:-1], like)
        check_support(support, like.shape[:-1], like.device, labels, facts)
        needs = needs_grad(hidden, weight, bias)
        route = choose_route(
            name, objective, like.dtype, needs_grad=any(needs), grad_scale=grad_scale,
            grad_dtype=narrowest_dtype(hidden, weight), sharded=vocab_shard is not None, linear=True,
            support=support is not None,
        )  # fmt: skip
        fused = route.name == "fused"
        call = loss_call(
            objective, arguments, labels, ignore_index, like, scaling, like.shape[-1],
            fused=fused, over_support=support is not None,
        )  # fmt: skip
        table = call.token_table(operators(name))
        active = active_rows(table[1], call.count, ignore_index, num_active)
        call.add_facts(facts)
        facts.add(memory_budget=budget, logits_dtype=like.dtype, num_active=num_active)
    if not fused:
        logprob, entropy, _, logprob_full = linear_row_stats(
            hidden,
            weight,
            bias,
            table[1],
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
        assert logprob is not None
        return two_phase_result(TokenCall(call, operators(name), table, logprob, entropy, logprob_full))
    refuse_forward_mode(hidden, weight, bias)
    kept = None
    if support is not None:
        tokens = call.tokens
        kept = KeptRows.of(
            operators(name), table[1], scaling, tokens.params, tokens.ignore_index, support, None, like
        )  # fmt: skip
    rows = _Rows(
        operators(name), call, table, active, budget, product_dtype(weight), like.dtype, needs, main_grad, kept
    )
    loss, per_token, metrics, count = _FusedLinearLoss.apply(hidden, weight, bias, rows)
    logprob_full = None if kept is None else per_token[3]
    out = loss_result(call, loss, per_token[:3], metrics, count, logprob_full)
    return add_exact_kl(call, out, operators(name))


class _Rows(NamedTuple):
    operators: Any
    call: LossCall
    table: tuple[Tensor, Tensor, Tensor]
    active: ActiveRows
    budget: int
    dtype: torch.dtype
    logits_dtype: torch.dtype
    needs: tuple[bool, bool, bool]
    main_grad: Tensor | None
    kept: KeptRows | None


class _FusedLinearLoss(torch.autograd.Function):
    """Loss and gradients of all chunks in the forward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: _Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        backend_operators, call, (table, labels, counter) = rows.operators, rows.call, rows.table
        tokens, temperature, kept = call.tokens, call.scaling.temperature, rows.kept
        with no_autocast(hidden.device):
            head = cast_head(hidden, weight, bias, rows.dtype)
            dtype = stats_dtype(rows.logits_dtype)
            per_token = torch.zeros(4 if kept is None else 5, call.count, dtype=dtype, device=hidden.device)
            over_support = None if kept is None else per_token.new_empty(7, call.count)
            flags = torch.zeros(call.count, dtype=torch.int32, device=hidden.device)
            shape, learns = shape_of(head, rows.active, rows.logits_dtype), any(rows.needs)
            if learns:
                plan = plan_rows(shape, rows.budget, machine_of(hidden.device))
            else:
                plan = RowPlan(*(window_rows(shape, rows.budget),) * 2)
            several = plan.chunks(shape) > 1 or rows.main_grad is not None
            gradients = HeadGradients(head, rows.needs, several)
            buffers = Buffers(plan, head, rows.logits_dtype, learns)
            for chunk in rows.active.chunks(plan.rows):
                chunk_hidden = rows.active.of(head, chunk)
                for logits, some, grad_logits in buffers.windows(head, chunk_hidden, chunk):
                    place = (some.row_index, some.first_token)
                    if kept is not None and over_support is not None:
                        kept.logprobs_(logits, *place, over_support[0])
                    backend_operators.loss_rows_(
                        logits, labels, temperature, tokens.params, tokens.ignore_index, *place, table, per_token,
                        flags, over_support, grad_logits if learns else None,
                    )  # fmt: skip
                    if kept is not None and over_support is not None and learns:
                        saved, (d_logprob, d_full, d_entropy) = over_support[1:4], over_support[4:]
                        wanted = (d_logprob, d_entropy if call.objective.entropy_coef else None, None, d_full)
                        kept.gradient_(*place, per_token[4], saved, wanted, grad_logits)
                if learns:
                    gradients.add(head, chunk.index, chunk_hidden, buffers.gradient[: len(chunk_hidden)])
            gradients.finish()
        loss, metrics, count = backend_operators.token_summary(
            per_token[:4],
            None if kept is None else per_token[4],
            flags,
            table,
            labels,
            counter,
            tokens.params,
            tokens.ignore_index,
        )
        if call.objective.reduction == "none":
            loss = per_token[0].clone()
        ctx.gradients, ctx.operators, ctx.main_grad = gradients, backend_operators, rows.main_grad
        ctx.like = (hidden, weight, bias)
        others = (per_token[1:], metrics, count)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_policy_loss")
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through the same linear_policy_loss: "
                "the fused gradients were handed out by the first"
            )
        if grad_loss is None:
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        return (*gradients.scaled(grad_loss, ctx.like, ctx.operators, ctx.main_grad), None)
