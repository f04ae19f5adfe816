"""The per-token loss of an `Objective` in plain PyTorch, from log-probs and entropies that exist already.

The readable definition behind every kernel: `erc.reference` and the two-phase path run this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.constants import Column, Present, TokenFlag
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import RatioInputs
from erc.surrogate.sequences import Sequences


@dataclass(frozen=True)
class TokenBatch:
    """Everything known of `N` tokens before their logits are read: the token table, and what only two-phase rules look
    at. Every tensor is `[N]`, in the statistics dtype, and constant, but for `ref_kl`, which brings its graph.

    `mask` is the weight that the caller gave a token and 0 where it is not to be read; `weight` is what the reduction
    makes of it. `old_logprob` is None for an on-policy update, `old_entropy` and `ref_logprob` where the caller gave
    none.
    """

    mask: Tensor
    weight: Tensor
    advantages: Tensor
    old_logprob: Tensor | None
    old_entropy: Tensor | None
    ref_logprob: Tensor | None
    policy_weight: Tensor
    entropy_weight: Tensor
    logprob_weight: Tensor
    sequences: Sequences | None = None
    old_divergence: Tensor | None = None
    ref_kl: Tensor | None = None
    generator: torch.Generator | None = None

    @classmethod
    def of_table(cls, table: Tensor, present: int, mask: Tensor, **others: Any) -> TokenBatch:
        """The batch of a token table, whose columns `present` says which are given."""
        columns = dict(zip(Column, table.unbind(1), strict=True))
        return cls(
            mask=mask,
            weight=columns[Column.WEIGHT],
            advantages=columns[Column.ADVANTAGE],
            old_logprob=columns[Column.OLD_LOGPROB] if present & Present.OLD_LOGPROB else None,
            old_entropy=columns[Column.OLD_ENTROPY] if present & Present.OLD_ENTROPY else None,
            ref_logprob=columns[Column.REF_LOGPROB] if present & Present.REF_LOGPROB else None,
            policy_weight=columns[Column.POLICY_WEIGHT],
            entropy_weight=columns[Column.ENTROPY_WEIGHT],
            logprob_weight=columns[Column.LOGPROB_WEIGHT],
            **others,
        )


class TokenLosses(NamedTuple):
    """`loss`: the token's share of the scalar loss, with its graph; `token_loss`: unweighted, detached; `flags`:
    `TokenFlag` bits."""

    loss: Tensor
    token_loss: Tensor
    flags: Tensor


def token_losses(objective: Objective, batch: TokenBatch, logprob: Tensor, entropy: Tensor) -> TokenLosses:
    """Compose the parts of `objective` for each token; differentiable in `logprob` and (for the entropy term)
    `entropy`.

    An inactive token (mask 0) must come with log-prob and entropy 0; it gives exactly 0 and an exactly zero gradient.
    """
    active = batch.mask != 0
    old_logprob = logprob.detach() if batch.old_logprob is None else batch.old_logprob
    inputs = RatioInputs(
        logprob,
        entropy,
        old_logprob,
        batch.advantages,
        batch.mask,
        batch.sequences,
        batch.old_divergence,
        batch.generator,
    )
    policy, clip_low, clip_high = objective.ratio.terms(inputs)
    if objective.rollout_correction is not None:
        policy = policy * batch.policy_weight
    flags = clip_low * TokenFlag.CLIP_LOW + clip_high * TokenFlag.CLIP_HIGH

    filtered = _filtered(objective, inputs)
    if filtered is not None:
        policy = torch.where(filtered, 0.0, policy)
        flags = flags + filtered * TokenFlag.FILTERED

    gate = objective.entropy_ratio
    if gate is not None:
        dropped, below, above = gate.dropped(entropy.detach(), batch.old_entropy)
        policy = torch.where(dropped, policy.detach() if gate.value == "kept" else 0.0, policy)
        flags = flags + dropped * TokenFlag.ERC_DROPPED + below * TokenFlag.ERC_LOW + above * TokenFlag.ERC_HIGH

    token_loss = policy
    if objective.kl is not None and objective.kl.kind != "full":
        token_loss = token_loss + objective.kl.coef * objective.kl.estimate(logprob, old_logprob, batch.ref_logprob)
    # A row without a distribution, or a token with a NaN input, stays NaN, value and gradient, also where a clip, a
    # zero advantage or the gate would hide it.
    nothing = 0 * (batch.weight + entropy.detach())  # 0, or NaN for such a token
    token_loss = torch.where(nothing.isnan(), logprob * nothing, token_loss)
    token_loss = torch.where(active, token_loss, 0.0)

    loss = batch.weight * token_loss
    if objective.entropy_coef:
        loss = loss + batch.entropy_weight * entropy
    if objective.nll_coef:
        weight = batch.logprob_weight
        loss = loss + torch.where(weight == 0, 0.0, weight * logprob)
    flags = torch.where(active, flags, 0).to(torch.int32)
    return TokenLosses(loss, token_loss.detach(), flags)


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
