"""What checks share: of the frozen dataclasses of an objective, and of values."""

from __future__ import annotations

import warnings
from math import isfinite
from typing import Any, TypeGuard

import torch
from torch import Tensor


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def check_band(part: Any, low: str, high: str) -> None:
    """The fields `low` and `high` of `part` are widths: the band is `(1 - low, 1 + high)`.

    Bounds in their place (0.8 and 1.2 for 0.2 and 0.2) are refused where they make no band, and warned of where they
    make one that hardly anybody means.
    """
    widths = getattr(part, low), getattr(part, high)
    for name, width in zip((low, high), widths, strict=True):
        require(is_number(width) and width >= 0, name, "a finite number >= 0", width)
    below, above = min(widths), max(widths)
    advice = f"{low} and {high} are widths around 1"
    if 0.5 < below < 1 < above < 2:
        advice += f": for {below:g} to {above:g} write {type(part).__name__}({1 - below:.6g}, {above - 1:.6g})"
        if widths[0] < 1:
            band = f"{1 - widths[0]:.6g} to {1 + widths[1]:.6g}"
            warnings.warn(f"{advice}; as given, the band is {band}", UserWarning, stacklevel=4)
    if widths[0] > 1:
        raise ValueError(f"{low} must be at most 1, got {widths[0]!r}; {advice}")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(tensor)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
