"""TRL's `selective_log_softmax_and_entropy` on `[B, T, V]`, and `ChunkedLogProbFunction`, its fused lm_head.

The former is one Triton kernel on a GPU, and `selective_log_softmax` and `entropy_from_logits` elsewhere.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.peers.base import Runner, Statistics, Variant, from_statistics, token_loss
from benchmarks.workloads import TEMPERATURE, Inputs, sequence_count

VOCAB_CHUNK = 8192  # TRL's own chunk


def _batched(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    batch = sequence_count(len(labels))
    return logits.view(batch, -1, logits.shape[-1]), labels.view(batch, -1)


def _load(entropy_requires_grad: bool = True) -> Statistics:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = _batched(logits, labels)
        logprob, entropy = selective_log_softmax_and_entropy(logits, labels, entropy_requires_grad)
        return logprob.view(-1), entropy.view(-1)

    return statistics


def statistics_of_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by the fused lm_head."""
    from trl.kernels import ChunkedLogProbFunction

    arguments = (hidden, weight, None, labels, TEMPERATURE, VOCAB_CHUNK, None, 1.0, ("entropy",))
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
    return logprob, entropy


def _linear(inputs: Inputs) -> Runner:
    def call() -> None:
        hidden, weight = inputs.head()
        logprob, entropy = statistics_of_head(hidden, weight, inputs.labels)
        token_loss(logprob, entropy.detach(), inputs).backward()

    return Runner(call)


PEER = Variant(
    "TRL",
    from_statistics(_load, constant_entropy=partial(_load, entropy_requires_grad=False)) | {"linear": _linear},
    requires=("trl.trainer.utils",),
)
