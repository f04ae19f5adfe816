"""Builds csrc/cuda for the CPU: the very same .cu sources, compiled by g++ with the headers beside this file.

`load()` compiles what changed, loads the library and registers the operators of `erc.ops` for CPU tensors in the
namespace `erc_cuda_host`, so that the tests call them as they call any backend.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from erc import ops
from tests import build_script

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD_DIR = ROOT / "build" / "cuda_host"
NAMESPACE = "erc_cuda_host"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")

_EXECUTOR = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64),
)  # fmt: skip
_WRAPPED = ("torch_get_const_data_ptr", "torch_get_mutable_data_ptr")

KERNELS = tuple(sorted(path for kind in ("*.cu", "*.cpp") for path in (ROOT / "csrc" / "cuda").glob(kind)))
FIBERS = HERE / "cuda_host" / "fibers.cpp"


def compiler() -> str | None:
    """g++, or None where there is none (the headers use the compiler's `_Float16`)."""
    return shutil.which("g++")


def library(
    name: str,
    target: str,
    sources: list[Path],
    flags: tuple[str, ...],
    link: tuple[str, ...],
    libraries: tuple[str, ...] = (),
) -> Path:
    """C++ sources (.cu counts as C++), compiled and linked into `BUILD_DIR / name / target` by setup.py's builder."""
    script, folder = build_script.builder(), BUILD_DIR / name
    base = (str(compiler()), "-std=c++17", "-fPIC", "-ffp-contract=off", "-DERC_CUDA_HOST", "-Wall")
    base += ("-Wno-unknown-pragmas", f"-I{HERE}", f"-I{ROOT / 'csrc'}", *flags, "-x", "c++")
    objects = [script.Object(source, folder / f"{source.stem}.o", base) for source in sources]
    return build_script.built(script.Library(folder / target, (str(compiler()), *link), libraries, objects))


class Host:
    """The loaded library: `ops` holds the operators, `configure` chooses the machine that the launchers see."""

    def __init__(self, path: Path) -> None:
        self._namespace = ops.define(NAMESPACE)
        torch.ops.load_library(str(path))
        self.library = handle = ctypes.CDLL(str(path))
        self._configure = handle.erc_cuda_host_configure
        self._fault = handle.erc_cuda_host_fault
        self._fault.restype = ctypes.c_char_p
        self._launches = handle.erc_cuda_host_launches
        self._execute_with = handle.erc_cuda_host_execute_with
        self._complain = handle.erc_cuda_host_complain
        self._tensors = handle.erc_cuda_host_tensors
        self.ops = getattr(torch.ops, NAMESPACE)

    def configure(
        self,
        clusters: bool = True,
        multiprocessors: int = 1,
        order: int = 0,
        poison: int = 0xFF,
        l2_bytes: int = 1 << 20,
        compiled_for: int = 90,
    ) -> None:
        """A machine with or without thread-block clusters (sm_90 or sm_80), with so many multiprocessors that few rows
        are split over blocks; `order` of threads and blocks (0, 1 reversed, else a shuffle's seed); `poison` fills
        shared memory; `compiled_for` 80 is code for sm_80 on whatever machine."""
        self._configure(int(clusters), compiled_for, multiprocessors, order, poison, l2_bytes)

    def launches(self) -> list[tuple[int, int, int, int]]:
        """(grid, block, cluster, bytes of shared memory) of every launch since `configure`."""
        shapes = (ctypes.c_int64 * 4 * 16)()
        count = self._launches(shapes, 16)
        return [tuple(shape) for shape in shapes[:count]]

    def execute_with(self, executor: Callable[[str, int, int, int, int, list[bytes]], None] | None) -> None:
        """Hand every launch to `executor(kernel's symbol, grid, block, cluster, bytes of shared memory, parameters)`
        instead of running it on fibers; None: fibers again. What it raises becomes the launch's error."""

        def call(name, grid, block, cluster, shared, count, data, sizes) -> int:
            try:
                parameters = [ctypes.string_at(data[i], sizes[i]) for i in range(count)]
                executor(name.decode(), grid, block, cluster, shared, parameters)
            except Exception as error:  # must not pass through C++
                self._complain(f"{type(error).__name__}: {error}".encode())
                return 0
            return 1

        self._executor = _EXECUTOR(call) if executor else _EXECUTOR()
        self._execute_with(self._executor)

    def tensors(self) -> list[tuple[int, int]]:
        """(address, bytes) of every tensor that the bindings took the address of since the last call."""
        extents = (ctypes.c_int64 * 2 * 256)()
        return [tuple(extents[i]) for i in range(self._tensors(extents, 256))]

    def fault(self, name: str, out: torch.Tensor) -> str:
        """Run the kernel `name` of faults.cpp on `out` `[>= 32]` float32; returns what the harness found, "" for
        nothing."""
        return self._fault(name.encode(), ctypes.cast(out.data_ptr(), ctypes.POINTER(ctypes.c_float))).decode()


def sanitized_program() -> Path:
    """sanitize.cpp and the kernels under AddressSanitizer and UBSan."""
    sources = [*KERNELS, FIBERS, HERE / "sanitize.cpp"]
    return library("sanitize", "sanitize_kernels", sources, ("-O1", *SANITIZE), SANITIZE)


@cache
def load() -> Host:
    """Compile, load and register. Once a process; sanitized where `make sanitize` has loaded the run-time library."""
    torch_dir = Path(torch.__file__).parent
    sanitized = "libasan" in os.environ.get("LD_PRELOAD", "")
    name, optimise = ("torch_asan", ("-O1", *SANITIZE)) if sanitized else ("torch", ("-O2",))
    flags = (*optimise, "-isystem", str(torch_dir / "include"))
    flags += (f"-DTORCH_TARGET_VERSION={build_script.builder().OLDEST_TORCH}",)
    sources = [*KERNELS, FIBERS, HERE / "faults.cpp", HERE / "tensors.cpp", ROOT / "csrc" / "bindings" / "cuda.cpp"]
    wrapped = (f"-Wl,--wrap={name}" for name in _WRAPPED)
    libraries = (f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-ldl", *wrapped)
    link = ("-shared", *(SANITIZE if sanitized else ()))
    return Host(library(name, "liberc_cuda_host.so", sources, flags, link, libraries))
