"""Layer 2: statistics of rows whose sampling was cut: the dense sweep as ever, and a sparse part around it.

Before the sweep the logits of the kept tokens are copied out, `K` numbers for all rows, of which the log-prob over the
support is made; the sweep knows nothing of them. In the backward the sweep writes the gradient of what is dense, zero
where that is nothing, and then every kept entry is overwritten by the sum of its dense and its sparse part, which
float64 computes from the copied logits and the row's state. So 16 bits are rounded once, also where the gradient lies
over the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erc.ops import contiguous, refuse_double_backward, stats_dtype
from erc.parallel import LOCAL_IGNORE_INDEX, VocabShard, row_scale, sharded_state
from erc.rows import RowScaling
from erc.support import SamplingSupport


class DenseGradients(NamedTuple):
    """`[N]` each, or None: by the statistics of the full vocabulary."""

    logprob: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor | None


class SupportRows(NamedTuple):
    """The row sums over a support, float64 `[N]`, of `x = scaled logits`, centred at the largest kept one.

    `rest` leaves the label out: where the label is the maximum, its probability is `1 - rest / total`, uncancelled.
    """

    row_max: Tensor
    rest: Tensor
    label: Tensor  # x_y - row_max

    @property
    def total(self) -> Tensor:
        return self.rest + self.label.exp()

    def logprob(self) -> Tensor:
        return torch.where(self.label == 0, -self.rest.log1p(), self.label - self.total.log())


@dataclass(frozen=True)
class KeptTokens:
    """The entries `[K]` of a support beside the rows and labels of a call.

    The padding of a cut row stands for the row's label once more, so that what is written there is what the label's own
    entry writes.
    """

    labels: Tensor  # [N], outside the vocabulary where the row is invalid
    offsets: Tensor  # [N + 1]
    row: Tensor  # [K]
    column: Tensor  # [K], inside the vocabulary whatever the ids are
    is_label: Tensor  # [K] bool
    real: Tensor  # [K] bool: no padding
    cut: Tensor  # [N] bool
    invalid: Tensor  # [N] bool: must be NaN

    @classmethod
    def of(cls, support: SamplingSupport, labels: Tensor, vocab_size: int, ignore_index: int) -> KeptTokens:
        """Of labels `[N]`.

        Raises:
            IndexError: on the CPU, as `SamplingSupport.cut_rows`.
        """
        cut, invalid = support.cut_rows(labels, vocab_size, ignore_index)
        row, ids = support.row_of_ids(), support.token_ids.long()
        label, real = labels[row], ids >= 0
        column = torch.where(real, ids, label)
        return cls(
            labels=torch.where(invalid, vocab_size + (ignore_index == vocab_size), labels),
            offsets=support.offsets,
            row=row,
            column=column.clamp(0, vocab_size - 1),
            is_label=column == label,
            real=real,
            cut=cut,
            invalid=invalid,
        )

    def place(self, rows: Tensor, start: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Where the entries lie in `rows` `[outer, inner, V]` that begin at column `start`, and which of them do."""
        column = self.column - start
        here = (column >= 0) & (column < rows.shape[-1])
        inner = max(1, rows.shape[1])
        return (self.row // inner, self.row % inner, column.clamp(0, rows.shape[-1] - 1)), here

    def gather(self, rows: Tensor, shard: VocabShard | None) -> Tensor:
        """The logits `[K]` of the entries, in the statistics dtype; of a shard the same on every rank."""
        dtype = stats_dtype(rows.dtype)
        if shard is None:
            return rows[self.place(rows, 0)[0]].to(dtype)
        values = torch.full(self.row.shape, -torch.inf, dtype=dtype, device=rows.device)
        if rows.shape[-1]:
            place, here = self.place(rows, shard.start)
            values = torch.where(here, rows[place].to(dtype), values)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=shard.group)
        return values

    def sums(self, x: Tensor) -> SupportRows:
        """Of the scaled logits `[K]`, float64. Segmented sums keep their order, so runs agree bit for bit."""

        def reduced(values: Tensor, how: str, start: float) -> Tensor:
            return torch.segment_reduce(values, how, offsets=self.offsets, initial=start, unsafe=True)

        row_max = reduced(x, "max", -torch.inf)
        row_max = torch.where(row_max.isfinite(), row_max, torch.nan)  # no distribution over these tokens
        u = x - row_max[self.row]
        rest = reduced(torch.where(self.is_label, 0.0, u.exp()), "sum", 0.0)
        label = reduced(torch.where(self.is_label & self.real, u, 0.0), "sum", 0.0)
        return SupportRows(row_max, rest, label)

    def scaled(self, values: Tensor, scaling: RowScaling) -> tuple[Tensor, Tensor]:
        """`x` `[K]`, float64, of the logits `values`, and its derivative by them."""
        temperature, softcap, logit_scale = scaling.values
        slope = torch.full_like(values, logit_scale / temperature, dtype=torch.float64)
        if scaling.temperature is not None:
            slope = slope / scaling.temperature.double()[self.row]
        values = values.double()
        if not softcap:
            return values * slope, slope
        tanh = torch.tanh(values * (logit_scale / softcap))
        # An infinite logit stays infinite: -inf forbids a token, +inf makes its row NaN.
        x = torch.where(values.isinf(), values, tanh * (softcap / logit_scale) * slope)
        return x, slope * (1 - tanh * tanh)

    def gradient(
        self, values: Tensor, scaling: RowScaling, params: Tensor, saved: Tensor, full: Tensor,
        sparse: Tensor | None, dense: DenseGradients,
    ) -> Tensor:  # fmt: skip
        """The gradient `[K]`, float64, by the logits `values`: `sparse` `[N]` is the upstream one of the log-prob over
        the support, `dense` those of the full vocabulary, whose state is `saved` `[3, N]` and log-prob `full`."""
        x, slope = self.scaled(values, scaling)
        total = torch.zeros_like(x)
        if sparse is not None:
            rows = self.sums(x)
            p, others = (x - rows.row_max[self.row]).exp() / rows.total[self.row], rows.rest / rows.total
            total = total + sparse.double()[self.row] * torch.where(self.is_label, others[self.row], -p)
        if any(grad is not None for grad in dense):
            row_max, rest, weighted = saved.double()
            mean, x_max = weighted / (1 + rest), row_max * row_scale(params, scaling.temperature)
            u = x - x_max[self.row]
            p = u.exp() / (1 + rest)[self.row]
            others = -full.double().expm1()  # 1 - p_y, uncancelled
            logprob, entropy, logsumexp = (
                torch.zeros_like(x) if grad is None else grad.double()[self.row] for grad in dense
            )
            total = total + logprob * torch.where(self.is_label, others[self.row], -p)
            total = total + torch.where(p == 0, 0.0, p * (logsumexp + entropy * (mean[self.row] - u)))
        return torch.where(torch.isneginf(x), 0.0, total * slope)

    def overwrite(self, grad_rows: Tensor, gradient: Tensor, start: int = 0) -> None:
        """Write the entries of cut rows; the others get what they hold."""
        if not grad_rows.shape[-1]:
            return
        place, here = self.place(grad_rows, start)
        held = grad_rows[place]
        grad_rows.index_put_(place, torch.where(here & self.cut[self.row], gradient.to(held.dtype), held))


def support_statistics(
    backend_operators: Any,
    rows: Tensor,
    kept: KeptTokens,
    scaling: RowScaling,
    params: Tensor,
    ignore_index: int,
    shard: VocabShard | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob over the support, entropy, logsumexp and log-prob over the full vocabulary, `[N]` each, of
    `[outer, inner, V]`; differentiable in `rows`."""
    return _SupportStats.apply(rows, backend_operators, kept, scaling, params, ignore_index, shard, inplace)


class _SupportStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        backend_operators: Any,
        kept: KeptTokens,
        scaling: RowScaling,
        params: Tensor,
        ignore_index: int,
        shard: VocabShard | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, labels = kept.gather(rows, shard), kept.labels
        arguments = (rows, labels, scaling.temperature, params, ignore_index)
        if shard is None:
            full, entropy, logsumexp, saved = backend_operators.stats_forward(*arguments)
        else:
            (full, entropy, logsumexp), labels, saved = sharded_state(*arguments, shard, backend_operators)
            ignore_index = LOCAL_IGNORE_INDEX
        over_support = kept.sums(kept.scaled(values, scaling)[0]).logprob().to(full.dtype)
        # Without a distribution over the full vocabulary, there is none over a part of it.
        logprob = torch.where(kept.cut, over_support + 0 * logsumexp, full)
        logprob = logprob.masked_fill(kept.invalid, torch.nan)
        ctx.save_for_backward(rows, labels, params, saved, values, full, logprob.isnan())
        ctx.operators, ctx.kept, ctx.scaling, ctx.shard = backend_operators, kept, scaling, shard
        ctx.ignore_index, ctx.inplace, ctx.used = ignore_index, inplace, False
        ctx.set_materialize_grads(False)
        return logprob, entropy, logsumexp, full

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a loss over a sampling support")
        if ctx.used:
            raise RuntimeError("a second backward through token_stats(inplace_backward=True): the logits are gone")
        if all(grad is None for grad in grads):
            return (None,) * 8
        sparse, entropy, logsumexp, full_grad = map(contiguous, grads)
        rows, labels, params, saved, values, full, nothing = ctx.saved_tensors
        kept = ctx.kept
        logprob = full_grad
        if sparse is not None:  # a row that was not cut is dense; one without a distribution is NaN as a whole
            logprob = torch.where(kept.cut, 0.0, sparse).masked_fill(nothing, torch.nan)
            logprob = logprob if full_grad is None else logprob + full_grad
        arguments = (labels, ctx.scaling.temperature, params, ctx.ignore_index)
        upstream = (logprob, entropy, logsumexp)
        if ctx.inplace:
            ctx.used, grad_rows = True, rows.detach()
            ctx.operators.stats_backward_(grad_rows, *arguments, None, 0, saved, *upstream, grad_rows)
            torch.autograd.graph.increment_version(grad_rows)
        else:
            grad_rows = ctx.operators.stats_backward(rows, *arguments, saved, *upstream)
        dense = DenseGradients(full_grad, entropy, logsumexp)
        gradient = kept.gradient(values, ctx.scaling, params, saved, full, sparse, dense)
        kept.overwrite(grad_rows, gradient, 0 if ctx.shard is None else ctx.shard.start)
        return (grad_rows,) + (None,) * 7
