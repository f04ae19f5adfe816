"""The GPU backends on a GPU: what only a GPU shows. The contract that every backend shares runs there in the other
modules of this folder (`pytest tests/contract -m gpu`).

Everything here is skipped where there is none. `pytest -m gpu -s` prints the bandwidths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import erc
from benchmarks.hardware import GPUS
from erc.backend import operators, why_not
from tests.backends import loss_call, params
from tests.oracle import random_labels, random_logits, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False"),
]
DEVICE = "cuda"
IGNORE = -100
V = 151_936

PEAKS = {gpu.name: gpu.bandwidth for gpu in GPUS}


@pytest.fixture(params=["cuda", "triton"])
def ops(request) -> Iterator[Any]:
    """The operators of a GPU backend, which the public calls take, too; tensors are made on the GPU."""
    reason = why_not(request.param)
    if reason is not None:
        pytest.skip(reason)
    torch.set_default_device(DEVICE)
    with erc.use_backend(request.param):
        yield operators(request.param)
    torch.set_default_device(None)


# ---- what only a GPU shows -------------------------------------------------------------------------------------------


def per_row(ops, logits: Tensor, labels: Tensor) -> list[Tensor]:
    """What depends on a row alone, and not on its place in the batch as the inputs of `loss_call` do."""
    statistics = ops.stats_forward(logits, labels, None, params(), IGNORE)
    saved, ones = statistics[3], torch.ones_like(statistics[1])
    gradient = ops.stats_backward(logits, labels, None, params(), IGNORE, saved, ones, ones, ones)
    pair = ops.paired_forward(logits, logits.flip(2).contiguous(), None, params())
    _, _, logprob, entropy, *_ = loss_call(ops, logits, labels)
    return [*statistics, gradient, *pair, logprob, entropy]


def everything(ops, logits: Tensor, labels: Tensor) -> list[Tensor]:
    return [*per_row(ops, logits, labels), *loss_call(ops, logits, labels)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_rows_have_the_bits_that_they_have_among_many(dtype, ops):
    """Few rows are split over blocks, many are not; a thousand rows are more than any GPU has multiprocessors."""
    logits, labels = random_logits(1, 1000, 40_960, dtype=dtype), random_labels(1000, V=40_960)
    labels[3] = IGNORE
    few, many = logits[:, :5].clone(), logits
    for a, b in zip(per_row(ops, few, labels[:5]), per_row(ops, many, labels), strict=True):
        assert same_bits(a, b[..., :5] if b.dim() < 3 else b[:, :5])


def test_runs_repeat_bit_by_bit(ops):
    logits, labels = random_logits(1, 300, 32_768, dtype=torch.bfloat16), random_labels(300, V=32_768)
    first = everything(ops, logits, labels)
    for _ in range(5):
        for a, b in zip(first, everything(ops, logits, labels), strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("rows", [5, 700])
def test_gradients_in_place_are_the_same_bits(rows, ops):
    logits, labels = random_logits(1, rows, 40_960, dtype=torch.bfloat16), random_labels(rows, V=40_960)
    *outputs, gradient = loss_call(ops, logits, labels)
    for a, b in zip(outputs, loss_call(ops, logits, labels, in_place=True), strict=True):
        assert same_bits(a, b)
    assert same_bits(gradient, logits)


@pytest.mark.parametrize("rows", [5, 700])
def test_a_cuda_graph_captures_and_replays_every_operator(rows, ops):
    logits, labels = random_logits(1, rows, 32_768, dtype=torch.bfloat16), random_labels(rows, V=32_768)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything(ops, logits, labels)  # compiles and loads what capturing may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(ops, logits, labels)
    logits.copy_(random_logits(1, rows, 32_768, dtype=torch.bfloat16, seed=5))
    graph.replay()
    for a, b in zip(captured, everything(ops, logits, labels), strict=True):
        assert same_bits(a, b)


def test_nothing_waits_for_the_gpu(ops):
    logits = random_logits(64, 4096, dtype=torch.bfloat16).requires_grad_(True)
    labels = random_labels(64, V=4096)
    given = {"old_logprob": torch.full((64,), -5.0), "old_entropy": torch.ones(64), "advantages": torch.ones(64)}

    def step() -> None:
        erc.policy_loss(logits, labels, **given, objective="erc-dapo").loss.backward()
        sum(erc.token_stats(logits, labels)).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- bandwidth -------------------------------------------------------------------------------------------------------


def seconds(call, repeats: int = 20) -> float:
    """The median of `repeats` timings by events."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2]


@pytest.mark.parametrize("name", ["statistics", "fused loss", "fused loss in place", "scale"])
def test_bandwidth(name, ops, capsys):
    """At least 60 % of what a plain copy of the same logits reaches; printed beside the data sheet's peak."""
    rows = 2048
    logits = torch.randn(1, rows, V, dtype=torch.bfloat16)
    labels, factor = random_labels(rows, V=V), torch.full((rows,), 0.5)
    target = torch.empty_like(logits)
    calls = {
        "statistics": (lambda: ops.stats_forward(logits, labels, None, params(), IGNORE), 1),
        "fused loss": (lambda: loss_call(ops, logits, labels), 2),
        "fused loss in place": (lambda: loss_call(ops, target, labels, in_place=True), 2),
        "scale": (lambda: ops.scale_rows_(target, factor), 2),
    }
    call, passes = calls[name]
    size = logits.numel() * logits.element_size()
    target.copy_(logits)
    copied = 2 * size / seconds(lambda: target.copy_(logits))
    reached = passes * size / seconds(call)
    gpu = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAKS.items() if key in gpu), None)
    with capsys.disabled():
        share = f", {reached / peak:.0%} of the data sheet's peak" if peak else ""
        print(f"\n{gpu}, {name}: {reached / 1e9:,.0f} GB/s, {reached / copied:.0%} of a copy's{share}")
    assert reached >= 0.6 * copied
