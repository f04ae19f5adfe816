"""Calls of the public functions that between them launch every kernel with every feature on and off."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

import erc
from erc import backend, ops, triton_kernels

BACKEND = "triton, stubbed"
NAMESPACE = "erc_triton_stub"
ROWS = (2, 300)  # more than any GPU shares over several programs; sequences, by which some losses take their mean
Call = Callable[[], object]


def register() -> torch.library.Library:
    """Triton's operators for CPU tensors, selectable by name; the handle keeps them alive."""
    library = ops.define(NAMESPACE)
    triton_kernels.register(library)
    backend.register_namespace(BACKEND, NAMESPACE)
    return library


def _loss(logits: Tensor, objective: str | erc.Objective, grad: bool = True, **settings: object) -> Call:
    def call() -> None:
        leaf, values = logits.clone().requires_grad_(grad), torch.ones(logits.shape[:-1])
        given = {"old_logprob": values, "old_entropy": values, "ref_logprob": values, "advantages": values}
        if isinstance(objective, erc.Objective) and objective.nll_coef:
            given["nll_mask"] = values > 0
        out = erc.policy_loss(
            leaf * 1 if settings.get("inplace_backward") else leaf, torch.zeros_like(values, dtype=torch.int64),
            objective=objective, grad_scale=1.0 if logits.dtype == torch.float16 else None, backend=BACKEND,
            **given, **settings,
        )  # fmt: skip
        if grad:
            out.loss.backward()

    return call


def _statistics(logits: Tensor, gradients: tuple[str, ...] = ("logprob", "entropy", "logsumexp"), **settings) -> Call:
    def call() -> None:
        leaf = logits.clone().requires_grad_()
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64) if "logprob" in gradients else None
        stats = erc.token_stats(leaf, labels, backend=BACKEND, **settings)
        sum(getattr(stats, name).sum() for name in gradients).backward()

    return call


def _pair(logits: Tensor, **settings: object) -> Call:
    def call() -> None:
        ratio = erc.entropy_ratio(logits.clone().requires_grad_(), logits, backend=BACKEND, **settings)
        sum(value.sum() for value in ratio if value.requires_grad).backward()

    return call


def _shard(logits: Tensor) -> Call:
    def call() -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        shard = erc.VocabShard(None, 0, logits.shape[-1])
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        erc.token_stats(logits, labels, vocab_shard=shard, backend=BACKEND)
        erc.entropy_ratio(logits, logits, vocab_shard=shard, backend=BACKEND)

    return call


def calls() -> Iterator[tuple[str, Call]]:
    """(name, call), cheapest kernels first."""
    dapo = erc.objective("erc-dapo")
    bonus = erc.objective("erc-dapo", entropy_coef=0.1)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        name, logits = str(dtype).removeprefix("torch."), torch.zeros(*ROWS, 2048, dtype=dtype)
        yield f"statistics, {name}", _statistics(logits)
        yield f"erc-dapo, {name}", _loss(logits, dapo)
        yield f"erc-dapo with an entropy bonus, {name}", _loss(logits, bonus)
        yield f"pairs, {name}", _pair(logits)
        yield f"few rows, {name}", _loss(torch.zeros(2, 1, 80_000, dtype=dtype), bonus)
    logits = torch.zeros(*ROWS, 2048, dtype=torch.bfloat16)
    features = {
        "softcap": (logits, {"softcap": 30.0}),
        "unaligned": (torch.zeros(*ROWS, 2053, dtype=torch.bfloat16), {}),
        "temperature per token": (logits, {"temperature": torch.ones(ROWS)}),
    }
    for name, (tensor, settings) in features.items():
        yield f"statistics, {name}", _statistics(tensor, **settings)
        yield f"erc-dapo, {name}", _loss(tensor, bonus, **settings)
        yield f"pairs, {name}", _pair(tensor, **settings)
    for gradients in (("logprob",), ("entropy",), ("logprob", "entropy")):
        yield f"statistics, gradient of {' and '.join(gradients)}", _statistics(logits, gradients)
    yield "in place", _loss(logits, dapo, inplace_backward=True)
    yield "statistics of few rows", _statistics(torch.zeros(2, 1, 80_000, dtype=torch.bfloat16))
    yield "a shard", _shard(logits)
    yield "no gradient", _loss(logits, dapo, grad=False)
    for name in erc.objectives():
        objective = erc.objective(name)
        if objective.fused and not name.startswith("erc-"):
            yield name, _loss(logits, objective)
    for kind in ("k1", "k2", "k3", "abs", "k3+"):
        yield f"kl {kind}", _loss(logits, erc.objective("dapo", kl=erc.KLPenalty(kind, 0.1)))
    yield (
        "kl k3, importance weighted",
        _loss(logits, erc.objective("dapo", kl=erc.KLPenalty("k3", 0.1, importance_weighted=True))),
    )
    gate = erc.EntropyRatioClip(value="zero")
    yield "a gate that zeroes the value", _loss(logits, erc.objective("dapo", entropy_ratio=gate))
    yield "no gate", _loss(logits, "dapo")
