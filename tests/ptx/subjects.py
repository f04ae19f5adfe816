"""What the contract is tested on: a backend, an architecture, and the form in which rows are spread over blocks.

ERC_PTX=all (`make ptx`) takes everything, ERC_PTX=90 everything for sm_90. Without it, beside the other tests, there is
one architecture for each backend, and `conftest` takes some cases of each test. A hash of the kernels' sources chooses:
every change of a kernel may choose others, the same tree always chooses the same.
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
            clusters, architecture = self.form == "cluster", self.architecture
            host.configure(clusters=clusters, compiled_for=architecture, multiprocessors=multiprocessors)
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
    """Kernels are compiled when they are asked for; two files at a time where all of them will be."""
    library = nvcc.Library(architecture)
    if architecture in architectures("cuda"):
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
def digest(backend: str) -> int:
    """Of the sources of a backend's kernels."""
    folder, pattern = ("csrc", "**/*") if backend == "cuda" else ("erc/triton_kernels", "*.py")
    files = sorted(path for path in (_ROOT / folder).glob(pattern) if path.is_file())
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:4], "big")


def architectures(backend: str) -> tuple[int, ...]:
    """Those that are tested now."""
    choice = os.environ.get("ERC_PTX", "")
    if choice == "all":
        return ARCHITECTURES
    return (int(choice) if choice else ARCHITECTURES[digest(backend) % len(ARCHITECTURES)],)


def cluster_architecture() -> int:
    """One that has clusters, and whose kernels are compiled anyhow if there is one."""
    able = [architecture for architecture in architectures("cuda") if architecture >= 90]
    return able[0] if able else 90 + 10 * (digest("cuda") % 2)


def subjects(family: str) -> list:
    """Parameters for a test of a family of kernels; each carries its reason to be skipped, if there is one."""
    found: list[Subject] = []
    for backend in ("cuda", "triton"):
        for architecture in architectures(backend):
            forms = ("block",) if family in ("pairs", "scale") else ("block", "split")
            if backend == "cuda" and family == "loss" and architecture >= 90:
                forms = ("cluster", *forms)
            found += [Subject(backend, architecture, form) for form in forms]
    if family == "loss" and not any(subject.form == "cluster" for subject in found):
        found.append(Subject("cuda", cluster_architecture(), "cluster"))
    parameters = []
    for subject in found:
        reason = why_not(subject.backend)
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        parameters.append(pytest.param(subject, marks=marks, id="-".join(map(str, subject))))
    return parameters


def is_whole() -> bool:
    """Whether every case is tested, not only what fits beside the other tests."""
    return "ERC_PTX" in os.environ
