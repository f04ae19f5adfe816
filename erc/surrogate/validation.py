"""Checks that the frozen dataclasses of an objective share."""

from __future__ import annotations

from math import isfinite
from typing import Any


def require(condition: bool, name: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
