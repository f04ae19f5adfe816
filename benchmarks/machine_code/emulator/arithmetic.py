"""Floating-point arithmetic as the hardware does it, on numpy arrays: one rounding in a given direction, flushed
subnormals, fused multiply-adds."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def flush(x: F32) -> F32:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def to_odd(total: F64, error: F64) -> F64:
    """`total + error`, of which `total` is the rounded sum, with the last bit set if it is inexact: rounding that once
    more, to fewer bits, gives what a single rounding gives."""
    bits = total.view(np.int64)
    inexact = (error != 0) & (bits & 1 == 0) & np.isfinite(total) & np.isfinite(error)
    away = (error > 0) == (total > 0)
    return np.where(inexact, (bits + np.where(away, 1, -1)).view(np.float64), total)


def exact_sum(a: F64, b: F64) -> F64:
    """a + b rounded to odd."""
    total = a + b
    virtual = total - a
    return to_odd(np.atleast_1d(total), np.atleast_1d((a - (total - virtual)) + (b - virtual)))


def narrow(x: F64, mode: str = "RN") -> F32:
    """float32 of a float64 that `to_odd` made; `mode`: RN, RZ, RM (down) or RP (up)."""
    y = x.astype(np.float32)
    if mode == "RN":
        return y
    wide = y.astype(np.float64)
    too_high = (wide > x) if mode == "RM" else (np.abs(wide) > np.abs(x)) & (x > 0) if mode == "RZ" else x != x
    too_low = (wide < x) if mode == "RP" else (np.abs(wide) > np.abs(x)) & (x < 0) if mode == "RZ" else x != x
    y = np.where(too_high & np.isfinite(x), np.nextafter(y, np.float32(-np.inf)), y)
    return np.where(too_low & np.isfinite(x), np.nextafter(y, np.float32(np.inf)), y)


def fma32(a: F32, b: F32, c: F32, mode: str = "RN") -> F32:
    product = np.float64(a) * np.float64(b)  # exact: 48 bits
    return narrow(exact_sum(*np.broadcast_arrays(product, np.float64(c))), mode)


def add32(a: F32, b: F32, mode: str = "RN") -> F32:
    return narrow(exact_sum(*np.broadcast_arrays(np.float64(a), np.float64(b))), mode)


def mul32(a: F32, b: F32, mode: str = "RN") -> F32:
    return narrow(np.atleast_1d(np.float64(a) * np.float64(b)), mode)


def fma64(a: F64, b: F64, c: F64) -> F64:
    """Exact rational arithmetic, once for each different triple: float64 work of a float32 kernel is the same in every
    thread."""
    triples = np.stack(np.broadcast_arrays(*(np.atleast_1d(x) for x in (a, b, c))))
    unique, inverse = np.unique(triples, axis=1, return_inverse=True)
    return np.array([_fma(*map(float, triple)) for triple in unique.T])[inverse.reshape(-1)]


def _fma(a: float, b: float, c: float) -> float:
    plain = a * b + c
    if not np.isfinite(plain):
        return plain
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return float(exact) if exact else plain


def ex2(x: F32) -> F32:
    return flush(np.exp2(np.float64(x)).astype(np.float32))


def to_bfloat16(x: F32) -> NDArray[np.uint32]:
    """Bits, rounded to nearest even; one bit pattern for NaN."""
    bits = np.atleast_1d(x).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)


def from_bfloat16(bits: NDArray[np.uint32]) -> F32:
    return (np.atleast_1d(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_float16(x: F32) -> NDArray[np.uint32]:
    return np.atleast_1d(x).astype(np.float16).view(np.uint16).astype(np.uint32)


def from_float16(bits: NDArray[np.uint32]) -> F32:
    return np.atleast_1d(bits).astype(np.uint16).view(np.float16).astype(np.float32)
