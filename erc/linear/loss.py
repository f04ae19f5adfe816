"""Layer 3: the policy loss from hidden states and the lm_head's weight, without ever holding the logits.

Rows are processed in chunks: one GEMM makes a chunk of logits, the fused kernel turns it into its gradient in place,
and two GEMMs turn that into gradients of `hidden` and `weight` right away. No chunk of logits is computed twice: 6 NVD
flops forward and backward, where designs that recompute in the backward need 8. Gradients of `weight` and `bias`
accumulate in float32 across chunks; in 16-bit dtypes each chunk's contribution is rounded once. The GEMMs are
PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.backend import operators, select
from erc.derivatives import refuse_double_backward, refuse_forward_mode
from erc.inputs import TokenArguments, labelled_batch, resolve_objective, row_scaling
from erc.linear.head import ActiveRows, HeadGradients, active_rows, cast_head, check_head, chunk_rows, needs_grad
from erc.linear.stats import linear_row_stats
from erc.loss import FusedArguments, choose_path, fused_arguments
from erc.ops import stats_dtype
from erc.parallel import VocabShard, agreement, check_shardable
from erc.results import PolicyLoss, collect, policy_loss_result
from erc.surrogate.objective import Objective
from erc.surrogate.token_loss import TokenLosses


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
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    grad_scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_shard: VocabShard | None = None,
    memory_budget: int | None = None,
    num_active: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """`policy_loss` of `hidden @ weight.T + bias`, whose logits are never stored whole.

    Args:
        hidden: `[*, D]`; position `t` must predict `labels[t]`. Under autocast the GEMMs run in its dtype.
        weight: `[V, D]`, the lm_head or a tied embedding; a shard of its rows with `vocab_shard`. A weight without
            requires_grad (LoRA) costs no weight gradient. DTensors are refused: pass the local tensor.
        bias: `[V]` or None.
        vocab_shard: as `token_stats`; runs two-phase, with one all-reduce of the gradient of `hidden` in the backward.
        memory_budget: bytes of logits that exist at a time (default 256 MiB). Beyond them and the returned gradients,
            memory is the float32 accumulator of `weight`'s gradient.
        num_active: an upper bound of the rows that labels and mask leave active. Ignored rows cost no flops: on the CPU
            always, on a GPU, where counting them would synchronise, only with this number. Too large a one costs flops;
            too small a one raises, on a GPU by an assertion on the device.
        validate: with `vocab_shard`, check that the ranks agree, at the price of one more collective.
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
        like = check_head(hidden, weight, bias, vocab_shard, facts)
        objective = resolve_objective(objective)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward=False)
        leading, dtype = tuple(like.shape[:-1]), like.dtype
        arguments = TokenArguments(
            old_logprob,
            advantages,
            mask,
            old_entropy,
            ref_logprob,
            rollout_logprob,
            nll_mask,
            old_divergence,
            ref_kl,
            cu_seqlens,
            normalizer,
            entropy_normalizer,
            nll_normalizer,
            generator,
        )
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        labels, batch = labelled_batch(objective, arguments, like, labels, ignore_index)
        active = active_rows(labels, len(labels), ignore_index, num_active)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
        facts.add(objective=objective, memory_budget=memory_budget, num_active=num_active)
    needs = needs_grad(hidden, weight, bias)
    path = choose_path(name, objective, dtype, any(needs), grad_scale)
    fused = path.name == "fused" and vocab_shard is None and not (objective.reduction == "none" and any(needs))
    if not fused:
        logprob, entropy, _ = linear_row_stats(
            hidden, weight, bias, labels, scaling, ignore_index, name, vocab_shard, memory_budget, active
        )
        return policy_loss_result(objective, batch, logprob, entropy, leading)
    refuse_forward_mode(hidden, weight, bias)
    call = _FusedCall(
        operators(name),
        fused_arguments(objective, batch, labels, scaling, ignore_index, grad_scale),
        active,
        chunk_rows(len(weight), dtype, memory_budget),
        dtype,
        needs,
    )
    loss, token_loss, logprob, entropy, flags = _FusedLinearLoss.apply(hidden, weight, bias, call)
    if grad_scale is not None:
        loss = loss / grad_scale
    return collect(objective, batch, TokenLosses(loss, token_loss, flags), logprob, entropy, leading)


class _FusedCall(NamedTuple):
    operators: Any
    arguments: FusedArguments
    active: ActiveRows
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool, bool]


class _FusedLinearLoss(torch.autograd.Function):
    """Loss and gradients of all chunks in the forward. The loss of a differentiable call is summed: it has one
    upstream gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _FusedCall) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = cast_head(hidden, weight, bias, call.dtype)
            gradients = HeadGradients(head, call.needs)
            count, rows_dtype = len(head.hidden), stats_dtype(call.dtype)
            outputs = [torch.zeros(count, dtype=rows_dtype, device=hidden.device) for _ in range(4)]
            outputs.append(torch.zeros(count, dtype=torch.int32, device=hidden.device))
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            for index in call.active.chunks(size):
                rows = call.active.of(head.hidden, index)
                logits = head.logits(rows, buffer)
                arguments = call.arguments.rows(index)
                if any(call.needs):
                    results = call.operators.policy_loss_(logits, *arguments)
                    gradients.add(head, index, rows, logits[0])
                else:
                    results = call.operators.policy_loss(logits, *arguments, False)
                for output, result in zip(outputs, results, strict=False):
                    output[index] = result
            gradients.finish(head)
        if any(call.needs):
            outputs[0] = outputs[0].sum()
        ctx.gradients, ctx.operators = gradients, call.operators
        ctx.like = (hidden, weight, bias)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through the same linear_policy_loss: "
                "the fused gradients were handed out by the first"
            )
        if grad_loss is None:
            return None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        hidden, weight, bias = gradients.scaled(grad_loss, ctx.like, ctx.operators)
        if hidden is not None:
            hidden = hidden.view(ctx.like[0].shape)
        return hidden, weight, bias, None
