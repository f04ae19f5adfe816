"""The instruction set: what each PTX instruction becomes in the Python code of a basic block.

A translator serves one name: it reads the opcode's modifiers and adds lines to the block. A modifier, a type or an
operand that it has no use for ends the translation with `UnknownInstruction`: nothing is skipped. The section beside
each name is that of the PTX ISA document, version 9.1, that says what the instruction does
(https://docs.nvidia.com/cuda/parallel-thread-execution).

Floating-point arithmetic is NumPy's and `lanes.c`'s: rounded to nearest even, subnormals kept unless `.ftz` is there,
fused only where PTX says `fma`. Cache hints change no value and are read over by name. Approximate instructions err by
as much as the document allows, up or down by a hash of the operand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from tests.ptx.source import Instruction

if TYPE_CHECKING:
    from tests.ptx.program import Block

FLOATS = ("f32", "f64")
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
UNSIGNED = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
PIPES = ("fp32", "fp64", "special", "integer", "convert", "move", "memory", "control", "synchronise")
"""What instructions are counted as. PTX is not machine code: a division is one instruction here and a dozen there."""

_TABLE: dict[str, Callable[[Block, Modifiers, Instruction], str]] = {}
SECTIONS: dict[str, str] = {}
"""The names that there are, and where the document describes them."""


class UnknownInstruction(Exception):
    """An opcode, modifier, type or number of operands that has no meaning here."""


def instruction(name: str, section: str) -> Callable:
    """Registers the translator of `name`. It returns the instruction's pipe."""

    def register(function):
        _TABLE[name] = function
        SECTIONS[name] = section
        return function

    return register


class Modifiers:
    """The parts of an opcode after its name; each is taken once."""

    def __init__(self, opcode: str) -> None:
        self.name, *self.parts = opcode.split(".")

    def take(self, *choices: str) -> str | None:
        """The one of `choices` that is there, or None."""
        for choice in choices:
            if choice in self.parts:
                self.parts.remove(choice)
                return choice
        return None

    def need(self, *choices: str) -> str:
        """As `take`, where one must be there."""
        taken = self.take(*choices)
        if taken is None:
            raise UnknownInstruction(f"none of .{', .'.join(choices)}")
        return taken

    def type(self, *types: str) -> str:
        """The last part, which must be one of `types`."""
        if not self.parts or self.parts[-1] not in types:
            raise UnknownInstruction(f"type {self.parts[-1] if self.parts else 'missing'}")
        return self.parts.pop()


def translate(block: Block, instruction: Instruction) -> str:
    """Adds the code of one instruction to a block and returns its pipe.

    Raises:
        UnknownInstruction: with the text of the instruction.
    """
    modifiers = Modifiers(instruction.opcode)
    try:
        if modifiers.name not in _TABLE:
            raise UnknownInstruction("opcode")
        pipe = _TABLE[modifiers.name](block, modifiers, instruction)
        if modifiers.parts:
            raise UnknownInstruction(f"modifier .{'.'.join(modifiers.parts)}")
    except UnknownInstruction as error:
        raise UnknownInstruction(f"{error} in `{instruction.text}`, line {instruction.line}") from None
    return pipe


@cache
def waits_for(opcode: str) -> str | None:
    """What an instruction waits for: threads of its warp, its block or its cluster, or an mbarrier. It begins a basic
    block, which runs when they are there."""
    name = opcode.partition(".")[0]
    if opcode.startswith(("bar.warp.sync", "barrier.cluster.arrive")) or name in ("shfl", "vote", "redux"):
        return "warp"
    if opcode.startswith("barrier.cluster"):
        return "cluster"
    if name in ("bar", "barrier"):
        return "block"
    if opcode.startswith(("mbarrier.try_wait", "mbarrier.test_wait")):
        return "mbarrier"
    return None


def operands(instruction: Instruction, *counts: int) -> tuple:
    """The operands, which must be one of `counts` many."""
    if len(instruction.operands) not in counts:
        raise UnknownInstruction(f"{len(instruction.operands)} operands")
    return instruction.operands


def float_pipe(type_: str) -> str:
    return "fp64" if type_ == "f64" else "fp32"


def takes_ftz(modifiers: Modifiers, type_: str) -> bool:
    """Whether `.ftz` is there; float64 and integers have none."""
    return type_ in ("f32", "f32x2") and bool(modifiers.take("ftz"))


def flushed(expression: str, ftz: bool) -> str:
    """`.ftz`: a subnormal number becomes a zero of its sign."""
    return f"flush({expression})" if ftz else expression


from tests.ptx.isa import arithmetic, control, logic, memory  # noqa: E402, F401  (they fill the table)
