"""PyTorch's `linear_cross_entropy`: log-probs of the labels from the lm_head, without entropy.

Its chunked path makes the gradient in the forward, for one weight per batch; a policy loss weighs every token by
itself, so `reduction="none"` is what applies here.
"""

from __future__ import annotations

import torch.nn.functional as F

from benchmarks.peers.base import Runner, Variant, token_loss
from benchmarks.workloads import Inputs


def _linear(inputs: Inputs) -> Runner:
    def call() -> None:
        logprob = -F.linear_cross_entropy(*inputs.head(), inputs.labels, reduction="none")
        token_loss(logprob, None, inputs).backward()

    return Runner(call)


def _unavailable() -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else "this PyTorch has no linear_cross_entropy"


PEER = Variant("PyTorch linear_cross_entropy", {"linear": _linear}, unavailable=_unavailable)
