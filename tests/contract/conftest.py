"""The fixture `kernels`: every backend that this process can run, one after the other.

Triton decides at import whether it interprets, and the CPU library at its first call which instruction set it takes. So
the modules that use the fixture run again in processes of their own, each with the backends that its environment names:
test_other_processes.py lists them.
"""

from __future__ import annotations

import os

import pytest

import erc
from erc.backend import register_namespace
from tests.cuda_host import build

CUDA_HOST = "cuda_host"


def _here() -> list[str]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ["triton"]
    if "ERC_CPU_ISA" in os.environ:
        return ["cpu"]
    return ["cpu", CUDA_HOST, "torch"]


@pytest.fixture(params=_here())
def kernels(request, monkeypatch):
    """The name of a backend that every call of the test takes."""
    name = request.param
    if name == CUDA_HOST:
        if build.compiler() is None:
            pytest.skip("needs g++")
        build.load().configure(clusters=True, multiprocessors=1)
        register_namespace(CUDA_HOST, build.NAMESPACE)
    elif erc.backends()[name] != "available":
        pytest.skip(f"backend {name}: {erc.backends()[name]}")
    if name == "triton":
        from erc.triton_kernels import tuning

        monkeypatch.setattr(
            tuning, "LANES", 32
        )  # several tiles and segments at sizes that the interpreter gets through
    with erc.use_backend(name):
        yield name
