"""Layer 2: the lm_head as a chain of chunks: checks, one GEMM for a chunk of logits, two for its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.inputs import LOGITS_DTYPES, check_plain
from erc.ops import stats_dtype
from erc.parallel import Facts, VocabShard
from erc.surrogate.validation import values_are_readable

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
        self._accumulator = torch.promote_types(head.weight.dtype, torch.float32)
        self.hidden = torch.zeros_like(head.hidden) if needs_hidden else None
        self.weight: Tensor | None = None
        self._needs_weight = needs_weight
        self.bias = torch.zeros_like(head.bias, dtype=self._accumulator) if needs_bias else None

    def add(self, head: Head, index: Tensor | slice, rows: Tensor, grad_logits: Tensor) -> None:
        """Add the contribution of the chunk `rows = head.hidden[index]` with the gradient `[n, V]` of its logits."""
        if self.hidden is not None:
            self.hidden[index] = grad_logits @ head.weight
        if self._needs_weight:
            self._add_weight(grad_logits.t(), rows)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

    def _add_weight(self, grad_logits: Tensor, rows: Tensor) -> None:
        """The first product is written, not added to zeros, and stays in its dtype unless a second one comes: then the
        sum is float32's business."""
        shape, dtype = (grad_logits.shape[0], rows.shape[1]), grad_logits.dtype
        if self.weight is None:
            self.weight = torch.empty(*shape, dtype=dtype, device=rows.device)
            torch.mm(grad_logits, rows, out=self.weight)
            return
        if self.weight.dtype != self._accumulator:
            first = self.weight
            self.weight = torch.empty(*shape, dtype=self._accumulator, device=rows.device).copy_(first)
        if dtype == self._accumulator:
            torch.addmm(self.weight, grad_logits, rows, out=self.weight)
        else:
            self.weight.add_(grad_logits @ rows)

    def finish(self, head: Head) -> None:
        """After the last chunk: without any, the gradient of the weight is 0."""
        if self._needs_weight and self.weight is None:
            self.weight = torch.zeros_like(head.weight)

    def scaled(
        self, factor: Tensor, like: tuple[Tensor, Tensor, Tensor | None], backend_operators: Any
    ) -> list[Tensor | None]:
        """The gradients times a scalar that is read on the device, in the dtypes of the caller's tensors."""
        results = []
        for grad, target in zip((self.hidden, self.weight, self.bias), like, strict=True):
            if grad is not None:
                rows = grad.view(1, -1, grad.shape[-1])
                backend_operators.scale_rows_(rows, factor.to(stats_dtype(grad.dtype)))
                grad = grad.to(target.dtype).view(target.shape)
            results.append(grad)
        return results


class Chunk(NamedTuple):
    """Some rows of a call: as an index into tokens, and as the two arguments by which operators know them."""

    index: Tensor | slice
    row_index: Tensor | None
    first_token: int


class ActiveRows(NamedTuple):
    """Which rows of a call are computed: all `count`, or those of `index`.

    `ignored` `[N]` tells which of them contribute nothing, None where none does.
    """

    count: int
    index: Tensor | None = None
    ignored: Tensor | None = None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """At most `size` rows each, and alike: products of a small remainder run slowly."""
        total = self.count if self.index is None else len(self.index)
        size = -(-total // max(1, -(-total // size)))
        for start in range(0, total, max(1, size)):
            stop = min(start + size, total)
            if self.index is None:
                yield Chunk(slice(start, stop), None, start)
            else:
                yield Chunk(self.index[start:stop], self.index[start:stop], 0)

    def of(self, hidden: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's rows of `hidden`; what an ignored one holds, NaN too, reaches no product."""
        rows = hidden[chunk.index]
        return rows if self.ignored is None else rows.masked_fill(self.ignored[chunk.index, None], 0)


def active_rows(labels: Tensor | None, count: int, ignore_index: int, num_active: int | None) -> ActiveRows:
    """The rows that are read; ignored ones cost no flops.

    On a GPU counting them would synchronise, so rows are compacted there only where the caller gives an upper bound,
    `num_active`. Surplus slots take the first ignored row, which contributes nothing however often it comes.

    Raises:
        ValueError: more rows are active than `num_active` says (on a GPU, and in compiled code, an assertion on the
            device).
    """
    if num_active is not None and (not isinstance(num_active, int) or isinstance(num_active, bool) or num_active < 0):
        raise ValueError(f"num_active must be an int >= 0 or None, got {num_active!r}")
    if labels is None:
        return ActiveRows(count)
    active = labels != ignore_index
    if values_are_readable(labels):
        found = int(active.sum())
        if num_active is not None and found > num_active:
            raise ValueError(f"num_active must be at least the number of active rows, {found}, got {num_active}")
        return ActiveRows(count, None if found == count else active.nonzero().squeeze(-1))
    return _bounded_rows(active, num_active)


def _bounded_rows(active: Tensor, num_active: int | None) -> ActiveRows:
    """`active_rows` without reading a value."""
    count = len(active)
    if num_active is None or num_active >= count:
        return ActiveRows(count, None, ~active)
    torch._assert_async(active.sum() <= num_active, "num_active is smaller than the number of active rows")
    index = torch.nonzero_static(active, size=num_active).squeeze(-1)
    return ActiveRows(count, torch.where(index < 0, active.to(torch.uint8).argmin(), index), ~active)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, shard: VocabShard | None, facts: Facts) -> Tensor:
    """Check the head; returns what later checks look at: shape, dtype and device of the logits that will never
    exist."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        check_plain(name, tensor)
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
    facts.add(rows=hidden.shape[:-1].numel(), columns=weight.shape[0], dtype=gemm_dtype(hidden))
    # The backward reduces the gradient of hidden over the ranks, or on none of them.
    facts.add(hidden_requires_grad=needs_grad(hidden)[0], has_bias=bias is not None)
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    return torch.empty((), dtype=gemm_dtype(hidden), device=hidden.device).expand(*hidden.shape[:-1], vocab_size)


def gemm_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    flat = hidden.detach().reshape(-1, hidden.shape[-1]).to(dtype)
    return Head(flat, weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


def chunk_rows(columns: int, dtype: torch.dtype, memory_budget: int | None) -> int:
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    row_bytes = max(1, columns) * dtype.itemsize
    return max(1, (memory_budget or DEFAULT_MEMORY_BUDGET) // row_bytes)


def needs_grad(*tensors: Tensor | None) -> tuple[bool, bool, bool]:
    return tuple(torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in tensors)
