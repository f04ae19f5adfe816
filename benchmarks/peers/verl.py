"""verl: `logprobs_from_logits` (by flash-attn where that is installed) and `entropy_from_logits_with_chunking`."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Statistics, Variant, from_statistics


def _load() -> Statistics:
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    # With gradient verl differentiates the plain form: the chunked one writes into a preallocated tensor.
    return lambda logits, labels: (
        logprobs_from_logits(logits, labels, inplace_backward=False),
        entropy_from_logits(logits),
    )


def _load_for_loss() -> Statistics:
    from verl.utils.torch_functional import entropy_from_logits_with_chunking, logprobs_from_logits

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            entropy = entropy_from_logits_with_chunking(logits)
        return logprobs_from_logits(logits, labels, inplace_backward=False), entropy

    return statistics


_ops = from_statistics(_load, constant_entropy=_load_for_loss)
_without_grad = from_statistics(_load_for_loss)
PEER = Variant("verl", _ops | {"stats": _without_grad["stats"]}, requires=("verl.utils.torch_functional",))
