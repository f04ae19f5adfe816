"""Policy losses from logits, and from log-probs that exist already.

The fused route makes the gradient while the row is on chip: one read of the logits and one write of the gradient, for
forward and backward together. The two-phase route (statistics, then the loss on `[N]` numbers, then the gradient)
serves what needs more than one token at a time; it reads the logits twice. `erc.call.choose_route` decides, never the
user; `erc.explain` tells.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from erc.backend import operators, select
from erc.call import LossCall, TokenArguments, choose_route, loss_call
from erc.inputs import resolve_objective
from erc.ops import no_graph, refuse_double_backward, refuse_forward_mode
from erc.parallel import VocabShard, agreement, check_columns, check_shardable
from erc.results import PolicyLoss, TokenCall, add_exact_kl, loss_result, tokens_of, two_phase_result
from erc.rows import as_rows, check_inplace, row_scaling
from erc.stats import row_statistics
from erc.support import SamplingSupport, check_support
from erc.surrogate.objective import Objective


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
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
    support: SamplingSupport | None = None,
    inplace_backward: bool = False,
    vocab_shard: VocabShard | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped policy-gradient loss of `objective` and its gradient, from one pass over the logits.

    Args:
        logits: `[*, V]`; position `t` must predict `labels[t]`. Pass full logits with shifted labels and the last
            position ignored rather than a slice, whose gradient PyTorch would have to pad.
        labels: `[*]`, the sampled tokens; `ignore_index` marks rows that are not read, give 0 and an exactly zero
            gradient.
        old_logprob: `[*]` log-probs under the rollout policy, or None for on-policy updates (ratio 1).
        advantages: `[*]`, or one per sequence: `[B]` or `[B, 1]` for `[B, T]` rows, `[S]` for packed ones.
        objective: a preset name (`erc.objectives()`) or an `erc.Objective`.
        mask: `[*]` bool, int or float; a weight on the token in numerator and denominator. 0 is the same as
            `ignore_index`.
        old_entropy: `[*]` float32 or float64 entropies of the rollout policy; required by an entropy-ratio gate.
        ref_logprob: `[*]`; required by a KL penalty. rollout_logprob: `[*]`; required by a rollout correction.
        nll_mask: `[*]`; required by `nll_coef`.
        old_divergence: `[*]` nats or total variation to the rollout policy's whole distribution; required by
            `DPPO("full-tv")` and `DPPO("full-kl")`.
        ref_kl: `[*]` exact KL(policy || reference) with its graph, `erc.entropy_ratio(logits, ref_logits).kl_new_old`;
            required by `KLPenalty("full")`. It is added to the loss of whatever path runs.
        cu_seqlens: `[S + 1]` offsets of packed rows `[N]`.
        sequence_group: the ranks over which sequences are split (context parallelism): each passes its part, `[B,
            T_local]` or packed with its own offsets, of the same sequences in the same order. Sums per sequence and
            every count are then over all ranks, and the ranks' losses and gradients add up to those of one process.
            Metrics are of the local tokens.
        normalizer: replaces the count of the reduction (global token or sequence count for data parallelism and
            gradient accumulation); with it the upstream gradient is 1, and the backward then touches nothing. A number
            or a 0-d tensor, which is not read on the host; 0 is allowed where no token is active.
        entropy_normalizer, nll_normalizer: the same for the terms with a denominator of their own: the entropy bonus of
            `entropy_reduction="active-mean"` (all active tokens) and the NLL (those of `nll_mask`). Required with
            `normalizer` where such a term is on.
        generator: what a rule's random choices draw from (`ClipCov`), None for PyTorch's global generator.
        grad_scale: GradScaler's current scale, a number or a 0-d tensor, which is not read on the host. float16 logits
            take the two-phase path without it, because a fused gradient is rounded before it is scaled.
        support: the tokens that the sampler kept of each row (top-k, top-p, min-p, a grammar), as `token_stats`; two
            small launches more. Ratio rules, rollout corrections and `approx_kl` take the log-prob over them, and old
            and rollout log-probs must be over the same; gate, entropy bonus and exact KL are of the full vocabulary; KL
            estimates and the NLL say which they take (`KLPenalty(over=)`, `Objective.nll_over`). The metric
            `kept_mass` is the mean probability that the full distribution gives the kept tokens; with
            `rollout_logprob`, `mismatch_kl` is the k3 estimate of KL(engine || old policy), both over them.
        temperature, softcap, logit_scale, vocab_shard, validate, backend: as `token_stats`; a sharded loss runs
            two-phase. Under torch.compile pass a temperature that changes from step to step as a tensor: Dynamo
            compiles again for every new Python float.
        inplace_backward: writes the gradient over `logits` during the forward; they must not be a leaf, nor be used
            afterwards, nor lie inside activation checkpointing.

    Returns:
        PolicyLoss. `loss` is differentiable in `logits` alone, once: a second backward raises. `logprob`, `entropy` and
        `per_token_loss` are detached. Without grad no gradient is computed. Under activation checkpointing the fused
        gradient is computed twice.

    Raises:
        ValueError, TypeError, IndexError: naming the argument and what was expected, before any row is read.

    Sources: PPO arXiv 1707.06347, DAPO arXiv 2503.14476, entropy-ratio clipping arXiv 2512.05591; the other rules in
    `erc.surrogate.ratio_rules`.

    >>> import torch, erc
    >>> logits = torch.randn(2, 3, 11, requires_grad=True)
    >>> labels = torch.randint(11, (2, 3))
    >>> old = erc.token_stats(logits.detach(), labels)
    >>> rollout = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.tensor([1.0, -1.0])}
    >>> out = erc.policy_loss(logits, labels, objective="erc-dapo", **rollout)
    >>> out.loss.backward()
    >>> float(out.metrics["erc_fraction"])
    0.0
    """
    arguments = TokenArguments(
        old_logprob=old_logprob, advantages=advantages, mask=mask, old_entropy=old_entropy, ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob, nll_mask=nll_mask, old_divergence=old_divergence, ref_kl=ref_kl,
        cu_seqlens=cu_seqlens, normalizer=normalizer, entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer, grad_scale=grad_scale, generator=generator, sequence_group=sequence_group,
    )  # fmt: skip
    with agreement(vocab_shard, validate) as facts:
        vocab_size = check_columns(logits, vocab_shard, facts)
        objective = resolve_objective(objective)
        needs_grad = logits.requires_grad and torch.is_grad_enabled()
        if inplace_backward and needs_grad:
            check_inplace(logits)
        name, _ = select(logits, backend)
        check_support(support, logits.shape[:-1], logits.device, labels, facts)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward, facts)
        scaling = row_scaling(temperature, softcap, logit_scale, logits.shape[:-1], logits)
        route = choose_route(
            name, objective, logits.dtype,
            needs_grad=needs_grad, grad_scale=grad_scale, sharded=vocab_shard is not None,
            split=sequence_group is not None, support=support is not None,
        )  # fmt: skip
        fused = route.name == "fused"
        call = loss_call(
            objective, arguments, labels, ignore_index, logits, scaling, vocab_size,
            fused=fused, over_support=support is not None,
        )  # fmt: skip
        backend_operators = operators(name)
        if not fused:
            table = call.token_table(backend_operators)
        call.add_facts(facts)
    if fused:
        return fused_loss(call, backend_operators, logits, support, needs_grad, inplace_backward)
    logprob, entropy, _, logprob_full = row_statistics(
        backend_operators, logits, table[1], scaling, ignore_index, support, vocab_shard
    )
    assert logprob is not None
    return two_phase_result(TokenCall(call, backend_operators, table, logprob, entropy, logprob_full))


def fused_loss(
    call: LossCall,
    backend_operators: Any,
    logits: Tensor,
    support: SamplingSupport | None,
    needs_grad: bool,
    inplace: bool,
) -> PolicyLoss:
    """Table, rows and summary by one operator, and the gradient with them."""
    refuse_forward_mode(logits)
    per_row = call.objective.reduction == "none"
    kept = (None, None) if support is None else (support.token_ids, support.offsets)
    arguments = (call.scaling.temperature, *call.tokens, *kept, per_row, needs_grad)
    try:
        if needs_grad and not torch.compiler.is_compiling():
            others: list[Tensor] = []
            loss = _FusedLoss.apply(logits, backend_operators, arguments, inplace, others)
            per_token, _, metrics, count = others
        else:
            with no_graph() if not needs_grad else nullcontext():
                loss, per_token, _, metrics, count, _ = backend_operators.policy_loss(as_rows(logits), *arguments)
    except RuntimeError as error:
        call.explain(error, support)
        raise
    logprob_full = None if support is None else per_token[3]
    out = loss_result(call, loss, per_token[:3], metrics, count, logprob_full)
    return add_exact_kl(call, out, backend_operators)


class _FusedLoss(torch.autograd.Function):
    """The eager fused loss: its gradient exists after the forward; the backward scales it in place, or not at all."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, backend_operators: Any, arguments: tuple, inplace: bool, others: list[Tensor]
    ) -> Tensor:
        rows = as_rows(logits.detach())
        operator = backend_operators.policy_loss_ if inplace else backend_operators.policy_loss
        with no_graph():
            loss, *results, grad = operator(rows, *arguments)
        if inplace:
            grad = rows
            torch.autograd.graph.increment_version(rows)
        others.extend(results)  # constants: as outputs each of them would cost a place in the graph
        ctx.save_for_backward(grad)
        ctx.operators, ctx.used, ctx.shape = backend_operators, False, logits.shape
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        refuse_double_backward("policy_loss")
        if ctx.used:
            raise RuntimeError(
                "a second backward through the same policy_loss: the fused gradient was handed out by the first; "
                "call policy_loss again"
            )
        if grad_loss is None:
            return None, None, None, None, None
        ctx.used = True
        (grad,) = ctx.saved_tensors
        ctx.operators.scale_rows_(grad, grad_loss.contiguous())
        return grad.view(ctx.shape), None, None, None, None


def objective_loss(
    logprob: Tensor,
    entropy: Tensor,
    *,
    logprob_full: Tensor | None = None,
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
) -> PolicyLoss:
    """The policy loss from log-probs and entropies that a trainer holds already: no vocabulary work.

    Differentiable in `logprob` `[*]` (nats, float32 or float64), and in `entropy` `[*]` if and only if the objective
    has an entropy term; the entropy-ratio gate reads the entropy's value only. Where `logprob` is over a sampling
    support, `logprob_full` `[*]` is over the full vocabulary, for the terms that compare it; differentiable, too.
    Everything else as `erc.policy_loss`.

    >>> import torch
    >>> logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> entropy = torch.tensor([1.0, 1.2])
    >>> rollout = {"old_logprob": logprob.detach(), "old_entropy": torch.ones(2), "advantages": torch.ones(2)}
    >>> out = objective_loss(logprob, entropy, objective="erc-dapo", **rollout)
    >>> out.loss.backward()
    >>> logprob.grad  # the second token's entropy rose by 20 %: its gradient is dropped
    tensor([-0.5000, -0.0000])
    """
    arguments = TokenArguments(
        old_logprob=old_logprob, advantages=advantages, mask=mask, old_entropy=old_entropy, ref_logprob=ref_logprob,
        rollout_logprob=rollout_logprob, nll_mask=nll_mask, old_divergence=old_divergence, ref_kl=ref_kl,
        cu_seqlens=cu_seqlens, normalizer=normalizer, entropy_normalizer=entropy_normalizer,
        nll_normalizer=nll_normalizer, generator=generator, sequence_group=sequence_group,
    )  # fmt: skip
    if not isinstance(logprob, Tensor):
        raise TypeError(f"logprob must be a torch.Tensor, got {type(logprob).__name__}")
    chosen = operators(select(logprob)[0])
    return two_phase_result(tokens_of(chosen, logprob, entropy, objective, arguments, logprob_full))
