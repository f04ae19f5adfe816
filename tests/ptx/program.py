"""A kernel as basic blocks: where they begin, what runs after them, and which registers live between them."""

from __future__ import annotations

from collections import Counter
from functools import cache

from tests.ptx import isa
from tests.ptx.block import Block
from tests.ptx.isa import UnknownInstruction
from tests.ptx.numeric import namespace
from tests.ptx.source import SIZES, Kernel, Register, Vector

SHARED_BASE = 1024
"""Where a block's shared memory starts in its window: not at 0, so that an address of 0 is out of bounds."""
LOCAL_BASE = 64
_LEAVE = ("ret", "exit")


class Program:
    """A translated kernel.

    Raises:
        UnknownInstruction: for the first instruction that has no meaning here, whether it would run or not.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.names = namespace()
        self.parameter_index = {name: i for i, (name, _) in enumerate(kernel.parameters)}
        self.variables, self.static_shared, self.local_bytes = _layout(kernel)
        self.held = _held_types(kernel)
        self.blocks = _basic_blocks(self)
        for block in self.blocks:
            block.translate()
        _find_live_registers(self.blocks)
        opcodes = {ins.opcode for ins in kernel.instructions}
        accesses = (opcode.split(".") for opcode in opcodes if opcode.startswith(("ld.", "st.", "atom.", "red.")))
        self.granule = min([4, *(SIZES.get(parts[-1], 4) for parts in accesses)])  # the fewest bytes of an access
        self.is_empty = opcodes <= set(_LEAVE)  # all that a thread does is leave


def _layout(kernel: Kernel) -> tuple[dict[str, int], int, int]:
    """Addresses of shared and local variables, and how many bytes they take; what the launch gives comes last."""
    addresses, ends = {}, {"shared": SHARED_BASE, "local": LOCAL_BASE}
    for variable in sorted(kernel.variables, key=lambda v: v.size == 0):
        start = -(-ends[variable.space] // variable.align) * variable.align
        addresses[variable.name] = start
        ends[variable.space] = start + variable.size
    return addresses, ends["shared"] - SHARED_BASE, ends["local"]


def _held_types(kernel: Kernel) -> dict[str, str]:
    """The NumPy type in which each register is stored between blocks: float where most instructions want a float."""
    votes: Counter = Counter()
    for instruction in kernel.instructions:
        for position, operand in enumerate(instruction.operands):
            vote = _wants_float(instruction.opcode, position)
            for element in operand.elements if isinstance(operand, Vector) else (operand,):
                if vote and isinstance(element, Register):
                    votes[element.name] += vote
    held = {}
    for name, type_ in kernel.registers.items():
        floating = SIZES[type_] >= 4 and (votes[name] > 0 or (votes[name] == 0 and type_[0] == "f"))
        held[name] = "?" if type_ == "pred" else f"{'f' if floating else 'u'}{SIZES[type_]}"
    return held


@cache
def _wants_float(opcode: str, position: int) -> int:
    """1 if an operand is a float, -1 if it is an integer, 0 if the instruction does not care."""
    name, *parts = opcode.split(".")
    type_ = parts[-1] if parts else "b32"
    if name == "cvt" and position == 0:
        type_ = parts[-2]
    if name in ("mov", "ld", "st", "selp") and type_[0] in "bu":
        return 0
    return 1 if type_ in ("f32", "f64") else -1


def _basic_blocks(program: Program) -> list[Block]:
    kernel = program.kernel
    code, starts = kernel.instructions, {0, *kernel.labels.values()}
    for i, instruction in enumerate(code):
        if isa.waits_for(instruction.opcode):
            starts.add(i)
        if instruction.opcode.partition(".")[0] in ("bra", *_LEAVE):
            starts.add(i + 1)
    bounds = sorted(start for start in starts if start < len(code))
    number = {start: i for i, start in enumerate(bounds)}
    blocks = []
    for i, (start, end) in enumerate(zip(bounds, [*bounds[1:], len(code)], strict=True)):
        block = Block(i, kernel, program, code[start:end], isa.waits_for(code[start].opcode))
        block.following = i + 1 if end < len(code) else None
        last = code[end - 1]
        name = last.opcode.partition(".")[0]
        if name == "bra":
            label = last.operands[0].text
            if label not in kernel.labels:
                raise UnknownInstruction(f"label {label} in `{last.text}`, line {last.line}")
            block.taken = number.get(kernel.labels[label])
        if name in ("bra", *_LEAVE):
            block.conditional = last.guard is not None
            block.following = block.following if block.conditional else block.taken
        blocks.append(block)
    return blocks


def _find_live_registers(blocks: list[Block]) -> None:
    """What groups of threads carry from block to block."""
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            targets = {block.following} | ({block.taken} if block.conditional else set())
            live_out = frozenset().union(*(blocks[n].live_in for n in targets if n is not None))
            live_in = frozenset(block.reads | (live_out - block.writes))
            if (live_in, live_out) != (block.live_in, block.live_out):
                block.live_in, block.live_out, changed = live_in, live_out, True
