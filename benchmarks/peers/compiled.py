"""torch.compile of the eager code, whole function at once; compile time is not measured."""

from __future__ import annotations

import torch

from benchmarks.peers.base import Runner, Variant, from_statistics, token_loss
from benchmarks.peers.eager import entropy_ratio, statistics, statistics_for_loss
from benchmarks.workloads import Inputs


def _compile(function):
    torch.compiler.reset()  # every case is compiled for its own shape, never for a dynamic one
    return torch.compile(function)


def _entropy_ratio(inputs: Inputs) -> Runner:
    function = _compile(entropy_ratio)
    return Runner(lambda: function(inputs.logits_master, inputs.old_logits))


def _linear(inputs: Inputs) -> Runner:
    @_compile
    def loss(hidden, weight, labels):
        return token_loss(*statistics_for_loss(hidden @ weight.t(), labels), inputs)

    return Runner(lambda: loss(*inputs.head(), inputs.labels).backward())


PEER = Variant(
    "torch.compile",
    from_statistics(lambda: statistics, constant_entropy=lambda: statistics_for_loss, wrap=_compile)
    | {"entropy-ratio": _entropy_ratio, "linear": _linear},
)
