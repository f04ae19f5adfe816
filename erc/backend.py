"""Layer 1: which backend runs a call, and why.

`cpu` is the C++ library built beside this package, `triton` and `cuda` are for GPUs, `torch` is `erc.reference` and
runs everywhere. A call takes, in this order: its `backend=` argument, `use_backend`, the environment variable
`ERC_BACKEND`, or the first available one of `DEFAULT_ORDER` for the device of the logits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erc import ops, reference

NAMES = ("cpu", "triton", "cuda", "torch")
DEFAULT_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_NAMESPACES = {name: f"erc_{name}" for name in ("cpu", "triton", "cuda")}
_libraries: dict[str, torch.library.Library] = {}
_forced: list[str] = []


def library_path(name: str) -> Path:
    """Where the compiled library `name` lies; `ERC_CPU_LIBRARY` and `ERC_CUDA_LIBRARY` point elsewhere."""
    override = os.environ.get(f"ERC_{name.upper()}_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "lib" / f"liberc_{name}.so"


def _load_library(name: str) -> str | None:
    path = library_path(name)
    if not path.exists():
        return f"{path.name} was not built: install with a C++ compiler{' and nvcc' if name == 'cuda' else ''}"
    _libraries[name] = ops.define(_NAMESPACES[name])
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None


def _load_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _load_library("cuda")


def triton_is_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, by Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not triton_is_interpreted():
        return "no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    from erc import triton_kernels

    _libraries["triton"] = ops.define(_NAMESPACES["triton"])
    triton_kernels.register(_libraries["triton"])
    return None


_LOADERS: dict[str, Callable[[], str | None]] = {
    "cpu": lambda: _load_library("cpu"),
    "triton": _load_triton,
    "cuda": _load_cuda,
    "torch": lambda: None,
}


@cache
def why_not(name: str) -> str | None:
    """Why backend `name` is not available, or None where it is. Loads it."""
    return _LOADERS[name]()


def backends() -> dict[str, str]:
    """Every backend's name, and "available" or the reason why it is not.

    >>> backends()["torch"]
    'available'
    """
    return {name: why_not(name) or "available" for name in NAMES}


def cpu_isa() -> str | None:
    """The instruction set that the `cpu` backend runs on this processor, None where it is not available."""
    if why_not("cpu") is not None:
        return None
    symbol = ctypes.CDLL(str(library_path("cpu"))).erc_cpu_isa
    symbol.restype = ctypes.c_char_p
    return symbol().decode()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call inside on backend `name`.

    >>> with use_backend("torch"):
    ...     pass
    """
    _check_name(name, "name")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def _check_name(name: str, argument: str) -> None:
    if name not in NAMES and name not in _NAMESPACES:
        raise ValueError(f"{argument} must be one of {NAMES}, got {name!r}")


def _runs_on(name: str, device: str) -> bool:
    if name == "triton":
        return device != "cpu" or triton_is_interpreted()
    return name == "torch" or name == device or name not in NAMES


def select(logits: Tensor, backend: str | None = None) -> tuple[str, str]:
    """The backend for `logits`, and the reason. Compiled code keeps the choice made when it was traced.

    Raises:
        ValueError: for an unknown backend, one for another device, or one that is not available.
    """
    return _select(logits.device.type, backend)


@torch.compiler.assume_constant_result
def _select(device: str, backend: str | None) -> tuple[str, str]:
    for name, reason in (
        (backend, "the backend argument"),
        (_forced[-1] if _forced else None, "use_backend"),
        (os.environ.get("ERC_BACKEND"), "ERC_BACKEND"),
    ):
        if name is None:
            continue
        _check_name(name, "backend")
        if not _runs_on(name, device):
            raise ValueError(f"backend {name!r} (from {reason}) does not run on {device} tensors")
        if name in NAMES and why_not(name) is not None:
            raise ValueError(f"backend {name!r} (from {reason}) is not available: {why_not(name)}")
        return name, reason
    for name in DEFAULT_ORDER.get(device, ("torch",)):
        if why_not(name) is None:
            return name, f"the first available one for {device} tensors"
    raise AssertionError("the torch backend is always available")


def operators(name: str) -> Any:
    """The operators of backend `name`: `operators("cpu").stats_forward(...)`."""
    if name == "torch":
        return reference.OPERATORS
    return getattr(torch.ops, _NAMESPACES[name])


def register_namespace(name: str, namespace: str) -> None:
    """Make operators defined elsewhere, such as a test build, selectable as backend `name` on any device."""
    _NAMESPACES[name] = namespace
