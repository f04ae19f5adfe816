"""One basic block as Python code that computes for many threads at once.

A register is a NumPy array with one value per thread. Inside a block it is a local variable; at the block's end those
that a later block reads are stored, in the NumPy type in which most instructions use them. Another type is a view.
Values that are the same for all threads (literals, parameters) stay scalars within a block, and a register that two
halves were moved into stays two variables until somebody wants it whole.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from types import FunctionType
from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import isa
from tests.ptx.isa import UnknownInstruction
from tests.ptx.numeric import DTYPES
from tests.ptx.source import SIZES, Address, Float, Instruction, Integer, Kernel, Name, Negated, Register, Sink

if TYPE_CHECKING:
    from tests.ptx.program import Program

_AXES = ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid")
SPECIAL_REGISTERS = frozenset(
    [f"{name}.{axis}" for name in _AXES for axis in "xyz"]
    + ["laneid", "cluster_ctarank", "cluster_nctarank"]
    + [f"lanemask_{relation}" for relation in ("eq", "lt", "le", "gt", "ge")]
)
"""What a group of threads can answer (PTX ISA, section 10)."""

_VARYING = re.compile(r"\b(?:v\d+|g|r|n)\b")  # what an expression may name that differs between threads


def numpy_type(type_: str) -> str:
    """f32 -> f4, s64 -> i8, pred -> ?"""
    return "?" if type_ == "pred" else np.dtype(DTYPES[type_]).str[1:]


def ptx_type(dtype: str) -> str:
    """f4 -> f32, i8 -> s64, ? -> pred"""
    return "pred" if dtype == "?" else dtype[0].replace("i", "s") + str(8 * int(dtype[1:]))


class Value:
    """What a register holds at one point of a block: the variables that name it, by NumPy type, or its two halves."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.names: dict[str, str] = {}
        self.halves: tuple[Value, Value] | None = None


@dataclass(eq=False)
class Block:
    """Instructions that run one after another.

    `sync` is what the first one waits for. `taken` and `following` are the blocks after it, None for the end of the
    thread: the code returns under which condition threads go to `taken`, or None where all go to `following`.
    """

    number: int
    kernel: Kernel
    program: Program
    instructions: list[Instruction]
    sync: str | None
    taken: int | None = None
    following: int | None = None
    conditional: bool = False
    reads: set[str] = field(default_factory=set)  # registers read before they are written
    writes: set[str] = field(default_factory=set)
    live_in: frozenset[str] = frozenset()  # registers that this block or a later one reads
    live_out: frozenset[str] = frozenset()
    pipes: Counter = field(default_factory=Counter)
    lines: list[str] = field(default_factory=list)
    values: dict[str, Value] = field(default_factory=dict)
    specials: dict[str, str] = field(default_factory=dict)
    uniform: set[str] = field(default_factory=set)  # variables that are scalars
    relaxed: bool = False  # the instruction that is translated takes wider registers
    guard: str | None = None  # of the instruction that is translated: which threads execute it
    result: str | None = None
    count: int = 0

    def translate(self) -> None:
        """Turns the instructions into lines of Python.

        Raises:
            UnknownInstruction: for the first one that has no meaning here.
        """
        for instruction in self.instructions:
            self.guard = None
            self.relaxed = instruction.opcode.partition(".")[0] in ("ld", "st", "cvt")
            if instruction.guard is not None:
                condition = self.use(instruction.guard, "pred")
                condition = self.full(f"~{condition}" if instruction.unless else condition)
                if instruction is self.instructions[-1] and self.conditional:
                    self.result = condition
                else:
                    self.guard = self.keep(condition)
            self.pipes[isa.translate(self, instruction)] += 1

    @cached_property
    def function(self) -> FunctionType:
        """The compiled code: function(machine, group)."""
        stores = []
        for name in sorted(self.writes & self.live_out):
            view = self.view(self.values[name], ptx_type(self.program.held[name]))  # may add a line
            stores.append(f"r[{name!r}] = {self.full(view)}")
        end = [] if self.result is None else [f"return {self.result}"]
        name = f"block_{self.number}"
        code = "\n    ".join([f"def {name}(M, g):", "n, r = g.n, g.r", *self.lines, *stores, *end])
        scope: dict = {}
        exec(compile(code, f"<{self.kernel.name}, block {self.number}>", "exec"), self.program.names, scope)
        return scope[name]

    # ---- lines ----

    def line(self, code: str) -> None:
        self.lines.append(code)

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def keep(self, expression: str) -> str:
        """A variable for an expression that is read more than once; scalar if all that it names is."""
        if expression.isidentifier():
            return expression
        name = self.fresh()
        self.line(f"{name} = {expression}")
        if all(used in self.uniform for used in _VARYING.findall(expression)):
            self.uniform.add(name)
        return name

    def full(self, expression: str) -> str:
        """An array, also where the value is the same for all threads."""
        name = self.keep(expression)
        return f"np.full(n, {name})" if name in self.uniform else name

    # ---- operands ----

    def use(self, operand, type_: str) -> str:
        """An operand's value in `type_`. Only loads, stores and conversions take a wider register (PTX ISA, 9.4.1)."""
        value = self.value(operand, type_)
        if value.size != SIZES[type_] and not self.relaxed:
            raise UnknownInstruction(f"operand of {value.size} bytes")
        return self.view(value, type_)

    def held_type(self, type_: str, *sources) -> str:
        """Of the types of `type_`'s size the one in which a source is at hand: a move needs no view."""
        for source in sources:
            value = self.values.get(source.name) if isinstance(source, Register) else None
            if value and value.names and value.size == SIZES[type_]:
                return ptx_type(next(iter(value.names)))
        return "u" + type_[1:] if type_[0] == "b" else type_

    def define(self, target, type_: str, expression: str, extend: str | None = None) -> None:
        """`target` is `expression` from now on, where the guard holds. A wider register is filled with zeros, or with
        the sign if `extend`, by default `type_`, is signed."""
        if isinstance(target, Sink):
            return
        if not isinstance(target, Register):
            raise UnknownInstruction("destination")
        size = SIZES[self.kernel.registers[target.name]]
        if SIZES[type_] > size or (SIZES[type_] < size and not self.relaxed):
            raise UnknownInstruction(f"destination of {size} bytes")
        if SIZES[type_] < size:
            signed = (extend or type_)[0] == "s"
            narrow = f"({expression}).view(S{8 * SIZES[type_]})" if signed else f"({expression})"
            type_ = f"{'s' if signed else 'u'}{8 * size}"
            expression = f"{narrow}.astype({type_.upper()})"
        if self.guard is not None:
            expression = f"select({self.guard}, {expression}, {self.use(target, type_)})"
        self.set(target, self.fresh_value(size, numpy_type(type_), expression))

    def set(self, target: Register, value: Value) -> None:
        self.values[target.name] = value
        self.writes.add(target.name)

    def address(self, operand, uniform: bool = False) -> str:
        """Byte addresses in 64 bits: an array, or a scalar if `uniform`."""
        if not isinstance(operand, Address):
            raise UnknownInstruction("address")
        base, offset = operand
        if not isinstance(base, Register):
            name = self.use(Name(base.text, base.offset + offset) if isinstance(base, Name) else base, "u64")
        else:
            type_ = f"u{8 * SIZES[self.kernel.registers[base.name]]}"
            name = self.use(base, type_)
            name = f"{name} + {self.constant(type_, offset)}" if offset else name
            name = name if type_ == "u64" else f"({name}).astype(U64)"
        return self.keep(name) if uniform else self.full(name)

    def is_uniform(self, operand: Address) -> bool:
        return not isinstance(operand.base, Register) or self.use(operand.base, "u64") in self.uniform

    def unpack(self, targets: tuple, source, size: int) -> None:
        """mov {low, high}, source."""
        for target, half in zip(targets, self.half_values(source, size), strict=True):
            type_ = ptx_type(next(iter(half.names), f"u{half.size}"))
            self.define(target, type_, self.view(half, type_))

    def pack(self, target: Register, sources: tuple, size: int) -> None:
        """mov target, {low, high}."""
        self.set_halves(target, tuple(self.value(source, f"b{4 * size}") for source in sources), size)

    def use_halves(self, operand) -> tuple[str, str]:
        """The two floats of an f32x2 operand."""
        low, high = (self.view(half, "f32") for half in self.half_values(operand, 8))
        return low, high

    def define_halves(self, target: Register, low: str, high: str) -> None:
        self.set_halves(target, (self.fresh_value(4, "f4", low), self.fresh_value(4, "f4", high)), 8)

    def set_halves(self, target: Register, values: tuple[Value, Value], size: int) -> None:
        whole = Value(size)
        whole.halves = values
        if self.guard is None:
            self.set(target, whole)
        else:
            self.define(target, f"u{8 * size}", self.view(whole, f"u{8 * size}"))

    def half_values(self, operand, size: int) -> tuple[Value, Value]:
        value = self.value(operand, f"b{8 * size}")
        if value.halves is None:
            whole = self.view(value, f"u{8 * size}")
            parts = (f"{part}{4 * size}({whole})" for part in ("low", "high"))
            value.halves = tuple(self.fresh_value(size // 2, f"u{size // 2}", part) for part in parts)
        return value.halves

    # ---- values ----

    def fresh_value(self, size: int, dtype: str, expression: str) -> Value:
        value = Value(size)
        value.names[dtype] = self.keep(expression)
        return value

    def view(self, value: Value, type_: str) -> str:
        """A value's bits in another type; of a wider value, its lower bits."""
        wanted, size = numpy_type(type_), SIZES[type_]
        if not value.names:
            low, high = (self.view(half, f"u{4 * value.size}") for half in value.halves)
            value.names[f"u{value.size}"] = self.keep(f"pack{4 * value.size}({low}, {high})")
        if wanted in value.names:
            return value.names[wanted]
        if "?" in value.names or wanted == "?" or size > value.size:
            raise UnknownInstruction(f"type .{type_} of an operand of {value.size} bytes")
        if size < value.size:
            whole = self.view(value, f"u{8 * value.size}")
            return self.view(self.fresh_value(size, f"u{size}", f"{whole}.astype(U{8 * size})"), type_)
        have = next(iter(value.names.values()))
        value.names[wanted] = self.keep(f"{have}.view({type_.upper()})")
        return value.names[wanted]

    def value(self, operand, type_: str) -> Value:
        if isinstance(operand, Register):
            return self.register(operand.name)
        if isinstance(operand, Negated):
            return self.fresh_value(1, "?", f"~{self.view(self.register(operand.register.name), 'pred')}")
        if isinstance(operand, Name):
            return self.named(operand, type_)
        value = Value(SIZES[type_])
        if type_ == "pred" and isinstance(operand, Integer):
            value.names["?"] = f"np.bool_({bool(operand.value)})"
        elif isinstance(operand, Integer) or (isinstance(operand, Float) and operand.size == SIZES[type_]):
            literal = operand.value if isinstance(operand, Integer) else operand.bits
            value.names[numpy_type(type_)] = self.constant(type_, literal)
        else:
            raise UnknownInstruction(f"operand {operand}")
        return value

    def constant(self, type_: str, value: int) -> str:
        """The name of a literal in the program's namespace."""
        dtype = np.dtype(DTYPES[type_])
        bits = value & ((1 << (8 * dtype.itemsize)) - 1)
        name = f"K{numpy_type(type_)}_{bits:x}"
        self.program.names[name] = np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]
        self.uniform.add(name)
        return name

    def register(self, name: str) -> Value:
        if name not in self.values:
            self.reads.add(name)
            dtype = self.program.held[name]
            self.values[name] = self.fresh_value(SIZES[self.kernel.registers[name]], dtype, f"r[{name!r}]")
        return self.values[name]

    def named(self, operand: Name, type_: str) -> Value:
        """A special register, or the address of a variable or parameter."""
        if operand.text[0] == "%":
            name = operand.text[1:]
            if name not in SPECIAL_REGISTERS:
                raise UnknownInstruction(f"special register %{name}")
            if name not in self.specials:
                self.specials[name] = self.keep(f"M.special(g, {name!r})")
            wide = SIZES[type_] == 8
            variable = self.specials[name]
            return self.fresh_value(8 if wide else 4, "u8" if wide else "u4", variable + ".astype(U64)" * wide)
        if operand.text in self.program.parameter_index:
            start = f"M.parameters[{self.program.parameter_index[operand.text]}]"
            return self.fresh_value(8, "u8", f"{start} + {self.constant('u64', operand.offset)}")
        if operand.text not in self.program.variables:
            raise UnknownInstruction(f"name {operand.text}")
        size = SIZES[type_]
        start = self.program.variables[operand.text] + operand.offset
        return self.fresh_value(size, f"u{size}", self.constant(f"u{8 * size}", start))
