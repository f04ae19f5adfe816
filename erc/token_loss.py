"""Layer 3: the per-token loss of an `Objective` in plain PyTorch, from log-probs and entropies that exist already.

The readable definition behind every kernel: `erc.reference` and the two-phase path run this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erc.objectives import Objective
from erc.ops import TokenFlag
from erc.ratio_rules import RatioInputs
from erc.sequences import Sequences


@dataclass(frozen=True)
class TokenBatch:
    """Everything known of `N` tokens before their logits are read. Every tensor is `[N]`, constant, in the statistics
    dtype.

    `mask` is the weight of a token in the reduction and 0 where it is not to be read; `weight` is what the reduction
    makes of it. `policy_weight`, `entropy_weight` and `logprob_weight` are None where the objective has no such term.
    """

    mask: Tensor
    weight: Tensor
    advantages: Tensor
    old_logprob: Tensor | None
    old_entropy: Tensor | None
    ref_logprob: Tensor | None
    policy_weight: Tensor | None
    entropy_weight: Tensor | None
    logprob_weight: Tensor | None
    sequences: Sequences | None


class TokenLosses(NamedTuple):
    """`loss`: the token's share of the scalar loss, with its graph; `token_loss`: unweighted, detached; `flags`:
    `TokenFlag` bits."""

    loss: Tensor
    token_loss: Tensor
    flags: Tensor


def token_losses(objective: Objective, batch: TokenBatch, logprob: Tensor, entropy: Tensor) -> TokenLosses:
    """Compose the parts of `objective` for each token; differentiable in `logprob` and (for the entropy term)
    `entropy`.

    An inactive token (mask 0) gives exactly 0 and an exactly zero gradient, whatever its values are.
    """
    active = batch.mask != 0
    logprob = torch.where(active, logprob, 0.0)
    entropy = torch.where(active, entropy, 0.0)
    old_logprob = logprob.detach() if batch.old_logprob is None else torch.where(active, batch.old_logprob, 0.0)

    inputs = RatioInputs(logprob, old_logprob, torch.where(active, batch.advantages, 0.0), batch.mask, batch.sequences)
    policy, clip_low, clip_high = objective.ratio.terms(inputs)
    if batch.policy_weight is not None:
        policy = policy * torch.where(active, batch.policy_weight, 0.0)
    flags = clip_low * TokenFlag.CLIP_LOW + clip_high * TokenFlag.CLIP_HIGH

    gate = objective.entropy_ratio
    if gate is not None:
        dropped, below, above = gate.dropped(entropy.detach(), torch.where(active, batch.old_entropy, 0.0))
        policy = torch.where(dropped, policy.detach() if gate.value == "kept" else 0.0, policy)
        flags = flags + dropped * TokenFlag.ERC_DROPPED + below * TokenFlag.ERC_LOW + above * TokenFlag.ERC_HIGH

    token_loss = policy
    if objective.kl is not None:
        ref_logprob = torch.where(active, batch.ref_logprob, 0.0)
        token_loss = token_loss + objective.kl.coef * objective.kl.estimate(logprob, old_logprob, ref_logprob)
    # A row without a distribution stays NaN, also where a clip, a zero advantage or the gate would hide it.
    token_loss = torch.where(entropy.isnan(), entropy.detach(), token_loss)
    token_loss = torch.where(active, token_loss, 0.0)

    loss = batch.weight * token_loss
    if batch.entropy_weight is not None:
        loss = loss + batch.entropy_weight * entropy
    if batch.logprob_weight is not None:
        weight = torch.where(active, batch.logprob_weight, 0.0)
        loss = loss + torch.where(weight == 0, 0.0, weight * logprob)
    flags = torch.where(active, flags, 0).to(torch.int32)
    return TokenLosses(torch.where(active, loss, 0.0), token_loss.detach(), flags)
