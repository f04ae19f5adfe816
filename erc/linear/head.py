"""The lm_head as a chain of chunks: checks, one GEMM for a window of logits, two for a chunk's gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.inputs import LOGITS_DTYPES, check_plain
from erc.linear.plan import RowPlan, Shape
from erc.linear.products import add_product, converts_weight, write_logits
from erc.ops import stats_dtype
from erc.parallel import Facts, ReducedRows, VocabShard
from erc.surrogate.validation import values_are_readable


class Head(NamedTuple):
    """The matrices of a call: `hidden` `[N, D]` as it came, `weight` `[V, D]` and `bias` `[V]` or None in the dtype of
    the products."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, rows: Tensor, out: Tensor) -> Tensor:
        """The logits of `rows` `[n, D]`, written to `out` `[>= n, V]`, as the `[1, n, V]` that operators take."""
        out = out[: len(rows)]
        write_logits(rows, self.weight, self.bias, out)
        return out[None]


class Buffers:
    """The memory of a plan: a window of logits, and a chunk of their gradient, which may be the same."""

    def __init__(self, plan: RowPlan, head: Head, logits_dtype: torch.dtype, gradient: bool = True) -> None:
        columns, device = len(head.weight), head.weight.device
        self._window = torch.empty(plan.window, columns, dtype=logits_dtype, device=device)
        self.gradient = self._window
        if gradient and logits_dtype != head.weight.dtype:
            self.gradient = torch.empty(plan.rows, columns, dtype=head.weight.dtype, device=device)

    def windows(self, head: Head, rows: Tensor, chunk: Chunk) -> Iterator[tuple[Tensor, Chunk, Tensor]]:
        """The chunk by windows: the logits of some of its `rows`, which they are, and where their gradient goes."""
        for start in range(0, len(rows), len(self._window)):
            part = slice(start, min(start + len(self._window), len(rows)))
            yield head.logits(rows[part], self._window), chunk.part(part), self.gradient[None, part]


class HeadGradients:
    """Gradients of a `Head`, gathered chunk by chunk; None where not needed.

    That of the weight is added to `total` where that is given, a float32 `[V, D]`, and is None here. That of the hidden
    states is summed over the ranks of a `shard`, each chunk's while the next one is computed.
    """

    def __init__(
        self,
        head: Head,
        needs: tuple[bool, bool, bool],
        several: bool,
        total: Tensor | None = None,
        shard: VocabShard | None = None,
    ) -> None:
        needs_hidden, needs_weight, needs_bias = needs
        dtype = head.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        self._shard = shard
        self._reduced: list[tuple[Tensor | slice, ReducedRows]] = []
        self.hidden = torch.zeros_like(head.hidden, dtype=wide if shard else dtype) if needs_hidden else None
        # A single product stays in its dtype; the sum of several is kept in float32.
        self.weight: Tensor | None = None
        if needs_weight and total is None:
            self.weight = torch.empty_like(head.weight, dtype=wide if several else dtype)
        self._total, self._first = (self.weight, True) if total is None else (total, False)
        self.bias = torch.zeros_like(head.bias, dtype=wide) if needs_bias and head.bias is not None else None

    def add(self, head: Head, index: Tensor | slice, rows: Tensor, grad_logits: Tensor) -> None:
        """Add the contribution of the chunk `rows = head.hidden[index]` with the gradient `[n, V]` of its logits."""
        if self.hidden is not None:
            part = grad_logits @ head.weight
            if self._shard is None:
                self.hidden[index] = part
            else:
                self._reduced.append((index, self._shard.reduce(part)))
        if self._total is not None:
            add_product(self._total, grad_logits.t(), rows, self._first)
            self._first = False
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

    def finish(self) -> None:
        """After the last chunk: without any, the gradient of the weight is 0."""
        if self.hidden is not None:
            for index, total in self._reduced:
                self.hidden[index] = total.wait()
        if self.weight is not None and self._first:
            self.weight.zero_()

    def like(self, targets: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor | None]:
        """The gradients in shape and dtype of the caller's tensors."""
        grads = zip((self.hidden, self.weight, self.bias), targets, strict=True)
        return [None if g is None or target is None else g.to(target.dtype).view(target.shape) for g, target in grads]

    def scaled(
        self,
        factor: Tensor,
        targets: tuple[Tensor, Tensor, Tensor | None],
        backend_operators: Any,
        main_grad: Tensor | None,
    ) -> list[Tensor | None]:
        """`like`, times a scalar that is read on the device; with `main_grad` that of the weight is added there."""
        for grad in (self.hidden, self.weight, self.bias):
            if grad is not None:
                rows = grad.view(1, -1, grad.shape[-1])
                backend_operators.scale_rows_(rows, factor.to(stats_dtype(grad.dtype)))
        if main_grad is not None and self.weight is not None:
            main_grad.add_(self.weight)
            self.weight = None
        return self.like(targets)


class Chunk(NamedTuple):
    """Some rows of a call: as an index into tokens, and as the two arguments by which operators know them."""

    index: Tensor | slice  # type: ignore[assignment]  # tuple.index is of no use here
    row_index: Tensor | None
    first_token: int

    def part(self, rows: slice) -> Chunk:
        """Some rows of it, counted from its first one."""
        if self.row_index is None:
            start = self.first_token
            return Chunk(slice(start + rows.start, start + rows.stop), None, start + rows.start)
        return Chunk(self.row_index[rows], self.row_index[rows], 0)


class ActiveRows(NamedTuple):
    """Which rows of a call are computed: all `count`, or those of `index`.

    `ignored` `[N]` tells which of them contribute nothing, None where none does.
    """

    count: int  # type: ignore[assignment]  # tuple.count and tuple.index are of no use here
    index: Tensor | None = None  # type: ignore[assignment]
    ignored: Tensor | None = None

    def total(self) -> int:
        """How many rows are computed."""
        return self.count if self.index is None else len(self.index)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """At most `size` rows each."""
        for start in range(0, self.total(), size):
            stop = min(start + size, self.total())
            if self.index is None:
                yield Chunk(slice(start, stop), None, start)
            else:
                yield Chunk(self.index[start:stop], self.index[start:stop], 0)

    def of(self, head: Head, chunk: Chunk) -> Tensor:
        """The chunk's hidden states in the dtype of the products; what an ignored one holds, NaN too, reaches none."""
        rows = head.hidden[chunk.index].to(head.weight.dtype)
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


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logits_dtype: torch.dtype | None,
    shard: VocabShard | None,
    facts: Facts,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> Tensor:
    """Check the head, whose arguments the caller knows by `names`; returns what later checks look at: shape, dtype and
    device of the logits that will never exist."""
    for name, tensor in zip(names, (hidden, weight, bias), strict=True):
        if tensor is None and name == names[2]:
            continue
        check_plain(name, tensor)
        assert tensor is not None
        if tensor.dtype not in LOGITS_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like {names[0]}, got {tensor.device}")
    of_hidden, of_weight, of_bias = names
    if weight.dim() != 2 or (weight.shape[0] < 1 and shard is None):
        raise ValueError(f"{of_weight} must be [V, D] with V >= 1, got shape {tuple(weight.shape)}")
    if hidden.dim() and weight.shape[1] != hidden.shape[-1] == weight.shape[0]:
        raise ValueError(f"{of_weight} must be [V, D], got shape {tuple(weight.shape)}: pass {of_weight}.t()")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{of_hidden} must be [*, {weight.shape[1]}] like {of_weight}'s columns, got shape {tuple(hidden.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"{of_bias} must be [{weight.shape[0]}] like {of_weight}'s rows, got shape {tuple(bias.shape)}"
        )
    if not _autocasts(hidden.device):
        if weight.dtype != hidden.dtype and not (weight.dtype == torch.float32 and hidden.dtype.itemsize == 2):
            raise TypeError(
                f"{of_weight} must have the dtype of {of_hidden}, {hidden.dtype}, or float32, got {weight.dtype}"
            )
        if bias is not None and bias.dtype != weight.dtype:
            raise TypeError(f"{of_bias} must have the dtype of {of_weight}, {weight.dtype}, got {bias.dtype}")
    facts.add(rows=hidden.shape[:-1].numel(), columns=weight.shape[0], dtype=product_dtype(weight))
    # The backward reduces the gradient of hidden over the ranks, or on none of them.
    facts.add(hidden_requires_grad=needs_grad(hidden)[0], has_bias=bias is not None)
    vocab_size = weight.shape[0] if shard is None else shard.vocab_size
    dtype = _checked_logits_dtype(logits_dtype, product_dtype(weight))
    return torch.empty((), dtype=dtype, device=hidden.device).expand(*hidden.shape[:-1], vocab_size)


def check_main_grad(main_grad: Tensor | None, weight: Tensor) -> None:
    if main_grad is None:
        return
    if not isinstance(main_grad, Tensor):
        raise TypeError(f"main_grad must be a torch.Tensor or None, got {type(main_grad).__name__}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if main_grad.dtype != dtype or main_grad.requires_grad:
        raise TypeError(f"main_grad must be {dtype} and not require grad, got {main_grad.dtype}")
    if main_grad.numel() and 1 not in main_grad.stride():
        raise ValueError(f"main_grad must be without gaps along its rows or columns, got strides {main_grad.stride()}")
    if main_grad.shape != weight.shape or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad must be {list(weight.shape)} on {weight.device} like weight, got {list(main_grad.shape)} on "
            f"{main_grad.device}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("main_grad must be None where weight does not require grad")


class AddedToMainGrad(torch.autograd.Function):
    """A weight whose gradient, made by autograd, is added to a tensor instead of being returned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


def _checked_logits_dtype(logits_dtype: torch.dtype | None, operands: torch.dtype) -> torch.dtype:
    wide = torch.promote_types(operands, torch.float32)
    if logits_dtype is None:
        return wide
    if logits_dtype not in (operands, wide):
        choices = " or ".join(dict.fromkeys(map(str, (wide, operands))))
        raise ValueError(f"logits_dtype must be None or {choices} for a head of {operands}, got {logits_dtype!r}")
    return logits_dtype


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the operands of the products: autocast's, or the weight's."""
    return torch.get_autocast_dtype(weight.device.type) if _autocasts(weight.device) else weight.dtype


def _autocasts(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Around products whose operands have their dtype already."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def narrowest_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which a gradient is rounded for the last time."""
    operands = product_dtype(weight)
    return hidden.dtype if hidden.dtype.itemsize < operands.itemsize else operands


def cast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    return Head(flat, weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


def shape_of(head: Head, active: ActiveRows, logits_dtype: torch.dtype, columns: int | None = None) -> Shape:
    """What a plan needs to know; `columns` where shards must agree on more than their own."""
    columns = len(head.weight) if columns is None else columns
    weight = head.weight
    converts = converts_weight(weight.device, weight.dtype, logits_dtype)
    return Shape(active.total(), weight.shape[1], columns, weight.dtype.itemsize, logits_dtype.itemsize, converts)


def needs_grad(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[bool, bool, bool]:
    def needs(tensor: Tensor | None) -> bool:
        return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad

    return needs(hidden), needs(weight), needs(bias)
