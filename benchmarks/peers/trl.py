"""TRL, as its GRPOTrainer computes a loss: `selective_log_softmax` and `entropy_from_logits` on `[B, T, V]`.

Both are Triton kernels on a GPU. `ChunkedLogProbFunction` is its fused lm_head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Runner, Statistics, Variant, from_statistics, token_loss
from benchmarks.workloads import TEMPERATURE, Inputs, sequence_count

VOCAB_CHUNK = 8192  # TRL's own chunk


def _batched(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    batch = sequence_count(len(labels))
    return logits.view(batch, -1, logits.shape[-1]), labels.view(batch, -1)


def _load() -> Statistics:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = _batched(logits, labels)
        return selective_log_softmax(logits, labels).view(-1), entropy_from_logits(logits).view(-1)

    return statistics


def _load_for_loss() -> Statistics:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = _batched(logits, labels)
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return selective_log_softmax(logits, labels).view(-1), entropy.view(-1)

    return statistics


def _linear(inputs: Inputs) -> Runner:
    from trl.kernels import ChunkedLogProbFunction

    def call() -> None:
        hidden, weight = inputs.head()
        arguments = (hidden, weight, None, inputs.labels, TEMPERATURE, VOCAB_CHUNK, None, 1.0, ("entropy",))
        logprob, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
        token_loss(logprob, entropy.detach(), inputs).backward()

    return Runner(call)


PEER = Variant(
    "TRL",
    from_statistics(_load, constant_entropy=_load_for_loss) | {"linear": _linear},
    requires=("trl.trainer.utils",),
)
