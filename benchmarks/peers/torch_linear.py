"""PyTorch's `linear_cross_entropy`: log-probs of the labels from the lm_head, without entropy.

By its chunked path, which its documentation recommends for memory: with `reduction="none"`, as a policy loss needs it,
that path recomputes the logits of a chunk in the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.peers.base import Runner, Variant, token_loss
from benchmarks.workloads import Inputs


def _linear(inputs: Inputs) -> Runner:
    options = torch.nn.LinearCrossEntropyOptions()

    def call() -> None:
        loss = F.linear_cross_entropy(*inputs.head(), inputs.labels, reduction="none", options=options)
        token_loss(-loss, None, inputs).backward()

    return Runner(call)


def _unavailable() -> str | None:
    return (
        None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "this PyTorch has no chunked linear_cross_entropy"
    )


PEER = Variant("PyTorch linear_cross_entropy", {"linear": _linear}, unavailable=_unavailable)
