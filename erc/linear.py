"""Layer 3: statistics and losses from hidden states and the lm_head's weight, without ever holding the logits.

Rows are processed in chunks: one GEMM makes a chunk of logits, the fused kernel turns it into its gradient in place,
and two GEMMs turn that into gradients of `hidden` and `weight` right away. No chunk of logits is computed twice: 6 NVD
flops forward and backward, where designs that recompute in the backward need 8. Gradients of `weight` and `bias`
accumulate in float32 across chunks; in 16-bit dtypes each chunk's contribution is rounded once. The GEMMs are
PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc import reference
from erc.backends import operators, select
from erc.inputs import (
    LOGITS_DTYPES,
    RowScaling,
    TokenArguments,
    check_labels,
    labelled_batch,
    resolve_objective,
    row_scaling,
)
from erc.loss import FusedArguments, choose_path, fused_arguments
from erc.objectives import Objective
from erc.ops import stats_dtype
from erc.parallel import LOCAL_IGNORE_INDEX, VocabShard, agreement, check_shardable, merge_states, state_statistics
from erc.results import PolicyLoss, TokenStats, collect, policy_loss_result
from erc.rows import params_tensor
from erc.token_loss import TokenLosses

DEFAULT_MEMORY_BUDGET = 256 * 2**20
"""Bytes of logits that exist at a time."""


class Head(NamedTuple):
    """The matrices of a call in the dtype of its GEMMs: `hidden` `[N, D]`, `weight` `[V, D]`, `bias` `[V]` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits of `rows` `[n, D]`, written to `out` `[>= n, V]`, as the `[1, n, V]` that operators take."""
        out = out[: len(rows)]
        if self.bias is None:
            torch.mm(rows, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, rows, self.weight.t(), out=out)
        return out[None]


class HeadGradients:
    """Gradients of a `Head`, gathered chunk by chunk; None where not needed."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        accumulator = torch.promote_types(head.weight.dtype, torch.float32)
        self.hidden = torch.zeros_like(head.hidden) if needs_hidden else None
        self.weight = torch.zeros_like(head.weight, dtype=accumulator) if needs_weight else None
        self.bias = torch.zeros_like(head.bias, dtype=accumulator) if needs_bias else None

    def add(self, head: Head, index: Tensor | slice, rows: Tensor, grad_logits: Tensor) -> None:
        """Add the contribution of the chunk `rows = head.hidden[index]` with the gradient `[n, V]` of its logits."""
        if self.hidden is not None:
            self.hidden[index] = grad_logits @ head.weight
        if self.weight is not None:
            if self.weight.dtype == grad_logits.dtype:
                torch.addmm(self.weight, grad_logits.t(), rows, out=self.weight)
            else:
                self.weight.add_(grad_logits.t() @ rows)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

    def scaled(
        self, factor: Tensor, like: tuple[Tensor, Tensor, Tensor | None], backend_operators: Any
    ) -> list[Tensor | None]:
        """The gradients times a scalar that is read on the device, in the dtypes of the caller's tensors."""
        results = []
        for grad, target in zip((self.hidden, self.weight, self.bias), like, strict=True):
            if grad is not None:
                rows = grad.view(1, -1, grad.shape[-1])
                scale = factor.to(stats_dtype(grad.dtype)).expand(rows.shape[1]).contiguous()
                backend_operators.scale_rows_(rows, scale)
                grad = grad.to(target.dtype)
            results.append(grad)
        return results


def _chunks(index: Tensor | None, count: int, size: int) -> Iterator[Tensor | slice]:
    """Chunks of the active rows: of `index` where rows were compacted, else of all `count` rows."""
    total = count if index is None else len(index)
    for start in range(0, total, size):
        stop = min(start + size, total)
        yield slice(start, stop) if index is None else index[start:stop]


def active_rows(labels: Tensor | None, ignore_index: int, num_active: int | None) -> Tensor | None:
    """Indices of the rows that are read, or None for all: ignored rows then cost no flops.

    On a GPU counting them would synchronise, so rows are compacted there only where the caller gives `num_active`.
    """
    if labels is None:
        return None
    active = labels != ignore_index
    if num_active is not None:
        return torch.nonzero_static(active, size=num_active).squeeze(-1)
    if labels.device.type != "cpu" or bool(active.all()):
        return None
    return active.nonzero().squeeze(-1)


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard | None, facts: dict[str, int]
) -> Tensor:
    """Check the head; returns what later checks look at: shape, dtype and device of the logits that will never
    exist."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name} is a DTensor: pass {name}.to_local() with vocab_shard= where it is sharded by vocabulary, "
                f"else {name}.full_tensor()"
            )
        if tensor.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {tensor.device}")
    if weight.dim() != 2 or (weight.shape[0] < 1 and shard is None):
        raise ValueError(f"weight must be [V, D] with V >= 1, got shape {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [*, {weight.shape[1]}] like weight's columns, got shape {tuple(hidden.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}] like weight's rows, got shape {tuple(bias.shape)}")
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise TypeError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    facts |= {"rows": hidden.shape[:-1].numel(), "columns": weight.shape[0]}
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    return torch.empty((), dtype=_gemm_dtype(hidden), device=hidden.device).expand(*hidden.shape[:-1], vocab_size)


def _gemm_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    flat = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
    return Head(flat, weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


def _chunk_rows(weight: Tensor, dtype: torch.dtype, memory_budget: int | None) -> int:
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    row_bytes = max(1, weight.shape[0]) * dtype.itemsize
    return max(1, (memory_budget or DEFAULT_MEMORY_BUDGET) // row_bytes)


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
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
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
        num_active: how many rows have a label other than `ignore_index`. Ignored rows cost no flops: on the CPU
            always, on a GPU, where counting them would synchronise, only with this number.
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
    with agreement(vocab_shard, validate, hidden) as facts:
        like = _check_head(hidden, weight, bias, vocab_shard, facts)
        objective = resolve_objective(objective)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward=False)
        leading, dtype = tuple(like.shape[:-1]), like.dtype
        arguments = TokenArguments(
            old_logprob, advantages, mask, old_entropy, ref_logprob, rollout_logprob, nll_mask, cu_seqlens, normalizer
        )
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        labels, batch = labelled_batch(objective, arguments, like, labels, ignore_index)
    needs = _needs_grad(hidden, weight, bias)
    path = choose_path(name, objective, dtype, any(needs), grad_scale)
    fused = path.name == "fused" and vocab_shard is None and not (objective.reduction == "none" and any(needs))
    if not fused:
        logprob, entropy, _ = _row_stats(
            hidden, weight, bias, labels, scaling, ignore_index, name, vocab_shard, memory_budget, num_active
        )
        return policy_loss_result(objective, batch, logprob, entropy, leading)
    call = _FusedCall(
        operators(name),
        fused_arguments(objective, batch, labels, scaling, ignore_index, grad_scale),
        active_rows(labels, ignore_index, num_active),
        _chunk_rows(weight, dtype, memory_budget),
        dtype,
        needs,
    )
    loss, token_loss, logprob, entropy, flags = _FusedLinearLoss.apply(hidden, weight, bias, call)
    if grad_scale is not None:
        loss = loss / grad_scale
    return collect(objective, batch, TokenLosses(loss, token_loss, flags), logprob, entropy, leading)


def _needs_grad(*tensors: Tensor | None) -> tuple[bool, bool, bool]:
    return tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors)


class _FusedCall(NamedTuple):
    operators: Any
    arguments: FusedArguments
    index: Tensor | None
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool, bool]


class _FusedLinearLoss(torch.autograd.Function):
    """Loss and gradients of all chunks in the forward. The loss of a differentiable call is summed: it has one
    upstream gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _FusedCall) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast_head(hidden, weight, bias, call.dtype)
            gradients = HeadGradients(head, call.needs)
            count, rows_dtype = len(head.hidden), stats_dtype(call.dtype)
            outputs = [torch.zeros(count, dtype=rows_dtype, device=hidden.device) for _ in range(4)]
            outputs.append(torch.zeros(count, dtype=torch.int32, device=hidden.device))
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            for index in _chunks(call.index, count, size):
                rows = head.hidden[index]
                logits = head.logits(rows, buffer)
                arguments = call.arguments.rows(index)
                if any(call.needs):
                    results = call.operators.policy_loss_(logits, *arguments)
                    gradients.add(head, index, rows, logits[0])
                else:
                    results = call.operators.policy_loss(logits, *arguments, False)
                for output, result in zip(outputs, results, strict=False):
                    output[index] = result
        if any(call.needs):
            outputs[0] = outputs[0].sum()
        ctx.gradients, ctx.operators = gradients, call.operators
        ctx.like = (hidden, weight, bias)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
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
    with agreement(vocab_shard, validate, hidden) as facts:
        like = _check_head(hidden, weight, bias, vocab_shard, facts)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward=False)
        leading = tuple(like.shape[:-1])
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        if labels is not None:
            labels = check_labels(labels, leading, hidden.device, like.shape[-1], ignore_index)
    stats = _row_stats(
        hidden, weight, bias, labels, scaling, ignore_index, name, vocab_shard, memory_budget, num_active
    )
    return TokenStats(*(None if stat is None else stat.view(leading) for stat in stats))


def _row_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    scaling: RowScaling,
    ignore_index: int,
    backend: str,
    vocab_shard: VocabShard | None,
    memory_budget: int | None,
    num_active: int | None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp of checked arguments, `[N]` each."""
    if backend == "torch":
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return reference.row_stats(logits, labels, scaling, ignore_index)
    if vocab_shard is not None:
        weight, bias = vocab_shard.local_rows(weight), None if bias is None else vocab_shard.local_rows(bias)
    dtype = _gemm_dtype(hidden)
    call = _StatsCall(
        operators(backend),
        labels,
        scaling.temperature,
        params_tensor(scaling),
        ignore_index,
        active_rows(labels, ignore_index, num_active),
        _chunk_rows(weight, dtype, memory_budget),
        dtype,
        _needs_grad(hidden, weight, bias),
        vocab_shard,
    )
    logprob, entropy, logsumexp = _LinearStats.apply(hidden, weight, bias, call)
    return (None if labels is None else logprob), entropy, logsumexp


class _StatsCall(NamedTuple):
    operators: Any
    labels: Tensor | None
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    index: Tensor | None
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool, bool]
    vocab_shard: VocabShard | None

    @property
    def start(self) -> int:
        return 0 if self.vocab_shard is None else self.vocab_shard.start

    def arguments(self, index: Tensor | slice, labels: Tensor | None, ignore_index: int) -> tuple:
        """What the statistics operators take after the logits, for the rows of `index`."""
        temperature = None if self.temperature is None else self.temperature[index]
        return None if labels is None else labels[index], temperature, self.params, ignore_index


class _LinearStats(torch.autograd.Function):
    """Statistics chunk by chunk; the backward computes each chunk of logits again and reduces it right away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _StatsCall) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            head = _cast_head(hidden, weight, bias, call.dtype)
            count = len(head.hidden)
            # Rows that are not read keep the state of a single certain token: every statistic 0.
            state = torch.zeros(4, count, dtype=stats_dtype(call.dtype), device=hidden.device)
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            for index in _chunks(call.index, count, size):
                logits = head.logits(head.hidden[index], buffer)
                arguments = call.arguments(index, call.labels, call.ignore_index)
                state[:, index] = call.operators.partial_stats(logits, *arguments, call.start)
            if call.vocab_shard is not None:
                state = merge_states(call.vocab_shard.gather(state), call.params, call.temperature)
            ignored = None if call.labels is None else call.labels == call.ignore_index
            logprob, entropy, logsumexp = state_statistics(state, call.params, call.temperature, ignored)
        ctx.save_for_backward(hidden, weight, bias, state)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return logprob, entropy, logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
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
            head = _cast_head(hidden, weight, bias, call.dtype)
            gradients = HeadGradients(head, call.needs)
            count = len(head.hidden)
            size = max(1, min(call.chunk_rows, count))
            buffer = torch.empty(size, len(head.weight), dtype=call.dtype, device=hidden.device)
            for index in _chunks(call.index, count, size):
                rows = head.hidden[index]
                logits = head.logits(rows, buffer)
                chunk_grads = [None if grad is None else grad[index].contiguous() for grad in grads]
                saved = state[:3, index].contiguous()
                arguments = call.arguments(index, labels, ignore_index)
                call.operators.stats_backward_(logits, *arguments, saved, *chunk_grads)
                gradients.add(head, index, rows, logits[0])
        if call.vocab_shard is not None and gradients.hidden is not None:
            gradients.hidden = call.vocab_shard.reduce(gradients.hidden)
        results = [
            None if grad is None else grad.to(target.dtype).view(target.shape)
            for grad, target in zip(
                (gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True
            )
        ]
        return (*results, None)
