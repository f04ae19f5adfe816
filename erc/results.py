"""What the public functions return, and how per-token values become it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from erc.surrogate.metrics import policy_metrics
from erc.surrogate.objective import Objective
from erc.surrogate.token_loss import TokenBatch, TokenLosses, exact_kl_terms, token_losses


class TokenStats(NamedTuple):
    """Per-token statistics `[*]` in nats: float32, or float64 for float64 logits. `logprob` is None without labels."""

    logprob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor


class EntropyRatio(NamedTuple):
    """What one pass over new and old logits tells of the step between them; each `[*]`, divergences in nats.

    `ratio = (entropy + 1e-8) / (old_entropy + 1e-8)`, the quantity that `EntropyRatioClip` gates.
    """

    ratio: Tensor
    entropy: Tensor
    old_entropy: Tensor
    kl_new_old: Tensor
    kl_old_new: Tensor
    total_variation: Tensor


class PolicyLoss(NamedTuple):
    """The result of a policy loss. `loss` carries the gradient; everything else is detached.

    `loss` is a scalar, or `[*]` for reduction "none". `per_token_loss` `[*]` is unweighted and 0 where masked.
    `metrics` is a dict of 0-d tensors that were never synchronised (`erc.surrogate.metrics.policy_metrics`).
    """

    loss: Tensor
    per_token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


def policy_loss_result(
    objective: Objective, batch: TokenBatch, logprob: Tensor, entropy: Tensor, leading: tuple[int, ...]
) -> PolicyLoss:
    """The loss of `objective` on `[N]` log-probs and entropies, by plain PyTorch and autograd."""
    losses = token_losses(objective, batch, logprob, entropy)
    return collect(objective, batch, losses, logprob, entropy, leading)


def collect(
    objective: Objective,
    batch: TokenBatch,
    losses: TokenLosses,
    logprob: Tensor,
    entropy: Tensor,
    leading: tuple[int, ...],
) -> PolicyLoss:
    """Per-token results `[N]` as a `PolicyLoss` of rows `[*]`."""
    logprob, entropy = logprob.detach(), entropy.detach()
    loss, token_loss, exact_kl = losses.loss, losses.token_loss, exact_kl_terms(objective, batch)
    if objective.reduction != "none":
        loss = loss.sum()
    if exact_kl is not None:
        weighted = batch.weight * exact_kl
        loss = loss + (weighted if objective.reduction == "none" else weighted.sum())
        token_loss = token_loss + exact_kl.detach()
    return PolicyLoss(
        loss=loss.view(leading) if objective.reduction == "none" else loss,
        per_token_loss=token_loss.view(leading),
        logprob=logprob.view(leading),
        entropy=entropy.view(leading),
        metrics=policy_metrics(objective, batch, logprob, entropy, losses.flags),
    )
