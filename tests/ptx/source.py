"""PTX text to instructions: registers, labels, parameters and shared variables of one kernel.

Covered is what nvcc and Triton write: entry functions without calls, declarations of registers and shared variables in
the module and in the body, and the scopes `{ ... }` of inline assembly, whose registers and labels get names of their
own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

SIZES = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4,
         "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8}  # fmt: skip
"""Bytes of a PTX type; a predicate is held in one."""


class ParseError(Exception):
    """Text that this parser does not know."""


class Register(NamedTuple):
    name: str


class Integer(NamedTuple):
    value: int


class Float(NamedTuple):
    """A floating-point literal: its bits in 32 (`0f`) or 64 (`0d`) bits."""

    bits: int
    size: int


class Name(NamedTuple):
    """A variable's address, a special register or a label; `offset` in bytes."""

    text: str
    offset: int = 0


class Address(NamedTuple):
    """`[base + offset]`."""

    base: Register | Name | Integer
    offset: int


class Vector(NamedTuple):
    elements: tuple


class Negated(NamedTuple):
    register: Register


class Pair(NamedTuple):
    """`first|second`, two destinations."""

    first: Register | Sink
    second: Register | Sink


class Sink(NamedTuple):
    """`_`, a result that nobody takes."""


Operand = Register | Integer | Float | Name | Address | Vector | Negated | Pair | Sink


@dataclass(frozen=True, eq=False)
class Instruction:
    """`@guard opcode operands`; `guard` is the predicate register, `unless` whether it is negated."""

    index: int
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    unless: bool
    text: str
    line: int


class Variable(NamedTuple):
    """A variable in shared or local memory; 0 bytes: as much as the launch gives."""

    name: str
    space: str
    size: int
    align: int


@dataclass
class Kernel:
    """One `.entry` of a PTX file."""

    name: str
    target: str
    parameters: list[tuple[str, int]]  # name, bytes
    directives: dict[str, tuple[int, ...]]  # maxntid, reqntid, reqnctapercluster, ...
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the index of the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  # the type that each was declared with
    variables: list[Variable] = field(default_factory=list)

    @property
    def architecture(self) -> int:
        """80 for sm_80, 100 for sm_100a."""
        return int(re.match(r"sm_(\d+)", self.target).group(1))


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)(?P<attributes>(?:\s+\.\w+(?:\s+\d+)?)*)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d+)\])?"
)
_DIRECTIVE = re.compile(r"\.(\w+)\s*((?:\d+\s*,?\s*)*)")
_VARIABLE = re.compile(
    r"(?:\.extern\s+)?\.(?P<space>shared|local)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?:\[(?P<count>\d*)\])?\s*;"
)
_SPACE = re.compile(r"\s*")
_LINE_DIRECTIVE = re.compile(r"\.(?:loc|file)\b[^\n]*")
_PRAGMA = re.compile(r"\.pragma\b[^;]*;")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]*);")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_STATEMENT = re.compile(r"(?:@(?P<unless>!?)(?P<guard>[%\w$]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>[^;]*);")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?(?:0x[\da-fA-F]+|\d+)))?\s*\]$")
_SUM = re.compile(r"([A-Za-z_$][\w$]*)\s*\+\s*(\d+)$")
_INTEGER = re.compile(r"-?(?:0[xX][\da-fA-F]+|\d+)U?$")


def entries(text: str) -> list[str]:
    """The names of the kernels in a PTX file."""
    return _ENTRY.findall(text)


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel `name` of a PTX file, or its only one.

    Raises:
        ParseError: for text it does not know, and where there is no such kernel.
    """
    found = [match for match in _ENTRY.finditer(text) if name in (None, match.group(1))]
    if len(found) != 1:
        raise ParseError(f"{len(found)} kernels named {name or 'anything'} among {entries(text)}")
    start = found[0]
    target = re.search(r"\.target\s+(\w+)", text)
    opening = text.index("{", start.end())
    header = _COMMENT.sub("", text[start.end() : opening])
    closing = header.index(")") if "(" in header else 0
    parameters = []
    for one in _PARAMETER.finditer(header[:closing]):
        parameters.append((one["name"], SIZES[one["type"]] * int(one["count"] or 1)))
    directives = {}
    for key, values in _DIRECTIVE.findall(header[closing:]):
        directives[key] = tuple(int(v) for v in re.findall(r"\d+", values))
    kernel = Kernel(start.group(1), target.group(1) if target else "sm_80", parameters, directives)
    first = _ENTRY.search(text)  # the module's own variables come before its kernels
    kernel.variables += [_variable(match) for match in _VARIABLE.finditer(text, 0, first.start())]
    _Body(kernel, text, opening + 1).read()
    return kernel


def _variable(match: re.Match) -> Variable:
    count = match["count"]
    size = 0 if count == "" else SIZES[match["type"]] * int(count or 1)
    return Variable(match["name"], match["space"], size, int(match["align"] or SIZES[match["type"]]))


class _Body:
    """Reads the statements between a kernel's braces."""

    def __init__(self, kernel: Kernel, text: str, position: int) -> None:
        self.kernel = kernel
        self.line = text.count("\n", 0, position) + 1
        end = _end_of_body(text, position)
        self.text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n"), text[position:end])
        self.position = 0
        self.scopes: list[tuple[int, set[str]]] = []  # inline assembly: number, names of its own
        self.number = 0

    def read(self) -> None:
        text, position = self.text, 0
        while True:
            blank = _SPACE.match(text, position)
            self.line += text.count("\n", position, blank.end())
            position = blank.end()
            if position == len(text):
                return
            start = position
            position = self.statement(text, position)
            self.line += text.count("\n", start, position)

    def statement(self, text: str, position: int) -> int:
        """Reads one statement at `position` and returns where it ends."""
        character = text[position]
        if character == "{":
            self.number += 1
            self.scopes.append((self.number, set()))
            return position + 1
        if character == "}":
            self.scopes.pop()
            return position + 1
        if character == ".":
            return self.directive(text, position)
        label = _LABEL.match(text, position)
        if label:
            self.kernel.labels[self.own_label(label.group(1))] = len(self.kernel.instructions)
            return label.end()
        match = _STATEMENT.match(text, position)
        if match is None:
            raise ParseError(f"{self.kernel.name}, line {self.line}: {text[position : position + 80]!r}")
        guard = Register(self.own_name(match["guard"])) if match["guard"] else None
        parts = [part.strip() for part in _OPERAND.findall(match["operands"])]
        is_branch = match["opcode"].partition(".")[0] == "bra"
        operands = tuple(Name(self.own_label(part)) if is_branch else self.operand(part) for part in parts)
        self.kernel.instructions.append(
            Instruction(
                len(self.kernel.instructions), match["opcode"], operands, guard, match["unless"] == "!",
                " ".join(match.group().split()), self.line,
            )
        )  # fmt: skip
        return match.end()

    def directive(self, text: str, position: int) -> int:
        for pattern in (_LINE_DIRECTIVE, _PRAGMA):
            match = pattern.match(text, position)
            if match:
                return match.end()
        match = _VARIABLE.match(text, position)
        if match:
            self.kernel.variables.append(_variable(match))
            return match.end()
        match = _REGISTERS.match(text, position)
        if match is None:
            raise ParseError(f"{self.kernel.name}, line {self.line}: {text[position : position + 80]!r}")
        for name in match.group(2).split(","):
            name = name.strip()
            several = re.match(r"(.*)<(\d+)>$", name)
            if several:
                for i in range(int(several.group(2))):
                    self.kernel.registers[f"{several.group(1)}{i}"] = match.group(1)
                continue
            if self.scopes:
                self.scopes[-1][1].add(name)
            self.kernel.registers[self.own_name(name)] = match.group(1)
        return match.end()

    def own_name(self, name: str) -> str:
        """A register's name, made unique if one of the innermost scopes declares it."""
        if not self.scopes:
            return name
        for number, names in reversed(self.scopes):
            if name in names:
                return f"{name}@{number}"
        return name

    def own_label(self, name: str) -> str:
        return name if name.startswith("$") or not self.scopes else f"{name}@{self.scopes[-1][0]}"

    def operand(self, text: str) -> Operand:
        name = self.own_name(text)
        if name in self.kernel.registers:
            return Register(name)
        if "|" in text:
            return Pair(*(self.operand(part.strip()) for part in text.split("|")))
        if text[0] == "%":
            return Name(text)
        if text[0] == "{":
            return Vector(tuple(self.operand(part.strip()) for part in text[1:-1].split(",")))
        if text[0] == "[":
            match = _ADDRESS.match(text)
            if match is None:
                raise ParseError(f"{self.kernel.name}, line {self.line}: address {text!r}")
            return Address(self.operand(match.group(1)), int(match.group(2) or "0", 0))
        if text[0] == "!":
            return Negated(self.operand(text[1:].strip()))
        if text == "_":
            return Sink()
        if text[:2] in ("0f", "0F", "0d", "0D"):
            return Float(int(text[2:], 16), 4 if text[1] in "fF" else 8)
        if _INTEGER.match(text):
            return Integer(int(text.rstrip("U"), 0))
        if re.match(r"\d+\.\d+$", text):  # the fraction of createpolicy
            return Name(text)
        match = _SUM.match(text)
        if match:
            return Name(match.group(1), int(match.group(2)))
        if re.match(r"[\w$]+$", text):
            return Name(text)
        raise ParseError(f"{self.kernel.name}, line {self.line}: operand {text!r}")


def _end_of_body(text: str, position: int) -> int:
    """Where the brace closes that was opened before `position`."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[position:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return position + brace.start()
    raise ParseError("a kernel without an end")
