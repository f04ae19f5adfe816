"""The emulator of NVIDIA's machine code: it finds what a GPU leaves undefined, and its arithmetic rounds once."""

from __future__ import annotations

import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="its package carries the disassembler")
from benchmarks.machine_code import cuda_variants
from benchmarks.machine_code.emulator import arithmetic, cubin
from benchmarks.machine_code.emulator.machine import Launch, Machine
from benchmarks.machine_code.emulator.memory import Memory

ARCHS = ("sm_80", "sm_90", "sm_100")
needs_nvcc = pytest.mark.skipif(cuda_variants.nvcc() is None, reason="needs nvcc")

SOURCE = """
extern "C" __global__ void functions(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  out[i] = tanhf(x[i]);
  out[n + i] = expf(x[i]);
  out[2 * n + i] = log1pf(fabsf(x[i]));
  out[3 * n + i] = 1.0f / x[i];
  out[4 * n + i] = float(double(x[i]) / 3.0);
}
// Every lane takes as many turns as its number: warps diverge, meet again and vote.
extern "C" __global__ void turns(unsigned* out) {
  __shared__ unsigned seen[64];
  unsigned sum = 0;
#pragma unroll 1
  for (unsigned k = 0; k < threadIdx.x % 32; ++k) sum = (sum * 3 + k) ^ threadIdx.x;
  seen[threadIdx.x] = sum + __popc(__ballot_sync(0xffffffffu, sum > 1000));
  __syncthreads();
  out[threadIdx.x] = seen[63 - threadIdx.x] + __shfl_xor_sync(0xffffffffu, sum, 5);
}
extern "C" __global__ void out_of_bounds(float* out) { out[threadIdx.x + (1 << 26)] = 1; }
extern "C" __global__ void unwritten(float* out) {
  extern __shared__ float shared[];
  out[threadIdx.x] = shared[threadIdx.x];
}
"""


@pytest.fixture(scope="module", params=ARCHS)
def compiled(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "small.cu").write_text(SOURCE)
    command = [cuda_variants.nvcc(), "-O3", "-cubin", f"-arch={request.param}", "small.cu", "-o", "small.cubin"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "small.cubin"


def run(path: Path, function: str, launch: Launch, params: bytes, memory: Memory):
    return Machine(cubin.load(path, function), launch, params, memory).run()


@needs_nvcc
def test_functions_of_the_math_library_are_as_exact_as_on_a_gpu(compiled):
    n, memory = 500, Memory()
    x = np.linspace(-4, 4, n, dtype=np.float32) + np.float32(1e-3)
    source, out = memory.put(x), np.zeros((5, n), np.float32)
    target = memory.put(out)
    for block in range(2):
        params = struct.pack("<QQi", source, target, n)
        Machine(cubin.load(compiled, "functions"), Launch(256, blocks=2), params, memory, first_block=block).run()
    wide = x.astype(np.float64)
    exact = np.stack([np.tanh(wide), np.exp(wide), np.log1p(np.abs(wide)), 1 / wide, wide / 3])
    error = np.abs(memory.get(target, out) / exact - 1) * 2**23
    assert (error[:3] < 3).all() and (error[3:] <= 0.5).all(), error.max(1)


@needs_nvcc
def test_diverging_lanes_meet_again(compiled):
    memory, out = Memory(), np.zeros(64, np.uint32)
    target = memory.put(out)
    executed = run(compiled, "turns", Launch(64), struct.pack("<Q", target), memory)
    thread = np.arange(64, dtype=np.uint32)
    total = np.zeros(64, np.uint32)
    for k in range(31):
        total = np.where(k < thread % 32, (total * np.uint32(3) + np.uint32(k)) ^ thread, total)
    votes = np.array([(total[w * 32 : w * 32 + 32] > 1000).sum() for w in range(2)], np.uint32).repeat(32)
    assert (memory.get(target, out) == (total + votes)[::-1] + total[thread ^ 5]).all()
    assert executed.issues.shape[1] == 2 and executed.issues.max() >= 31


@needs_nvcc
def test_what_a_gpu_leaves_undefined_is_found(compiled):
    memory, out = Memory(), np.zeros(32, np.float32)
    target = memory.put(out)
    with pytest.raises(RuntimeError, match="outside of the memory"):
        run(compiled, "out_of_bounds", Launch(32), struct.pack("<Q", target), memory)
    with pytest.raises(RuntimeError, match="not aligned"):
        run(compiled, "turns", Launch(64), struct.pack("<Q", target + 2), memory)
    run(compiled, "unwritten", Launch(32, dynamic_shared=128), struct.pack("<Q", target), memory)
    assert np.isnan(memory.get(target, out)).all()
    with pytest.raises(ValueError, match="bytes of arguments"):
        run(compiled, "turns", Launch(64), b"", memory)
    with pytest.raises(LookupError, match="does not name one of"):
        cubin.load(compiled, "nothing")


def test_fused_multiply_adds_round_once():
    generator = np.random.default_rng(0)
    a, b, c = (generator.standard_normal(4000).astype(np.float32) * np.float32(2.0**e) for e in (0, 1, 14))
    c[::3] = -(a * b)[::3]  # what is left is the rounding of the product
    exact = [float(np.float32(_rounded(x, y, z))) for x, y, z in zip(a, b, c, strict=True)]
    assert (arithmetic.fma32(a, b, c) == np.array(exact, np.float32)).all()
    twice = (np.float64(a) * b + c).astype(np.float32)
    hard = arithmetic.fma32(np.float32(1 + 2**-23), np.float32(1 + 2**-23), np.array([2.0**-60], np.float32))
    assert hard[0] == np.float32(1 + 2**-22) and twice.shape == a.shape
    down, up = (arithmetic.add32(np.float32(1), np.array([2.0**-30], np.float32), mode) for mode in ("RM", "RP"))
    assert (down[0], up[0]) == (1, np.nextafter(np.float32(1), np.float32(2)))
    third = arithmetic.fma64(np.array([1 / 3]), np.array([3.0]), np.array([-1.0]))
    assert third[0] == 3 * Fraction(1 / 3) - 1


def _rounded(a: float, b: float, c: float) -> float:
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    # float() of a Fraction rounds to 53 bits first; the neighbours say whether that has moved it.
    neighbours = (near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf)))
    return min(neighbours, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))
