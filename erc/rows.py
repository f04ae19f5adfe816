"""Layer 1: the shapes that operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from erc.derivatives import refuse_forward_mode
from erc.inputs import RowScaling


def as_rows(logits: Tensor) -> Tensor:
    """`[*, V]` as `[outer, inner, V]` with a last stride of 1: a view wherever strides allow one."""
    refuse_forward_mode(logits)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        return logits[None, None]
    if logits.dim() == 2:
        return logits[None]
    if logits.dim() == 3:
        return logits
    return logits.reshape(-1, logits.shape[-2], logits.shape[-1])


def check_inplace(logits: Tensor) -> None:
    """Refuse to overwrite logits that somebody may still need, or that the kernel would not really overwrite.

    Raises:
        ValueError: for a leaf or a view of one, overlapping rows, or a layout that `as_rows` would copy.
    """
    if logits.is_leaf or (logits._is_view() and logits._base.is_leaf):
        raise ValueError(
            "inplace_backward overwrites logits with their gradient: logits must be neither a leaf nor a view of one"
        )
    if _may_overlap(logits):
        raise ValueError(f"inplace_backward needs logits whose rows do not overlap, got strides {logits.stride()}")
    if as_rows(logits).data_ptr() != logits.data_ptr():
        raise ValueError("inplace_backward needs logits whose rows are contiguous in memory")


def _may_overlap(tensor: Tensor) -> bool:
    """Whether two elements may share memory: expanded tensors, sliding windows."""
    span = 1  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < span:
            return True
        span += max(0, size - 1) * stride
    return False


def params_tensor(scaling: RowScaling, *numbers: float) -> Tensor:
    """Everything that may change from step to step, in the order of `erc.ops.ParamIndex`, on the CPU."""
    return torch.tensor([*scaling.values, *numbers], dtype=torch.float64, device="cpu")
