"""What a caller may pass, argument by argument. Nothing here reads a value of a GPU tensor.

Values of CPU tensors are checked by the operators as they read them; where one of them finds something,
`explain_invalid_values` says what it was.
"""

from __future__ import annotations

from math import isfinite
from numbers import Real

import torch
from torch import Tensor

from erc.constants import ABSENT_LABEL, CUT_LABEL
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective as preset
from erc.surrogate.validation import values_are_readable

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
EXACT_DTYPES = (torch.float32, torch.float64)


def check_plain(name: str, tensor: Tensor | None) -> None:
    """Refuse what is no one strided tensor, and say how to pass what it holds."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: pass {name}.to_local() with vocab_shard= where it is sharded by vocabulary, "
            f"else {name}.full_tensor()"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass {name}.values() as packed rows, with cu_seqlens={name}.offsets()"
        )


def check_logits(logits: Tensor, name: str = "logits") -> None:
    check_plain(name, logits)
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [*, V] with V >= 1, got shape {tuple(logits.shape)}")


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Refuse a graph that the loss would silently drop."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: the loss treats it as a constant; pass {name}.detach()")


def row_tensor(name: str, tensor: Tensor, leading: tuple[int, ...], device: torch.device) -> Tensor:
    """A per-row argument as `[*]`, or an error that names it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like logits, got {tensor.device}")
    if tensor.shape != leading:
        raise ValueError(f"{name} must have shape {tuple(leading)}, one value per row, got {tuple(tensor.shape)}")
    return tensor


def constant_rows(
    name: str, tensor: Tensor | None, leading: tuple[int, ...], device: torch.device, *, exact: bool = True
) -> Tensor | None:
    """A per-token constant as operators take it: contiguous. `exact`: a log-prob or an entropy, which 16 bits ruin."""
    if tensor is None:
        return None
    row_tensor(name, tensor, leading, device)
    if tensor.requires_grad:
        check_constant(name, tensor)
    if exact and tensor.dtype not in EXACT_DTYPES:
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}: "
            "rounded to 16 bits it cannot decide a ratio of 1.05"
        )
    return tensor.contiguous()


def label_rows(labels: Tensor, leading: tuple[int, ...], device: torch.device, ignore_index: int) -> Tensor:
    """Labels as operators take them: contiguous integers."""
    row_tensor("labels", labels, leading, device)
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype}")
    if not isinstance(ignore_index, int) or not CUT_LABEL < ignore_index < -ABSENT_LABEL:
        raise ValueError(f"ignore_index must be an int64 other than its smallest, got {ignore_index!r}")
    return labels.contiguous()


def check_label_values(labels: Tensor, vocab_size: int, ignore_index: int, mask: Tensor | None = None) -> None:
    """Raises IndexError for a label outside `[0, vocab_size)` of a row that is read (CPU; on a GPU the row is NaN)."""
    if not values_are_readable(labels):
        return
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if mask is not None:
        bad &= mask.view(labels.shape) != 0
    if bool(bad.any()):
        where = _position(bad)
        raise IndexError(
            f"labels must lie in [0, {vocab_size}) or equal ignore_index={ignore_index}, "
            f"got {int(labels[where])} at position {where}"
        )


def _position(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in bad.nonzero()[0])


def check_token_values(
    leading: tuple[int, ...],
    vocab_size: int,
    ignore_index: int,
    labels: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    normalizers: dict[str, Tensor | float | None],
    statistics: dict[str, Tensor | None],
) -> None:
    """Raises where an active token has a value that no loss is defined for, naming argument, value and position.

    The CPU's token table finds that there is one in the pass that reads them; this says which.
    """
    if not values_are_readable(labels):
        return
    active = labels.view(leading) != ignore_index
    if mask is not None:
        bad = active & ~(mask.isfinite() & (mask >= 0))
        if bool(bad.any()):
            where = _position(bad)
            raise ValueError(f"mask must be finite and >= 0: it weighs tokens; got {float(mask[where])} at {where}")
        active = active & (mask != 0)
    check_label_values(labels.view(leading), vocab_size, ignore_index, mask)
    if advantages.shape == leading:
        bad = active & ~advantages.isfinite()
    else:  # one per sequence; where no token is active it may be anything, but trainers do not compute it by hand
        bad = ~advantages.isfinite()
    if bool(bad.any()) and bool(active.any()):
        where = _position(bad)
        raise ValueError(f"advantages must be finite, got {float(advantages[where])} at position {where}")
    for name, values in statistics.items():
        if values is None:
            continue
        bad = active & values.isnan()
        if bool(bad.any()):
            raise ValueError(f"{name} must not be NaN where a token is active, got NaN at position {_position(bad)}")
    nll_mask = statistics.get("nll_mask")
    for name, value in normalizers.items():
        counts = active & (nll_mask != 0) if name == "nll_normalizer" and nll_mask is not None else active
        if value is not None and not float(value) > 0 and bool(counts.any()):
            raise ValueError(f"{name} must be positive where a token counts, got {float(value)}")


# ---- numbers and other things ----------------------------------------------------------------------------------------


def positive(name: str, value: float, *, or_zero: bool = False) -> float:
    """A positive finite number, or a symbolic one under torch.compile."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a positive number, got {value!r}")
    if not torch.compiler.is_compiling() and not (isfinite(value) and (value > 0 or (or_zero and value == 0))):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def scalar(name: str, value: float | Tensor | None, device: torch.device) -> tuple[float, Tensor | None]:
    """A count that is a number or a 0-d tensor: the number (-1 for none given), and the tensor, on `device`."""
    if value is None:
        return -1.0, None
    if not isinstance(value, Tensor):
        return float(positive(name, value, or_zero=True)), None
    check_constant(name, value)
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if values_are_readable(value) and not bool(value >= 0):
        raise ValueError(f"{name} must be positive, got {float(value)}")
    return -1.0, value.detach().to(device, non_blocking=True)


def resolve_objective(objective: str | Objective) -> Objective:
    if isinstance(objective, str):
        return preset(objective)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a preset name or an erc.Objective, got {type(objective).__name__}")
    return objective


def check_offsets(cu_seqlens: Tensor, tokens: int, device: torch.device) -> Tensor:
    """The offsets `[S + 1]` of packed rows, contiguous."""
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
    ):
        raise TypeError("cu_seqlens must be a 1-D int32 or int64 tensor of offsets [S + 1]")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on {device} like logits, got {cu_seqlens.device}")
    if values_are_readable(cu_seqlens):
        steps = cu_seqlens.diff()
        if len(cu_seqlens) < 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((steps < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows {tokens}, got {cu_seqlens.tolist()}")
    return cu_seqlens.contiguous()
