"""The counter of the CPU's main loops, and what it must find."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from benchmarks import cpu_loops
from erc.backend import cpu_isa

# Operations of an element: docs/benchmarks.md says which. The bounds leave room for another compiler's moves.
ARITHMETIC = {
    ("avx512", "statistics_float32"): 12 / 16,
    ("avx512", "statistics_bfloat16"): 12.5 / 16,
    ("avx2", "statistics_float32"): 14 / 8,
    ("avx2", "statistics_bfloat16"): 15 / 8,
}
LISTING = """
100: mov %rax,%rbx
104: vmovups (%rax),%zmm0
108: prefetcht1 0x8000(%rdx)
10c: prefetcht0 0x400(%rax)
110: vaddps %zmm0,%zmm1,%zmm1
114: vfmadd132ps %zmm0,%zmm1,%zmm2
118: add $0x40,%rax
11c: jne 104 <f+0x4>
120: vaddps %zmm0,%zmm1,%zmm1
124: jne 120 <f+0x20>
128: jmp 100 <f>
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    isa = cpu_isa()
    if isa not in cpu_loops._ISA_FLAGS:
        pytest.skip("no loops are compiled for this processor")
    if shutil.which("g++") is None or shutil.which("objdump") is None:
        pytest.skip("needs g++ and objdump")
    return cpu_loops.compiled(isa, tmp_path_factory.mktemp("loops"))


def test_the_innermost_loop_of_most_vectors_is_counted():
    lines = [line.split(": ") for line in LISTING.strip().splitlines()]
    loop = cpu_loops.main_loop([(int(address, 16), text) for address, text in lines], itemsize=4)
    assert loop == cpu_loops.Loop(instructions=7 / 16, arithmetic=2 / 16), "one of each kind of prefetch: 64 bytes"


def test_an_element_takes_the_operations_that_the_page_counts(library):
    found = cpu_loops.functions(library)
    for (isa, name), operations in ARITHMETIC.items():
        if isa == cpu_isa():
            loop = cpu_loops.main_loop(found[name], itemsize=4 if name.endswith("float32") else 2)
            assert 0.9 * operations < loop.arithmetic <= 1.01 * operations, name


@pytest.mark.parametrize("name", cpu_loops._READS)
def test_plain_reads_read_everything(library, name):
    words = torch.randint(-(2**62), 2**62, (8 * 512 + 1,))[1:]
    read = getattr(ctypes.CDLL(str(library)), name)
    read.restype = ctypes.c_int64
    assert read(ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(words.nbytes)) == int(words.sum())


def test_every_figure_is_measured(library, monkeypatch):
    monkeypatch.setattr(cpu_loops, "_ROWS", 4)
    monkeypatch.setattr(cpu_loops, "_VOCAB", 5000)
    threads = torch.get_num_threads()
    try:
        measured = cpu_loops.measure(library, rounds=2)
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == 4 + 2 * 8 and all(0 < value < 1e5 for value in measured.values())
    for operator in ("stats float32", "policy-loss bfloat16"):
        assert measured[f"least {operator}"] <= measured[f"median {operator}"]
