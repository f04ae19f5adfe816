"""Layer 3: which tokens form a sequence, padded `[B, T]` or packed `[N]` with `cu_seqlens`, and sums over sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequence structure of `N` flattened tokens.

    Padded rows: `length` tokens for each of `N / length` sequences. Packed rows: `offsets` `[S + 1]`, sequence `i`
    holding the tokens `offsets[i]` to `offsets[i + 1] - 1`.
    """

    tokens: int
    length: int | None = None
    offsets: Tensor | None = None

    def sum(self, values: Tensor) -> Tensor:
        """`[N]` -> `[S]`, differentiable, in a fixed order."""
        if self.offsets is None:
            return values.view(-1, self.length).sum(-1)
        return torch.segment_reduce(values, "sum", offsets=self.offsets)

    def mean(self, values: Tensor, mask: Tensor) -> Tensor:
        """`[N]` -> `[S]`: the mean weighted by `mask`; 0 for a sequence without active tokens."""
        count = self.sum(mask)
        return self.sum(torch.where(mask == 0, 0.0, values * mask)) / torch.where(count == 0, 1.0, count)

    def expand(self, per_sequence: Tensor) -> Tensor:
        """`[S]` -> `[N]`: every token gets its sequence's value."""
        if self.offsets is None:
            return per_sequence.repeat_interleave(self.length)
        lengths = self.offsets.diff()
        return per_sequence.repeat_interleave(lengths, output_size=self.tokens)
