"""Entropies and divergences between two heads, without the logits of either."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.backend import operators, select
from erc.inputs import check_constant
from erc.linear.head import (
    ActiveRows,
    Chunk,
    Head,
    HeadGradients,
    cast_head,
    check_head,
    needs_grad,
    no_autocast,
    product_dtype,
)
from erc.linear.plan import memory_budget_of
from erc.ops import refuse_double_backward, refuse_forward_mode, stats_dtype
from erc.parallel import Facts, VocabShard, agreement, check_shardable, merged_pair
from erc.results import EntropyRatio
from erc.rows import row_scaling, scaling_params


def linear_entropy_ratio(
    hidden: Tensor,
    weight: Tensor,
    old_hidden: Tensor,
    old_weight: Tensor,
    *,
    bias: Tensor | None = None,
    old_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    vocab_shard: VocabShard | None = None,
    memory_budget: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> EntropyRatio:
    """`entropy_ratio` of `hidden @ weight.T + bias` and `old_hidden @ old_weight.T + old_bias`, neither stored whole.

    Exact KL in both directions, total variation and entropies of two policies: an exact KL penalty, full-vocabulary
    DPPO, distillation from a teacher (arXiv 2306.13649) whose width may be another one.

    Args:
        hidden, weight, bias: `[*, D]`, `[V, D]`, `[V]` or None, as `linear_policy_loss`.
        old_hidden, old_weight, old_bias: `[*, D_old]`, `[V, D_old]`, `[V]` or None; constants. Where both share a head,
            pass `weight.detach()`.
        temperature, softcap, logit_scale: applied to both.
        logits_dtype: of both, as `linear_policy_loss`: float32 by default, of 16-bit operands too.
        vocab_shard: both weights and biases are this rank's rows of larger ones, as `token_stats`. Two all-gathers a
            chunk of rows, of twelve numbers per row in all; one all-reduce of the gradient of `hidden` in the backward.
        memory_budget: bytes of both logits and of their gradient that exist at a time, as `linear_policy_loss`.
        validate: with `vocab_shard`, check that the ranks agree, at the price of one more collective.

    Returns:
        EntropyRatio of `[*]`, float32 (float64 for float64 heads), in nats, differentiable once in `hidden`, `weight`
        and `bias`; the backward computes each chunk of logits again.

    Raises:
        TypeError, ValueError: naming the argument; what is old must not require grad.

    >>> import torch, erc
    >>> student, teacher = torch.randn(5, 8, requires_grad=True), torch.randn(5, 16)
    >>> out = erc.linear_entropy_ratio(student, torch.randn(11, 8), teacher, torch.randn(11, 16))
    >>> out.kl_old_new.sum().backward()
    >>> student.grad.shape
    torch.Size([5, 8])
    """
    with agreement(vocab_shard, validate) as facts:
        like = check_head(hidden, weight, bias, logits_dtype, vocab_shard, facts)
        names = ("old_hidden", "old_weight", "old_bias")
        old_like = check_head(old_hidden, old_weight, old_bias, logits_dtype, vocab_shard, Facts(), names)
        for name, value in zip(names, (old_hidden, old_weight, old_bias), strict=True):
            check_constant(name, value)
        if old_like.shape != like.shape or len(old_weight) != len(weight) or old_like.device != like.device:
            raise ValueError(
                f"old_hidden and old_weight must give logits {tuple(like.shape)}, of {len(weight)} columns here, on "
                f"{like.device} like hidden and weight, got {tuple(old_like.shape)} of {len(old_weight)} on "
                f"{old_like.device}"
            )
        if old_like.dtype != like.dtype:
            raise TypeError(f"old_weight must give logits of {like.dtype} like weight, got {old_like.dtype}")
        budget = memory_budget_of(memory_budget, like.device)
        name, _ = select(like, backend)
        if vocab_shard is not None:
            check_shardable(name, False, facts)
        leading = like.shape[:-1]
        scaling = row_scaling(temperature, softcap, logit_scale, leading, like)
        dtypes = (product_dtype(weight), product_dtype(old_weight))
        facts.add(scaling=scaling.values, temperature=scaling.temperature, old_dtype=dtypes[1])
        facts.add(memory_budget=budget, logits_dtype=like.dtype, has_old_bias=old_bias is not None)
    if vocab_shard is not None:
        weight, old_weight = map(vocab_shard.local_rows, (weight, old_weight))
        bias, old_bias = (None if tensor is None else vocab_shard.local_rows(tensor) for tensor in (bias, old_bias))
    pair = _Pair(
        operators(name), scaling.temperature, scaling_params(scaling), budget, like.dtype, dtypes,
        needs_grad(hidden, weight, bias), (old_hidden, old_weight, old_bias), vocab_shard,
    )  # fmt: skip
    if name == "torch":
        stats, _ = pair.operators.paired_forward(*pair.stored(hidden, weight, bias), *pair.scaling())
    else:
        refuse_forward_mode(hidden, weight, bias, old_hidden, old_weight, old_bias)
        stats = _LinearEntropyRatio.apply(hidden, weight, bias, pair).unbind()
    return EntropyRatio(*(stat.view(leading) for stat in stats))


class _Pair(NamedTuple):
    operators: Any
    temperature: Tensor | None
    params: Tensor
    budget: int
    logits_dtype: torch.dtype
    dtypes: tuple[torch.dtype, torch.dtype]
    needs: tuple[bool, bool, bool]
    old: tuple[Tensor, Tensor, Tensor | None]
    vocab_shard: VocabShard | None

    def scaling(self) -> tuple[Tensor | None, Tensor]:
        return self.temperature, self.params

    def stored(self, *new: Any) -> list[Tensor]:
        """Both heads' logits `[1, N, V]`, whole and by autograd."""
        logits = []
        for (hidden, weight, bias), dtype in zip((new, self.old), self.dtypes, strict=True):
            rows = hidden.reshape(-1, hidden.shape[-1]).to(dtype).to(self.logits_dtype)
            weight = weight.to(dtype).to(self.logits_dtype)
            bias = None if bias is None else bias.to(dtype).to(self.logits_dtype)
            with no_autocast(hidden.device):
                logits.append(torch.nn.functional.linear(rows, weight, bias)[None])
        return logits

    def heads(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Head, Head]:
        return cast_head(hidden, weight, bias, self.dtypes[0]), cast_head(*self.old, self.dtypes[1])

    def chunk_rows(self, count: int, columns: int, gradient: bool) -> int:
        """Rows of which the logits of both heads exist at a time, and with `gradient` that of the first, as kernels
        write it and as products read it; by even shards, so that every rank's chunks are the same."""
        columns = max(1, columns) if self.vocab_shard is None else self.vocab_shard.even_share()
        wide = self.logits_dtype.itemsize
        column_bytes = 2 * wide
        if gradient:
            column_bytes += wide + (self.dtypes[0].itemsize if self.dtypes[0] != self.logits_dtype else 0)
        return max(1, min(count, self.budget // (columns * column_bytes)))

    def logits(self, heads: tuple[Head, Head], buffers: list[Tensor], rows: ActiveRows, chunk: Chunk) -> list[Tensor]:
        return [head.logits(rows.of(head, chunk), buffer) for head, buffer in zip(heads, buffers, strict=True)]

    def sweep(self, logits: list[Tensor], chunk: Chunk) -> tuple[Tensor, Tensor]:
        """`paired_forward` of the chunk, of all ranks' columns."""
        if self.vocab_shard is None:
            return self.operators.paired_forward(*logits, *self.of_chunk(chunk))
        new, old = logits
        temperature, params = self.of_chunk(chunk)
        return merged_pair(new, old, temperature, params, self.vocab_shard, self.operators)

    def of_chunk(self, chunk: Chunk) -> tuple[Tensor | None, Tensor]:
        """The scaling of the chunk's rows."""
        return None if self.temperature is None else self.temperature[chunk.index], self.params

    def buffers(self, heads: tuple[Head, Head], size: int) -> list[Tensor]:
        return [torch.empty(size, len(h.weight), dtype=self.logits_dtype, device=h.weight.device) for h in heads]


class _LinearEntropyRatio(torch.autograd.Function):
    """The six outputs `[6, N]` chunk by chunk; the backward computes each chunk of logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, pair: _Pair) -> Tensor:
        with no_autocast(hidden.device):
            heads = pair.heads(hidden, weight, bias)
            rows = ActiveRows(len(heads[0].hidden))
            size = pair.chunk_rows(rows.count, len(weight), gradient=False)
            buffers = pair.buffers(heads, size)
            found = [pair.sweep(pair.logits(heads, buffers, rows, chunk), chunk) for chunk in rows.chunks(size)]
        empty = hidden.new_empty((6, 0), dtype=stats_dtype(pair.logits_dtype))
        stats, saved = (torch.cat(parts, 1) for parts in zip(*found, strict=True)) if found else (empty, empty)
        ctx.save_for_backward(hidden, weight, bias, saved, *pair.old)
        ctx.pair = pair
        ctx.set_materialize_grads(False)
        return stats

    @staticmethod
    def backward(ctx: Any, grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("linear_entropy_ratio")
        if grads is None:
            return None, None, None, None
        hidden, weight, bias, saved, *old = ctx.saved_tensors
        pair = ctx.pair._replace(old=tuple(old))
        with no_autocast(hidden.device):
            heads = pair.heads(hidden, weight, bias)
            rows = ActiveRows(len(heads[0].hidden))
            size = pair.chunk_rows(rows.count, len(weight), gradient=True)
            buffers = pair.buffers(heads, size)
            gradients = HeadGradients(heads[0], pair.needs, rows.count > size, shard=pair.vocab_shard)
            for chunk in rows.chunks(size):
                logits = pair.logits(heads, buffers, rows, chunk)
                gradient = pair.operators.paired_backward(
                    *logits, *pair.of_chunk(chunk), saved[:, chunk.index].contiguous(),
                    grads[:, chunk.index].contiguous(),
                )  # fmt: skip
                gradients.add(heads[0], chunk.index, rows.of(heads[0], chunk), gradient[0].to(pair.dtypes[0]))
            gradients.finish()
        return (*gradients.like((hidden, weight, bias)), None)
