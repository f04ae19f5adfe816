"""What the contract is tested on: a backend, an architecture, and the form in which rows are spread over blocks.

All of them with ERC_PTX=all (`make ptx`). Otherwise one architecture for each kernel, chosen by a hash of the sources:
every change of a kernel may choose another, the same tree always chooses the same. ERC_PTX=90 chooses by hand.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from erc import ops
from erc.backend import register_namespace
from tests.cuda_host import build
from tests.ptx import native, nvcc
from tests.ptx.machine import Checks

ARCHITECTURES = (80, 90, 100)
FAMILIES = ("statistics", "loss", "pairs", "scale")
TRITON_NAMESPACE = "erc_triton_ptx"
_ROOT = Path(__file__).parents[2]
_MANY, _FEW = 132, 1  # multiprocessors: rows are split over blocks, or not


class Subject(NamedTuple):
    """`form`: "block" is a block per row, "split" several; "cluster" is the fused loss in a cluster of blocks."""

    backend: str
    architecture: int
    form: str

    @property
    def name(self) -> str:
        """The backend as `erc` calls it."""
        return f"ptx_{self.backend}"

    @contextmanager
    def running(self, checks: Checks | None = None):
        """Kernels of this backend run here; yields the engine, whose `launches` say what ran."""
        checks = checks or Checks()
        multiprocessors = _MANY if self.form == "split" else _FEW
        if self.backend == "triton":
            from tests.ptx.triton_engine import TritonEngine

            _register_triton()
            engine = TritonEngine(self.architecture, multiprocessors, checks)
        else:
            from tests.ptx.cuda_engine import CudaEngine

            host = build.load()
            register_namespace("ptx_cuda", build.NAMESPACE)
            host.configure(clusters=self.form == "cluster", multiprocessors=multiprocessors)
            engine = CudaEngine(host, _library(self.architecture), checks)
        with engine.running():
            yield engine


@cache
def _register_triton() -> object:
    from erc import triton_kernels

    library = ops.define(TRITON_NAMESPACE)
    triton_kernels.register(library)
    register_namespace("ptx_triton", TRITON_NAMESPACE)
    return library


@cache
def _library(architecture: int) -> nvcc.Library:
    """All that a launcher of this architecture may launch, compiled two files at a time."""
    library = nvcc.Library(architecture)
    nvcc.compile_all((source, architecture) for source in library.sources)
    return library


def why_not(backend: str) -> str | None:
    """Why a backend's kernels cannot run here, or None."""
    if native.why_not() is not None:
        return native.why_not()
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "TRITON_INTERPRET=1: this process cannot compile kernels" if interpreted else None
    if nvcc.nvcc() is None:
        return "needs nvcc"
    return None if build.compiler() else "needs g++"


@cache
def _digest(backend: str) -> int:
    folder, pattern = ("csrc", "**/*") if backend == "cuda" else ("erc/triton_kernels", "*.py")
    files = sorted(path for path in (_ROOT / folder).glob(pattern) if path.is_file())
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4], "big")


def architectures(backend: str) -> tuple[int, ...]:
    """Those that are tested now."""
    choice = os.environ.get("ERC_PTX", "")
    if choice == "all":
        return ARCHITECTURES
    return (int(choice) if choice else ARCHITECTURES[_digest(backend) % len(ARCHITECTURES)],)


def subjects(family: str) -> list:
    """Parameters for a test of a family of kernels; each carries its reason to be skipped, if there is one."""
    found = []
    for backend in ("cuda", "triton"):
        for architecture in architectures(backend):
            forms = ("block",) if family in ("pairs", "scale") else ("block", "split")
            if backend == "cuda" and family == "loss" and architecture >= 90:
                forms = ("cluster", *forms)
            found += [Subject(backend, architecture, form) for form in forms]
    if family == "loss" and not any(s.form == "cluster" for s in found):
        found.append(Subject("cuda", 90 + 10 * (_digest("cuda") % 2), "cluster"))
    parameters = []
    for subject in found:
        reason = why_not(subject.backend)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param(subject, marks=marks, id="-".join(map(str, subject))))
    return parameters


def is_whole() -> bool:
    """Whether everything is tested (`make ptx`), not what fits beside the other tests."""
    return os.environ.get("ERC_PTX") == "all"
