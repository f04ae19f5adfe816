"""Bits, comparisons, selections, moves and conversions."""

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
from tests.ptx.source import SIZES, Float, Instruction, Integer, Pair, Vector

if TYPE_CHECKING:
    from tests.ptx.program import Block

BITS = ("b16", "b32", "b64")

# ---- bits ------------------------------------------------------------------------------------------------------------


def _bitwise(symbol: str) -> Callable:
    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        type_ = mods.type("pred", *BITS)
        d, a, b = operands(ins, 3)
        block.define(d, type_, f"{block.use(a, type_)} {symbol} {block.use(b, type_)}")
        return "integer"

    return translator


instruction("and", "9.7.8.1")(_bitwise("&"))
instruction("or", "9.7.8.2")(_bitwise("|"))
instruction("xor", "9.7.8.3")(_bitwise("^"))


@instruction("not", "9.7.8.4")
def _not(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type("pred", *BITS)
    d, a = operands(ins, 2)
    block.define(d, type_, f"~{block.use(a, type_)}")
    return "integer"


def _shift(symbol: str) -> Callable:
    def translator(block: Block, mods: Modifiers, ins: Instruction) -> str:
        type_ = mods.type(*BITS, *(INTEGERS if symbol == ">>" else ()))
        d, a, b = operands(ins, 3)
        width, x = 8 * SIZES[type_], block.use(a, type_)
        if isinstance(b, Integer) and 0 <= b.value < width:
            block.define(d, type_, f"{x} {symbol} {b.value}")
        else:
            function = "shifted_left" if symbol == "<<" else "shifted_right"
            block.define(d, type_, f"{function}({x}, {block.use(b, 'u32')}, {width})")
        return "integer"

    return translator


instruction("shl", "9.7.8.8")(_shift("<<"))
instruction("shr", "9.7.8.9")(_shift(">>"))


@instruction("bfe", "9.7.1.19")
def _bfe(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type("u32", "u64")
    d, a, b, c = operands(ins, 4)
    width = 8 * SIZES[type_]
    field = f"shifted_right({block.use(a, type_)}, {block.use(b, 'u32')} & 255, {width})"
    block.define(d, type_, f"{field} & ~shifted_left(~{type_.upper()}(0), {block.use(c, 'u32')} & 255, {width})")
    return "integer"


@instruction("bfi", "9.7.1.20")
def _bfi(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("b32")
    d, a, b, start, length = operands(ins, 5)
    count = f"{block.use(start, 'u32')} & 255"
    field = f"shifted_left(~shifted_left(~U32(0), {block.use(length, 'u32')} & 255, 32), {count}, 32)"
    moved = f"shifted_left({block.use(a, 'u32')}, {count}, 32)"
    block.define(d, "u32", f"{moved} & {field} | {block.use(b, 'u32')} & ~{field}")
    return "integer"


@instruction("popc", "9.7.1.14")
def _popc(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type("b32", "b64")
    d, a = operands(ins, 2)
    block.define(d, "u32", f"np.bitwise_count({block.use(a, type_)}).astype(U32)")
    return "integer"


@instruction("brev", "9.7.1.17")
def _brev(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("b32")
    d, a = operands(ins, 2)
    block.define(d, "u32", f"reversed_bits({block.use(a, 'u32')})")
    return "integer"


@instruction("bfind", "9.7.1.16")
def _bfind(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.need("shiftamt")
    mods.type("u32")
    d, a = operands(ins, 2)
    block.define(d, "u32", f"leading_zeros({block.use(a, 'u32')})")
    return "integer"


@instruction("prmt", "9.7.9.7")
def _prmt(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("b32")
    d, *sources = operands(ins, 4)
    block.define(d, "u32", f"permuted({', '.join(block.use(o, 'u32') for o in sources)})")
    return "integer"


# ---- comparison and selection ----------------------------------------------------------------------------------------

_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_FLOAT_FORMS = {  # an ordered comparison is false where either is NaN, one with u is true
    "eq": "{0} == {1}", "ne": "({0} < {1}) | ({0} > {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}", "equ": "~(({0} < {1}) | ({0} > {1}))", "neu": "{0} != {1}", "ltu": "~({0} >= {1})",
    "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "~(np.isnan({0}) | np.isnan({1}))", "nan": "np.isnan({0}) | np.isnan({1})",
}  # fmt: skip


def _compared(comparison: str, floating: bool, x: str, y: str) -> str:
    forms = _FLOAT_FORMS if floating else {name: f"{{0}} {symbol} {{1}}" for name, symbol in _SYMBOLS.items()}
    if comparison not in forms:
        raise UnknownInstruction(f"comparison .{comparison}")
    return forms[comparison].format(x, y)


@instruction("setp", "9.7.6.2, 9.7.7.2, 9.3.1")
def _setp(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS, *INTEGERS, *BITS, "bf16", "f16", "bf16x2", "f16x2")
    comparison = mods.parts.pop(0) if mods.parts else ""
    if type_ in ("bf16x2", "f16x2"):
        pair, a, b = operands(ins, 3)
        if not isinstance(pair, Pair):
            raise UnknownInstruction("destination")
        x, y = (block.keep(block.use(o, "u32")) for o in (a, b))
        for target, part in ((pair.first, "low16"), (pair.second, "high16")):
            halves = [block.keep(f"from_{type_[:-2]}({part}({z}))") for z in (x, y)]
            block.define(target, "pred", _compared(comparison, True, *halves))
        return "fp32"
    combine = mods.take("and", "or", "xor")
    d, a, b, *other = operands(ins, 4 if combine else 3)
    if type_ in ("bf16", "f16"):
        x, y = (block.keep(f"from_{type_}({block.use(o, 'u16')})") for o in (a, b))
    else:
        ftz = takes_ftz(mods, type_)
        x, y = (block.keep(flushed(block.use(o, type_), ftz)) for o in (a, b))
    result = _compared(comparison, type_ not in (*INTEGERS, *BITS), x, y)
    if combine:
        result = f"({result}) {'&|^'[('and', 'or', 'xor').index(combine)]} {block.use(other[0], 'pred')}"
    block.define(d, "pred", result)
    return float_pipe(type_) if type_ in FLOATS else "integer"


@instruction("selp", "9.7.6.3")
def _selp(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS, *INTEGERS, *BITS)
    d, a, b, c = operands(ins, 4)
    held = block.held_type(type_, a, b)
    block.define(d, held, f"select({block.use(c, 'pred')}, {block.use(a, held)}, {block.use(b, held)})")
    return "move"


# ---- moves and conversions -------------------------------------------------------------------------------------------


@instruction("mov", "9.7.9.3, 9.7.9.4")
def _mov(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type(*FLOATS, *INTEGERS, *BITS, "pred")
    d, a = operands(ins, 2)
    if isinstance(d, Vector) or isinstance(a, Vector):
        vector = d if isinstance(d, Vector) else a
        if type_ not in ("b32", "b64") or len(vector.elements) != 2:
            raise UnknownInstruction("vector")
        if vector is d:
            block.unpack(d.elements, a, SIZES[type_])
        else:
            block.pack(d, a.elements, SIZES[type_])
        return "move"
    held = type_ if isinstance(a, Float) or type_ == "pred" else block.held_type(type_, a)
    block.define(d, held, block.use(a, held))
    return "move"


_WHOLE = {"rni": "np.rint", "rzi": "np.trunc", "rmi": "np.floor", "rpi": "np.ceil"}


@instruction("cvt", "9.7.9.21")
def _cvt(block: Block, mods: Modifiers, ins: Instruction) -> str:
    types = (*FLOATS, *INTEGERS, "u8", "s8", "bf16", "f16", "bf16x2", "f16x2")
    source, target = mods.type(*types), mods.type(*types)
    ftz = "f32" in (source, target) and bool(mods.take("ftz"))
    if target in ("bf16x2", "f16x2"):  # the first source goes to the upper half
        d, a, b = operands(ins, 3)
        mods.need("rn")
        convert = f"to_{target[:-2]}"
        block.define(d, "u32", f"pack16({convert}({block.use(b, 'f32')}), {convert}({block.use(a, 'f32')}))")
        return "convert"
    d, a = operands(ins, 2)
    narrow = [type_ for type_ in (source, target) if type_ in ("bf16", "f16", "bf16x2", "f16x2")]
    if narrow:
        if {source, target} not in ({"f32", "bf16"}, {"f32", "f16"}):
            raise UnknownInstruction("conversion")
        if target == "f32":
            block.define(d, "f32", f"from_{source}({block.use(a, 'u16')})")
        else:
            mods.need("rn")
            block.define(d, "u16", f"to_{target}({block.use(a, 'f32')})")
        return "convert"
    x = flushed(block.use(a, source), ftz and source == "f32")
    whole = mods.take(*_WHOLE) if source in FLOATS else None
    saturate = bool(mods.take("sat"))
    if source in FLOATS and target in FLOATS:
        if whole and source == target:
            x = f"{_WHOLE[whole]}({x})"
        elif source != target and not whole:
            if SIZES[target] < SIZES[source]:
                mods.need("rn")
            x = f"{x}.astype({target.upper()})"
        elif whole:
            raise UnknownInstruction("conversion")
        block.define(d, target, flushed(f"saturated({x})" if saturate else x, ftz and target == "f32"))
    elif source in FLOATS:
        if not whole:
            raise UnknownInstruction("rounding")
        block.define(d, target, f"to_integer({x}, {target.upper()}, '{whole}')")
    elif target in FLOATS:
        mods.need("rn")
        block.define(d, target, f"{x}.astype({target.upper()})")
    else:
        block.define(d, target, f"clamped({x}, {target.upper()})" if saturate else f"{x}.astype({target.upper()})")
    return "convert"


@instruction("createpolicy", "9.7.9.18")
def _createpolicy(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("b64")
    mods.need("fractional")
    mods.need("L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged")
    d, _ = operands(ins, 2)
    block.define(d, "u64", "U64(0)")  # a hint: nothing reads its value
    return "move"
