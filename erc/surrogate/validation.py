"""What checks share: of the frozen dataclasses of an objective, and of values."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def values_are_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(tensor)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
