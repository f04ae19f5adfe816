"""Every backend that this process can run, in turn: `kernels` each once, `machine` each form of its kernels.

Triton decides at import whether it interprets, and the CPU library at its first call which instruction set it takes. So
the modules that use the fixtures run again in processes of their own, each with the backends of its environment:
test_other_processes.py lists them. On a GPU `machine` makes it the default device.
"""

from __future__ import annotations

import os

import pytest
import torch

import erc
from tests.backends import CUDA_FORMS, CUDA_HOST, GPU, INTERPRETED, open_backend

__all__ = ["CUDA_HOST"]


def _here(*cuda: str) -> list[str]:
    if INTERPRETED:
        return ["triton"]
    return ["cpu"] if "ERC_CPU_ISA" in os.environ else ["cpu", *cuda, "torch"]


@pytest.fixture
def _opened(request, monkeypatch):
    opened = open_backend(request.param)
    if request.param == "triton":
        from erc.triton_kernels import tuning

        monkeypatch.setattr(tuning, "LANES", 32)  # many tiles and segments at sizes that the interpreter gets through
    if request.param.startswith("gpu-"):
        torch.set_default_device("cuda")
    with erc.use_backend(opened.name):
        yield opened
    torch.set_default_device(None)


@pytest.fixture
def kernels(_opened):
    """The name of a backend that every call of the test takes."""
    return _opened.name


@pytest.fixture
def machine(_opened):
    """A backend which every call of the test takes; CUDA's on machines that hold a row in a cluster of blocks, in one
    block, or split over blocks."""
    return _opened


@pytest.fixture
def native(_opened):
    """A machine with operators of its own: all but PyTorch's."""
    return _opened


@pytest.fixture
def cpu():
    """For what is a matter of the CPU's sweep, or too much for an interpreter."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter has the process")
    with erc.use_backend(open_backend("cpu").name):
        yield


def pytest_generate_tests(metafunc):
    machines = [*_here(*CUDA_FORMS), *GPU]
    chosen = {"kernels": _here("cuda-cluster"), "machine": machines}
    chosen["native"] = [name for name in machines if name != "torch"]
    for name, backends in chosen.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize("_opened", backends, indirect=True)
