"""Which backend runs a call, and why.

`cpu` is the C++ library built beside this package, `triton` and `cuda` are for GPUs, `torch` is `erc.reference` and
runs everywhere. A call takes, in this order: its `backend=` argument, `use_backend`, the environment variable
`ERC_BACKEND`, or the first available one of `DEFAULT_ORDER` for the device of the logits.

A backend is available on a device if its library loads and a call of two tiny operators gives the right numbers there.
That call reads a result, so it is made once per device, and never while a graph is captured or a call is traced:
there an earlier answer counts, or the launch's own error.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from erc import ops, reference
from erc.constants import NUM_PARAMS

_Function = TypeVar("_Function", bound=Callable[..., Any])
NAMES = ("cpu", "triton", "cuda", "torch")
DEFAULT_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")}
_NAMESPACES = {name: f"erc_{name}" for name in ("cpu", "triton", "cuda")}
_libraries: dict[str, torch.library.Library] = {}
_forced: list[str] = []
_answers: dict[tuple[str, torch.device], str | None] = {}  # of `_try_out`, by backend and device
_warned: set[torch.device] = set()


# ---- loading ---------------------------------------------------------------------------------------------------------


def library_path(name: str) -> Path:
    """Where the compiled library `name` lies; `ERC_CPU_LIBRARY` and `ERC_CUDA_LIBRARY` point elsewhere."""
    override = os.environ.get(f"ERC_{name.upper()}_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "lib" / f"liberc_{name}.so"


def _load_library(name: str) -> str | None:
    path = library_path(name)
    if not path.exists():
        return f"{path.name} was not built: install with a C++ compiler{' and nvcc' if name == 'cuda' else ''}"
    if name not in _libraries:  # a namespace is defined once per process, however often loading is tried
        _libraries[name] = ops.define(_NAMESPACES[name])
    torch.ops.load_library(path)
    if _text_of(path, "erc_stamp") != ops.stamp():
        return f"{path.name} was built from other sources than this package: build it again"
    return None


@cache  # a loaded library does not change
def _text_of(path: Path, symbol: str) -> str | None:
    """What a function `const char* symbol()` of a library returns, None where it has no such function."""
    function = getattr(ctypes.CDLL(str(path)), symbol, None)
    if function is None:
        return None
    function.restype = ctypes.c_char_p
    return function().decode()


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

    if "triton" not in _libraries:
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
def _load(name: str) -> str | None:
    """Why backend `name` does not load, or None where it does."""
    try:
        return _LOADERS[name]()
    except Exception as error:  # whatever it is, another backend may run
        return f"does not load: {_in_short(error)}"


def _in_short(error: BaseException) -> str:
    """The first line of an error; of a chain, as compilers raise it, the line of the first cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


# ---- trying out ------------------------------------------------------------------------------------------------------


def _try_out(name: str, device: torch.device) -> str | None:
    """Why backend `name` does not run on `device`, found by statistics and gradient of two rows; None where it does."""
    row = torch.tensor([0.0, 1.0, 0.0, 2.0], device=device, dtype=torch.float32).mul(math.log(2))
    logits = row.expand(1, 2, 4).contiguous()
    params = torch.tensor([1.0, 0.0, 1.0] + [0.0] * (NUM_PARAMS - 3), dtype=torch.float64, device="cpu")
    inputs = (logits, torch.full((2,), 3, dtype=torch.int64, device=device), None, params, -100)
    expected = [-math.log(2), 1.75 * math.log(2), 3 * math.log(2), -0.125, -0.25, -0.125, 0.5]
    try:
        with synchronisation_allowed(device):
            logprob, entropy, logsumexp, saved = operators(name).stats_forward(*inputs)
            gradient = operators(name).stats_backward(*inputs, saved, torch.ones_like(logits[0, :, 0]), None, None)
            rows = torch.cat((torch.stack((logprob, entropy, logsumexp), 1), gradient[0]), 1).tolist()
    except Exception as error:
        return f"does not run on {device}: {_in_short(error)}"
    if all(
        math.isclose(value, right, rel_tol=1e-5) for row in rows for value, right in zip(row, expected, strict=True)
    ):
        return None
    return f"gives wrong numbers on {device}: {rows[0]} for {expected}"


@contextmanager
def synchronisation_allowed(device: torch.device) -> Iterator[None]:
    """Inside, reading a result is no error, whatever `torch.cuda.set_sync_debug_mode` says."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def results_are_readable(device: torch.device) -> bool:
    """Whether a result can be read: not under a dispatch mode, such as fake tensors, nor while a graph is captured."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _home(name: str) -> torch.device:
    """The device on which a backend is tried out where no tensor says which."""
    gpu = name == "cuda" or (name == "triton" and not triton_is_interpreted())
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


def why_not(name: str, device: torch.device | None = None, tracing: bool = False) -> str | None:
    """Why backend `name` is not available on `device` (by default the current one), or None where it is.

    Loads it, and tries it out once per device, unless `tracing` or a mode or capture forbids it.
    """
    reason = _load(name)
    if reason is not None or name == "torch":
        return reason
    key = (name, device or _home(name))
    if key not in _answers:
        if tracing or not results_are_readable(key[1]):
            return None
        _answers[key] = _try_out(*key)
    return _answers[key]


def backends() -> dict[str, str]:
    """Every backend's name, and "available" or the reason why it is not, on the current GPU where it needs one.

    >>> backends()["torch"]
    'available'
    """
    return {name: why_not(name) or "available" for name in NAMES}


def cpu_isa() -> str | None:
    """The instruction set that the `cpu` backend runs on this processor, None where it is not available."""
    return None if why_not("cpu") is not None else _text_of(library_path("cpu"), "erc_cpu_isa")


def cpu_wide_product() -> str:
    """The instructions by which the `cpu` backend multiplies bfloat16 into float32, empty where it does not."""
    return "" if why_not("cpu") is not None else _text_of(library_path("cpu"), "erc_cpu_wide_product") or ""


class use_backend(ContextDecorator):
    """Run every call inside on backend `name`, or as a decorator every call of a function. By itself it changes
    nothing, and warns.

    >>> with use_backend("torch"):
    ...     pass
    """

    def __init__(self, name: str) -> None:
        _check_name(name, "name")
        self.name, self._entered = name, False

    def __enter__(self) -> None:
        self._entered = True
        _forced.append(self.name)

    def __exit__(self, *_: object) -> None:
        _forced.pop()

    def __call__(self, function: _Function) -> _Function:
        self._entered = True
        return super().__call__(function)

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):
            warnings.warn(
                f"use_backend({self.name!r}) changes nothing by itself: write `with erc.use_backend({self.name!r}):` "
                f"around the calls, or set ERC_BACKEND={self.name} for the whole process",
                stacklevel=2,
            )


def _check_name(name: str, argument: str) -> None:
    if name not in NAMES and name not in _NAMESPACES:
        raise ValueError(f"{argument} must be one of {NAMES}, got {name!r}")


def _runs_on(name: str, device: str) -> bool:
    if name == "triton":
        return device != "cpu" or triton_is_interpreted()
    return name == "torch" or name == device or name not in NAMES


def select(logits: Tensor, backend: str | None = None) -> tuple[str, str]:
    """The backend for `logits`, and the reason. Compiled code keeps the choice made when it was traced.

    Warns once where no compiled backend is available and the float64 reference takes the call.

    Raises:
        ValueError: for an unknown backend, one for another device, or one that is not available.
    """
    return _select(logits.device, backend, torch.compiler.is_compiling())


def _select(device: torch.device, backend: str | None, tracing: bool) -> tuple[str, str]:
    for name, reason in (
        (backend, "the backend argument"),
        (_forced[-1] if _forced else None, "use_backend"),
        (os.environ.get("ERC_BACKEND"), "ERC_BACKEND"),
    ):
        if name is None:
            continue
        _check_name(name, "backend")
        if not _runs_on(name, device.type):
            raise ValueError(f"backend {name!r} (from {reason}) does not run on {device.type} tensors")
        if name in NAMES and (problem := why_not(name, device, tracing)) is not None:
            raise ValueError(f"backend {name!r} (from {reason}) is not available: {problem}")
        return name, reason
    problems = {}
    for name in DEFAULT_ORDER.get(device.type, ("torch",)):
        problems[name] = why_not(name, device, tracing)
        if problems[name] is None:
            if name == "torch":
                _warn_of_fallback(device, problems)
            return name, f"the first available one for {device.type} tensors"
    raise AssertionError("the torch backend is always available")


def _warn_of_fallback(device: torch.device, problems: dict[str, str | None]) -> None:
    if device in _warned or device.type == "meta":
        return
    _warned.add(device)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in problems.items() if reason) or "none is for them"
    warnings.warn(
        f"erc computes {device} tensors in float64 by plain PyTorch, many times slower and with several tensors as "
        f"large as the logits: no other backend is available ({reasons})",
        stacklevel=2,
    )


# What torch.compiler.assume_constant_result sets; the decorator itself imports the whole compiler.
_select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operators(name: str) -> Any:
    """The operators of backend `name`: `operators("cpu").stats_forward(...)`."""
    if name == "torch":
        return reference.OPERATORS
    return getattr(torch.ops, _NAMESPACES[name])


def register_namespace(name: str, namespace: str) -> None:
    """Make operators defined elsewhere, such as a test build, selectable as backend `name` on any device."""
    _NAMESPACES[name] = namespace
