"""Triton's own launch path without a GPU: a driver that only knows its target, and launches that are handed over.

    with stub_driver("sm_90") as launches:
        OPERATORS["stats_forward"](logits, labels, None, params, -100)  # CPU tensors
    launches[0].kernel.asm["ptx"]

Argument binding, specialisation, the cache of compiled kernels and the compiler are Triton's; only what would load the
binary and start it is left out. So outputs hold whatever `torch.empty` found, unless `on_launch` computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from erc.triton_kernels import tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# (multiprocessors, bytes of the L2 cache): A100, H100, B200, MI300X, MI355X, RX 7900 XTX.
_SIZES = {
    "sm_80": (108, 40 << 20),
    "sm_90": (132, 50 << 20),
    "sm_100": (148, 126 << 20),
    "gfx942": (304, 4 << 20),
    "gfx950": (256, 4 << 20),
    "gfx1100": (96, 6 << 20),
}


@dataclass(frozen=True)
class Launch:
    """What a GPU would have been given."""

    kernel: CompiledKernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # by parameter name: tensors, numbers, constexprs, None
    options: dict[str, Any]  # num_warps, maxnreg, ...


class _Driver:
    """What `JITFunction.run` asks of a driver before it launches."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_device(self) -> str:
        return self._arch  # Triton keeps what it compiled by device: one for each target

    def get_current_stream(self, _device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._arch]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def is_active(self) -> bool:
        return True


def device_like(arch: str) -> tuning.Device:
    """A GPU of this architecture, as `tuning` sees it."""
    return tuning.Device(arch, _SIZES[arch][0], TARGETS[arch].warp_size, _SIZES[arch][1])


@contextmanager
def stub_driver(arch: str, on_launch: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """CPU tensors count as those of a GPU of this architecture; yields the launches, in order."""
    launches: list[Launch] = []
    compile_and_launch = JITFunction.run

    def run(self: JITFunction, *args, grid: tuple[int, ...], warmup: bool, **kwargs) -> CompiledKernel:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs)
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arguments = {name: named.pop(name) for name in self.arg_names}
        launches.append(Launch(kernel, grid, arguments, options=named))
        if on_launch is not None:
            on_launch(launches[-1])
        return kernel

    active = driver._active  # `driver.active` looks for a GPU
    driver.set_active(_Driver(arch))
    try:
        with mock.patch.object(JITFunction, "run", run), tuning.cpu_as(device_like(arch)):
            yield launches
    finally:
        driver.set_active(active)
