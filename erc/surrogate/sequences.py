"""Which tokens form a sequence, padded `[B, T]` or packed `[N]` with `cu_seqlens`, and sums over sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequence structure of `N` flattened tokens.

    Padded rows: `length` tokens for each of `N / length` sequences. Packed rows: `offsets` `[S + 1]`, sequence `i`
    holding the tokens `offsets[i]` to `offsets[i + 1] - 1`. With `group` (context parallelism) each rank holds a part,
    maybe an empty one, of the same sequences in the same order; sums are then over the parts of all its ranks.
    """

    tokens: int
    length: int = 0
    offsets: Tensor | None = None
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        """`[N]` -> `[S]`, differentiable, in a fixed order."""
        return self._over_ranks(self._local_sum(values))

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """`[N]` -> `[S]`: the mean weighted by `mask`; 0 for a sequence without active tokens."""
        sums = self._local_sum(mask), self._local_sum((values * mask).masked_fill(mask == 0, 0.0))
        count, total = sums if self.group is None else self._over_ranks(torch.stack(sums))
        return total / count.clamp(min=torch.finfo(count.dtype).tiny)

    def total(self, values: Tensor) -> Tensor:
        """`[N]` -> a scalar: the sum over all sequences."""
        return self._over_ranks(values.sum())

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[S]` -> `[N]`: every token gets its sequence's value."""
        if self.offsets is None:
            return per_sequence[:, None].expand(-1, self.length).reshape(-1)
        lengths = self.offsets.diff()
        return per_sequence.repeat_interleave(lengths, output_size=self.tokens)

    def _local_sum(self, values: Tensor) -> Tensor:
        if self.offsets is None:
            return values.view(-1, self.length).sum(-1)
        return torch.segment_reduce(values, "sum", offsets=self.offsets)

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return sums if self.group is None else _SumOverRanks.apply(sums, self.group)


class _SumOverRanks(torch.autograd.Function):
    """The sum of every rank's values, in float64: the parts of a sequence are as good as a whole one. What the ranks
    make of it adds up to the loss, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_reduced(values, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduced(grad, ctx.group), None


def _all_reduced(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = values.to(torch.float64, copy=True).contiguous()
    dist.all_reduce(total, group=group)
    return total.to(values.dtype)
