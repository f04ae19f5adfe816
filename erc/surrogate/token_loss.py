"""Layer 3: the per-token loss of an `Objective` in plain PyTorch, from log-probs and entropies that exist already.

The readable definition behind every kernel: `erc.reference` and the two-phase path run this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erc.ops import TokenFlag
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import RatioInputs, scaled_logprob
from erc.surrogate.sequences import Sequences


@dataclass(frozen=True)
class TokenBatch:
    """Everything known of `N` tokens before their logits are read. Every tensor is `[N]`, in the statistics dtype, and
    constant, but for `ref_kl`, which brings its graph.

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
    old_divergence: Tensor | None = None
    ref_kl: Tensor | None = None
    generator: torch.Generator | None = None


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

    advantage = torch.where(active, batch.advantages, 0.0)
    inputs = RatioInputs(
        logprob, entropy, old_logprob, advantage, batch.mask, batch.sequences, batch.old_divergence, batch.generator
    )
    policy, clip_low, clip_high = objective.ratio.terms(inputs)
    if batch.policy_weight is not None:
        policy = scaled_logprob(torch.where(active, batch.policy_weight, 0.0), policy)
    flags = clip_low * TokenFlag.CLIP_LOW + clip_high * TokenFlag.CLIP_HIGH

    filtered = _filtered(objective, inputs)
    if filtered is not None:
        policy = torch.where(filtered, 0.0, policy)
        flags = flags + filtered * TokenFlag.FILTERED

    gate = objective.entropy_ratio
    if gate is not None:
        dropped, below, above = gate.dropped(entropy.detach(), torch.where(active, batch.old_entropy, 0.0))
        policy = torch.where(dropped, policy.detach() if gate.value == "kept" else 0.0, policy)
        flags = flags + dropped * TokenFlag.ERC_DROPPED + below * TokenFlag.ERC_LOW + above * TokenFlag.ERC_HIGH

    token_loss = policy
    if objective.kl is not None and objective.kl.kind != "full" and objective.kl.coef:
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


def _filtered(objective: Objective, inputs: RatioInputs) -> Tensor | None:
    """Which tokens the objective's filters take out of the policy term, or None without any filter."""
    dropped = []
    if objective.high_entropy is not None:
        dropped.append(objective.high_entropy.dropped(inputs.entropy.detach(), inputs.mask != 0))
    if objective.off_policy_mask is not None:
        dropped.append(
            objective.off_policy_mask.dropped(
                inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.mask, inputs.sequences
            )
        )
    return torch.stack(dropped).any(0) if dropped else None


def exact_kl_terms(objective: Objective, batch: TokenBatch) -> Tensor | None:
    """`coef * ref_kl` of each token, with its graph, or None where the penalty is an estimate: it needs nothing of the
    sampled token, so it is added to what any path computes."""
    if objective.kl is None or objective.kl.kind != "full":
        return None
    return torch.where(batch.mask != 0, objective.kl.coef * batch.ref_kl, 0.0)
