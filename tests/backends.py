"""The operators of every backend that this process can run, as fixtures for the tests of the contract.

`operators` gives each backend once; `every_form` also each form of the CUDA kernels (a row in a cluster of blocks, in one
block, split over blocks). Both need no GPU: CUDA runs on the host (`tests.cuda_host`). Triton interprets for a whole
process or not at all: with TRITON_INTERPRET=1 it is the only one.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erc.backend import operators as operators_of
from erc.backend import why_not
from erc.constants import NUM_PARAMS, Param
from tests.cuda_host import build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_FORMS = {"cuda-cluster": (True, 1), "cuda-block": (False, 1), "cuda-split": (False, 132)}


class Backend(NamedTuple):
    name: str
    ops: Any
    checks_values: bool  # whether a bad value raises, as on the CPU, or makes its token NaN


def _backend(name: str) -> Backend:
    if name.startswith("cuda"):
        if build.compiler() is None:
            pytest.skip("needs g++")
        host = build.load()
        clusters, multiprocessors = CUDA_FORMS[name]
        host.configure(clusters=clusters, multiprocessors=multiprocessors)
        return Backend(name, host.ops, False)
    if (reason := why_not(name)) is not None:
        pytest.skip(reason)
    return Backend(name, operators_of(name), name == "cpu")


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu", "cuda-block"])
def operators(request) -> Backend:
    return _backend(request.param)


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu", *CUDA_FORMS])
def every_form(request) -> Backend:
    return _backend(request.param)


_DEFAULTS = {
    Param.TEMPERATURE: 1.0,
    Param.LOGIT_SCALE: 1.0,
    Param.GATE_EPS: 1e-8,
    Param.KL_CLAMP: float("inf"),
    Param.NORMALIZER: -1.0,
    Param.ENTROPY_NORMALIZER: -1.0,
    Param.NLL_NORMALIZER: -1.0,
    Param.ADVANTAGE_LENGTH: 1.0,
    Param.GRAD_SCALE: 1.0,
}


def params(rule: tuple[float, ...] = (), **numbers: float) -> Tensor:
    """The `params` tensor with `rule` and the given numbers, by the names of `Param` in lower case; the others count
    tokens and change nothing."""
    values = torch.zeros(NUM_PARAMS, dtype=torch.float64, device="cpu")
    given = {**_DEFAULTS, **{Param[name.upper()]: value for name, value in numbers.items()}}
    for position, value in given.items():
        values[position] = value
    values[Param.RULE : Param.RULE + len(rule)] = torch.tensor(rule, dtype=torch.float64, device="cpu")
    return values
