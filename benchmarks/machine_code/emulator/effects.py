"""The table from an instruction's name to what it does; the modules beside this one fill it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine_code.emulator.operands import Decoded

if TYPE_CHECKING:
    from benchmarks.machine_code.emulator.machine import Step

Effect = Callable[[Decoded, "Step"], None]
EFFECTS: dict[str, Effect] = {}

U32, U64, S64 = np.uint32, np.uint64, np.int64
LOW_WORD = U64(0xFFFFFFFF)


def effect(*names: str) -> Callable[[Effect], Effect]:
    """Registers a function for the instructions of these names."""

    def register(function: Effect) -> Effect:
        EFFECTS.update(dict.fromkeys(names, function))
        return function

    return register


def compare(name: str, a: Any, b: Any) -> Any:
    """Ordered comparisons, and those that hold for unordered operands too (their names end in U)."""
    if name in ("NAN", "NUM"):
        unordered = (a != a) | (b != b)
        return unordered if name == "NAN" else ~unordered
    base = {"EQ": a == b, "NE": a != b, "LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b}[name[:2]]
    unordered = (a != a) | (b != b)
    return base | unordered if name.endswith("U") else base & ~unordered


def combine(i: Decoded, s: Step, result: Any, at: int) -> None:
    """The result of a comparison with the predicate operand `at`; the second output is that of the opposite."""
    other = i.operands[at].predicate(s)
    for output, value in ((i.operands[0], result), (i.operands[1], ~result)):
        output.put(s, value | other if "OR" in i.mods else value ^ other if "XOR" in i.mods else value & other)
