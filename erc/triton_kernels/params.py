"""The host side of a launch: the `params` tensor as run-time numbers, and the addressing of rows.

Nothing here depends on a value in a way that compiles a kernel anew: numbers travel as float64 arguments, sizes and
strides as integers that Triton is told not to specialise, and `Layout` holds what does change the machine code.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from erc.constants import Param
from erc.ops import stats_dtype

from . import tuning
from .rows import Layout, Scaling


def kernel(function):
    """`triton.jit` for kernels whose integers and addresses never cause a new compilation: they are the arguments that
    are declared as integers, and those whose names end in `_ptr`."""
    parameters = inspect.signature(function).parameters
    integers = [name for name, parameter in parameters.items() if parameter.annotation in (tl.int32, tl.int64)]
    pointers = [name for name in parameters if name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=integers, do_not_specialize_on_alignment=pointers)


def read_scaling(params: Tensor) -> Scaling:
    """x = v * scale, where a per-row temperature still divides; v = cap * tanh(z * cap_scale) under a softcap."""
    temperature, softcap, logit_scale = params[: Param.RULE].tolist()
    if softcap:
        return Scaling(1.0 / temperature, softcap, logit_scale / softcap)
    return Scaling(logit_scale / temperature, 1.0, 1.0)


class Rows(NamedTuple):
    """A `[outer, inner, V]` tensor as a kernel addresses it."""

    data: Tensor
    count: int  # type: ignore[assignment]  # of rows; tuple.count is of no use here
    V: int
    inner: int
    stride_outer: int
    stride_inner: int

    def address(self) -> tuple[int, int, int]:
        return self.inner, self.stride_outer, self.stride_inner

    def strides(self) -> tuple[int, int]:
        return self.stride_outer, self.stride_inner

    def row_bytes(self) -> int:
        return self.V * self.data.element_size()

    def aligned(self) -> bool:
        """Whether every row starts and ends at a multiple of 128 bits."""
        unit = 16 // self.data.element_size()
        sizes = (
            self.V,
            self.stride_outer if self.count > self.inner else 0,
            self.stride_inner if self.inner > 1 else 0,
        )
        return self.data.data_ptr() % 16 == 0 and all(size % unit == 0 for size in sizes)

    def per_token(self, *leading: int) -> Tensor:
        """An uninitialised `[*leading, rows]` in the statistics dtype."""
        return self.data.new_empty((*leading, self.count), dtype=stats_dtype(self.data.dtype))


def rows_of(tensor: Tensor) -> Rows:
    """Raises ValueError unless `tensor` is `[outer, inner, V]` with a last stride of 1."""
    if tensor.dim() != 3 or (tensor.shape[2] > 1 and tensor.stride(2) != 1):
        raise ValueError(
            f"logits must be [outer, inner, V] with a last stride of 1, got {tuple(tensor.shape)}, {tensor.stride()}"
        )
    outer, inner, V = tensor.shape
    return Rows(tensor, outer * inner, V, max(inner, 1), tensor.stride(0), tensor.stride(1))


def gradient_rows(logits: Rows, grad_logits: Tensor) -> Rows:
    """Raises unless a gradient of `logits` can be written there: their own memory, other memory of their dtype, or, of
    float32 logits, of a 16-bit one."""
    grad = rows_of(grad_logits)
    if (grad.count, grad.V) != (logits.count, logits.V):
        raise ValueError(
            f"grad_logits must be like the logits, {logits.count} rows of {logits.V}, got {grad.count} of {grad.V}"
        )
    dtype, own_memory = logits.data.dtype, grad.data.data_ptr() != logits.data.data_ptr()
    narrower = dtype == torch.float32 and grad.data.dtype in (torch.bfloat16, torch.float16) and own_memory
    if grad.data.dtype != dtype and not narrower:
        raise ValueError(
            "grad_logits must have the dtype of the logits, or of float32 logits a 16-bit one in memory of its own, "
            f"got {grad.data.dtype} for {dtype}"
        )
    return grad


class Selection(NamedTuple):
    """Which token each row belongs to: `row_index[row]`, or without it `first_token + row`."""

    row_index: Tensor | None = None
    first_token: int = 0


class RowInputs(NamedTuple):
    """What identifies the rows of a call and how they are read."""

    rows: Rows
    labels: Tensor | None
    temperature: Tensor | None
    params: Tensor
    ignore_index: int
    selection: Selection = Selection()

    def pointers(self) -> tuple[Tensor | None, ...]:
        """logits, labels, temperature and row index, as every row kernel takes them first."""
        return self.rows.data, self.labels, self.temperature, self.selection.row_index

    def numbers(self) -> tuple[int, ...]:
        """V, the strides, the first token and `ignore_index`."""
        return self.rows.V, *self.rows.address(), self.selection.first_token, self.ignore_index

    def layout(self, *others: Rows) -> Layout:
        """The constexpr layout of a launch that reads these rows, and reads or writes `others` with them."""
        return make_layout(
            self.rows.data.dtype,
            aligned=all(rows.aligned() for rows in (self.rows, *others)),
            softcap=float(self.params[Param.SOFTCAP]) != 0,
            per_row=self.temperature is not None,
        )


def row_inputs(
    logits: Tensor,
    labels: Tensor | None,
    temperature: Tensor | None,
    params: Tensor,
    ignore_index: int,
    row_index: Tensor | None = None,
    first_token: int = 0,
) -> RowInputs:
    """The first arguments of the row operators."""
    return RowInputs(rows_of(logits), labels, temperature, params, ignore_index, Selection(row_index, first_token))


def make_layout(dtype: torch.dtype, *, aligned: bool = True, softcap: bool = False, per_row: bool = False) -> Layout:
    vec = 16 // dtype.itemsize
    return Layout(
        LANES=tuning.LANES,
        VEC=vec,
        LOADS=tuning.LOADS,
        TILES=tuning.TILES,
        ALIGNED=aligned,
        PACKED=dtype == torch.bfloat16,
        SOFTCAP=softcap,
        PER_ROW=per_row,
        REAL=tl.float64 if dtype == torch.float64 else tl.float32,
    )


class CompiledLayout:
    """A `Layout` whose fields are constexprs. Compared and hashed by identity, at every launch, so made once each."""

    def __init__(self, layout: Layout) -> None:
        for name, value in layout._asdict().items():
            setattr(self, name, tl.constexpr(value))

    def __repr__(self) -> str:
        """Part of the key under which Triton keeps compiled kernels on disk."""
        return f"CompiledLayout({vars(self)})"


@cache
def compiled_layout(layout: Layout) -> CompiledLayout:
    """The layout for a kernel that is compiled: before Triton 3.8 the compiler takes an attribute of a constexpr for a
    plain number. The interpreter wants the plain numbers of `layout` itself."""
    return CompiledLayout(layout)


def columns_per_segment(layout: Layout) -> int:
    """Columns of a segment, the unit in which programs may share a row."""
    return layout.LANES * layout.VEC * layout.LOADS * layout.TILES
