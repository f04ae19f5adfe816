"""Host time of one `policy_loss` and its backward on one token, station by station, beside `F.cross_entropy`.

One token of eleven logits, one thread: what remains is Python, dispatch and autograd, the time that a GPU waits for
where its kernels are short. The stations are timed inside real calls; every time is the median of many.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import erc
import erc.loss
from erc.backend import operators

STATIONS = (
    "front desk",
    "of it: checks and arguments",
    "operator, autograd node",
    "of it: operator",
    "result",
    "backward",
)
_COLUMNS = 11


class _Marks:
    """Moments of one call by name, taken by wrappers around the functions that stations begin or end with."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.at[f"{name} begins"] = time.perf_counter()
            result = function(*args, **kwargs)
            self.at[f"{name} ends"] = time.perf_counter()
            return result

        return timed


@contextmanager
def _marked(marks: _Marks) -> Iterator[None]:
    names = ("loss_call", "fused_loss", "loss_result")
    kept = {name: getattr(erc.loss, name) for name in (*names, "operators")}

    class Operators:
        policy_loss = staticmethod(marks.around("operator", operators("cpu").policy_loss))
        scale_rows_ = staticmethod(operators("cpu").scale_rows_)

    try:
        for name in names:
            setattr(erc.loss, name, marks.around(name, kept[name]))
        erc.loss.operators = lambda _: Operators
        yield
    finally:
        for name, function in kept.items():
            setattr(erc.loss, name, function)


def _median(call: Callable[[], object], calls: int) -> float:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found[calls // 10 :])


def host_rows(calls: int = 3000) -> list[tuple[str, str, str]]:
    """(what, microseconds, multiple of `F.cross_entropy` forward and backward)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = _measured(calls)
    finally:
        torch.set_num_threads(threads)
    unit = times["F.cross_entropy and backward"]
    return [(name, f"{1e6 * seconds:.0f}", f"{seconds / unit:.2f}") for name, seconds in times.items()]


def _measured(calls: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, _COLUMNS, generator=generator, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.long)
    old = erc.token_stats(logits.detach(), labels, backend="cpu")
    given = {"old_logprob": old.logprob, "old_entropy": old.entropy, "advantages": torch.ones(1), "normalizer": 1.0}

    def loss() -> torch.Tensor:
        return erc.policy_loss(logits, labels, objective="erc-dapo", backend="cpu", **given).loss

    def whole() -> None:
        loss().backward()

    def cross_entropy() -> None:
        F.cross_entropy(logits.view(1, -1), labels.view(1)).backward()

    @torch.no_grad()
    def stats() -> None:
        erc.token_stats(logits, labels, backend="cpu")

    marks, spans = _Marks(), {name: [] for name in STATIONS}
    with _marked(marks):
        for number in range(calls):
            start = time.perf_counter()
            value = loss()
            forward = time.perf_counter()
            value.backward()
            end, at = time.perf_counter(), marks.at
            if number >= calls // 10:
                desk, arguments, node, operator, result, backward = (spans[name] for name in STATIONS)
                desk.append(at["fused_loss begins"] - start)
                arguments.append(at["loss_call ends"] - at["loss_call begins"])
                node.append(at["loss_result begins"] - at["fused_loss begins"])
                operator.append(at["operator ends"] - at["operator begins"])
                result.append(forward - at["loss_result begins"])
                backward.append(end - forward)
    return {
        **{name: statistics.median(found) for name, found in spans.items()},
        "policy_loss and backward, whole": _median(whole, calls),
        "token_stats without grad": _median(stats, calls),
        "F.cross_entropy and backward": _median(cross_entropy, calls),
    }
