"""Elementary functions, by arithmetic that the interpreter, NVIDIA and AMD share."""

from __future__ import annotations

import inspect

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Below it tanh is a polynomial; above it `1 - exp(-2u)` loses nothing.
SMALL_TANH = tl.constexpr(0.55)

# Older releases of Triton divide in full, which costs six instructions more.
HAS_APPROXIMATE_DIVISION = tl.constexpr("approx" in inspect.signature(tl.fdiv).parameters)


@triton.jit
def real(value, L: tl.constexpr):
    """A scalar argument as a 0-d tensor of the statistics dtype."""
    return tl.full((), value, L.REAL)


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp for x >= 0 (Kahan)."""
    u = 1.0 + x
    rest = u - 1.0
    return tl.where(rest == 0.0, x, tl.log(u) * (x / tl.where(rest == 0.0, 1.0, rest)))


@triton.jit
def expm1(x):
    """exp(x) - 1 to a few ulp for |x| <= 80 (Kahan): an error of exp cancels in (u - 1) / log(u)."""
    u = tl.exp(x)
    log_u = tl.log(u)
    return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.where(log_u == 0.0, 1.0, log_u)))


@triton.jit
def tanh_and_slope(u):
    """tanh(u) and 1 - tanh(u)^2, each to a few ulp: no approximate tanh, and one division for both."""
    e = tl.exp2(tl.abs(u) * (-2.0 * LOG2E))
    if HAS_APPROXIMATE_DIVISION and u.dtype == tl.float32:
        inverse = tl.fdiv(tl.zeros_like(e) + 1.0, 1.0 + e, approx=True)  # 2 ulp: the divisor is in [1, 2]
    else:
        inverse = 1.0 / (1.0 + e)
    w = u * u
    if u.dtype == tl.float64:
        # Lambert's continued fraction, cut where its error is 1e-14.
        numerator = 135135.0 + w * (17325.0 + w * (378.0 + w))
        near_zero = u * (numerator / (135135.0 + w * (62370.0 + w * (3150.0 + w * 28.0))))
    else:
        # Fitted to tanh(u) / u on |u| < SMALL_TANH at the Chebyshev nodes of w: 1.2 ulp.
        p = tl.fma(w, -0.006615761201828718, 0.02131274901330471)
        p = tl.fma(w, p, -0.05391006916761398)
        p = tl.fma(w, p, 0.13333117961883545)
        p = tl.fma(w, p, -0.3333333134651184)
        near_zero = tl.fma(u * w, p, u)
    far = (1.0 - e) * inverse
    tanh = tl.where(tl.abs(u) < SMALL_TANH, near_zero, tl.where(u < 0, -far, far))
    return tanh, 4.0 * e * (inverse * inverse)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")
