"""TRL, as its GRPOTrainer computes a loss: `selective_log_softmax` and `entropy_from_logits` (Triton kernels on a GPU), and
`ChunkedLogProbFunction` for a fused lm_head."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Runner, Statistics, Variant, from_statistics, token_loss
from benchmarks.workloads import TEMPERATURE, Inputs

VOCAB_CHUNK = 8192  # TRL's own chunk


def _load() -> Statistics:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    return lambda logits, labels: (selective_log_softmax(logits, labels), entropy_from_logits(logits))


def _load_for_loss() -> Statistics:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
        return selective_log_softmax(logits, labels), entropy

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
