"""Reading NVIDIA machine code: the loops of a kernel and what an iteration of each costs.

Works on the text of `nvdisasm -c`, so it measures any kernel that ends up in a cubin: Triton's, nvcc's, a peer's.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

_LABEL = re.compile(r"^\s*(\.L_x_\d+|\.L_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L_x_\d+|\.L_\d+)\)")
_RESOURCE = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")

_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

# Which pipe executes an instruction, by its name's first part. FMA-pipe moves (IMAD.MOV, IMAD.U32, IMAD.SHL) count as
# FMA.
_FMA = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "IMAD", "HADD2", "HMUL2", "HFMA2", "FSWZADD"}
_CONTROL = {"BRA", "NOP", "BSSY", "BSYNC", "WARPSYNC", "EXIT", "CALL", "RET", "BREAK", "YIELD", "JMP", "BRX"}
_SHUFFLE = {"SHFL", "REDUX", "CREDUX"}
_BARRIER = {"BAR", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR"}


@dataclass(frozen=True, slots=True)
class Instruction:
    opcode: str
    operands: str  # of a branch: a cubin with every variant has too many of the others to keep

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    def width(self) -> int:
        """Bytes that a thread loads or stores by it."""
        return next((_BYTES[part] for part in self.opcode.split(".")[1:] if part in _BYTES), 4)

    def pipe(self) -> str:
        """`mufu`, `fma`, `alu`, `memory`, `shared`, `uniform` or `control`."""
        name = self.name
        if name == "MUFU":
            return "mufu"
        if name in _FMA:
            return "fma"
        if name in {"LDG", "STG", "LD", "ST", "LDL", "STL"}:
            return "memory"
        if name in {"LDS", "STS", "LDSM", "STSM", "ATOMS"} | _SHUFFLE | _BARRIER:
            return "shared"
        if name in _CONTROL:
            return "control"
        if name.startswith("U") or name in {"S2UR", "R2UR", "LDC", "LDCU"}:
            return "uniform"
        return "alu"


@dataclass(frozen=True)
class Loop:
    """An innermost loop, first instruction to the branch back; `begin` is where it starts in the kernel."""

    instructions: tuple[Instruction, ...]
    begin: int = 0

    def count(self, *names: str) -> int:
        return sum(i.name in names for i in self.instructions)

    def bytes_of(self, name: str) -> int:
        return sum(i.width() for i in self.instructions if i.name == name)

    def widths(self, name: str) -> tuple[int, ...]:
        """The widths in bits of its loads (`LDG`) or stores (`STG`), each once."""
        return tuple(sorted({8 * i.width() for i in self.instructions if i.name == name}))

    def reads(self) -> int:
        """Bytes of logits that a thread loads: from global memory, else in full vectors from shared memory."""
        return self.bytes_of("LDG") or sum(i.width() for i in self.instructions if i.name == "LDS" and i.width() == 16)

    def writes(self) -> int:
        """Bytes of a gradient that a thread stores: to global memory, else in full vectors for a bulk copy."""
        return self.bytes_of("STG") or sum(i.width() for i in self.instructions if i.name == "STS" and i.width() == 16)

    def pipes(self) -> Counter[str]:
        return Counter(i.pipe() for i in self.instructions)

    def barriers(self) -> int:
        return self.count(*_BARRIER)

    def shuffles(self) -> int:
        return self.count(*_SHUFFLE)


@dataclass(frozen=True)
class Kernel:
    """A kernel of a cubin: its code, and what it takes of a multiprocessor."""

    name: str
    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int

    def spills(self) -> bool:
        """Whether it touches local memory, by its resources or by an instruction."""
        return bool(self.stack_bytes or self.local_bytes) or any(i.name in {"LDL", "STL"} for i in self.instructions)

    def device_barriers(self) -> int:
        """Barriers that wait until all of the GPU sees what a thread has written: hundreds of cycles each."""
        scopes = {"GPU", "SYS", "VC"}
        return sum(i.name == "MEMBAR" and bool(scopes & set(i.opcode.split("."))) for i in self.instructions)

    def load_loops(self) -> list[Loop]:
        """Innermost loops that read logits, from global memory or where a bulk copy put them, and write none: sweeps
        for statistics."""
        return [loop for loop in self.loops if loop.reads() and not loop.writes() and loop.count("MUFU")]

    def gradient_loops(self) -> list[Loop]:
        """Innermost loops that read, take an exponential and write: gradient sweeps."""
        return [loop for loop in self.loops if loop.reads() and loop.writes() and loop.count("MUFU")]


def tool(name: str) -> str:
    """A CUDA binary utility: the one that Triton carries, else one on the PATH."""
    import triton

    carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(carried) if carried.exists() else name


def run_tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> list[Kernel]:
    """Every kernel of a cubin.

    Raises:
        subprocess.CalledProcessError: if the CUDA tools cannot read it.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = run_tool(tool("nvdisasm"), "-c", str(path))
        usage = run_tool(tool("cuobjdump"), "--dump-resource-usage", str(path))
    resources: dict[str, dict[str, int]] = {}
    for name, line in re.findall(r"Function ([\w$.]+):\s*\n\s*(.*)", usage):
        resources[name] = {key: int(value) for key, value in _RESOURCE.findall(line)}
    return [_kernel(name, code.splitlines(), resources.get(name, {})) for name, code in _functions(listing)]


@lru_cache(maxsize=8)
def disassemble_file(path: Path) -> list[Kernel]:
    """As `disassemble`, remembered: a cubin with every variant of a kernel takes seconds."""
    return disassemble(path.read_bytes())


def _functions(listing: str) -> list[tuple[str, str]]:
    parts = re.split(r"^\s*(?:\.section\s+)?\.text\.([\w$.]+)[^\n]*$", listing, flags=re.MULTILINE)
    code: dict[str, str] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        code[name] = code.get(name, "") + body
    return list(code.items())


def _kernel(name: str, lines: list[str], resources: dict[str, int]) -> Kernel:
    instructions: list[Instruction] = []
    label_at: dict[str, int] = {}
    for line in lines:
        if match := _LABEL.match(line):
            label_at[match[1]] = len(instructions)
        elif match := _INSTRUCTION.search(line):
            instructions.append(Instruction(sys.intern(match[1]), match[2] if match[1].startswith("BRA") else ""))
    return Kernel(
        name,
        tuple(instructions),
        tuple(_innermost_loops(instructions, label_at)),
        resources.get("REG", 0),
        resources.get("SHARED", 0),
        resources.get("STACK", 0),
        resources.get("LOCAL", 0),
    )


def _innermost_loops(instructions: list[Instruction], label_at: dict[str, int]) -> list[Loop]:
    spans = []
    for at, instruction in enumerate(instructions):
        if instruction.name == "BRA" and (match := _TARGET.search(instruction.operands)):
            begin = label_at.get(match[1], at + 1)
            if begin < at:  # a branch to itself is the padding behind EXIT
                spans.append((begin, at))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [Loop(tuple(instructions[begin : end + 1]), begin) for begin, end in sorted(inner)]
