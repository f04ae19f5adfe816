"""Reading a cubin: a function's instructions with their operands, its constant banks and where its arguments lie."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine_code.sass import run_tool, tool

_LABEL = re.compile(r"^\s*([.$\w]+):\s*$")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;")
_PARAM_CBANK, _KPARAM_INFO = 0x0A, 0x17  # attributes of a kernel's .nv.info section


@dataclass(frozen=True)
class Line:
    """An instruction at `address` (bytes from the function's start) under the predicate `guard`, "" for none."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A kernel as the emulator loads it. `params`: (offset, bytes) of the arguments in constant bank 0."""

    name: str
    lines: tuple[Line, ...]
    labels: dict[str, int]  # the line that a label stands before
    constants: dict[int, bytes]
    params: tuple[int, int]
    shared_bytes: int


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return tuple(part for part in (*parts, text[start:].strip()) if part)


def _sections(image: bytes) -> dict[str, tuple[int, bytes]]:
    """(size, content) by name of a 64-bit ELF file; a section without content in the file has none."""
    offset, entry, count, names = struct.unpack_from("<Q10xHHH", image, 40)
    headers = [struct.unpack_from("<IIQQQQ", image, offset + i * entry) for i in range(count)]
    strings = headers[names][4]
    found = {}
    for name, kind, _, _, at, size in headers:
        end = image.index(b"\0", strings + name)
        found[image[strings + name : end].decode()] = (size, b"" if kind == 8 else image[at : at + size])
    return found


def _params(info: bytes) -> tuple[int, int]:
    """Where bank 0 holds the arguments: attributes are (format, attribute, size or value), then a payload."""
    at = 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        if attribute == _PARAM_CBANK and form == 4:
            return struct.unpack_from("<4xHH", info, at + 4)
        at += 4 + (size if form == 4 else 0)
    raise LookupError("the kernel does not say where its arguments are")


@lru_cache(maxsize=64)
def load(cubin: bytes | Path, function: str | None = None) -> Function:
    """A function of a cubin; None names the only one.

    Raises:
        LookupError: if the cubin has no such function, or several and none is named.
    """
    image = cubin if isinstance(cubin, bytes) else cubin.read_bytes()
    sections = _sections(image)
    names = [name.removeprefix(".text.") for name in sections if name.startswith(".text.")]
    chosen = [name for name in names if function in (None, name)]
    if len(chosen) != 1:
        raise LookupError(f"{function!r} does not name one of {names}")
    (name,) = chosen
    lines, labels = _listing(image, name)
    banks = {}
    for section, (size, content) in sections.items():
        match = re.fullmatch(rf"\.nv\.constant(\d+)\.{re.escape(name)}", section)
        if match and match[1] != "0":
            banks[int(match[1])] = content[:size]
    shared = sections.get(f".nv.shared.{name}", (0, b""))[0]
    return Function(name, lines, labels, banks, _params(sections[f".nv.info.{name}"][1]), shared)


def _listing(image: bytes, name: str) -> tuple[tuple[Line, ...], dict[str, int]]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(image)
        index = _symbol_index(image, name)
        text = run_tool(tool("nvdisasm"), "-c", "-fun", str(index), str(path))
    lines: list[Line] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _INSTRUCTION.search(line):
            address, guard, opcode, operands = match.groups()
            if int(address, 16) != 16 * len(lines):
                raise ValueError(f"{name}: an instruction at {address} was not understood: {line}")
            lines.append(Line(int(address, 16), guard or "", opcode, split_operands(operands)))
        elif match := _LABEL.match(line):
            labels[match[1]] = len(lines)
    return tuple(lines), labels


def _symbol_index(image: bytes, name: str) -> int:
    sections = _sections(image)
    symbols, strings = sections[".symtab"][1], sections[".strtab"][1]
    for index in range(len(symbols) // 24):
        at, kind = struct.unpack_from("<IB", symbols, index * 24)
        if kind & 15 == 2 and strings[at : strings.index(b"\0", at)].decode() == name:
            return index
    raise LookupError(f"no function {name}")
