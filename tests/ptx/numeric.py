"""What the code of a basic block calls: NumPy's types under PTX's names, `lanes.c`, and a few functions in NumPy."""

from __future__ import annotations

import numpy as np

from tests.ptx.native import lanes

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "b64": np.uint64,
    "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip

# Generic addresses: global memory lies where it lies, the windows of shared and local memory above it.
SHARED_WINDOW = np.uint64(1 << 60)
LOCAL_WINDOW = np.uint64(1 << 61)


def saturated(x):
    """`.sat`: to [0, 1], NaN to +0."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)) + x.dtype.type(0)


def shifted_left(x, count, width: int):
    """A shift by more than the width is one by the width."""
    shift = np.minimum(count, width - 1).astype(x.dtype)
    return np.where(count >= width, x.dtype.type(0), x << shift)


def shifted_right(x, count, width: int):
    shift = np.minimum(count, width - 1).astype(x.dtype)
    rest = x >> x.dtype.type(width - 1) if x.dtype.kind == "i" else x.dtype.type(0)
    return np.where(count >= width, rest, x >> shift)


def reversed_bits(x):
    """brev of 32 bits."""
    bits = np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    return np.packbits(bits[:, ::-1], axis=1, bitorder="little").view(np.uint32).reshape(np.shape(x))


def leading_zeros(x):
    """bfind.shiftamt of 32 bits: how far the highest bit must be shifted; all ones where there is none."""
    highest = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, 0xFFFFFFFF, 32 - highest).astype(np.uint32)


def permuted(a, b, selector):
    """prmt: four bytes of the eight of (a, b), or eight copies of one's sign where its selector has the highest bit."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint32(0)
    for place in range(4):
        choice = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * place) & np.uint64(15)
        byte = (both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)).astype(np.uint32)
        byte = np.where(choice & np.uint64(8), np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * place)
    return out


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x, dtype, rounding: str):
    """cvt of a float to an integer: rounded, clamped to the range, NaN as the document says for the two types."""
    bounds = np.iinfo(dtype)
    whole = _ROUND[rounding](x)
    inside = np.where((whole >= float(bounds.min)) & (whole < float(bounds.max)), whole, 0).astype(dtype)
    clamped = np.where(
        whole >= float(bounds.max), dtype(bounds.max), np.where(whole < float(bounds.min), dtype(bounds.min), inside)
    )
    wide = x.dtype == np.float64 or bounds.bits == 64
    nan = dtype(0) if not wide else dtype(bounds.min if bounds.min < 0 else 1 << (bounds.bits - 1))
    return np.where(np.isnan(x), nan, clamped)


def clamped(x, dtype):
    """cvt.sat of integers."""
    bounds, own = np.iinfo(dtype), np.iinfo(x.dtype)
    low, high = max(bounds.min, own.min), min(bounds.max, own.max)
    return np.clip(x, x.dtype.type(low), x.dtype.type(high)).astype(dtype)


def namespace() -> dict:
    """The globals of generated code."""
    native = lanes()
    names = {name: getattr(native, name) for name in dir(native) if not name.startswith("_")}
    names |= {name.upper(): dtype for name, dtype in DTYPES.items()}
    names |= {
        "np": np, "ONE": np.float32(1), "ONE64": np.float64(1), "MINUS_ZERO": np.float32(-0.0),
        "SHARED_WINDOW": SHARED_WINDOW, "LOCAL_WINDOW": LOCAL_WINDOW,
    }  # fmt: skip
    functions = (saturated, shifted_left, shifted_right, reversed_bits, leading_zeros, permuted, to_integer, clamped)
    for function in functions:
        names[function.__name__] = function
    return names
