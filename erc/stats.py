"""Row statistics as autograd functions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from erc import reference
from erc.backend import operators, select
from erc.call import labels_explained
from erc.inputs import check_constant, check_label_values, label_rows
from erc.kept import support_statistics
from erc.ops import contiguous, no_graph, refuse_double_backward, refuse_forward_mode
from erc.parallel import VocabShard, agreement, check_columns, check_shardable, sharded_pair, sharded_stats
from erc.results import EntropyRatio, TokenStats
from erc.rows import RowScaling, as_rows, check_inplace, row_scaling, scaling_params
from erc.support import SamplingSupport, check_support

if TYPE_CHECKING:
    from erc.results import LabelledStats


@overload
def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    support: SamplingSupport | None = ...,
    inplace_backward: bool = ...,
    vocab_shard: VocabShard | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> LabelledStats: ...
@overload
def token_stats(
    logits: Tensor,
    labels: None = ...,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    support: SamplingSupport | None = ...,
    inplace_backward: bool = ...,
    vocab_shard: VocabShard | None = ...,
    validate: bool = ...,
    backend: str | None = ...,
) -> TokenStats: ...
def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    support: SamplingSupport | None = None,
    inplace_backward: bool = False,
    vocab_shard: VocabShard | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> TokenStats:
    """Log-prob of the labels, entropy and logsumexp of each row, from one read of the logits.

    Every output is of `x = softcap * tanh(logits * logit_scale / softcap) / temperature`, in nats.

    Args:
        logits: `[*, V]`, float32, bfloat16, float16 or float64. A -inf logit is a forbidden token. A row that is all
            -inf or holds NaN or +inf gives NaN for that row alone.
        labels: `[*]` integers in `[0, V)`, or `ignore_index` for rows that are not read and give 0 with gradient 0.
        temperature: positive; a number, or a tensor `[*]` with one value per row.
        softcap: positive, or None.
        logit_scale: positive.
        support: the tokens that the sampler kept of each row, in the order of the flattened labels: `logprob` is then
            over them, `logprob_full` over the full vocabulary like everything else. Costs a gather of the kept logits,
            and in the backward as many writes, beside the sweeps that run without it.
        inplace_backward: the backward writes the gradient over `logits`, which must not be a leaf and must not be used
            by anything else afterwards.
        vocab_shard: `logits` are this rank's columns of a larger vocabulary (`erc.VocabShard`); labels stay global. One
            all-gather of four numbers per row; every rank gets bitwise the same statistics, and its own columns'
            gradient of the one replicated loss.
        validate: with `vocab_shard`, check that the ranks agree, at the price of one more collective and a
            synchronisation.
        backend: see `erc.backends()`.

    Returns:
        TokenStats of `[*]`, float32 (float64 for float64 logits), differentiable in `logits`. An output that takes no
        part in the loss costs nothing in the backward; double backward raises.

    Raises:
        TypeError, ValueError: naming the argument.
        IndexError: a label out of range or outside its support (on a GPU, where reading it would synchronise, the row
            is NaN instead).

    >>> import torch, erc
    >>> logits = torch.zeros(2, 4, requires_grad=True)
    >>> stats = erc.token_stats(logits, torch.tensor([1, 3]))
    >>> stats.entropy
    tensor([1.3863, 1.3863], grad_fn=<ViewBackward0>)
    """
    with agreement(vocab_shard, validate) as facts:
        vocab_size = check_columns(logits, vocab_shard, facts)
        name, _ = select(logits, backend)
        if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
            check_inplace(logits)
        leading = logits.shape[:-1]
        scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
        if labels is not None:
            labels = label_rows(labels, leading, logits.device, ignore_index).to(torch.int64)
        check_support(support, leading, logits.device, labels, facts)
        if vocab_shard is not None:
            check_shardable(name, inplace_backward, facts)
            if labels is not None:
                check_label_values(labels, vocab_size, ignore_index)
        facts.add(scaling=scaling.values, temperature=scaling.temperature, labels=labels, ignore_index=ignore_index)
    with labels_explained(labels, leading, vocab_size, ignore_index):
        stats = row_statistics(
            operators(name), logits, labels, scaling, ignore_index, support, vocab_shard, inplace_backward
        )
    return TokenStats.of_rows(*stats, leading)


def row_statistics(
    backend_operators: Any,
    logits: Tensor,
    labels: Tensor | None,
    scaling: RowScaling,
    ignore_index: int,
    support: SamplingSupport | None = None,
    vocab_shard: VocabShard | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy, logsumexp and, with a support, log-prob over the full vocabulary: `[N]` of checked arguments,
    differentiable in `logits`."""
    rows, params = as_rows(logits), scaling_params(scaling)
    arguments = (labels, scaling.temperature, params, ignore_index)
    by_autograd = backend_operators is operators("torch")
    if not by_autograd:
        refuse_forward_mode(logits)
    differentiable = logits.requires_grad and torch.is_grad_enabled()
    if support is not None:
        assert labels is not None  # the front desk asked for them
        if by_autograd:
            return reference.support_statistics(rows, labels, *arguments[1:], support)
        inplace = inplace_backward and differentiable
        return support_statistics(
            backend_operators, rows, labels, scaling, params, ignore_index, support, vocab_shard, inplace
        )
    if vocab_shard is not None:
        stats = sharded_stats(rows, *arguments, vocab_shard, backend_operators)
    elif inplace_backward and differentiable and not by_autograd:
        stats = _InplaceStats.apply(rows, backend_operators, arguments)
    else:
        with nullcontext() if differentiable else no_graph():
            stats = backend_operators.stats_forward(rows, *arguments)[:3]
    return stats[0] if labels is not None else None, *stats[1:], None


class _InplaceStats(torch.autograd.Function):
    """`stats_forward` whose backward reuses the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, backend_operators: Any, arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
        labels, temperature, params, ctx.ignore_index = arguments
        logprob, entropy, logsumexp, saved = backend_operators.stats_forward(logits, *arguments)
        ctx.save_for_backward(logits, labels, temperature, params, saved)
        ctx.operators, ctx.used = backend_operators, False
        ctx.set_materialize_grads(False)
        return logprob, entropy, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_double_backward("token_stats(inplace_backward=True)")
        if ctx.used:
            raise RuntimeError("a second backward through token_stats(inplace_backward=True): the logits are gone")
        if all(grad is None for grad in grads):
            return None, None, None
        logits, labels, temperature, params, saved = ctx.saved_tensors
        ctx.used = True
        logits = logits.detach()
        grads = (grads[0] if labels is not None else None, *grads[1:])
        ctx.operators.stats_backward_(
            logits, labels, temperature, params, ctx.ignore_index, None, 0, saved, *map(contiguous, grads), logits
        )
        torch.autograd.graph.increment_version(logits)
        return logits, None, None


def entropy_ratio(
    logits: Tensor,
    old_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_shard: VocabShard | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> EntropyRatio:
    """Entropies of new and old rows, their ratio, and the divergences between them, in one pass over both.

    Args:
        logits: `[*, V]`, as `token_stats`.
        old_logits: the same shape, dtype and device; a constant.
        temperature, softcap, logit_scale: applied to both.
        vocab_shard: both are this rank's columns of a larger vocabulary, as `token_stats`; two all-gathers of twelve
            numbers per row in all.
        validate: with `vocab_shard`, check that the ranks agree, at the price of one more collective.
        backend: see `erc.backends()`.

    Returns:
        EntropyRatio of `[*]`, float32 (float64 for float64 logits), in nats, differentiable in `logits`. `kl_new_old`
        is KL(new || old); a forbidden old token that the new policy allows makes it inf. Divergences are sums of terms
        >= 0, so small ones keep their relative accuracy (arXiv 2512.05591 for the ratio, arXiv 2602.04879 for the use
        of the others).

    Raises:
        TypeError, ValueError: naming the argument; `old_logits` must not require grad.

    >>> import torch, erc
    >>> new, old = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    >>> erc.entropy_ratio(new, old).ratio
    tensor([0.8399])
    """
    with agreement(vocab_shard, validate) as facts:
        check_columns(logits, vocab_shard, facts)
        check_columns(old_logits, vocab_shard, facts, "old_logits")
        check_constant("old_logits", old_logits)
        if old_logits.shape != logits.shape or old_logits.dtype != logits.dtype or old_logits.device != logits.device:
            raise ValueError(
                f"old_logits must have the shape, dtype and device of logits, {tuple(logits.shape)} {logits.dtype} "
                f"{logits.device}, got {tuple(old_logits.shape)} {old_logits.dtype} {old_logits.device}"
            )
        name, _ = select(logits, backend)
        if vocab_shard is not None:
            check_shardable(name, False, facts)
        leading = logits.shape[:-1]
        scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
        facts.add(scaling=scaling.values, temperature=scaling.temperature)
    if name != "torch":
        refuse_forward_mode(logits, old_logits)
    arguments = (as_rows(logits), as_rows(old_logits.detach()), scaling.temperature, scaling_params(scaling))
    if vocab_shard is None:
        stats, _ = operators(name).paired_forward(*arguments)
    else:
        stats = sharded_pair(*arguments, vocab_shard, operators(name))
    return EntropyRatio(*(stat.view(leading) for stat in stats))
