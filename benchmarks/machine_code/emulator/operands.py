"""What an instruction's operands are, and how a step of the machine reads and writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine_code.emulator.cubin import Line

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Step

_REGISTER = re.compile(r"(U?R|U?P|B)(\d+|Z|T)((?:\.\w+)*)$")
_CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[(?:(\w+)(?:\+(-?0x[0-9a-f]+))?)\]((?:\.\w+)*)$")
_ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[(.*)\]$")
_TERM = re.compile(r"([+-]?)\s*(-?0x[0-9a-f]+|U?R(?:\d+|Z))((?:\.\w+)*)")
_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "QNAN": np.nan, "INF": np.inf}


@dataclass(frozen=True)
class Operand:
    """`kind`: R, UR, P, UP, B, const, memory, special or immediate. A zero register and a true predicate have the
    number -1."""

    kind: str
    text: str
    number: int = -1
    negative: bool = False
    inverted: bool = False  # ~ of a register, ! of a predicate
    absolute: bool = False
    suffix: str = ""
    bank: int = 0
    terms: tuple[tuple[int, Operand | None, int], ...] = ()  # of an address: (sign, register, immediate)

    @classmethod
    def parse(cls, text: str) -> Operand:
        text = text.replace(".reuse", "").strip()
        flags = {"negative": False, "inverted": False, "absolute": False}
        inner = text
        if inner[:1] == "-" and not re.match(r"-[\d.]|-INF|-QNAN", inner):
            flags["negative"], inner = True, inner[1:]
        if inner[:1] in "~!" and len(inner) > 1:
            flags["inverted"], inner = True, inner[1:]
        if match := re.fullmatch(r"\|(.*)\|((?:\.\w+)*)", inner):
            flags["absolute"], inner = True, match[1] + match[2]
        if match := _REGISTER.match(inner):
            number = -1 if match[2] in "ZT" else int(match[2])
            return cls(match[1], text, number, suffix=match[3], **flags)
        if match := _CONSTANT.match(inner):
            return cls("const", text, bank=int(match[1], 0), terms=_terms(inner), suffix=match[4], **flags)
        if match := _ADDRESS.match(inner):
            return cls("memory", text, terms=_terms(match[1]))
        if inner.startswith(("SR_", "`", "PR")):
            return cls("special", inner)
        return cls("immediate", text)

    def next(self, words: int) -> Operand:
        """The register `words` behind this one."""
        return self if self.number < 0 else replace(self, number=self.number + words)

    # ---- reading ----------------------------------------------------------------------------------------------------

    def raw(self, s: Step) -> Any:
        """32 bits without modifiers: an array over the step's threads or warps, or a scalar."""
        if self.number < 0 and self.kind in ("R", "UR"):
            return np.uint32(0)
        if self.kind == "R":
            return s.R[self.number][s.threads]
        if self.kind == "UR":
            return s.UR[self.number][s.warps]
        if self.kind == "const":
            return s.machine.constant(self.bank, self.address(s), 4)
        return np.uint32(int(self.text, 0) & 0xFFFFFFFF)

    def u32(self, s: Step) -> Any:
        value = self.raw(s)
        if self.inverted:
            value = ~value
        if self.negative:
            value = np.uint32(0) - value
        return value

    def s32(self, s: Step) -> Any:
        return np.asarray(self.u32(s)).astype(np.uint32).view(np.int32)

    def u64(self, s: Step) -> Any:
        """A register pair, or eight bytes of a constant bank; an immediate is extended by its sign."""
        if self.kind == "immediate":
            return np.uint64(int(self.text, 0) & 0xFFFFFFFFFFFFFFFF)
        if self.kind == "const":
            value = s.machine.constant(self.bank, self.address(s), 8)
        elif self.number < 0:
            return np.uint64(0)
        else:
            file, at = (s.R, s.threads) if self.kind == "R" else (s.UR, s.warps)
            value = file[self.number][at].astype(np.uint64) | (
                file[self.number + 1][at].astype(np.uint64) << np.uint64(32)
            )
        return np.uint64(0) - value if self.negative else value

    def f32(self, s: Step) -> Any:
        if self.kind == "immediate":
            return np.float32(_float(self.text))
        return self._signed(np.asarray(self.raw(s)).astype(np.uint32).view(np.float32))

    def f64(self, s: Step) -> Any:
        if self.kind == "immediate":
            return np.float64(_float(self.text))
        bits = replace(self, negative=False).u64(s)
        return self._signed(np.asarray(bits).view(np.float64))

    def _signed(self, value: Any) -> Any:
        value = np.abs(value) if self.absolute else value
        return -value if self.negative else value

    def predicate(self, s: Step) -> Any:
        if self.number < 0:
            value: Any = np.bool_(True)
        elif self.kind == "UP":
            value = s.UP[self.number][s.warps]
        else:
            value = s.P[self.number][s.threads]
        return ~value if self.inverted else value

    def address(self, s: Step, extended: bool = False) -> Any:
        """The sum of a memory operand's terms, in 64 bits; `extended`: registers are pairs, said or not."""
        total: Any = np.int64(0)
        for sign, register, immediate in self.terms:
            if register is None:
                value: Any = np.int64(immediate)
            elif ".64" in register.suffix or (extended and register.kind == "R"):
                value = np.asarray(register.u64(s)).astype(np.int64)
            else:
                value = np.asarray(register.raw(s)).astype(np.int64)
                if scale := re.search(r"\.X(\d+)", register.suffix):
                    value = value * int(scale[1])
            total = total + sign * value
        return total

    # ---- writing ----------------------------------------------------------------------------------------------------

    def put(self, s: Step, value: Any) -> None:
        if self.number < 0:
            return
        if self.kind == "R":
            s.R[self.number][s.threads] = np.asarray(value).astype(np.uint32)
        elif self.kind == "UR":
            s.UR[self.number][s.warps] = np.asarray(value).astype(np.uint32)
        elif self.kind == "P":
            s.P[self.number][s.threads] = value
        else:
            s.UP[self.number][s.warps] = value

    def put_f32(self, s: Step, value: Any) -> None:
        self.put(s, np.asarray(value, np.float32).view(np.uint32))

    def put64(self, s: Step, value: Any) -> None:
        bits = np.asarray(value)
        bits = bits.view(np.uint64) if bits.dtype == np.float64 else bits.astype(np.uint64)
        self.put(s, bits & np.uint64(0xFFFFFFFF))
        self.next(1).put(s, bits >> np.uint64(32))


def _float(text: str) -> float:
    text = text.strip()
    return _FLOATS[text] if text in _FLOATS else float(text)


def _terms(text: str) -> tuple[tuple[int, Operand | None, int], ...]:
    text = re.sub(r"^c\[0x[0-9a-f]+\]\[(.*)\].*$", r"\1", text)
    terms = []
    for sign, term, suffix in _TERM.findall(text):
        direction = -1 if sign == "-" else 1
        if term.lstrip("-").startswith("0x"):
            terms.append((direction, None, int(term, 0)))
        else:
            terms.append((direction, Operand.parse(term + suffix), 0))
    return tuple(terms)


@dataclass(frozen=True)
class Decoded:
    """An instruction ready to be executed: its name, the other parts of its opcode, its operands."""

    line: Line
    name: str
    mods: frozenset[str]
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Operand | None
    uniform: bool  # once per warp
    effect: str  # its name in the table of effects
    memory: Operand | None

    @classmethod
    def of(cls, line: Line) -> Decoded:
        name, *parts = line.opcode.split(".")
        operands = tuple(Operand.parse(text) for text in line.operands)
        guard = Operand.parse(line.guard) if line.guard else None
        vectors = any(o.kind == "P" or (o.kind == "R" and o.number >= 0) for o in operands)
        vectors = vectors or any(r and r.kind == "R" for o in operands for _, r, _ in o.terms)
        uniform = name[0] == "U" or name in ("S2UR", "LDCU") or (name == "SYNCS" and not vectors)
        effect = f"SYNCS.{parts[0]}" if name == "SYNCS" else name
        memory = next((o for o in operands if o.kind == "memory"), None)
        return cls(line, name, frozenset(parts), tuple(parts), operands, guard, uniform, effect, memory)
