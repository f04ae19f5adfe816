"""Arithmetic of integers and floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.ptx.isa import (
    FLOATS,
    INTEGERS,
    Modifiers,
    UnknownInstruction,
    float_pipe,
    flushed,
    instruction,
    operands,
    takes_ftz,
)
from tests.ptx.source import SIZES, Instruction

if TYPE_CHECKING:
    from tests.ptx.program import Block

_NARROW = ("bf16", "f16")


def _saturated(expression: str, saturate: bool) -> str:
    return f"saturated({expression})" if saturate else expression


def _halves(block: Block, ins: Instruction, operation: str, count: int, ftz: bool) -> str:
    """`operation`, of {0}, {1}, ..., on each half of f32x2 operands (sm_100)."""
    d, *sources = operands(ins, count + 1)
    low, high = zip(*(block.use_halves(source) for source in sources), strict=True)
    results = [flushed(operation.format(*(flushed(x, ftz) for x in half)), ftz) for half in (low, high)]
    block.define_halves(d, *results)
    return "fp32"


def _add_sub_mul(symbol: str) -> Callable:
    # In another rounding than to nearest an addition is a fused multiply-add by one, a product one to -0.
    directed = {"+": "({0}, ONE, {1})", "-": "({0}, ONE, -({1}))", "*": "({0}, {1}, MINUS_ZERO)"}[symbol]

    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        if mods.parts[-1] in _NARROW and symbol != "*":  # mixed precision (sm_100): the first operand is narrow
            narrow, _ = mods.type(*_NARROW), mods.type("f32")
            mods.take("rn")
            d, a, c = operands(ins, 3)
            block.define(d, "f32", f"from_{narrow}({block.use(a, 'u16')}) {symbol} {block.use(c, 'f32')}")
            return "fp32"
        type_ = mods.type(*FLOATS, "f32x2", *INTEGERS)
        if type_ in INTEGERS:
            d, a, b = operands(ins, 3)
            if symbol == "*":
                return _multiply(block, mods, type_, d, (a, b))
            same = "u" + type_[1:]  # modulo 2^n the sign changes nothing
            block.define(d, same, f"{block.use(a, same)} {symbol} {block.use(b, same)}")
            return "integer"
        rounding, ftz = mods.take("rn", "rz", "rm", "rp") or "rn", takes_ftz(mods, type_)
        if rounding != "rn" and type_ != "f32":
            raise UnknownInstruction(f"modifier .{rounding}")
        if type_ == "f32x2":
            return _halves(block, ins, f"{{0}} {symbol} {{1}}", 2, ftz)
        d, a, b = operands(ins, 3)
        x, y = (flushed(block.use(o, type_), ftz) for o in (a, b))
        value = f"{x} {symbol} {y}" if rounding == "rn" else f"fma_{rounding}" + directed.format(x, y)
        block.define(d, type_, _saturated(flushed(value, ftz), bool(mods.take("sat"))))
        return float_pipe(type_)

    return translator


instruction("add", "9.7.1.1, 9.7.3.3, 9.7.5.1")(_add_sub_mul("+"))
instruction("sub", "9.7.1.2, 9.7.3.4, 9.7.5.2")(_add_sub_mul("-"))
instruction("mul", "9.7.1.3, 9.7.3.5")(_add_sub_mul("*"))


def _multiply(block: Block, mods: Modifiers, type_: str, d, factors: tuple, addend=None) -> str:
    """mul and mad of integers: the lower half of the product, the upper one, or all of it."""
    part, size = mods.need("lo", "wide", "hi"), SIZES[type_]
    if part == "lo":
        out = "u" + type_[1:]
        product = " * ".join(block.use(x, out) for x in factors)
    else:
        if size == 8:
            raise UnknownInstruction(f"modifier .{part}")
        out = f"{type_[0]}{16 * size}"
        product = " * ".join(f"{block.use(x, type_)}.astype({out.upper()})" for x in factors)
        if part == "hi":
            out, product = type_, f"({product} >> {8 * size}).astype({type_.upper()})"
    block.define(d, out, product if addend is None else f"{product} + {block.use(addend, out)}")
    return "integer"


@instruction("mad", "9.7.1.4")
def _mad(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*INTEGERS)
    d, a, b, c = operands(ins, 4)
    return _multiply(block, mods, type_, d, (a, b), c)


@instruction("fma", "9.7.3.6")
def _fma(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_, rounding = mods.type(*FLOATS, "f32x2"), mods.need("rn", "rz", "rm", "rp")
    ftz = takes_ftz(mods, type_)
    if rounding != "rn" and type_ != "f32":
        raise UnknownInstruction(f"modifier .{rounding}")
    if type_ == "f32x2":
        return _halves(block, ins, "fma_rn({0}, {1}, {2})", 3, ftz)
    d, *sources = operands(ins, 4)
    values = ", ".join(flushed(block.use(o, type_), ftz) for o in sources)
    block.define(d, type_, _saturated(flushed(f"fma_{rounding}({values})", ftz), bool(mods.take("sat"))))
    return float_pipe(type_)


@instruction("div", "9.7.1.8, 9.7.3.8")
def _div(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS, *INTEGERS)
    d, a, b = operands(ins, 3)
    if type_ in INTEGERS:
        block.define(d, type_, f"M.quotient(g, {ins.index}, {block.use(a, type_)}, {block.use(b, type_)})")
        return "integer"
    kind, ftz = mods.need(*(("rn",) if type_ == "f64" else ("rn", "full", "approx"))), takes_ftz(mods, type_)
    x, y = (flushed(block.use(o, type_), ftz) for o in (a, b))
    block.define(d, type_, flushed(f"{x} / {y}" if kind == "rn" else f"div_{kind}({x}, {y})", ftz))
    return float_pipe(type_) if kind == "rn" else "special"


@instruction("rem", "9.7.1.9")
def _rem(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*INTEGERS)
    d, a, b = operands(ins, 3)
    x, y = block.keep(block.use(a, type_)), block.keep(block.use(b, type_))
    block.define(d, type_, f"{x} - M.quotient(g, {ins.index}, {x}, {y}) * {y}")
    return "integer"


@instruction("rcp", "9.7.3.13, 9.7.3.14")
def _rcp(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_, kind, ftz = mods.type(*FLOATS), mods.need("rn", "approx"), bool(mods.take("ftz"))
    d, a = operands(ins, 2)
    x = block.use(a, type_)
    if type_ == "f64":
        if (kind == "approx") != ftz:
            raise UnknownInstruction("form")
        block.define(d, type_, f"rcp_gross({x})" if ftz else f"ONE64 / {x}")
    else:
        x = flushed(x, ftz)
        block.define(d, type_, flushed(f"ONE / {x}" if kind == "rn" else f"rcp({x})", ftz))
    return float_pipe(type_) if kind == "rn" else "special"


@instruction("sqrt", "9.7.3.15")
def _sqrt(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS)
    kind = mods.need(*(("rn",) if type_ == "f64" else ("rn", "approx")))
    ftz = takes_ftz(mods, type_)
    d, a = operands(ins, 2)
    x = flushed(block.use(a, type_), ftz)
    block.define(d, type_, flushed(f"np.sqrt({x})" if kind == "rn" else f"sqrt({x})", ftz))
    return float_pipe(type_) if kind == "rn" else "special"


def _approximate(name: str) -> Callable:
    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        mods.type("f32")
        mods.need("approx")
        ftz = bool(mods.take("ftz"))
        d, a = operands(ins, 2)
        x = block.use(a, "f32")
        if name == "ex2" and ftz:  # one call: an element's most expensive instruction
            block.define(d, "f32", f"ex2_ftz({x})")
        else:
            block.define(d, "f32", flushed(f"{name}({flushed(x, ftz)})", ftz))
        return "special"

    return translator


for _name, _section in (("rsqrt", "9.7.3.16"), ("lg2", "9.7.3.20"), ("ex2", "9.7.3.21"), ("tanh", "9.7.3.22")):
    instruction(_name, _section)(_approximate(_name))


def _extremum(name: str) -> Callable:
    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        type_ = mods.type(*FLOATS, "bf16x2", "f16x2", *INTEGERS)
        d, *sources = operands(ins, *((3, 4) if type_ == "f32" else (3,)))  # three inputs: sm_100
        if type_ in INTEGERS:
            block.define(d, type_, f"np.{name}imum({', '.join(block.use(o, type_) for o in sources)})")
            return "integer"
        if type_ in ("bf16x2", "f16x2"):
            block.define(d, "u32", f"{name}_{type_}({', '.join(block.use(o, 'u32') for o in sources)})")
            return "fp32"
        ftz, nan = takes_ftz(mods, type_), "nan" if type_ == "f32" and mods.take("NaN") else "num"
        first, *rest = (flushed(block.use(o, type_), ftz) for o in sources)
        for other in rest:
            first = f"{name}_{nan}({first}, {other})"
        block.define(d, type_, first)
        return float_pipe(type_)

    return translator


instruction("max", "9.7.1.13, 9.7.3.12, 9.7.4.8")(_extremum("max"))
instruction("min", "9.7.1.12, 9.7.3.11, 9.7.4.7")(_extremum("min"))


def _unary(form: str) -> Callable:
    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        type_ = mods.type(*FLOATS, "s16", "s32", "s64")
        ftz = takes_ftz(mods, type_)
        d, a = operands(ins, 2)
        block.define(d, type_, flushed(form.format(block.use(a, type_)), ftz))
        return float_pipe(type_) if type_ in FLOATS else "integer"

    return translator


instruction("abs", "9.7.1.10, 9.7.3.9")(_unary("np.abs({})"))
instruction("neg", "9.7.1.11, 9.7.3.10")(_unary("-({})"))


@instruction("copysign", "9.7.3.2")
def _copysign(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS)
    d, a, b = operands(ins, 3)
    block.define(d, type_, f"np.copysign({block.use(b, type_)}, {block.use(a, type_)})")  # the sign is a's
    return float_pipe(type_)
