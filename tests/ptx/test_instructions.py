"""Every instruction against what the PTX ISA document says of it, computed in another way: exact fractions, Python's
integers, NumPy in float64."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.ptx import isa, native

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
if native.why_not() is None:
    from tests.ptx.isa import SECTIONS, UnknownInstruction
    from tests.ptx.snippets import apply, snippet
    from tests.ptx.source import ParseError, parse

NAN, INF = math.nan, math.inf
RNG = np.random.default_rng(7)
SPECIAL = np.float32([0, -0.0, 1, -1, 0.5, 3e38, -3e38, 1e-40, -1e-40, 1e-45, INF, -INF, NAN, 2.0**-126, 1.5, 2.5])


def pairs(count: int, dtype=np.float32) -> list[np.ndarray]:
    """`count` arrays: every combination of special values, and random ones of many sizes."""
    grids = np.meshgrid(*[SPECIAL] * min(count, 2))
    random = [RNG.standard_normal(400) * 10.0 ** RNG.integers(-6, 7, 400) for _ in range(count)]
    arrays = [np.concatenate([grid.ravel(), extra]).astype(dtype) for grid, extra in zip(grids, random, strict=False)]
    if count == 3:
        arrays.append(np.concatenate([RNG.choice(SPECIAL, grids[0].size), random[2]]).astype(dtype))
    return arrays


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal bits, and any NaN for NaN."""
    expected = np.asarray(expected, actual.dtype)
    nan = np.isnan(expected) if expected.dtype.kind == "f" else np.zeros(len(expected), bool)
    if expected.dtype.kind == "f":
        assert np.array_equal(np.isnan(actual), nan)
    bits = f"u{actual.dtype.itemsize}"
    wrong = np.flatnonzero((actual.view(bits) != expected.view(bits)) & ~nan)
    assert not len(wrong), [(int(k), actual[k], expected[k]) for k in wrong[:5]]


def rounded(exact: Fraction, mode: str, zero: float = 0.0) -> np.float32:
    """An exact number in float32: to nearest even (rn), down (rm), up (rp) or toward zero (rz)."""
    if exact == 0:
        return np.float32(zero)
    exponent = max(math.floor(math.log2(abs(exact))) if abs(exact) > Fraction(1, 1 << 1000) else -1000, -126)
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    below = math.floor(exact / unit)
    rest = exact / unit - below
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2), "rm": False, "rp": rest > 0}
    number = (below + (up[mode] if mode != "rz" else (rest > 0 and exact < 0))) * unit
    if abs(number) >= Fraction(2) ** 128:
        largest = np.finfo(np.float32).max
        finite = mode == "rz" or (mode == "rm" and exact > 0) or (mode == "rp" and exact < 0)
        return np.float32(math.copysign(largest if finite else INF, exact))
    return np.float32(math.copysign(float(number), exact))


def fused(a, b, c, mode: str) -> np.ndarray:
    out = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        if not all(map(math.isfinite, (x, y, z))):
            out.append(np.float32(x * y + z))  # the product is exact in float64
            continue
        negative = (math.copysign(1, x) < 0) != (math.copysign(1, y) < 0)
        both_negative = negative and math.copysign(1, z) < 0  # zeros of one sign keep it
        both_positive = not negative and math.copysign(1, z) > 0
        zero = -0.0 if both_negative or (mode == "rm" and not both_positive) else 0.0
        out.append(rounded(Fraction(x) * Fraction(y) + Fraction(z), mode, zero))
    return np.array(out, np.float32)


# ---- floating point --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rn", "rm", "rp", "rz"])
def test_a_fused_multiply_add_rounds_once(mode):
    a, b, c = pairs(3)
    near = np.float32(RNG.standard_normal(300))
    a, b = np.concatenate([a, near]), np.concatenate([b, near[::-1]])
    c = np.concatenate([c, -(near * near[::-1])])  # what is left is the rounding of the product
    same(apply(f"fma.{mode}.f32", "f32 f32 f32 f32", a, b, c), fused(a, b, c, mode))


def test_a_fused_multiply_add_of_float64_rounds_once():
    a, b = RNG.standard_normal(200), RNG.standard_normal(200)
    c = -(a * b)
    expected = [float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert np.count_nonzero(expected) > 100
    same(apply("fma.rn.f64", "f64 f64 f64 f64", a, b, c), np.array(expected))


@pytest.mark.parametrize("type_", ["f32", "f64"])
@pytest.mark.parametrize(("name", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_sums_and_products(name, function, type_):
    a, b = pairs(2, np.float32 if type_ == "f32" else np.float64)
    with np.errstate(all="ignore"):
        expected = function(a, b)
    same(apply(f"{name}.{type_}", f"{type_} {type_} {type_}", a, b), expected)
    same(apply(f"{name}.rn.{type_}", f"{type_} {type_} {type_}", a, b), expected)


@pytest.mark.parametrize("mode", ["rm", "rp", "rz"])
def test_sums_and_products_in_another_rounding(mode):
    a, b = (x[np.isfinite(x)] for x in pairs(2))
    a, b = a[: min(len(a), len(b))], b[: min(len(a), len(b))]
    ones, zeros = np.ones_like(a), np.full_like(a, -0.0)
    same(apply(f"add.{mode}.f32", "f32 f32 f32", a, b), fused(a, ones, b, mode))
    same(apply(f"sub.{mode}.f32", "f32 f32 f32", a, b), fused(a, ones, -b, mode))
    same(apply(f"mul.{mode}.f32", "f32 f32 f32", a, b), fused(a, b, zeros, mode))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma"])
def test_packed_arithmetic_is_two_float32_operations(name):
    """sm_100: f32x2."""
    count = 3 if name == "fma" else 2
    low, high = pairs(count), [x[::-1] for x in pairs(count)]
    packed = [np.stack([x, y], 1).ravel().view(np.uint64) for x, y in zip(low, high, strict=True)]
    types = " ".join(["b64"] * (count + 1))
    actual = apply(f"{name}.rn.f32x2", types, *packed).view(np.float32).reshape(-1, 2)
    single = f"{name}.rn.f32"
    for half, inputs in enumerate((low, high)):
        same(np.ascontiguousarray(actual[:, half]), apply(single, " ".join(["f32"] * (count + 1)), *inputs))


def test_mixed_precision_widens_the_first_operand():
    """sm_100: sub.f32.bf16."""
    a, b = pairs(2)
    wide = a.view(np.uint32) & np.uint32(0xFFFF0000)
    narrow = (wide >> np.uint32(16)).astype(np.uint16)
    with np.errstate(all="ignore"):
        same(apply("sub.rn.f32.bf16", "f32 b16 f32", narrow, b), wide.view(np.float32) - b)
        same(apply("add.f32.bf16", "f32 b16 f32", narrow, b), wide.view(np.float32) + b)
        half = np.float16(a)
        same(apply("sub.rn.f32.f16", "f32 b16 f32", half.view(np.uint16), b), half.astype(np.float32) - b)


def test_division_and_reciprocal_are_correctly_rounded():
    a, b = pairs(2)
    with np.errstate(all="ignore"):
        same(apply("div.rn.f32", "f32 f32 f32", a, b), a / b)
        same(apply("rcp.rn.f32", "f32 f32", a), np.float32(1) / a)
        x, y = a.astype(np.float64), b.astype(np.float64)
        same(apply("div.rn.f64", "f64 f64 f64", x, y), x / y)
        same(apply("rcp.rn.f64", "f64 f64", x), 1 / x)
        same(apply("sqrt.rn.f32", "f32 f32", a), np.sqrt(a))
        same(apply("sqrt.rn.f64", "f64 f64", x), np.sqrt(x))


def ordered_bits(x: np.ndarray) -> np.ndarray:
    """Consecutive integers for consecutive float32 numbers."""
    bits = x.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


APPROXIMATE = {  # opcode: exact function, domain, largest error in units in the last place
    "ex2.approx.f32": (np.exp2, (-140, 127), 2),
    "ex2.approx.ftz.f32": (np.exp2, (-120, 127), 2),
    "rcp.approx.f32": (lambda x: 1 / x, (1e-3, 1e30), 1),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, (-1e30, -1e-3), 1),
    "sqrt.approx.f32": (np.sqrt, (0.1, 1e30), 1),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), (0.1, 1e30), 2),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_instructions_err_by_all_that_they_may(opcode):
    function, (low, high), ulps = APPROXIMATE[opcode]
    x = np.float32(RNG.uniform(low, high, 2000))
    actual, exact = apply(opcode, "f32 f32", x), function(x.astype(np.float64))
    error = ordered_bits(actual) - ordered_bits(exact.astype(np.float32))
    assert set(error) == {-ulps, ulps}  # both ways, and never less
    assert np.array_equal(actual, apply(opcode, "f32 f32", x)), "an operand always gives the same result"


@pytest.mark.parametrize("opcode", ["div.full.f32", "div.approx.f32"])
def test_approximate_divisions(opcode):
    a, b = np.float32(RNG.uniform(-10, 10, 1000)), np.float32(RNG.uniform(0.1, 1e20, 1000))
    error = ordered_bits(apply(opcode, "f32 f32 f32", a, b)) - ordered_bits(np.float32(a.astype(float) / b))
    assert set(error) == {-2, 2}
    huge = apply("div.approx.f32", "f32 f32 f32", np.float32([1, INF]), np.float32([1e38, 1e38]))
    assert huge[0] == 0 and np.isnan(huge[1])


def test_logarithm_and_hyperbolic_tangent():
    x = np.float32(np.concatenate([RNG.uniform(0.51, 1.99, 1000), RNG.uniform(2, 1e30, 1000)]))
    exact = np.log2(x.astype(np.float64))
    bound = np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact))
    error = np.abs(apply("lg2.approx.f32", "f32 f32", x) - exact)
    assert (error <= bound).all() and (error >= bound / 2)[np.abs(exact) > 0.1].all()
    x = np.float32(RNG.uniform(-3, 3, 1000))
    error = np.abs(apply("tanh.approx.f32", "f32 f32", x) / np.tanh(x.astype(np.float64)) - 1)
    assert (error <= 2.0**-11).all() and np.median(error) > 2.0**-12


def test_special_values_of_approximate_instructions():
    x = np.float32([-INF, -0.0, 0, INF, NAN])
    same(apply("ex2.approx.ftz.f32", "f32 f32", x), np.float32([0, 1, 1, INF, NAN]))
    same(apply("rcp.approx.ftz.f32", "f32 f32", x), np.float32([-0.0, -INF, INF, 0, NAN]))
    same(apply("lg2.approx.f32", "f32 f32", x), np.float32([NAN, -INF, -INF, INF, NAN]))
    same(apply("tanh.approx.f32", "f32 f32", x), np.float32([-1, -0.0, 0, 1, NAN]))
    same(apply("sqrt.approx.f32", "f32 f32", x), np.float32([NAN, -0.0, 0, INF, NAN]))


def test_the_gross_reciprocal_sees_and_gives_upper_words():
    x = np.concatenate([RNG.uniform(0.1, 1e6, 500), -RNG.uniform(0.1, 1e6, 500)])
    actual = apply("rcp.approx.ftz.f64", "f64 f64", x)
    assert (actual.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0).all()
    error = np.abs(actual * x - 1)
    assert (error < 2.0**-18).all() and error.max() > 2.0**-22
    special = apply("rcp.approx.ftz.f64", "f64 f64", np.array([0, -0.0, INF, -INF, 1e-310, NAN]))
    same(special, np.array([INF, -INF, 0, -0.0, INF, NAN]))


def test_flushing_takes_subnormals_for_zeros():
    small, one = np.float32([1e-40, -1e-40, 2.0**-126]), np.float32([1, 1, 1])
    same(apply("mul.ftz.f32", "f32 f32 f32", small, one), np.float32([0, -0.0, 2.0**-126]))
    same(apply("mul.f32", "f32 f32 f32", small, one), small)
    same(apply("fma.rn.ftz.f32", "f32 f32 f32 f32", small, one, small), np.float32([0, -0.0, 2.0**-125]))
    same(apply("abs.ftz.f32", "f32 f32", small), np.float32([0, 0, 2.0**-126]))
    same(apply("ex2.approx.ftz.f32", "f32 f32", np.float32([-127, -140, -125.5]))[:2], np.float32([0, 0]))
    assert apply("ex2.approx.f32", "f32 f32", np.float32([-127]))[0] > 0


def test_saturation():
    x, zero = np.float32([-2, 0.25, 7, NAN, INF]), np.float32([0, 0, 0, 0, 0])
    same(apply("cvt.sat.f32.f32", "f32 f32", x), np.float32([0, 0.25, 1, 0, 1]))
    same(apply("add.sat.f32", "f32 f32 f32", x, zero), np.float32([0, 0.25, 1, 0, 1]))


@pytest.mark.parametrize("type_", ["f32", "f64"])
def test_minima_and_maxima(type_):
    a, b = pairs(2, np.float32 if type_ == "f32" else np.float64)
    for name, better in (("max", np.greater), ("min", np.less)):
        with np.errstate(all="ignore"):
            choice = np.where(better(a, b), a, b)
        zero = (a == 0) & (b == 0)
        first = np.signbit(b) if name == "max" else np.signbit(a)  # -0 < +0
        choice = np.where(zero, np.where(first, a, b), choice)
        number = np.where(np.isnan(a), b, np.where(np.isnan(b), a, choice))
        same(apply(f"{name}.{type_}", f"{type_} {type_} {type_}", a, b), number)
        if type_ == "f32":
            either = np.where(np.isnan(a) | np.isnan(b), np.float32(NAN), choice)
            same(apply(f"{name}.NaN.f32", "f32 f32 f32", a, b), either)


def test_minima_and_maxima_of_three():
    """sm_100. A third input that is not looked at changes numbers without a word."""
    a, b, c = (np.float32(RNG.standard_normal(300)) for _ in range(3))
    same(apply("max.f32", "f32 f32 f32 f32", a, b, c), np.maximum(np.maximum(a, b), c))
    same(apply("min.NaN.f32", "f32 f32 f32 f32", a, b, c), np.minimum(np.minimum(a, b), c))


@pytest.mark.parametrize("half", ["bf16x2", "f16x2"])
def test_packed_maxima_keep_numbers_and_bits(half):
    a, b = (RNG.integers(0, 1 << 32, 3000, dtype=np.uint64).astype(np.uint32) for _ in range(2))
    actual = apply(f"max.{half}", "b32 b32 b32", a, b)
    lowest = apply(f"min.{half}", "b32 b32 b32", a, b)
    for shift in (0, 16):
        parts = [(x >> np.uint32(shift)).astype(np.uint16) for x in (a, b, actual, lowest)]
        if half == "f16x2":
            x, y, high, low = (part.view(np.float16).astype(np.float32) for part in parts)
        else:
            x, y, high, low = ((part.astype(np.uint32) << np.uint32(16)).view(np.float32) for part in parts)
        same(high, np.fmax(x, y))
        same(low, np.fmin(x, y))


def test_signs():
    a, b = pairs(2)
    same(apply("abs.f32", "f32 f32", a), np.abs(a))
    same(apply("neg.f32", "f32 f32", a), -a)
    same(apply("copysign.f32", "f32 f32 f32", a, b), np.copysign(b, a))
    same(apply("neg.f64", "f64 f64", a.astype(np.float64)), -a.astype(np.float64))
    same(apply("abs.f64", "f64 f64", a.astype(np.float64)), np.abs(a.astype(np.float64)))
    same(apply("copysign.f64", "f64 f64 f64", a.astype(float), b.astype(float)), np.copysign(b, a).astype(float))


COMPARISONS = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
}  # fmt: skip


@pytest.mark.parametrize("type_", ["f32", "f64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_float_comparisons(name, type_):
    a, b = pairs(2, np.float32 if type_ == "f32" else np.float64)
    nan, types = np.isnan(a) | np.isnan(b), f"pred {type_} {type_}"
    expected = COMPARISONS[name](a, b)
    assert np.array_equal(apply(f"setp.{name}.{type_}", types, a, b), (expected & ~nan).astype(int))
    assert np.array_equal(apply(f"setp.{name}u.{type_}", types, a, b), (expected | nan).astype(int))
    assert np.array_equal(apply(f"setp.num.{type_}", types, a, b), (~nan).astype(int))
    assert np.array_equal(apply(f"setp.nan.{type_}", types, a, b), nan.astype(int))


def test_half_precision_comparisons():
    a, b = np.float16(RNG.integers(-3, 4, 500)), np.float16(RNG.integers(-3, 4, 500))
    a[:5] = NAN
    bits = [x.view(np.uint16) for x in (a, b)]
    assert np.array_equal(apply("setp.eq.f16", "pred b16 b16", *bits), (a == b).astype(int))
    wide = [x.astype(np.float32).view(np.uint32) >> np.uint32(16) for x in (a, b)]
    assert np.array_equal(
        apply("setp.eq.bf16", "pred b16 b16", *(x.astype(np.uint16) for x in wide)), (a == b).astype(int)
    )


@pytest.mark.parametrize(("name", "symbol"), [("and", np.logical_and), ("or", np.logical_or), ("xor", np.logical_xor)])
def test_comparisons_combine_with_a_predicate(name, symbol):
    a, b, c = (RNG.integers(0, 2, 200).astype(np.int32) for _ in range(3))
    actual = apply(f"setp.eq.{name}.s32", "pred b32 b32 pred", a, b, c)
    assert np.array_equal(actual, symbol(a == b, c).astype(int))


# ---- integers --------------------------------------------------------------------------------------------------------

WIDTHS = {"u16": 16, "s16": 16, "u32": 32, "s32": 32, "u64": 64, "s64": 64}


def integers(type_: str, count: int = 300) -> np.ndarray:
    dtype = np.dtype(f"{'u' if type_[0] == 'u' else 'i'}{WIDTHS[type_] // 8}")
    bounds = np.iinfo(dtype)
    edges = [0, 1, 2, 3, 7, 31, 32, bounds.max, bounds.max - 1, bounds.min, bounds.min + 1]
    random = RNG.integers(bounds.min, bounds.max, count, dtype=dtype, endpoint=True)
    return np.concatenate([np.array(edges, dtype), random, random >> np.array(WIDTHS[type_] // 2, dtype)])


def wrapped(values: list[int], dtype: np.dtype) -> np.ndarray:
    bits = 8 * dtype.itemsize
    return np.array([v & ((1 << bits) - 1) for v in values], f"u{dtype.itemsize}").view(dtype)


@pytest.mark.parametrize("type_", WIDTHS)
def test_integer_arithmetic_wraps(type_):
    a, b, c = integers(type_), RNG.permutation(integers(type_)), RNG.permutation(integers(type_))
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    held, dtype = f"b{WIDTHS[type_]}", a.dtype
    for opcode, function in (
        (f"add.{type_}", lambda x, y: x + y),
        (f"sub.{type_}", lambda x, y: x - y),
        (f"mul.lo.{type_}", lambda x, y: x * y),
        (f"min.{type_}", min),
        (f"max.{type_}", max),
    ):
        actual = apply(opcode, f"{held} {held} {held}", a, b).view(dtype)
        assert np.array_equal(actual, wrapped([function(x, y) for x, y, _ in triples], dtype)), opcode
    actual = apply(f"mad.lo.{type_}", f"{held} {held} {held} {held}", a, b, c).view(dtype)
    assert np.array_equal(actual, wrapped([x * y + z for x, y, z in triples], dtype))
    if type_[0] == "s":
        assert np.array_equal(
            apply(f"neg.{type_}", f"{held} {held}", a).view(dtype), wrapped([-x for x in a.tolist()], dtype)
        )
        assert np.array_equal(
            apply(f"abs.{type_}", f"{held} {held}", a).view(dtype), wrapped([abs(x) for x in a.tolist()], dtype)
        )


@pytest.mark.parametrize("type_", WIDTHS)
def test_division_is_toward_zero(type_):
    a, b = integers(type_), RNG.permutation(integers(type_))
    b = np.where(b == 0, np.array(3, b.dtype), b)
    held = f"b{WIDTHS[type_]}"
    quotients = [
        abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert np.array_equal(
        apply(f"div.{type_}", f"{held} {held} {held}", a, b).view(a.dtype), wrapped(quotients, a.dtype)
    )
    rests = [x - q * y for x, y, q in zip(a.tolist(), b.tolist(), quotients, strict=True)]
    assert np.array_equal(apply(f"rem.{type_}", f"{held} {held} {held}", a, b).view(a.dtype), wrapped(rests, a.dtype))


@pytest.mark.parametrize("type_", ["u32", "s32"])
def test_wide_and_high_products(type_):
    a, b = integers(type_), RNG.permutation(integers(type_))
    products = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    wide = np.dtype(np.uint64 if type_ == "u32" else np.int64)
    assert np.array_equal(apply(f"mul.wide.{type_}", "b64 b32 b32", a, b).view(wide), wrapped(products, wide))
    assert np.array_equal(
        apply(f"mul.hi.{type_}", "b32 b32 b32", a, b).view(a.dtype), wrapped([p >> 32 for p in products], a.dtype)
    )
    c = RNG.permutation(integers("u64"))[: len(a)].view(wide)
    sums = [p + z for p, z in zip(products, c.tolist(), strict=True)]
    assert np.array_equal(apply(f"mad.wide.{type_}", "b64 b32 b32 b64", a, b, c).view(wide), wrapped(sums, wide))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bits_and_shifts(width):
    a, b = integers(f"u{width}"), RNG.permutation(integers(f"u{width}"))
    held = f"b{width}"
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert np.array_equal(apply(f"{name}.{held}", f"{held} {held} {held}", a, b), function(a, b))
    assert np.array_equal(apply(f"not.{held}", f"{held} {held}", a), ~a)
    counts = RNG.integers(0, 80, len(a)).astype(np.uint32)
    mask = (1 << width) - 1
    left = [(x << min(s, 200)) & mask for x, s in zip(a.tolist(), counts.tolist(), strict=True)]
    assert apply(f"shl.{held}", f"{held} {held} b32", a, counts).tolist() == left
    right = [x >> s for x, s in zip(a.tolist(), counts.tolist(), strict=True)]
    assert apply(f"shr.u{width}", f"{held} {held} b32", a, counts).tolist() == right
    signed = a.view(f"i{width // 8}")
    right = [x >> s for x, s in zip(signed.tolist(), counts.tolist(), strict=True)]
    assert apply(f"shr.s{width}", f"{held} {held} b32", a, counts).view(signed.dtype).tolist() == right
    assert apply(f"shl.{held}", f"{held} {held}", a, arguments="3").tolist() == [(x << 3) & mask for x in a.tolist()]


def test_predicates_are_bits_too():
    a, b = RNG.integers(0, 2, 100).astype(np.int32), RNG.integers(0, 2, 100).astype(np.int32)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        assert np.array_equal(apply(f"{name}.pred", "pred pred pred", a, b), function(a, b))
    assert np.array_equal(apply("not.pred", "pred pred", a), 1 - a)
    assert np.array_equal(apply("mov.pred", "pred pred", a), a)


def test_fields_and_counts():
    a, start, length = integers("u32"), RNG.integers(0, 40, 611), RNG.integers(0, 40, 611)
    start, length = start[: len(a)].astype(np.uint32), length[: len(a)].astype(np.uint32)
    fields = [(x >> s) & ((1 << n) - 1) for x, s, n in zip(a.tolist(), start.tolist(), length.tolist(), strict=True)]
    assert apply("bfe.u32", "b32 b32 b32 b32", a, start, length).tolist() == fields
    b, masks = (
        a[::-1].copy(),
        [((1 << n) - 1) << s & 2**32 - 1 for s, n in zip(start.tolist(), length.tolist(), strict=True)],
    )
    inserted = [x << s & m | y & ~m for x, y, s, m in zip(a.tolist(), b.tolist(), start.tolist(), masks, strict=True)]
    assert apply("bfi.b32", "b32 b32 b32 b32 b32", a, b, start, length).tolist() == inserted
    assert apply("popc.b32", "b32 b32", a).tolist() == [x.bit_count() for x in a.tolist()]
    assert apply("brev.b32", "b32 b32", a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in a.tolist()]
    zeros = [32 - x.bit_length() if x else 2**32 - 1 for x in a.tolist()]
    assert apply("bfind.shiftamt.u32", "b32 b32", a).tolist() == zeros and 2**32 - 1 in zeros


def test_bytes_are_chosen_from_two_words():
    a = integers("u32")
    b, selectors = a[::-1].copy(), RNG.integers(0, 1 << 16, len(a)).astype(np.uint32)

    def chosen(x: int, y: int, selector: int) -> int:
        pool = (x | y << 32).to_bytes(8, "little")
        places = [selector >> 4 * k & 15 for k in range(4)]
        return int.from_bytes([(pool[p & 7] >> 7) * 255 if p & 8 else pool[p] for p in places], "little")

    expected = [chosen(x, y, s) for x, y, s in zip(a.tolist(), b.tolist(), selectors.tolist(), strict=True)]
    assert apply("prmt.b32", "b32 b32 b32 b32", a, b, selectors).tolist() == expected


@pytest.mark.parametrize("type_", WIDTHS)
@pytest.mark.parametrize("name", COMPARISONS)
def test_integer_comparisons(name, type_):
    a, b = integers(type_), RNG.permutation(integers(type_))
    b[:50] = a[:50]
    held = f"b{WIDTHS[type_]}"
    actual = apply(f"setp.{name}.{type_}", f"pred {held} {held}", a, b)
    assert np.array_equal(actual, COMPARISONS[name](a, b).astype(int))


# ---- moves and conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", ["b16", "u16", "b32", "f32", "s32", "b64", "f64", "u64"])
def test_selection(type_):
    size = int(type_[1:])
    a, b, c = integers(f"u{size}"), RNG.permutation(integers(f"u{size}")), RNG.integers(0, 2, 611).astype(np.int32)
    c = c[: len(a)]
    held = type_ if type_[0] == "f" else f"b{size}"
    actual = apply(f"selp.{type_}", f"{held} {held} {held} pred", a, b, c).view(a.dtype)
    assert np.array_equal(actual, np.where(c, a, b))


def test_moves_of_halves():
    body = """
      mov.u32 %r1, %tid.x; ld.param.u64 %q1, [p0]; mad.wide.u32 %q1, %r1, 8, %q1; ld.global.u64 %q2, [%q1];
      mov.b64 {%r2, %r3}, %q2; mov.b64 %q3, {%r3, %r2}; st.global.u64 [%q1], %q3;
      mov.b32 {%h1, %h2}, %r2; mov.b32 %r4, {%h2, %h1};
      ld.param.u64 %q4, [p1]; mad.wide.u32 %q4, %r1, 4, %q4; st.global.u32 [%q4], %r4;"""
    from tests.ptx.snippets import run

    words = RNG.integers(0, 1 << 63, 32, dtype=np.uint64)
    before, swapped = words.copy(), np.zeros(32, np.uint32)
    run(body, words, swapped)
    assert np.array_equal(words, before << np.uint64(32) | before >> np.uint64(32))
    low = before.astype(np.uint32)
    assert np.array_equal(swapped, low << np.uint32(16) | low >> np.uint32(16))


def test_conversions_between_floats():
    a = np.concatenate([pairs(2)[0], np.float32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 65520, 1e-8, 3.4e38])])
    with np.errstate(all="ignore"):
        same(apply("cvt.f64.f32", "f64 f32", a), a.astype(np.float64))
        wide = a.astype(np.float64) * (1 + 2.0**-30)
        same(apply("cvt.rn.f32.f64", "f32 f64", wide), wide.astype(np.float32))
        half = a.astype(np.float16)
        same(apply("cvt.f32.f16", "f32 b16", half.view(np.uint16)), half.astype(np.float32))
        assert np.array_equal(apply("cvt.rn.f16.f32", "b16 f32", a)[~np.isnan(a)], half.view(np.uint16)[~np.isnan(a)])
    bits = a.view(np.uint32)
    nearest = np.array([_bfloat16(int(x)) for x in bits], np.uint16)
    nearest[np.isnan(a)] = 0x7FFF
    assert np.array_equal(apply("cvt.rn.bf16.f32", "b16 f32", a), nearest)
    widened = (nearest.astype(np.uint32) << np.uint32(16)).view(np.float32)
    same(apply("cvt.f32.bf16", "f32 b16", nearest), widened)
    both = apply("cvt.rn.bf16x2.f32", "b32 f32 f32", a, a[::-1])
    assert np.array_equal(both, nearest.astype(np.uint32) << np.uint32(16) | nearest[::-1])
    finite = ~np.isnan(a) & ~np.isnan(a[::-1])
    both = apply("cvt.rn.f16x2.f32", "b32 f32 f32", a, a[::-1])
    expected = half.view(np.uint16).astype(np.uint32) << np.uint32(16) | half.view(np.uint16)[::-1]
    assert np.array_equal(both[finite], expected[finite])


def _bfloat16(bits: int) -> int:
    """The nearest bfloat16, ties to even, in integers."""
    upper, rest = bits >> 16, bits & 0xFFFF
    return (upper + (rest > 0x8000 or (rest == 0x8000 and upper & 1))) & 0xFFFF


def test_conversions_to_whole_numbers():
    a = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 2.7, 1e10, -1e10, 0.1])
    same(apply("cvt.rni.f32.f32", "f32 f32", a), np.rint(a))
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        clamped = np.clip(function(a.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int64).astype(np.int32)
        assert np.array_equal(apply(f"cvt.{mode}.s32.f32", "s32 f32", a), clamped)
    assert apply("cvt.rzi.s32.f32", "s32 f32", np.float32([NAN])).tolist() == [0]
    assert apply("cvt.rzi.s64.f32", "s64 f32", np.float32([NAN])).tolist() == [-(2**63)]
    assert apply("cvt.rzi.u32.f32", "b32 f32", np.float32([-5, 5e9])).tolist() == [0, 2**32 - 1]


def test_conversions_of_integers():
    a = integers("s32")
    same(apply("cvt.rn.f32.s32", "f32 b32", a), a.astype(np.float32))
    same(apply("cvt.rn.f32.u32", "f32 b32", a), a.view(np.uint32).astype(np.float32))
    same(apply("cvt.rn.f64.u32", "f64 b32", a), a.view(np.uint32).astype(np.float64))
    assert np.array_equal(apply("cvt.s64.s32", "s64 b32", a), a.astype(np.int64))
    assert np.array_equal(apply("cvt.u64.u32", "b64 b32", a), a.view(np.uint32).astype(np.uint64))
    wide = integers("u64")
    assert np.array_equal(apply("cvt.u32.u64", "b32 b64", wide), wide.astype(np.uint32))
    assert np.array_equal(apply("cvt.u16.u32", "b16 b32", a), a.astype(np.uint16))
    assert np.array_equal(apply("cvt.sat.s16.s32", "b16 b32", a).view(np.int16), np.clip(a, -(2**15), 2**15 - 1))


def test_a_guard_leaves_the_other_threads_alone():
    a, b = np.float32([1, 2, 3, 4]), np.int32([1, 0, 1, 0])
    from tests.ptx.snippets import run

    out = np.float32([9, 9, 9, 9])
    run(
        """mov.u32 %r1, %tid.x; ld.param.u64 %q1, [p0]; mad.wide.u32 %q1, %r1, 4, %q1; ld.global.f32 %f1, [%q1];
        ld.param.u64 %q2, [p1]; mad.wide.u32 %q2, %r1, 4, %q2; ld.global.u32 %r2, [%q2]; setp.ne.s32 %p1, %r2, 0;
        mov.f32 %f2, 0f3F000000; @%p1 add.f32 %f2, %f1, %f1; @!%p1 add.f32 %f2, %f2, %f2;
        ld.param.u64 %q3, [p2]; mad.wide.u32 %q3, %r1, 4, %q3; @%p1 st.global.f32 [%q3], %f2;""",
        a, b, out, threads=4,
    )  # fmt: skip
    assert out.tolist() == [2, 9, 6, 9]


# ---- what is not known -----------------------------------------------------------------------------------------------

UNKNOWN = [
    "frobnicate.b32 %r1, %r2;",
    "add.f32 %f1, %f2, %f3, %f4;",
    "add.s32 %r1, %r2;",
    "add.rn.ftz.f64 %d1, %d2, %d3;",
    "mul.f32x2 %q1, %q2;",
    "mul.s32 %r1, %r2, %r3;",
    "fma.f32 %f1, %f2, %f3, %f4;",
    "fma.rm.f32x2 %q1, %q2, %q3, %q4;",
    "ex2.f32 %f1, %f2;",
    "ex2.approx.f16 %h1, %h2;",
    "max.xorsign.abs.f32 %f1, %f2, %f3;",
    "max.f64 %d1, %d2, %d3, %d4;",
    "min.NaN.f64 %d1, %d2, %d3;",
    "cvt.f32.f64 %f1, %d1;",
    "cvt.rz.f16.f32 %h1, %f1;",
    "cvt.rn.relu.bf16x2.f32 %r1, %f1, %f2;",
    "cvt.s32.f32 %r1, %f1;",
    "setp.lo.f32 %p1, %f1, %f2;",
    "setp.ltu.s32 %p1, %r1, %r2;",
    "setp.eq.bf16x2 %p1, %r1, %r2;",
    "ld.global.L3::keep.u32 %r1, [%q1];",
    "ld.global.v2.u32 %r1, [%q1];",
    "ld.const.u32 %r1, [%q1];",
    "st.param.u32 [%q1], %r1;",
    "st.global.b128 [%q1], %q2;",
    "shfl.sync.bfly.b32 %r1, %r2, 1, 31;",
    "shfl.bfly.b32 %r1, %r2, 1, 31, -1;",
    "@%p1 shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;",
    "@%p1 bar.sync 0;",
    "bar.sync 0, 64;",
    "bar.red.popc.u32 %r1, 0, %p1;",
    "barrier.cluster.arrive.acquire;",
    "mbarrier.try_wait.shared::cta.b64 %p1, [%r1], %q1;",
    "mbarrier.arrive.shared::cta.b64 %q1, [%r1];",
    "cp.async.ca.shared.global [%r1], [%q1], 16;",
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], [%q1], 16, [%r3], 1;",
    "atom.global.add.f16 %h1, [%q1], %h2;",
    "atom.global.min.f32 %f1, [%q1], %f2;",
    "redux.sync.add.f32 %f1, %f2, -1;",
    "vote.sync.ballot.pred %p1, %p2, -1;",
    "mov.u32 %r1, %clock;",
    "mov.b64 %q1, {%h1, %h2, %h3, %h4};",
    "mov.u32 %r1, nowhere;",
    "bra $nowhere;",
    "add.f32 %f1, %d1, %f2;",
    "add.f64 %f1, %d1, %d2;",
    "call.uni foo;",
    "fence.proxy.tensormap::generic.release.gpu;",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_ends_the_translation_with_its_name(text):
    """Even where it would never run."""
    with pytest.raises(UnknownInstruction) as error:
        snippet(f"bra.uni $end;\n {text}\n$end:")
    assert " ".join(text.split()) in str(error.value)


def test_text_that_is_no_ptx_is_an_error():
    for body in ("what is this", ".tex .u64 image;", "ld.global.u32 %r1, [%q1 - %q2];"):
        with pytest.raises((ParseError, UnknownInstruction)):
            snippet(body)
    with pytest.raises(ParseError, match="0 kernels"):
        parse(".version 8.0\n.target sm_90\n", "missing")


def test_every_instruction_has_a_test_and_a_section():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    untested = [name for name in SECTIONS if not re.search(rf"\b{name}\b[.;{{\"]", tests)]
    assert untested == [] and all(re.match(r"9\.\d", section) for section in SECTIONS.values())
    assert isa.PIPES
