"""Layer 3: reductions, as one weight per token that is known before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from erc.surrogate.sequences import Sequences

REDUCTIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)
"""Accepted values of `Objective.reduction`."""


def needs_sequences(reduction: str) -> bool:
    return reduction.startswith("seq-")


def token_weights(
    reduction: str,
    mask: Tensor,
    sequences: Sequences | None,
    normalizer: float | Tensor | None,
    max_length: int | None,
) -> Tensor:
    """The weight of each token, so that `loss = sum(weight * token_loss)`; `[N]` like `mask`.

    Args:
        reduction: one of `REDUCTIONS`. `token-mean` is DAPO's (arXiv 2503.14476), `seq-mean-token-mean` GRPO's,
            `seq-mean-token-sum-norm` Dr. GRPO's (arXiv 2503.20783): the sum over tokens divided by a constant length.
        mask: `[N]` weights; 0 takes the token out of numerator and denominator.
        sequences: needed by the `seq-` reductions.
        normalizer: replaces the count (of tokens, or of sequences), as data parallelism and gradient accumulation need;
            0 where there is nothing to divide.
        max_length: the constant of `seq-mean-token-sum-norm`.

    A sequence without active tokens does not count; no active token at all gives weight 0 everywhere, not NaN.
    """
    if reduction == "none" or reduction == "token-sum":
        weights, count = mask, None
    elif reduction == "token-mean":
        weights, count = mask, mask.sum()
    else:
        per_sequence = sequences.sum(mask)
        count = (per_sequence != 0).sum().to(mask.dtype)
        if reduction == "seq-mean-token-mean":
            weights = mask / sequences.expand(torch.where(per_sequence == 0, 1.0, per_sequence))
        elif reduction == "seq-mean-token-sum":
            weights = mask
        else:
            weights = mask / max_length
    if normalizer is not None:
        return torch.where(weights == 0, 0.0, weights / normalizer)
    if count is None:
        return weights
    return weights / torch.where(count == 0, 1.0, count)
