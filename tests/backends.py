"""The operators of every backend that this process can run, as fixtures for the tests of the contract.

`operators` gives each backend once; `every_form` also each form of the CUDA kernels (a row in a cluster of blocks, in
one block, split over blocks), which needs no GPU: CUDA runs on the host (`tests.cuda_host`). Triton interprets for a
whole process or not at all: with TRITON_INTERPRET=1 it is the only one. Where there is a GPU, its backends come on top.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erc.backend import operators as operators_of
from erc.backend import register_namespace, why_not
from erc.constants import NUM_PARAMS, Param, Present, Reduction
from erc.ops import stats_dtype
from tests.cuda_host import build

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA_FORMS = {"cuda-cluster": (True, 1), "cuda-block": (False, 1), "cuda-split": (False, 132)}


CUDA_HOST = "cuda_host"


class Backend(NamedTuple):
    name: str  # what `backend=` takes
    ops: Any
    checks_values: bool  # whether a bad value raises, as on the CPU, or makes its token NaN
    gradient: float  # the relative error of a float32 gradient: a GPU's exponential is good to 2^-22


class OnDevice:
    """A backend's operators on copies of the caller's CPU tensors on `device`, where `params` alone stays; what an
    operator writes is copied back."""

    def __init__(self, ops: Any, device: str) -> None:
        self._ops, self._device = ops, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operator = getattr(self._ops, name).default

        def call(*values: Any) -> Any:
            arguments = list(zip(operator._schema.arguments, values, strict=False))  # the last ones may have a default
            there = [
                value.to(self._device, copy=True) if isinstance(value, Tensor) and argument.name != "params" else value
                for argument, value in arguments
            ]
            results = operator(*there)
            for (argument, value), written in zip(arguments, there, strict=True):
                if isinstance(value, Tensor) and argument.alias_info is not None:
                    value.copy_(written)
            return torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, results)

        return call


def open_backend(name: str) -> Backend:
    if name.startswith("cuda-"):
        if build.compiler() is None:
            pytest.skip("needs g++")
        host = build.load()
        clusters, multiprocessors = CUDA_FORMS[name]
        host.configure(clusters=clusters, multiprocessors=multiprocessors)
        register_namespace(CUDA_HOST, build.NAMESPACE)
        return Backend(CUDA_HOST, host.ops, False, 4e-6)
    backend = name.removeprefix("gpu-")
    if (reason := why_not(backend)) is not None:
        pytest.skip(reason)
    return Backend(backend, operators_of(backend), name == "cpu", 1e-6 if name in ("cpu", "torch") else 4e-6)


def _on_device(name: str) -> Backend:
    opened = open_backend(name)
    return opened._replace(ops=OnDevice(opened.ops, "cuda")) if name.startswith("gpu-") else opened


_NEEDS_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
GPU = [pytest.param(f"gpu-{name}", marks=_NEEDS_GPU) for name in ("cuda", "triton")]


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu", "cuda-block", *GPU])
def operators(request) -> Backend:
    return _on_device(request.param)


@pytest.fixture(params=["triton"] if INTERPRETED else ["cpu", *CUDA_FORMS, *GPU])
def every_form(request) -> Backend:
    return _on_device(request.param)


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as a kernel stores them: rounded once. Triton's interpreter cuts float32 off to bfloat16."""
    if not (INTERPRETED and dtype == torch.bfloat16):
        return values.to(dtype)
    return (values.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)


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


def loss_call(
    ops: Any, logits: Tensor, labels: Tensor, in_place: bool = False, weights: Tensor | None = None, **numbers
):
    """Loss, per-token loss, log-prob, entropy, flags, metrics, number of tokens, and the gradient unless it is written
    over the logits: a clipped loss with an entropy bonus, whose inputs change from token to token."""
    values = torch.linspace(-1, 1, labels.numel())
    weights = 1 + values.abs() if weights is None else weights
    numbers = {"reduction": Reduction.TOKEN_SUM, "entropy_coef": 0.2, "entropy_shares": 1, **numbers}
    inf = float("inf")
    arguments = (None, labels, values + 0.5, weights, values - 6, *[None] * 9)
    arguments += (params((0.2, 0.28, inf, inf), present=Present.OLD_LOGPROB, **numbers), -100, None, None, False, True)
    operator = ops.policy_loss_ if in_place else ops.policy_loss
    loss, per_token, flags, metrics, tokens, gradient = operator(logits, *arguments)
    return loss, *per_token, flags, metrics, tokens, *([] if in_place else [gradient])


def shard_state(ops: Any, logits: Tensor, labels: Tensor, first_token: int, **numbers: float) -> Tensor:
    """`[4, N]` of the columns of a row that begin at `first_token`."""
    state = torch.empty(4, labels.numel(), dtype=stats_dtype(logits.dtype))
    ops.partial_stats_(logits, labels, None, params(**numbers), -100, None, 0, first_token, state)
    return state
