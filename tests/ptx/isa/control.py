"""Branches, barriers, fences and exchanges in a warp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.ptx.isa import Modifiers, UnknownInstruction, instruction, operands
from tests.ptx.source import Instruction, Integer, Pair, Sink

if TYPE_CHECKING:
    from tests.ptx.program import Block


def _unguarded(ins: Instruction) -> None:
    if ins.guard is not None:
        raise UnknownInstruction("a guard")


# ---- where threads go: the end of a basic block says it --------------------------------------------------------------


@instruction("bra", "9.7.12.3")
def _bra(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.take("uni")
    operands(ins, 1)
    return "control"


@instruction("ret", "9.7.12.6")
@instruction("exit", "9.7.12.7")
def _exit(block: Block, mods: Modifiers, ins: Instruction) -> str:
    operands(ins, 0)
    return "control"


@instruction("trap", "9.7.19.4")
def _trap(block: Block, mods: Modifiers, ins: Instruction) -> str:
    operands(ins, 0)
    block.line(f"M.trap(g, {ins.index}, {block.guard})")
    return "control"


# ---- barriers and fences ---------------------------------------------------------------------------------------------


@instruction("bar", "9.7.13.1, 9.7.13.2")
def _bar(block: Block, mods: Modifiers, ins: Instruction) -> str:
    _unguarded(ins)
    warp = mods.take("warp")
    mods.take("cta")
    mods.need("sync")
    (operand,) = operands(ins, 1)  # of a block all threads take part: no count
    if warp:
        block.line(f"M.warp_barrier(g, {ins.index}, {block.use(operand, 'u32')})")
        return "synchronise"
    mods.take("aligned")
    if not isinstance(operand, Integer):
        raise UnknownInstruction("a barrier in a register")
    block.line("M.block_barrier(g)")
    return "synchronise"


@instruction("barrier", "9.7.13.1, 9.7.13.3")
def _barrier(block: Block, mods: Modifiers, ins: Instruction) -> str:
    if not mods.take("cluster"):
        return _bar(block, mods, ins)
    _unguarded(ins)
    operands(ins, 0)
    mods.take("aligned")
    if mods.need("arrive", "wait") == "arrive":
        relaxed = mods.take("release", "relaxed") == "relaxed"
        block.line(f"M.cluster_arrive(g, {ins.index}, {relaxed})")
    else:
        mods.take("acquire")
        block.line(f"M.cluster_wait(g, {ins.index})")
    return "synchronise"


@instruction("membar", "9.7.13.4")
@instruction("fence", "9.7.13.4")
def _fence(block: Block, mods: Modifiers, ins: Instruction) -> str:
    """A store is visible at once here, so a fence moves nothing; the ledger asks for what orders threads."""
    operands(ins, 0)
    if mods.take("mbarrier_init"):
        mods.need("release")
        mods.need("cluster")
        block.line(f"M.fence_mbarrier_init(g, {block.guard})")
    elif mods.take("proxy"):
        mods.need("async")
    else:
        mods.take("sc", "acq_rel", "acquire", "release")
        mods.need("cta", "cluster", "gpu", "gl", "sys")
    return "synchronise"


@instruction("mbarrier", "9.7.13.15")
def _mbarrier(block: Block, mods: Modifiers, ins: Instruction) -> str:
    mods.type("b64")
    kind = mods.need("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait")
    remote = mods.take("shared::cta", "shared", "shared::cluster") == "shared::cluster"
    if kind in ("try_wait", "test_wait"):
        return _mbarrier_wait(block, mods, ins, remote)
    if kind in ("init", "inval"):
        address, *count = operands(ins, 2 if kind == "init" else 1)
        extra = "".join(f", {block.full(block.use(x, 'u32'))}" for x in count)
        block.line(f"M.mbarrier_{kind}(g, {ins.index}, {block.address(address)}{extra}, {block.guard})")
        return "synchronise"
    expects = kind == "expect_tx" or bool(mods.take("expect_tx"))
    mods.take("release", "relaxed")
    mods.take("cta", "cluster")
    if kind == "expect_tx":
        address, amount = operands(ins, 2)
    else:
        state, address, *given = operands(ins, *((3,) if expects else (2, 3)))
        amount = given[0] if given else Integer(1)
        if not isinstance(state, Sink):
            raise UnknownInstruction("a state")
    number = block.full(block.use(amount, "u32"))
    arrivals = 0 if kind == "expect_tx" else 1 if expects else number
    counts = f"{number if expects else 0}, {arrivals}"
    block.line(f"M.mbarrier_arrive(g, {ins.index}, {block.address(address)}, {counts}, {remote}, {block.guard})")
    return "synchronise"


def _mbarrier_wait(block: Block, mods: Modifiers, ins: Instruction, remote: bool) -> str:
    _unguarded(ins)
    mods.need("parity")
    relaxed = mods.take("acquire", "relaxed") == "relaxed"
    cluster = mods.take("cta", "cluster") == "cluster"
    d, address, parity = operands(ins, 3)
    if remote:
        raise UnknownInstruction("space")
    wanted = block.full(block.use(parity, "u32"))
    block.define(
        d, "pred", f"M.mbarrier_wait(g, {ins.index}, {block.address(address)}, {wanted}, {cluster}, {relaxed})"
    )
    return "synchronise"


# ---- warps -----------------------------------------------------------------------------------------------------------


@instruction("shfl", "9.7.9.6")
def _shfl(block: Block, mods: Modifiers, ins: Instruction) -> str:
    _unguarded(ins)
    mods.type("b32")
    mods.need("sync")
    mode = mods.need("up", "down", "bfly", "idx")
    d, a, b, c, mask = operands(ins, 5)
    pair = d if isinstance(d, Pair) else Pair(d, Sink())
    value, inside = block.fresh(), block.fresh()
    sources = ", ".join(block.full(block.use(x, "u32")) for x in (a, b, c))
    block.line(f"{value}, {inside} = M.shuffle(g, {ins.index}, '{mode}', {sources}, {block.use(mask, 'u32')})")
    block.define(pair.first, "u32", value)
    block.define(pair.second, "pred", inside)
    return "synchronise"


@instruction("vote", "9.7.13.9")
def _vote(block: Block, mods: Modifiers, ins: Instruction) -> str:
    _unguarded(ins)
    type_ = mods.type("pred", "b32")
    mods.need("sync")
    mode = mods.need(*(("ballot",) if type_ == "b32" else ("all", "any", "uni")))
    d, a, mask = operands(ins, 3)
    vote = block.full(block.use(a, "pred"))
    block.define(d, type_, f"M.vote(g, {ins.index}, '{mode}', {vote}, {block.use(mask, 'u32')})")
    return "synchronise"


@instruction("redux", "9.7.13.12")
def _redux(block: Block, mods: Modifiers, ins: Instruction) -> str:
    _unguarded(ins)
    type_ = mods.type("u32", "s32", "b32", "f32")
    mods.need("sync")
    choices = {"b32": ("and", "or", "xor"), "f32": ("min", "max")}.get(type_, ("add", "min", "max"))
    operation, nan = mods.need(*choices), type_ == "f32" and bool(mods.take("NaN"))
    d, a, mask = operands(ins, 3)
    value = block.full(block.use(a, type_))
    block.define(d, type_, f"M.reduce(g, {ins.index}, '{operation}', {nan}, {value}, {block.use(mask, 'u32')})")
    return "synchronise"
