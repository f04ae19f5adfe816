"""Rows of logits, as operators address and scale them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from erc.constants import NUM_PARAMS, Param
from erc.inputs import check_constant, positive, row_tensor
from erc.ops import stats_dtype
from erc.surrogate.validation import values_are_readable


def as_rows(logits: Tensor) -> Tensor:
    """`[*, V]` as `[outer, inner, V]` with a last stride of 1: a view wherever strides allow one."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 3:
        return logits
    if logits.dim() == 2:
        return logits[None]
    if logits.dim() == 1:
        return logits[None, None]
    return logits.reshape(-1, logits.shape[-2], logits.shape[-1])


def check_inplace(logits: Tensor) -> None:
    """Refuse to overwrite logits that may still be needed, or that the kernel would not really overwrite.

    Raises:
        ValueError: for a leaf or a view of one, overlapping rows, or a layout that `as_rows` would copy.
    """
    base = logits._base if logits._is_view() else None
    if logits.is_leaf or (base is not None and base.is_leaf):
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


@dataclass(frozen=True)
class RowScaling:
    """`x = softcap(z * logit_scale) / temperature` for each row.

    `temperature` is `[N]` in the statistics dtype, or None where the scalar in `values` holds for every row.
    """

    values: tuple[float, float, float]
    temperature: Tensor | None

    def apply(self, logits: Tensor) -> Tensor:
        """The scaled logits of `[N, V]` rows, by plain PyTorch."""
        temperature, softcap, logit_scale = self.values
        if softcap:  # an infinite logit stays infinite: -inf forbids a token, +inf makes its row NaN
            x = torch.where(logits.isinf(), logits, softcap * torch.tanh(logits * (logit_scale / softcap)))
        else:
            x = logits if logit_scale == 1 else logits * logit_scale
        if self.temperature is not None:
            return x / self.temperature[:, None]
        return x if temperature == 1 else x / temperature


UNSCALED = RowScaling((1.0, 0.0, 1.0), None)


def row_scaling(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, leading: tuple[int, ...], like: Tensor
) -> RowScaling:
    """Check and collect the scaling of `like`, the logits. A temperature whose values are not read here makes a
    bad row NaN."""
    if softcap is None and logit_scale == 1.0 and isinstance(temperature, float) and temperature == 1.0:
        return UNSCALED
    softcap = 0.0 if softcap is None else positive("softcap", softcap)
    logit_scale = positive("logit_scale", logit_scale)
    limit = _factor_limit(like.dtype)
    constant = 1.0 if isinstance(temperature, Tensor) else positive("temperature", temperature)
    for factor in (logit_scale / constant, *((logit_scale / softcap, 1 / constant) if softcap else ())):
        if not torch.compiler.is_compiling() and not 1 / limit <= factor <= limit:
            raise ValueError(
                f"temperature, softcap and logit_scale must scale the logits by 2^-{log2(limit):.0f} to "
                f"2^{log2(limit):.0f} for {like.dtype} logits, got a factor of {factor:.3g}"
            )
    if not isinstance(temperature, Tensor):
        return RowScaling((temperature, softcap, logit_scale), None)
    check_constant("temperature", temperature)
    if temperature.dim() == 0:
        temperature = temperature.to(like.device, non_blocking=True).expand(leading)
    temperature = row_tensor("temperature", temperature, leading, like.device)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be floating point, got {temperature.dtype}")
    rows = temperature.detach().reshape(-1).to(stats_dtype(like.dtype))
    valid = (rows >= max(1.0, logit_scale) / limit) & (rows <= min(1.0, logit_scale) * limit)
    if not values_are_readable(temperature):
        rows = torch.where(valid, rows, torch.nan)
    elif not bool(valid.all()):
        bad = int((~valid).nonzero()[0])
        raise ValueError(
            f"temperature must be positive and finite in every row, and scale the logits by 2^-{log2(limit):.0f} to "
            f"2^{log2(limit):.0f} for {like.dtype} logits, got {float(temperature.reshape(-1)[bad])} at row {bad}"
        )
    return RowScaling((1.0, softcap, logit_scale), rows.contiguous())


def _factor_limit(dtype: torch.dtype) -> float:
    """What logits may be multiplied or divided by: the statistics dtype has room for its square beside a logit and an
    upstream gradient."""
    return 2.0**400 if dtype == torch.float64 else 2.0**40


# ---- the numbers of a call ------------------------------------------------------------------------------------------

_CACHE: dict[tuple[float, ...], Tensor] = {}
_CACHE_SIZE = 256


def params_tensor(numbers: tuple[float, ...]) -> Tensor:
    """`numbers`, in the order of `erc.constants.Param`, as the CPU tensor that operators read; made once for each."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")
    params = _CACHE.get(numbers)
    if params is None:
        with torch.inference_mode(False):  # autograd saves it, whichever call came first
            params = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        if type(params) is not Tensor:  # of a mode that makes its own tensors, such as fake ones
            return params
        if len(_CACHE) >= _CACHE_SIZE:
            _CACHE.clear()
        _CACHE[numbers] = params
    return params


_NO_LOSS = (0.0,) * (NUM_PARAMS - Param.RULE)


def scaling_params(scaling: RowScaling) -> Tensor:
    """The params of a call that only scales."""
    return params_tensor(scaling.values + _NO_LOSS)
