"""The CUDA kernels of csrc/cuda, compiled by nvcc to cubins: no GPU and no PyTorch takes part.

One cubin a source file, architecture and variant, kept under build/ by a hash of everything that it was compiled from.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.locks import one_process
from benchmarks.machine_code import cuda_arguments
from benchmarks.machine_code.emulator.machine import Launch
from benchmarks.machine_code.report import CompiledKernel
from benchmarks.machine_code.sass import disassemble_file

_ROOT = Path(__file__).parents[2]
_CSRC = _ROOT / "csrc"
_CACHE = _ROOT / "build" / "machine_code"
_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-lineinfo")  # as setup.py

# Softcap and alignment of bfloat16 rows: what most training steps run, Gemma's softcap, and rows that do not start at a
# multiple of 16 bytes.
_VARIANTS = {"": (False, True), "softcap": (True, True), "unaligned": (False, False)}
_ELEMENTS = 32  # of a thread in one pass of a main loop: four 16-byte loads


@dataclass(frozen=True)
class CudaKernel:
    """A kernel by its function's name in a source file, its bytes of dynamic shared memory at V = 151,936 in bfloat16,
    and the architectures that launch it. A test on the host holds block, cluster and bytes to what the launchers do."""

    name: str
    source: str
    function: str
    shared: int
    archs: tuple[str, ...] = ("sm_80", "sm_90", "sm_100")
    threads: int = 128
    cluster: int = 1
    variant: str = ""


_CLUSTERS = ("sm_90", "sm_100")
MAIN = (
    CudaKernel("stats", "stats", "stats_row_kernel", 224),
    CudaKernel("stats of a segment", "stats", "segment_kernel", 96),
    CudaKernel("stats gradient", "stats", "stats_gradient_kernel", 24),
    CudaKernel("loss, cluster", "policy_loss", "loss_cluster_kernel", 38_400, _CLUSTERS, cluster=8),
    CudaKernel("loss, block", "policy_loss", "loss_block_kernel", 672, threads=256),
    CudaKernel("loss gradient of shared rows", "policy_loss", "loss_gradient_kernel", 672),
    CudaKernel("stats, softcap", "stats", "stats_row_kernel", 224, variant="softcap"),
    CudaKernel("loss, cluster, softcap", "policy_loss", "loss_cluster_kernel", 38_400, _CLUSTERS, cluster=8,
               variant="softcap"),
    CudaKernel("stats, unaligned", "stats", "stats_row_kernel", 224, variant="unaligned"),
    CudaKernel("loss, cluster, unaligned", "policy_loss", "loss_cluster_kernel", 38_432, _CLUSTERS, cluster=8,
               variant="unaligned"),
    CudaKernel("loss, block, unaligned", "policy_loss", "loss_block_kernel", 480, variant="unaligned"),
)  # fmt: skip


def nvcc() -> str | None:
    """The compiler, or None where there is none."""
    return shutil.which("nvcc")


def version(driver: str) -> str:
    return subprocess.run([driver, "--version"], capture_output=True, text=True, check=True).stdout


def digest() -> str:
    """Of what the cubins are compiled from, and by what."""
    hashed = hashlib.sha256(" ".join((version(nvcc()), *_FLAGS)).encode())
    for path in sorted([*_CSRC.glob("cuda/*.cu*"), *_CSRC.glob("cuda/*.h"), *_CSRC.glob("common/*.h")]):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


def cubin(source: str, arch: str, variant: str | None = None) -> Path:
    """csrc/cuda/`source`.cu for one architecture, with all variants of its kernels or one, which compiles in seconds.

    Raises:
        FileNotFoundError: without nvcc.
        subprocess.CalledProcessError: if it does not compile.
    """
    driver = nvcc()
    if driver is None:
        raise FileNotFoundError("nvcc is not on the PATH")
    only = [] if variant is None else _only(variant)
    path = _CACHE / f"{source}-{variant or ('all' if variant is None else 'plain')}-{arch}-{digest()}.cubin"
    with one_process(path):
        if not path.exists():
            fresh = path.with_suffix(".partial")
            files = [str(_CSRC / "cuda" / f"{source}.cu"), "-o", str(fresh)]
            command = [driver, *_FLAGS, *only, "-cubin", f"-arch={arch}", f"-I{_CSRC}", *files]
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.replace(path)
    return path


def _only(variant: str) -> list[str]:
    softcap, aligned = (str(flag).lower() for flag in _VARIANTS[variant])
    return [f"-DERC_ONLY_SOFTCAP={softcap}", f"-DERC_ONLY_ALIGNED={aligned}"]


def cubins(wanted: Iterable[tuple[str, str, str]]) -> dict[tuple[str, str, str], Path]:
    """Cubins of (source, architecture, variant), two compilers at a time."""
    wanted = sorted(set(wanted))
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(lambda each: cubin(*each), wanted), strict=True))


def cuda_kernels(archs: Iterable[str], kernels: Iterable[CudaKernel] = MAIN) -> list[CompiledKernel]:
    """The kernels of a training step, for the report."""
    wanted = [(kernel, arch) for kernel in kernels for arch in archs if arch in kernel.archs]
    compiled = cubins((kernel.source, arch, kernel.variant) for kernel, arch in wanted)
    chosen = []
    for kernel, arch in wanted:
        path = compiled[kernel.source, arch, kernel.variant]
        names = [found.name for found in disassemble_file(path)]
        (function,) = (name for name in names if kernel.function in name)
        launch = Launch(kernel.threads, kernel.shared, kernel.cluster, kernel.cluster)
        chosen.append(
            CompiledKernel(
                kernel.name, arch, path, function, (_ELEMENTS, _ELEMENTS), source="cuda", threads=kernel.threads,
                dynamic_shared=kernel.shared, cluster=kernel.cluster, softcap=kernel.variant == "softcap",
                offset=2 if kernel.variant == "unaligned" else 0,
                work=partial(cuda_arguments.work, kernel.function, launch),
            )
        )  # fmt: skip
    return chosen
