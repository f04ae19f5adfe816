"""Layer 3: policy losses from logits.

The fused path makes the gradient while the row is on chip: one read of the logits and one write of the gradient, for
forward and backward together. The two-phase path (statistics, then the loss on `[N]` numbers, then the gradient)
serves what needs more than one token at a time; it reads the logits twice. The objective decides, never the user;
`erc.explain` tells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc import reference
from erc.backend import operators, select
from erc.derivatives import refuse_double_backward
from erc.inputs import (
    RowScaling,
    TokenArguments,
    labelled_batch,
    resolve_objective,
    row_scaling,
)
from erc.parallel import VocabShard, agreement, check_columns, check_shardable, sharded_stats
from erc.results import PolicyLoss, collect, policy_loss_result
from erc.rows import as_rows, check_inplace, params_tensor
from erc.surrogate.objective import Objective
from erc.surrogate.token_loss import TokenBatch, TokenLosses


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
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    grad_scale: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
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
        nll_mask: `[*]`, 1 (or a weight) on the rows whose mean NLL `nll_coef` adds; required by it.
        old_divergence: `[*]` nats or total variation to the rollout policy's whole distribution; required by
            `DPPO("full-tv")` and `DPPO("full-kl")`.
        ref_kl: `[*]` exact KL(policy || reference) with its graph, `erc.entropy_ratio(logits, ref_logits).kl_new_old`;
            required by `KLPenalty("full")`. It is added to the loss of whatever path runs.
        cu_seqlens: `[S + 1]` offsets of packed rows `[N]`.
        normalizer: replaces the count of the reduction (global token or sequence count for data parallelism and
            gradient accumulation); with it the upstream gradient is 1, and the backward then touches nothing. 0 where
            no token is active at all.
        entropy_normalizer, nll_normalizer: the same for the terms that divide by a count of their own: the active
            tokens, of an entropy bonus with "active-mean"; those of `nll_mask`, of the NLL term. Required beside
            `normalizer` where the objective has such a term.
        generator: what a rule's random choices draw from (`ClipCov`), None for PyTorch's global generator.
        grad_scale: GradScaler's current scale. float16 logits take the two-phase path without it, because a fused
            gradient is rounded before it is scaled.
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
        ValueError, TypeError, IndexError: naming the argument and what was expected, before any kernel runs.

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
    with agreement(vocab_shard, validate) as facts:
        vocab_size = check_columns(logits, vocab_shard, facts)
        objective = resolve_objective(objective)
        needs_grad = logits.requires_grad and torch.is_grad_enabled()
        if inplace_backward and needs_grad:
            check_inplace(logits)
        if grad_scale is not None and not grad_scale > 0:
            raise ValueError(f"grad_scale must be positive, got {grad_scale!r}")
        name, _ = select(logits, backend)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward)
        leading = tuple(logits.shape[:-1])
        scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
        labels, batch = labelled_batch(objective, arguments, logits, labels, ignore_index, vocab_size)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
        facts.add(objective=objective)
    path = choose_path(name, objective, logits.dtype, needs_grad, grad_scale)
    if path.name == "reference":
        logprob, entropy, _ = reference.row_stats(logits, labels, scaling, ignore_index)
        return policy_loss_result(objective, batch, logprob, entropy, leading)
    backend_operators = operators(name)
    rows = as_rows(logits)
    if vocab_shard is not None:
        statistics = (labels, scaling.temperature, params_tensor(scaling), ignore_index, vocab_shard, backend_operators)
        logprob, entropy, _ = sharded_stats(rows, *statistics)
        return policy_loss_result(objective, batch, logprob, entropy, leading)
    if path.name == "two-phase":
        logprob, entropy, _, _ = backend_operators.stats_forward(
            rows, labels, scaling.temperature, params_tensor(scaling), ignore_index
        )
        return policy_loss_result(objective, batch, logprob, entropy, leading)
    call = FusedCall(backend_operators, fused_arguments(objective, batch, labels, scaling, ignore_index, grad_scale))
    loss, token_loss, logprob, entropy, flags = call(rows, needs_grad, inplace_backward)
    if grad_scale is not None:
        loss = loss / grad_scale
    return collect(objective, batch, TokenLosses(loss, token_loss, flags), logprob, entropy, leading)


class Path(NamedTuple):
    """How a policy loss runs: "fused", "two-phase" or "reference", and the reason."""

    name: str
    reason: str


def choose_path(
    backend: str, objective: Objective, dtype: torch.dtype, needs_grad: bool, grad_scale: float | None
) -> Path:
    """The path of a call. Everything that decides it is here."""
    if backend == "torch":
        return Path("reference", "plain PyTorch: several tensors as large as the logits")
    if not objective.fused:
        return Path("two-phase", objective.two_phase_reason)
    if dtype == torch.float16 and needs_grad and grad_scale is None:
        return Path("two-phase", "a fused float16 gradient would be rounded before the loss scale: pass grad_scale")
    return Path("fused", "one read of the logits and one write of the gradient, for forward and backward together")


class FusedArguments(NamedTuple):
    """The arguments of the `policy_loss` operator after the logits, in its order; tensors but `params` are `[N]`."""

    labels: Tensor
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    weight: Tensor
    advantages: Tensor
    old_logprob: Tensor | None
    old_entropy: Tensor | None
    ref_logprob: Tensor | None
    policy_weight: Tensor | None
    entropy_weight: Tensor | None
    logprob_weight: Tensor | None
    rule: int
    kl: int
    gate: int

    def rows(self, index: Tensor) -> FusedArguments:
        """The same arguments for the rows of `index`."""
        chosen = {
            name: value[index]
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and name != "params"
        }
        return self._replace(**chosen)


def fused_arguments(
    objective: Objective,
    batch: TokenBatch,
    labels: Tensor,
    scaling: RowScaling,
    ignore_index: int,
    grad_scale: float | None = None,
) -> FusedArguments:
    """What the `policy_loss` operator needs to run `objective` on `batch`, its gradient multiplied by `grad_scale`."""

    def scaled(weight: Tensor | None) -> Tensor | None:
        return weight if weight is None or grad_scale is None else weight * grad_scale

    return FusedArguments(
        labels=labels,
        temperature=scaling.temperature,
        params=params_tensor(scaling, *objective.kernel_params()),
        ignore_index=ignore_index,
        weight=scaled(batch.weight),
        advantages=batch.advantages,
        old_logprob=batch.old_logprob,
        old_entropy=batch.old_entropy if objective.entropy_ratio else None,
        ref_logprob=batch.ref_logprob if objective.kl and objective.kl.kernel_id else None,
        policy_weight=batch.policy_weight,
        entropy_weight=scaled(batch.entropy_weight),
        logprob_weight=scaled(batch.logprob_weight),
        rule=objective.ratio.kernel_id,
        kl=objective.kl.kernel_id if objective.kl else 0,
        gate=objective.entropy_ratio.gate_id if objective.entropy_ratio else 0,
    )


class FusedCall(NamedTuple):
    """One call of the fused operator. Returns (loss, token_loss, logprob, entropy, flags), each `[N]`; only loss has a
    graph."""

    operators: Any
    arguments: FusedArguments

    def __call__(self, rows: Tensor, needs_grad: bool, inplace: bool) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling() or not needs_grad:
            return self.operators.policy_loss(rows, *self.arguments, needs_grad)[:5]
        return _FusedLoss.apply(rows, self, inplace)


class _FusedLoss(torch.autograd.Function):
    """The eager fused loss: its gradient exists after the forward; the backward scales it in place, or not at all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, call: FusedCall, inplace: bool) -> tuple[Tensor, ...]:
        rows = rows.detach()
        if inplace:
            outputs, grad = call.operators.policy_loss_(rows, *call.arguments), rows
            torch.autograd.graph.increment_version(rows)
        else:
            *outputs, grad = call.operators.policy_loss(rows, *call.arguments, True)
        ctx.save_for_backward(grad)
        ctx.operators, ctx.used = call.operators, False
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        refuse_double_backward()
        if ctx.used:
            raise RuntimeError(
                "a second backward through the same policy_loss: the fused gradient was handed out by the first; "
                "call policy_loss again"
            )
        if grad_loss is None:
            return None, None, None
        ctx.used = True
        (grad,) = ctx.saved_tensors
        ctx.operators.scale_rows_(grad, grad_loss.contiguous())
        return grad, None, None
