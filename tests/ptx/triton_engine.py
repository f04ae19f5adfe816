"""Triton kernels on PTX: the whole way of a launch, but for the last step.

`JITFunction.run` binds arguments, specialises, compiles down to machine code and calls the launcher of the active
driver, as it does on a GPU. The driver here is a stand-in that knows its target; its launcher hands the PTX of the
compiled kernel and the flattened arguments to the interpreter. Tensors stay in the CPU's memory; `tuning.cpu_as` makes
the library's launchers take it for a GPU's.
"""

from __future__ import annotations

import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.ptx.machine import SHARED_LIMIT, Checks, Counts, Regions, Shape, launch
from tests.ptx.native import BUILD_DIR
from tests.ptx.program import Program
from tests.ptx.source import parse

FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
"""How each type of argument lies in parameter memory."""


@dataclass
class Launched:
    """One launch: the kernel's name, its shape and what it did."""

    kernel: str
    shape: Shape
    counts: Counts


@dataclass
class TritonEngine:
    """Executes every Triton launch of this process while `running`, compiled for `architecture`."""

    architecture: int
    multiprocessors: int | None = None  # fewer or more than the architecture's GPU has
    checks: Checks = field(default_factory=Checks)
    launches: list[Launched] = field(default_factory=list)
    regions: Regions = field(default_factory=Regions)

    @contextmanager
    def running(self):
        from triton import knobs
        from triton.runtime import driver

        from erc.triton_kernels import tuning
        from tests.stub_driver import device_like

        device = device_like(f"sm_{self.architecture}")
        if self.multiprocessors is not None:
            device = device._replace(multiprocessors=self.multiprocessors)
        active, folder = driver._active, knobs.cache.dir
        driver.set_active(_Driver(self))
        _engines.append(self)
        knobs.cache.dir = str(BUILD_DIR / "triton")
        knobs.runtime.kernel_load_start_hook.add(_remember)
        try:
            with tuning.cpu_as(device):
                yield self
        finally:
            knobs.runtime.kernel_load_start_hook.remove(_remember)
            knobs.cache.dir = folder
            driver._active = active
            _engines.pop()

    def execute(self, program: Program, grid: tuple[int, int, int], threads: int, shared: int, arguments: list) -> None:
        for index, (_, value) in enumerate(arguments):
            if isinstance(value, torch.Tensor) and value.numel():
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                self.regions.add(value.data_ptr(), (last + 1) * value.element_size(), f"argument {index}")
        parameters = [_packed(type_, value) for type_, value in arguments]
        hidden = len(program.kernel.parameters) - len(parameters)
        if not 0 <= hidden <= 2:
            raise TypeError(f"{program.kernel.name}: {hidden} parameters beside the arguments")
        parameters += [bytes(8)] * hidden  # scratch memory, which none of the kernels uses
        if grid[1:] != (1, 1):
            raise TypeError(f"a grid of {grid}: one dimension is modelled")
        shape = Shape(grid[0], threads, 1, shared)
        counts = launch(program, shape, parameters, self.regions, self.checks)
        self.launches.append(Launched(program.kernel.name, shape, counts))


def _packed(type_: str, value) -> bytes:
    if type_.startswith("*"):
        return struct.pack("<Q", value.data_ptr() if isinstance(value, torch.Tensor) else int(value))
    return struct.pack("<" + FORMATS[type_], value)


_programs: dict[str, Program] = {}  # by the path of the PTX file
_loading: list[Path] = []
_engines: list[
    TritonEngine
] = []  # that run, the innermost last: a compiled kernel outlives the engine that compiled it


def _remember(module, function, name: str, metadata_group: dict[str, str], hash_: str) -> None:
    """Which compiled kernel is about to be loaded: its PTX lies beside the machine code."""
    _loading[:] = [Path(path) for path in metadata_group.values() if path.endswith(".ptx")]


class _Utils:
    """What a driver knows about its device."""

    def __init__(self, engine: TritonEngine) -> None:
        self.engine = engine

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.engine.architecture] * 1024}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, Program, int, int, int]:
        (path,) = _loading
        if str(path) not in _programs:
            _programs[str(path)] = Program(parse(path.read_text(), name))
        return object(), _programs[str(path)], 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    """The active driver of Triton: one device per architecture, so that each has its own cache of compiled kernels."""

    def __init__(self, engine: TritonEngine) -> None:
        self.engine = engine
        self.utils = _Utils(engine)

    def launcher_cls(self, source, metadata):
        types = _leaves(tuple(source.signature.values()))

        def launcher(x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *arguments):
            engine = _engines[-1]
            values = _leaves(arguments, tuple(source.signature.values()))
            given = [(type_, value) for type_, value in zip(types, values, strict=True) if type_ != "constexpr"]
            engine.execute(function, (x, y, z), metadata.num_warps * 32, metadata.shared, given)

        return launcher

    def get_current_device(self) -> int:
        return self.engine.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.engine.architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def is_active(self) -> bool:
        return True


def _leaves(values: tuple, like: tuple | None = None) -> list:
    """A tuple argument is its elements, one after another; `like` says where tuples are."""
    out = []
    for value, kind in zip(values, values if like is None else like, strict=True):
        out += _leaves(tuple(value), None if like is None else tuple(kind)) if isinstance(kind, tuple) else [value]
    return out
