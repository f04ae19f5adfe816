"""Instructions on integers, bits and predicates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine_code.emulator.effects import LOW_WORD, S64, U32, U64, combine, compare, effect
from benchmarks.machine_code.emulator.memory import SHARED_WINDOW
from benchmarks.machine_code.emulator.operands import Decoded, Operand

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Step


@effect("MOV", "UMOV")
def _move(i: Decoded, s: Step) -> None:
    i.operands[0].put(s, i.operands[1].u32(s))


@effect("CS2R")
def _zero_pair(i: Decoded, s: Step) -> None:
    i.operands[0].put64(s, U64(0))


@effect("S2R", "S2UR")
def _special(i: Decoded, s: Step) -> None:
    m, name = s.machine, i.operands[1].text
    threads = s.threads if s.threads is not None else s.warps * 32
    values: dict[str, Any] = {
        "SR_TID.X": m.thread[threads] % m.launch.threads,
        "SR_LANEID": m.lane[threads],
        "SR_CTAID.X": m.first_block + m.block[threads],
        "SR_CgaCtaId": m.block[threads],
        "SR_SWINHI": SHARED_WINDOW,
    }
    zeros = {"SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z"}
    if name not in values and name not in zeros:
        raise NotImplementedError(f"{i.line.opcode} {name}")
    i.operands[0].put(s, values.get(name, 0))


@effect("LDC", "ULDC", "LDCU")
def _constant(i: Decoded, s: Step) -> None:
    into, source = i.operands
    address, m = source.address(s), s.machine
    if "U16" in i.mods or "U8" in i.mods:
        word = m.constant(source.bank, address // 4 * 4, 4)
        mask = U32(0xFFFF if "U16" in i.mods else 0xFF)
        into.put(s, (word >> np.asarray(address % 4 * 8).astype(U32)) & mask)
        return
    for word in range({"64": 2, "128": 4}.get(i.parts[-1] if i.parts else "", 1)):
        into.next(word).put(s, m.constant(source.bank, address + 4 * word, 4))


@effect("R2UR")
def _to_uniform(i: Decoded, s: Step) -> None:
    """Of the first thread of each warp that takes part; a predicate output says which others have another value."""
    threads = s.machine.threads_of(s)
    warps, first, inverse = np.unique(s.machine.warp[threads], return_index=True, return_inverse=True)
    values = np.broadcast_to(i.operands[-1].u32(s), threads.shape)
    s.UR[i.operands[-2].number][warps] = values[first]
    if len(i.operands) == 3:
        i.operands[0].put(s, values != values[first][inverse])


@effect("SEL", "USEL")
def _select(i: Decoded, s: Step) -> None:
    into, a, b, p = i.operands
    into.put(s, np.where(p.predicate(s), a.u32(s), b.u32(s)))


@effect("P2R")
def _predicates_to_register(i: Decoded, s: Step) -> None:
    into, _, old, mask = i.operands
    bits = sum(np.asarray(s.P[k][s.threads]).astype(U32) << U32(k) for k in range(7))
    into.put(s, (old.u32(s) & ~mask.u32(s)) | (bits & mask.u32(s)))


@effect("R2P")
def _register_to_predicates(i: Decoded, s: Step) -> None:
    _, source, mask = i.operands
    for k in range(7):
        if int(mask.u32(s)) >> k & 1:
            s.P[k][s.threads] = (source.u32(s) >> U32(k)) & U32(1) != 0


def _outputs(i: Decoded) -> tuple[Operand, list[Operand], list[Operand]]:
    """(destination, carry predicates written, the operands behind them)."""
    into, *rest = i.operands
    carries = []
    while rest[0].kind in ("P", "UP"):
        carries.append(rest.pop(0))
    return into, carries, rest


@effect("IADD3", "UIADD3", "IADD", "VIADD")
def _add(i: Decoded, s: Step) -> None:
    into, carries, rest = _outputs(i)
    numbers = [o for o in rest if o.kind not in ("P", "UP")]
    if "64" in i.mods:  # of register pairs
        into.put64(s, sum(np.asarray(o.u64(s)) for o in numbers))
        return
    total: Any = U64(0)
    for o in numbers:  # -x is ~x + 1; the 1 counts for the carry
        bits = np.asarray(o.raw(s)).astype(U64)
        total = total + ((bits ^ LOW_WORD) + U64(o.negative) if o.negative or o.inverted else bits)
    if "X" in i.mods:
        for p in rest[len(numbers) :]:
            total = total + np.asarray(p.predicate(s)).astype(U64)
    into.put(s, total & LOW_WORD)
    for level, carry in enumerate(carries):
        carry.put(s, total >> U64(32) > U64(level))


@effect("IMAD", "UIMAD")
def _multiply_add(i: Decoded, s: Step) -> None:
    into, carries, rest = _outputs(i)
    a, b, c = rest[:3]
    if "MOV" in i.mods:
        into.put(s, c.u32(s))
        return
    signed = "U32" not in i.mods
    if "WIDE" in i.mods or "HI" in i.mods:
        wide = [np.asarray(o.s32(s) if signed else o.u32(s)).astype(S64).astype(U64) for o in (a, b)]
        total = wide[0] * wide[1] + c.u64(s)
        if "X" in i.mods:
            total = total + np.asarray(rest[3].predicate(s)).astype(U64)
        if carries:
            carries[0].put(s, total < np.asarray(c.u64(s)))
        if "HI" in i.mods:
            into.put(s, total >> U64(32))
        else:
            into.put64(s, total)
        return
    product = np.asarray(a.u32(s)).astype(U64) * np.asarray(b.u32(s)).astype(U64)
    total = product + np.asarray(c.u32(s)).astype(U64)
    if "X" in i.mods:
        total = total + np.asarray(rest[3].predicate(s)).astype(U64)
    into.put(s, total & LOW_WORD)


@effect("LEA", "ULEA")
def _shifted_add(i: Decoded, s: Step) -> None:
    into, carries, rest = _outputs(i)
    a, b, rest = rest[0], rest[1], rest[2:]
    low, high = np.asarray(a.u32(s)).astype(U64), U64(0)
    if "SX32" in i.mods:
        high = np.asarray(a.s32(s)).astype(S64).astype(U64) >> U64(32)
    elif "HI" in i.mods:
        high = np.asarray(rest.pop(0).u32(s)).astype(U64)
    shift = U64(int(rest[0].text, 0) & 63)
    shifted = ((high << U64(32)) | low) << shift
    part = (shifted >> U64(32)) & LOW_WORD if "HI" in i.mods else shifted & LOW_WORD
    total = part + np.asarray(b.u32(s)).astype(U64)
    if "X" in i.mods:
        total = total + np.asarray(rest[1].predicate(s)).astype(U64)
    into.put(s, total & LOW_WORD)
    for carry in carries:
        carry.put(s, total > LOW_WORD)


def _table(lut: int, a: Any, b: Any, c: Any) -> Any:
    result: Any = a & U32(0) if np.asarray(a).dtype != np.bool_ else a & False
    for index in range(8):
        if lut >> index & 1:
            result = result | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
    return result


@effect("LOP3", "ULOP3")
def _logic(i: Decoded, s: Step) -> None:
    operands = list(i.operands)
    flag = operands.pop(0) if operands[0].kind in ("P", "UP") else None
    into, a, b, c, lut, p = operands
    value = _table(int(lut.text, 0), *(np.asarray(o.u32(s)) for o in (a, b, c)))
    into.put(s, value)
    if flag is not None:
        flag.put(s, (value != 0) | p.predicate(s))


@effect("PLOP3", "UPLOP3")
def _predicate_logic(i: Decoded, s: Step) -> None:
    first, second, a, b, c, lut, other = i.operands
    inputs = [np.asarray(o.predicate(s)) for o in (a, b, c)]
    results = [_table(int(table.text, 0), *inputs) for table in (lut, other)]
    first.put(s, results[0])
    second.put(s, results[1])


@effect("SHF", "USHF")
def _shift(i: Decoded, s: Step) -> None:
    into, low, by, high = i.operands
    wide = "64" in "".join(i.parts)
    value = np.asarray(low.u32(s)).astype(U64) | (np.asarray(high.u32(s)).astype(U64) << U64(32))
    amount = np.asarray(by.u32(s)).astype(U64)
    if "W" in i.mods:
        amount = amount & U64(63 if wide else 31)
    amount = np.minimum(amount, U64(63 if wide else 32))
    if "L" in i.mods:
        result = value << amount
    elif "S32" in i.mods or "S64" in i.mods:
        result = (value.astype(S64) >> amount.astype(S64)).astype(U64)
    else:
        result = value >> amount
    into.put(s, (result >> U64(32) if "HI" in i.mods else result) & LOW_WORD)


@effect("PRMT", "UPRMT")
def _permute(i: Decoded, s: Step) -> None:
    into, a, selector, c = i.operands
    both = np.asarray(a.u32(s)).astype(U64) | (np.asarray(c.u32(s)).astype(U64) << U64(32))
    chosen, result = np.asarray(selector.u32(s)).astype(U64), U64(0)
    for byte in range(4):
        nibble = (chosen >> U64(4 * byte)) & U64(15)
        value = (both >> ((nibble & U64(7)) * U64(8))) & U64(0xFF)
        sign = np.where(value & U64(0x80) != 0, U64(0xFF), U64(0))
        result = result | (np.where(nibble & U64(8) != 0, sign, value) << U64(8 * byte))
    into.put(s, result)


@effect("ISETP", "UISETP")
def _compare_integers(i: Decoded, s: Step) -> None:
    a, b = (o.u32(s) if "U32" in i.mods else o.s32(s) for o in i.operands[2:4])
    result = np.asarray(compare(i.parts[0], np.asarray(a), np.asarray(b)))
    if "EX" in i.mods:  # the upper halves of 64 bits: where they are equal, the lower ones decide
        lower = i.operands[5].predicate(s)
        if i.parts[0] == "EQ":
            result = result & lower
        elif i.parts[0] == "NE":
            result = result | lower
        else:
            result = compare(i.parts[0][0] + "T", np.asarray(a), np.asarray(b)) | ((a == b) & lower)
    combine(i, s, result, 4)


@effect("IMNMX", "VIMNMX", "UVIMNMX", "UIMNMX", "VIADDMNMX")
def _choose(i: Decoded, s: Step) -> None:
    """The smaller one where the last operand holds, else the larger one; VIADDMNMX adds two operands first."""
    into, _, (*inputs, p) = _outputs(i)
    *added, b = (o for o in inputs if o.kind not in ("P", "UP"))
    x, y = np.asarray(sum(o.u32(s) for o in added)).astype(U32), np.asarray(b.u32(s)).astype(U32)
    if "U32" not in i.mods:
        x, y = x.view(np.int32), y.view(np.int32)
    into.put(s, np.asarray(np.where(p.predicate(s), np.minimum(x, y), np.maximum(x, y))).view(U32))


@effect("IABS")
def _absolute(i: Decoded, s: Step) -> None:
    i.operands[0].put(s, np.abs(i.operands[1].s32(s).astype(S64)))


@effect("POPC", "UPOPC")
def _population(i: Decoded, s: Step) -> None:
    bits = np.atleast_1d(i.operands[1].u32(s)).astype(U32)
    i.operands[0].put(s, np.unpackbits(bits.view(np.uint8).reshape(-1, 4), axis=1).sum(1))


@effect("BREV", "UBREV")
def _reversed_bits(i: Decoded, s: Step) -> None:
    bits = np.atleast_1d(i.operands[-1].u32(s)).astype(U32).view(np.uint8).reshape(-1, 4)
    reversed_bits = np.packbits(np.unpackbits(bits[:, ::-1], axis=1)[:, ::-1], axis=1)
    i.operands[0].put(s, np.ascontiguousarray(reversed_bits[:, ::-1]).view(U32)[:, 0])


@effect("FLO", "UFLO")
def _leading_one(i: Decoded, s: Step) -> None:
    """The position of the highest bit that is set, or how far it is from the top; all ones where none is."""
    value = np.asarray(i.operands[-1].u32(s)).astype(np.float64)
    position = np.frexp(value)[1] - 1
    into = 31 - position if "SH" in i.mods else position
    i.operands[0].put(s, np.where(value == 0, -1, into).astype(S64) & 0xFFFFFFFF)
