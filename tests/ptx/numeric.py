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
    for function in (saturated, shifted_left, shifted_right, to_integer, clamped):
        names[function.__name__] = function
    return names
