"""Loads, stores, copies, atomic operations and addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.ptx.isa import (
    FLOATS,
    INTEGERS,
    UNSIGNED,
    Modifiers,
    UnknownInstruction,
    instruction,
    operands,
)
from tests.ptx.source import SIZES, Instruction, Sink, Vector

if TYPE_CHECKING:
    from tests.ptx.program import Block

_HINTS = (
    "cs", "cg", "ca", "cv", "lu", "wb", "wt", "nc", "L1::no_allocate", "L1::evict_first", "L1::evict_last",
    "L1::evict_normal", "L1::evict_unchanged", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last",
    "L2::evict_normal",
)  # fmt: skip
_ACCESSED = (*FLOATS, *INTEGERS, "b8", "u8", "s8", "b16", "b32", "b64")
_SPACES = {"shared::cta": "shared", "shared::cluster": "cluster"}


def _access(mods: Modifiers, ins: Instruction) -> tuple[str, str, int, tuple]:
    """Space, type, number of elements and operands of a load or store."""
    type_ = mods.type(*_ACCESSED)
    count = {"v2": 2, "v4": 4, "v8": 8}.get(mods.take("v2", "v4", "v8"), 1)
    space = mods.take("global", "shared", "shared::cta", "shared::cluster", "local", "param") or "generic"
    while mods.take(*_HINTS):
        pass
    if not mods.take("volatile", "weak") and mods.take("relaxed", "acquire", "release"):
        mods.need("cta", "cluster", "gpu", "sys")
    policy = bool(mods.take("L2::cache_hint"))
    return _SPACES.get(space, space), type_, count, operands(ins, 3 if policy else 2)[:2]


def _elements(operand, count: int) -> tuple:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise UnknownInstruction(f"{len(elements)} elements")
    return elements


def _values(block: Block, operand, count: int, size: int) -> str:
    return "".join(f"{block.use(element, UNSIGNED[size])}, " for element in _elements(operand, count))


@instruction("ld", "9.7.9.8, 9.7.9.9")
def _ld(block: Block, mods: Modifiers, ins: Instruction) -> str:
    space, type_, count, (target, address) = _access(mods, ins)
    size = SIZES[type_]
    names = [block.fresh() for _ in range(count)]
    uniform = space == "param" and block.is_uniform(address)
    where = block.address(address, uniform)
    block.line(f"{', '.join(names)}, = M.load_{space}(g, {ins.index}, {where}, {size}, {count}, {block.guard})")
    if uniform:
        block.uniform.update(names)
    for name, element in zip(names, _elements(target, count), strict=True):
        block.define(element, UNSIGNED[size], name, extend=type_)
    return "memory"


@instruction("st", "9.7.9.11, 9.7.9.12")
def _st(block: Block, mods: Modifiers, ins: Instruction) -> str:
    if mods.take("async"):
        return _st_async(block, mods, ins)
    space, type_, count, (address, source) = _access(mods, ins)
    if space == "param":
        raise UnknownInstruction("space")
    size = SIZES[type_]
    values, where = _values(block, source, count, size), block.address(address)
    block.line(f"M.store_{space}(g, {ins.index}, {where}, {size}, ({values}), {block.guard})")
    return "memory"


def _st_async(block: Block, mods: Modifiers, ins: Instruction) -> str:
    type_ = mods.type("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")
    count = {"v2": 2, "v4": 4}.get(mods.take("v2", "v4"), 1)
    mods.take("weak")
    mods.need("shared::cluster")
    mods.need("mbarrier::complete_tx::bytes")
    address, source, barrier = operands(ins, 3)
    size = SIZES[type_]
    values, where, signal = _values(block, source, count, size), block.address(address), block.address(barrier)
    block.line(f"M.store_async(g, {ins.index}, {where}, {size}, ({values}), {signal}, {block.guard})")
    return "memory"


@instruction("cp", "9.7.9.25.4.1")
def _cp(block: Block, mods: Modifiers, ins: Instruction) -> str:
    for part in ("async", "bulk", "global", "mbarrier::complete_tx::bytes"):
        mods.need(part)
    mods.need("shared::cluster", "shared::cta")
    to, source, size, barrier, *_ = operands(ins, 5 if mods.take("L2::cache_hint") else 4)
    addresses = ", ".join(block.address(o) for o in (to, source, barrier))
    block.line(f"M.copy_bulk(g, {ins.index}, {addresses}, {block.full(block.use(size, 'u32'))}, {block.guard})")
    return "memory"


def _atomic(block: Block, mods: Modifiers, ins: Instruction, returns: bool) -> str:
    type_ = mods.type("u32", "s32", "u64", "s64", "f32", "f64", "b32", "b64")
    choices = ("add",) if type_ in FLOATS else ("add", "exch", "cas", "min", "max", "and", "or", "xor", "inc", "dec")
    operation = mods.need(*choices)
    mods.take("relaxed", "acquire", "release", "acq_rel")
    mods.take("cta", "cluster", "gpu", "sys")
    space = mods.take("global", "shared", "shared::cta") or "generic"
    target, address, *sources = (*(() if returns else (Sink(),)), *operands(ins, 2 + returns + (operation == "cas")))
    values = "".join(f"{block.full(block.use(x, type_))}, " for x in sources)
    name, where = block.fresh(), block.address(address)
    call = (
        f"M.atomic(g, {ins.index}, '{_SPACES.get(space, space)}', '{operation}', {type_.upper()}, {where}, ({values})"
    )
    block.line(f"{name} = {call}, {block.guard})")
    block.define(target, type_, name)
    return "memory"


@instruction("atom", "9.7.13.5")
def _atom(block: Block, mods: Modifiers, ins: Instruction) -> str:
    return _atomic(block, mods, ins, True)


@instruction("red", "9.7.13.6")
def _red(block: Block, mods: Modifiers, ins: Instruction) -> str:
    return _atomic(block, mods, ins, False)


@instruction("cvta", "9.7.9.20")
def _cvta(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("u64")
    sign = "-" if mods.take("to") else "+"
    space = mods.need("global", "shared", "local", "param")
    d, a = operands(ins, 2)
    window = {"shared": "SHARED_WINDOW", "local": "LOCAL_WINDOW"}.get(space, "U64(0)")
    block.define(d, "u64", f"{block.use(a, 'u64')} {sign} {window}")
    return "integer"


@instruction("mapa", "9.7.9.23")
def _mapa(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("u32")
    mods.need("shared::cluster")
    d, a, b = operands(ins, 3)
    block.define(d, "u32", f"M.map_to_block(g, {ins.index}, {block.use(a, 'u32')}, {block.use(b, 'u32')})")
    return "integer"
