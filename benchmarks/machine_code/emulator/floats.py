"""Floating-point instructions and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine_code.emulator import arithmetic as fp
from benchmarks.machine_code.emulator.effects import LOW_WORD, S64, U32, U64, combine, compare, effect
from benchmarks.machine_code.emulator.operands import Decoded, Operand

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Step


def _mode(i: Decoded) -> str:
    return next((mode for mode in ("RM", "RP", "RZ") if mode in i.mods), "RN")


def _finish(i: Decoded, s: Step, value: Any) -> None:
    if "FTZ" in i.mods:
        value = fp.flush(value)
    if "SAT" in i.mods:
        value = np.where(np.isnan(value), np.float32(0), np.clip(value, np.float32(0), np.float32(1)))
    i.operands[0].put_f32(s, value)


def _inputs(i: Decoded, s: Step, *at: int) -> list[Any]:
    values = [i.operands[k].f32(s) for k in at]
    return [fp.flush(value) for value in values] if "FTZ" in i.mods else values


@effect("FADD")
def _fadd(i: Decoded, s: Step) -> None:
    a, b = _inputs(i, s, 1, 2)
    _finish(i, s, fp.add32(a, b, _mode(i)) if _mode(i) != "RN" else a + b)


@effect("FMUL")
def _fmul(i: Decoded, s: Step) -> None:
    a, b = _inputs(i, s, 1, 2)
    factor = next((float(part[1:]) for part in i.parts if part[0] in "DM" and part[1:].isdigit()), 1.0)
    half = any(part[0] == "D" and part[1:].isdigit() for part in i.parts)
    value = fp.mul32(a, b, _mode(i)) if _mode(i) != "RN" else a * b
    _finish(i, s, value * np.float32(1 / factor if half else factor))


@effect("FFMA")
def _ffma(i: Decoded, s: Step) -> None:
    _finish(i, s, fp.fma32(*_inputs(i, s, 1, 2, 3), mode=_mode(i)))


def _pair(o: Operand, s: Step) -> list[Any]:
    """Two float32 of a register pair (F32x2.HI_LO), or one twice (F32)."""
    if o.kind == "immediate":
        return [o.f32(s)] * 2
    if "F32x2" not in o.suffix or o.number < 0:
        return [o.f32(s)] * 2
    return [o.f32(s), o.next(1).f32(s)]


@effect("FADD2", "FMUL2", "FFMA2")
def _packed(i: Decoded, s: Step) -> None:
    inputs = [_pair(o, s) for o in i.operands[1:]]
    function = {"FADD2": lambda a, b: a + b, "FMUL2": lambda a, b: a * b, "FFMA2": fp.fma32}[i.name]
    values = [function(*halves) for halves in zip(*inputs, strict=True)]
    for half, value in enumerate(values):
        i.operands[0].next(half).put_f32(s, np.float32(value))


def _float_minimum(a: Any, b: Any, smaller: Any, nan: bool) -> Any:
    low, high = (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)
    return np.where(smaller, low(a, b), high(a, b))


@effect("FMNMX")
def _fmnmx(i: Decoded, s: Step) -> None:
    a, b = _inputs(i, s, 1, 2)
    _finish(i, s, np.float32(_float_minimum(a, b, i.operands[-1].predicate(s), "NAN" in i.mods)))


@effect("FMNMX3")
def _fmnmx3(i: Decoded, s: Step) -> None:
    a, b, c = _inputs(i, s, 1, 2, 3)
    p, nan = i.operands[-1].predicate(s), "NAN" in i.mods
    _finish(i, s, np.float32(_float_minimum(_float_minimum(a, b, p, nan), c, p, nan)))


@effect("FSEL")
def _fsel(i: Decoded, s: Step) -> None:
    a, b = _inputs(i, s, 1, 2)
    i.operands[0].put_f32(s, np.where(i.operands[3].predicate(s), np.float32(a), np.float32(b)))


@effect("FSETP", "DSETP")
def _compare_floats(i: Decoded, s: Step) -> None:
    a, b = (o.f64(s) for o in i.operands[2:4]) if i.name == "DSETP" else _inputs(i, s, 2, 3)
    combine(i, s, np.asarray(compare(i.parts[0], np.asarray(a), np.asarray(b))), 4)


@effect("FSET")
def _float_of_comparison(i: Decoded, s: Step) -> None:
    into, a, b, p = i.operands
    held = compare(i.parts[1], np.asarray(a.f32(s)), np.asarray(b.f32(s))) & p.predicate(s)
    into.put_f32(s, np.where(held, np.float32(1), np.float32(0)))


@effect("FCHK")
def _division_needs_care(i: Decoded, s: Step) -> None:
    """Whether a / b leaves the range in which the short sequence of a division is right."""
    a, b = (np.asarray(o.f32(s)) for o in i.operands[1:3])
    exponents = [np.where((x == 0) | ~np.isfinite(x), -1000, np.frexp(x)[1]) for x in (a, b)]
    difference = exponents[0] - exponents[1]
    unusual = (exponents[0] == -1000) | (exponents[1] == -1000)
    i.operands[0].put(s, unusual | (np.abs(difference) > 120) | (exponents[0] < -100) | (np.abs(exponents[1]) > 120))


@effect("MUFU")
def _special_function(i: Decoded, s: Step) -> None:
    kind = i.parts[0]
    if kind in ("RCP64H", "RSQ64H"):  # of the upper half of a float64, to as many bits
        upper = np.atleast_1d(i.operands[1].u32(s)).astype(U64) << U64(32)
        value = 1 / upper.view(np.float64) if kind == "RCP64H" else 1 / np.sqrt(upper.view(np.float64))
        i.operands[0].put(s, value.view(U64) >> U64(32))
        return
    x = np.asarray(i.operands[1].f32(s), np.float32)
    functions: dict[str, Callable[[Any], Any]] = {
        "EX2": fp.ex2,
        "RCP": lambda x: np.float32(1 / np.float64(x)),
        "RSQ": lambda x: np.float32(1 / np.sqrt(np.float64(x))),
        "SQRT": lambda x: np.float32(np.sqrt(np.float64(x))),
        "LG2": lambda x: np.float32(np.log2(np.float64(x))),
        "TANH": lambda x: np.float32(np.tanh(np.float64(x))),
    }
    i.operands[0].put_f32(s, functions[kind](x))


def _whole(i: Decoded, x: Any) -> Any:
    functions = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc}
    return next((function for mode, function in functions.items() if mode in i.mods), np.rint)(x)


@effect("FRND")
def _round(i: Decoded, s: Step) -> None:
    i.operands[0].put_f32(s, _whole(i, i.operands[1].f32(s)))


@effect("DADD", "DMUL", "DFMA")
def _double(i: Decoded, s: Step) -> None:
    values = [np.atleast_1d(o.f64(s)) for o in i.operands[1:]]
    if i.name == "DADD":
        i.operands[0].put64(s, values[0] + values[-1])
    elif i.name == "DMUL":
        i.operands[0].put64(s, values[0] * values[1])
    else:
        i.operands[0].put64(s, fp.fma64(*values))


@effect("F2F", "F2FP")
def _convert_floats(i: Decoded, s: Step) -> None:
    if i.name == "F2F":
        into, source = i.operands
        if i.parts[-2:] == ("F64", "F32"):
            into.put64(s, np.float64(np.atleast_1d(source.f32(s))))
        elif i.parts[-2:] == ("F32", "F64"):
            into.put_f32(s, np.float32(source.f64(s)))
        else:
            raise NotImplementedError(i.line.opcode)
        return
    into, high, low = i.operands
    convert = fp.to_bfloat16 if "BF16" in i.mods else fp.to_float16
    upper, lower = (convert(np.atleast_1d(np.float32(o.f32(s)))) for o in (high, low))
    into.put(s, upper << U32(16) | lower)


@effect("I2F", "I2FP")
def _to_float(i: Decoded, s: Step) -> None:
    o = i.operands[1]
    if "U64" in i.mods or "S64" in i.mods:
        value = np.asarray(o.u64(s)) if "U64" in i.mods else np.asarray(o.u64(s)).astype(S64)
    else:
        value = np.asarray(o.u32(s) if "U32" in i.mods else o.s32(s))
    if "F64" in i.mods:
        i.operands[0].put64(s, np.atleast_1d(value.astype(np.float64)))
    else:
        i.operands[0].put_f32(s, fp.narrow(np.atleast_1d(value.astype(np.float64)), _mode(i)))


@effect("F2I", "F2IP")
def _to_integer(i: Decoded, s: Step) -> None:
    x = i.operands[1].f64(s) if "F64" in i.mods else np.float64(i.operands[1].f32(s))
    x = _whole(i, x)
    wide = "U64" in i.mods or "S64" in i.mods
    top = 2.0 ** (64 if wide else 32) if ("U32" in i.mods or "U64" in i.mods) else 2.0 ** (63 if wide else 31)
    bottom = 0.0 if ("U32" in i.mods or "U64" in i.mods) else -top
    inside = np.nan_to_num(np.clip(x, bottom, np.nextafter(top, 0)))
    value = np.atleast_1d(inside.astype(U64) if "U64" in i.mods else inside.astype(S64).astype(U64))
    i.operands[0].put64(s, value) if wide else i.operands[0].put(s, value & LOW_WORD)


def _halves(o: Operand, s: Step, bfloat16: bool) -> list[Any]:
    """A packed pair as (low, high) float32; a suffix chooses one of them twice."""
    if "F32" in o.suffix:
        return [o.f32(s)] * 2
    bits = np.asarray(o.raw(s)).astype(U32)
    convert = fp.from_bfloat16 if bfloat16 else fp.from_float16
    low, high = convert(bits & U32(0xFFFF)), convert(bits >> U32(16))
    low, high = (low, low) if "H0_H0" in o.suffix else (high, high) if "H1_H1" in o.suffix else (low, high)
    values = [np.abs(x) if o.absolute else x for x in (low, high)]
    return [-x if o.negative else x for x in values]


@effect("HMNMX2", "VHMNMX")
def _packed_choice(i: Decoded, s: Step) -> None:
    """Of the numbers; a NaN loses."""
    bfloat16 = "BF16_V2" in i.mods
    inputs = [_halves(o, s, bfloat16) for o in i.operands[1:-1]]
    smaller, results = i.operands[-1].predicate(s), []
    for half in range(2):
        best = inputs[0][half]
        for other in inputs[1:]:
            best = _float_minimum(best, other[half], smaller, "NAN" in i.mods)
        results.append((fp.to_bfloat16 if bfloat16 else fp.to_float16)(np.float32(best)))
    i.operands[0].put(s, results[0] | results[1] << U32(16))


@effect("FHADD")
def _add_half(i: Decoded, s: Step) -> None:
    """A bfloat16 or float16, the upper one where its suffix says so, and a float32."""
    a = _halves(i.operands[1], s, "BF16" in i.mods)["H1" in i.operands[1].suffix]
    i.operands[0].put_f32(s, np.float32(a + i.operands[2].f32(s)))


@effect("HSETP2")
def _compare_halves(i: Decoded, s: Step) -> None:
    """Both halves; the first output is of the lower one, the second of the upper one."""
    bfloat16 = "BF16_V2" in i.mods
    first, second, a, *rest = i.operands
    low_high = _halves(a, s, bfloat16)
    if rest[0].kind == "immediate":  # two of them: the upper and the lower half
        others, rest = [rest[1].f32(s), rest[0].f32(s)], rest[2:]
    else:
        others, rest = _halves(rest[0], s, bfloat16), rest[1:]
    name = next(part for part in i.parts if part[:2] in ("EQ", "NE", "LT", "LE", "GT", "GE"))
    for output, x, y in zip((first, second), low_high, others, strict=True):
        output.put(s, np.asarray(compare(name, x, np.asarray(y))) & rest[0].predicate(s))


@effect("HFMA2", "HADD2", "HMUL2")
def _packed_half(i: Decoded, s: Step) -> None:
    bfloat16 = any(part.startswith("BF16") for part in i.parts)
    into, *rest = i.operands
    if "F32" in i.mods:  # HADD2.F32 widens one half
        values = [_halves(o, s, bfloat16)[0] for o in rest]
        into.put_f32(s, np.float32(sum(values[1:], values[0]) if values[0] is not rest[0] else values[0]))
        return
    immediates = [o for o in rest if o.kind == "immediate"]
    if len(immediates) == 2:  # the last operand: high and low half
        last = [np.atleast_1d(np.float32(o.f32(s))) for o in reversed(immediates)]
        rest = rest[: len(rest) - 2]
    else:
        last = _halves(rest.pop(), s, bfloat16)
    inputs = [_halves(o, s, bfloat16) for o in rest]
    results = []
    for half in range(2):
        values = [x[half] for x in inputs] + [last[half]]
        if i.name == "HFMA2":
            value = fp.fma32(*(np.float32(v) for v in values))
        else:
            value = values[0] + values[1] if i.name == "HADD2" else values[0] * values[1]
        value = np.atleast_1d(np.float32(value))
        results.append(fp.to_bfloat16(value) if bfloat16 else fp.to_float16(value))
    into.put(s, results[0] | results[1] << U32(16))
