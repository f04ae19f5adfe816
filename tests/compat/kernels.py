"""Runs in a compat environment: compiles every Triton kernel for one architecture and prints what came out, as JSON."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from dataclasses import asdict, dataclass

import triton

from benchmarks.machine_code.sass import disassemble
from tests.compat import calls
from tests.stub_driver import TARGETS, Launch, stub_driver


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code: `spilled` bytes per thread in local memory or scratch.

    On AMD's GPUs `lane_spills` scalar registers (a hundred at most, shared by a wavefront) wait in lanes of a vector
    register: an instruction to put one there, one to take it back, no memory.
    """

    kernel: str
    call: str  # the first that launched it
    instructions: int
    registers: int
    spilled: int
    lane_spills: int = 0


def examine(launch: Launch, call: str) -> Compiled:
    name = launch.kernel.metadata.name
    if "cubin" in launch.kernel.asm:
        (code,) = disassemble(launch.kernel.asm["cubin"])
        spilled = max(code.stack_bytes, code.local_bytes, int(code.spills()))
        return Compiled(name, call, len(code.instructions), code.registers, spilled)
    text = launch.kernel.asm["amdgcn"]
    figures = {key: int(value) for key, value in re.findall(r"\.(\w+): +(\d+)$", text, re.MULTILINE)}
    spilled = figures["private_segment_fixed_size"] or 4 * figures["vgpr_spill_count"]
    instructions = len(re.findall(r"^\t[sv]_|^\t(?:global|buffer|flat|ds|scratch)_", text, re.MULTILINE))
    return Compiled(name, call, instructions, figures["vgpr_count"], spilled, figures["sgpr_spill_count"])


def compile_all(arch: str, limit: int | None = None) -> tuple[list[Compiled], dict[str, str]]:
    """Every kernel that `calls` launches, once each, and the errors by call; `limit` leaves later calls out."""
    found: dict[int, Compiled] = {}
    errors = {}
    for name, call in list(calls.calls())[:limit]:
        with stub_driver(arch) as launches:
            try:
                call()
            except Exception as error:
                while error.__cause__ is not None:
                    error = error.__cause__
                errors[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
        for launch in launches:
            if id(launch.kernel) not in found:
                found[id(launch.kernel)] = examine(launch, name)
    return list(found.values()), errors


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("arch", choices=TARGETS)
    options.add_argument("--limit", type=int, help="only so many calls, the cheapest first")
    chosen = options.parse_args()
    warnings.simplefilter("ignore")  # outputs are whatever torch.empty found
    library = calls.register()
    compiled, errors = compile_all(chosen.arch, chosen.limit)
    figures = {"triton": triton.__version__, "kernels": [asdict(each) for each in compiled], "errors": errors}
    print(json.dumps(figures))
    del library


if __name__ == "__main__":
    main()
