"""Eager PyTorch, as a careful trainer writes it: float32 log-softmax, entropy as -sum p log p, autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.base import Runner, Variant, from_statistics, token_loss
from benchmarks.workloads import EPS, Inputs


def statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy, both differentiable."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, labels[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def statistics_for_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the entropy only feeds the gate: no graph for it."""
    logp = torch.log_softmax(logits.float(), -1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, labels[:, None]).squeeze(-1), entropy


@torch.no_grad()
def entropy_ratio(logits: Tensor, old_logits: Tensor) -> tuple[Tensor, ...]:
    """Ratio, both entropies, both KL divergences and the total variation."""
    new, old = torch.log_softmax(logits.float(), -1), torch.log_softmax(old_logits.float(), -1)
    p, q = new.exp(), old.exp()
    entropy, old_entropy = -(p * new).sum(-1), -(q * old).sum(-1)
    divergences = (p * (new - old)).sum(-1), (q * (old - new)).sum(-1), (p - q).abs().sum(-1) / 2
    return (entropy + EPS) / (old_entropy + EPS), entropy, old_entropy, *divergences


def linear(inputs: Inputs) -> Runner:
    """The whole logits, then the eager loss."""

    def call() -> None:
        hidden, weight = inputs.head()
        token_loss(*statistics_for_loss(hidden @ weight.t(), inputs.labels), inputs).backward()

    return Runner(call)


PEER = Variant(
    "eager PyTorch",
    from_statistics(lambda: statistics, constant_entropy=lambda: statistics_for_loss)
    | {
        "entropy-ratio": lambda inputs: Runner(lambda: entropy_ratio(inputs.logits_master, inputs.old_logits)),
        "linear": linear,
    },
)
