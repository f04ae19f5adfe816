"""Log-probs over the tokens that a sampler kept, around the sweeps of a backend, which run as without them.

Forward: one kernel, after that of the full vocabulary, reads the kept logits, leaves the log-prob over them, and says
which rows were cut; of a fused loss it comes before. Backward: the sweep writes the gradient of what is of the full
vocabulary (zero where that is nothing, without reading a logit), and one more kernel overwrites every kept entry by the
sum of both parts, computed in float64 from the logits that the forward left. So 16 bits are rounded once, also where
the gradient lies over the logits. A row that was not cut is the sweep's alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erc.constants import CUT_LABEL, INVALID_VALUE
from erc.ops import contiguous, refuse_double_backward, stats_dtype
from erc.parallel import LOCAL_IGNORE_INDEX, VocabShard, sharded_state
from erc.rows import RowScaling
from erc.support import SamplingSupport


class KeptRows(NamedTuple):
    """The tokens of a call beside what a sampler kept of them: arguments and results of the support's operators, of all
    tokens, for any part of the rows."""

    operators: Any
    labels: Tensor  # [N], of the whole vocabulary
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    support: SamplingSupport
    shard: VocabShard | None
    vocab_size: int  # the whole one
    values: Tensor  # [K], the kept logits
    state: Tensor  # [3, N]
    dense_labels: Tensor  # [N]

    @classmethod
    def of(
        cls, operators: Any, labels: Tensor, scaling: RowScaling, params: Tensor, ignore_index: int,
        support: SamplingSupport, shard: VocabShard | None, logits: Tensor,
    ) -> KeptRows:  # fmt: skip
        """`logits` `[*, V]` have the dtype and the local columns of the call's."""
        dtype, labels = stats_dtype(logits.dtype), labels.reshape(-1)
        return cls(
            operators,
            labels,
            scaling.temperature,
            params,
            ignore_index,
            support,
            shard,
            logits.shape[-1] if shard is None else shard.vocab_size,
            values=logits.new_empty(support.token_ids.shape, dtype=dtype),
            state=logits.new_empty((3, len(labels)), dtype=dtype),
            dense_labels=torch.empty_like(labels),
        )

    @property
    def start(self) -> int:
        return 0 if self.shard is None else self.shard.start

    def statistics_(
        self, rows: Tensor, row_index: Tensor | None, first_token: int, full: tuple[Tensor | None, ...],
        logprob: Tensor, gathered: bool = False,
    ) -> None:  # fmt: skip
        """Log-probs `[N]` over the support of some rows, whose log-prob, entropy, logsumexp and state over the full
        vocabulary are in `full`.

        Raises:
            IndexError: on the CPU, for a label that its row's support does not hold, or an id beyond the vocabulary.
        """
        try:
            self.operators.support_forward_(
                rows, self.labels, self.temperature, self.params, self.ignore_index, row_index, first_token, self.start,
                self.vocab_size, self.support.token_ids, self.support.offsets, gathered, self.values, *full, logprob,
                self.state, self.dense_labels,
            )  # fmt: skip
        except RuntimeError as error:
            if INVALID_VALUE in str(error):
                self.support.cut_rows(self.labels, self.vocab_size, self.ignore_index)
            raise

    def logprobs_(self, rows: Tensor, row_index: Tensor | None, first_token: int, logprob: Tensor) -> None:
        """The same before anything is known of the full vocabulary, as `loss_rows_` takes it: inf for a token that was
        not cut."""
        self.statistics_(rows, row_index, first_token, (None, None, None, None), logprob)

    def gather_(self, full: tuple[Tensor, ...], logprob: Tensor) -> None:
        """The same of a shard's rows, all of which went through `statistics_` for their kept logits."""
        assert self.shard is not None
        dist.all_reduce(self.values, op=dist.ReduceOp.MAX, group=self.shard.group)
        nothing = self.values.new_empty((1, len(self.labels), 0))
        self.statistics_(nothing, None, 0, full, logprob, gathered=True)

    def dense(self, grads: tuple[Tensor | None, ...], columns: int) -> tuple[Tensor, int, tuple[Tensor | None, ...]]:
        """Labels, ignored label and gradients of `stats_backward`, of those of (log-prob over the support, entropy,
        logsumexp, log-prob over the full vocabulary)."""
        logprob, entropy, logsumexp, full = grads
        labels, ignore_index = self.labels, self.ignore_index
        if full is None and logprob is not None:
            labels = self.dense_labels
        elif full is not None and logprob is not None:
            full = full + logprob.masked_fill(self.dense_labels == CUT_LABEL, 0.0)
        if self.shard is not None:
            local = self.shard.local_labels(labels, ignore_index, columns)
            labels, ignore_index = torch.where(labels == CUT_LABEL, labels, local), LOCAL_IGNORE_INDEX
        return labels, ignore_index, (logprob if full is None else full, entropy, logsumexp)

    def gradient_(
        self, row_index: Tensor | None, first_token: int, full: Tensor, saved: Tensor, grads: tuple[Tensor | None, ...],
        grad_rows: Tensor,
    ) -> None:  # fmt: skip
        """What `stats_backward` left in `grad_rows`, with the kept columns of cut rows as they should be. `full` `[N]`
        and `saved` `[3, N]` are of the full vocabulary."""
        logprob, entropy, logsumexp, logprob_full = grads
        if logprob is None:  # nothing is over the support
            return
        self.operators.support_backward_(
            self.labels, self.temperature, self.params, row_index, first_token, self.start, self.support.token_ids,
            self.support.offsets, self.values, saved, full, self.state, self.dense_labels, logprob, logprob_full,
            entropy, logsumexp, grad_rows,
        )  # fmt: skip


def support_statistics(
    operators: Any,
    rows: Tensor,
    labels: Tensor,
    scaling: RowScaling,
    params: Tensor,
    ignore_index: int,
    support: SamplingSupport,
    shard: VocabShard | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob over the support, entropy, logsumexp and log-prob over the full vocabulary, `[N]` each, of
    `[outer, inner, V]`; differentiable in `rows`."""
    if shard is not None:
        rows = rows[..., : shard.real_columns(rows.shape[-1])]
    kept = KeptRows.of(operators, labels, scaling, params, ignore_index, support, shard, rows.detach())
    return _SupportStats.apply(rows, kept, inplace)


class _SupportStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, kept: KeptRows, inplace: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (rows, kept.labels, kept.temperature, kept.params, kept.ignore_index)
        if kept.shard is None:
            full = kept.operators.stats_forward(*arguments)
        else:
            statistics, _, saved = sharded_state(*arguments, kept.shard, kept.operators)
            full = (*statistics, saved)
        logprob = torch.empty_like(full[0])
        kept.statistics_(rows, None, 0, full, logprob)
        if kept.shard is not None:
            kept.gather_(full, logprob)
        ctx.save_for_backward(rows, full[0], full[3])
        ctx.kept, ctx.inplace, ctx.used = kept, inplace, False
        ctx.set_materialize_grads(False)
        return logprob, full[1], full[2], full[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a loss over a sampling support")
        if ctx.used:
            raise RuntimeError("a second backward through token_stats(inplace_backward=True): the logits are gone")
        if all(grad is None for grad in grads):
            return None, None, None
        kept, grads = ctx.kept, tuple(map(contiguous, grads))
        rows, full, saved = ctx.saved_tensors
        labels, ignore_index, upstream = kept.dense(grads, rows.shape[-1])
        arguments = (labels, kept.temperature, kept.params, ignore_index)
        if ctx.inplace:
            ctx.used, grad_rows = True, rows.detach()
            kept.operators.stats_backward_(grad_rows, *arguments, None, 0, saved, *upstream, grad_rows)
            torch.autograd.graph.increment_version(grad_rows)
        else:
            grad_rows = kept.operators.stats_backward(rows, *arguments, saved, *upstream)
        kept.gradient_(None, 0, full, saved, grads, grad_rows)
        return grad_rows, None, None
