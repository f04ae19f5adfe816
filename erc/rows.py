"""Layer 1: the shapes that operators take."""

from __future__ import annotations

import torch
from torch import Tensor

from erc.inputs import RowScaling


def as_rows(logits: Tensor) -> Tensor:
    """`[*, V]` as `[outer, inner, V]` with a last stride of 1: a view wherever strides allow one."""
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
        ValueError: for a leaf, overlapping rows, or a layout that `as_rows` would copy.
    """
    if logits.is_leaf:
        raise ValueError("inplace_backward overwrites logits with their gradient, so logits must not be a leaf tensor")
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError("inplace_backward needs logits whose rows do not overlap, got an expanded tensor")
    if as_rows(logits).data_ptr() != logits.data_ptr():
        raise ValueError("inplace_backward needs logits whose rows are contiguous in memory")


def params_tensor(scaling: RowScaling, *numbers: float) -> Tensor:
    """Everything that may change from step to step, in the order of `erc.ops.ParamIndex`, on the CPU."""
    return torch.tensor([*scaling.values, *numbers], dtype=torch.float64, device="cpu")
