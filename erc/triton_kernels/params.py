"""The host side of a launch: the `params` tensor as run-time floats, and the addressing of rows.

Nothing here depends on a value in a way that compiles a kernel anew: numbers travel as float64 arguments, sizes and
strides as integers that Triton is told not to specialise, and `Layout` holds what does change the machine code.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .row_algebra import Layout, Scaling

# Position of each number in `params`; the counterpart of erc.ops.ParamIndex and csrc/common/params.h.
TEMPERATURE, SOFTCAP, LOGIT_SCALE = 0, 1, 2
LOSS = slice(3, 12)  # p0..p3, beta_low, beta_high, gate_eps, kl_coef, kl_clamp

_RUN_TIME_INTEGERS = (
    "N", "V", "inner", "stride_outer", "stride_inner", "out_stride_outer", "out_stride_inner",
    "old_stride_outer", "old_stride_inner", "ignore_index", "start", "segments", "programs",
)  # fmt: skip
_POINTERS = (
    "logits", "old_logits", "out", "labels", "temperature", "lanes", "saved", "logprob", "entropy", "logsumexp",
    "grad_logprob", "grad_entropy", "grad_logsumexp", "weight", "advantages", "old_logprob", "old_entropy",
    "ref_logprob",
    "policy_weight", "entropy_weight", "logprob_weight", "loss", "token_value", "flags", "state", "stats", "grads",
    "row_factor",
)  # fmt: skip


def kernel(function):
    """`triton.jit` for kernels whose integers and addresses never cause a new compilation."""
    return triton.jit(function, do_not_specialize=_RUN_TIME_INTEGERS, do_not_specialize_on_alignment=_POINTERS)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics computed from logits of `dtype`; as `erc.ops.stats_dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read_scaling(params: Tensor) -> Scaling:
    """x = v * scale, where a per-row temperature still divides; v = cap * tanh(z * cap_scale) under a softcap."""
    temperature, softcap, logit_scale = params[:3].tolist()
    if softcap:
        return Scaling(1.0 / temperature, softcap, logit_scale / softcap)
    return Scaling(logit_scale / temperature, 1.0, 1.0)


class Rows(NamedTuple):
    """A `[outer, inner, V]` tensor as a kernel addresses it."""

    data: Tensor
    count: int
    V: int
    inner: int
    stride_outer: int
    stride_inner: int

    def address(self) -> tuple[int, int, int]:
        return self.inner, self.stride_outer, self.stride_inner

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


def rows_of(tensor: Tensor) -> Rows:
    """Raises ValueError unless `tensor` is `[outer, inner, V]` with a last stride of 1."""
    if tensor.dim() != 3 or (tensor.shape[2] > 1 and tensor.stride(2) != 1):
        raise ValueError(
            f"logits must be [outer, inner, V] with a last stride of 1, got {tuple(tensor.shape)}, {tensor.stride()}"
        )
    outer, inner, V = tensor.shape
    return Rows(tensor, outer * inner, V, max(inner, 1), tensor.stride(0), tensor.stride(1))


def layout_of(params: Tensor, temperature: Tensor | None, *tensors: Rows) -> Layout:
    """The constexpr layout of a launch that reads or writes `tensors` together."""
    return make_layout(
        tensors[0].data.dtype,
        aligned=all(rows.aligned() for rows in tensors),
        softcap=float(params[SOFTCAP]) != 0,
        per_row=temperature is not None,
    )


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


def segment_columns(layout: Layout) -> int:
    """Columns of a segment, the unit in which programs may share a row."""
    return layout.LANES * layout.VEC * layout.LOADS * layout.TILES
