"""Small kernels written as PTX, for the tests of the interpreter itself."""

from __future__ import annotations

import struct

import numpy as np

from tests.ptx.machine import Checks, Counts, Regions, Shape, launch
from tests.ptx.program import Program
from tests.ptx.source import SIZES, parse

HEADER = """.version 8.7
.target {target}
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry snippet({parameters})
{{
  .reg .pred %p<16>;
  .reg .b16 %h<16>;
  .reg .b32 %r<64>;
  .reg .f32 %f<64>;
  .reg .b64 %q<64>;
  .reg .f64 %d<16>;
"""


def snippet(body: str, parameters: int = 0, target: str = "sm_100a") -> Program:
    """A kernel with `parameters` parameters of 8 bytes, `p0` and on, around `body`."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return Program(parse(HEADER.format(target=target, parameters=declared) + body + "\n ret;\n}\n"))


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    grid: int = 1,
    cluster: int = 1,
    shared: int = 0,
    checks: Checks | None = None,
    target: str = "sm_100a",
) -> Counts:
    """Runs `body`; parameter `p<i>` is the address of `arrays[i]`, which the kernel may read and write."""
    regions = Regions()
    for i, array in enumerate(arrays):
        regions.add(array.ctypes.data, array.nbytes, f"array {i}")
    parameters = [struct.pack("<Q", array.ctypes.data) for array in arrays]
    program = snippet(body, len(arrays), target)
    return launch(program, Shape(grid, threads, cluster, shared), parameters, regions, checks)


_REGISTER = {"pred": "%p", 2: "%h", 4: "%r", 8: "%q", "f32": "%f", "f64": "%d"}


def _register(type_: str, number: int) -> str:
    return f"{_REGISTER.get(type_) or _REGISTER[SIZES[type_]]}{number}"


def apply(opcode: str, types: str, *inputs, arguments: str = "", guard: str = "") -> np.ndarray:
    """One instruction per element: `types` is its result's type, then its operands'; `arguments` is appended, such as
    an immediate operand. A predicate comes back as 0 or 1, and goes in as one.

    >>> apply("add.f32", "f32 f32 f32", np.float32([1, 2]), np.float32([3, 4])).tolist()
    [4.0, 6.0]
    """
    out_type, *in_types = types.split()
    n = len(inputs[0])
    arrays = [np.ascontiguousarray(x) for x in inputs]
    out_size = 4 if out_type == "pred" else SIZES[out_type]
    out = np.zeros(n, f"u{out_size}")
    lines = ["mov.u32 %r60, %ctaid.x;", "mov.u32 %r61, %ntid.x;", "mov.u32 %r62, %tid.x;"]
    lines += ["mad.lo.s32 %r63, %r60, %r61, %r62;", f"setp.ge.u32 %p15, %r63, {n};", "@%p15 ret;"]
    names = []
    for i, type_ in enumerate(in_types):
        size = 4 if type_ == "pred" else SIZES[type_]
        lines += [f"ld.param.u64 %q{50 + i}, [p{i}];", f"mad.wide.u32 %q{50 + i}, %r63, {size}, %q{50 + i};"]
        name = _register(type_, i + 1)
        if type_ == "pred":
            lines += [f"ld.global.b32 %r{40 + i}, [%q{50 + i}];", f"setp.ne.b32 {name}, %r{40 + i}, 0;"]
        else:
            lines.append(f"ld.global.b{8 * size} {name}, [%q{50 + i}];")
        names.append(name)
    result = _register(out_type, 0)
    operands = ", ".join([result, *names, *([arguments] if arguments else [])])
    lines += [f"{guard} {opcode} {operands};"]
    last = len(in_types)
    lines += [f"ld.param.u64 %q60, [p{last}];", f"mad.wide.u32 %q60, %r63, {out_size}, %q60;"]
    if out_type == "pred":
        lines += [f"selp.b32 %r0, 1, 0, {result};", "st.global.b32 [%q60], %r0;"]
    else:
        lines.append(f"st.global.b{8 * out_size} [%q60], {result};")
    threads = 64
    run("\n".join(lines), *arrays, out, threads=threads, grid=-(-n // threads))
    return out.view(_NUMPY[out_type]) if out_type in _NUMPY else out


_NUMPY = {"f32": np.float32, "f64": np.float64, "s16": np.int16, "s32": np.int32, "s64": np.int64}
