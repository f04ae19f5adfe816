"""The per-token loss of an `Objective` in plain PyTorch, from log-probs and entropies that exist already.

The readable definition behind every kernel: `erc.reference` and the two-phase path run this code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.constants import Column, Present, TokenFlag
from erc.ops import refuse_double_backward, refuse_forward_mode
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import RatioInputs, scaled_logprob
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
        columns = table.unbind(1)
        return cls(
            mask=mask,
            weight=columns[Column.WEIGHT.value],
            advantages=columns[Column.ADVANTAGE.value],
            old_logprob=columns[Column.OLD_LOGPROB.value] if present & Present.OLD_LOGPROB else None,
            old_entropy=columns[Column.OLD_ENTROPY.value] if present & Present.OLD_ENTROPY else None,
            ref_logprob=columns[Column.REF_LOGPROB.value] if present & Present.REF_LOGPROB else None,
            policy_weight=columns[Column.POLICY_WEIGHT.value],
            entropy_weight=columns[Column.ENTROPY_WEIGHT.value],
            logprob_weight=columns[Column.LOGPROB_WEIGHT.value],
            **others,
        )

    def ratio_inputs(self, logprob: Tensor, entropy: Tensor) -> RatioInputs:
        """What a ratio rule sees of the batch and its statistics."""
        return RatioInputs(
            logprob,
            entropy,
            logprob.detach() if self.old_logprob is None else self.old_logprob,
            self.advantages,
            self.mask,
            self.sequences,
            self.old_divergence,
            self.generator,
        )


def with_derivatives(
    value: Tensor, d_logprob: Tensor, d_entropy: Tensor | None, logprob: Tensor, entropy: Tensor
) -> Tensor:
    """`value`, whose gradient by log-prob and entropy is what was computed beside it. `value` is `[N]`, or a sum over
    its tokens. There is no derivative but this one."""
    refuse_forward_mode(logprob, entropy)
    return _WithDerivatives.apply(value, d_logprob, d_entropy, logprob, entropy)


class _WithDerivatives(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, d_logprob: Tensor, d_entropy: Tensor | None, logprob: Tensor, entropy: Tensor
    ) -> Tensor:
        ctx.save_for_backward(d_logprob, d_entropy)
        # No view: a trainer may add to the loss in place (verl does), which autograd forbids on a view of a Function.
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a two-phase loss")
        d_logprob, d_entropy = ctx.saved_tensors
        needs_logprob, needs_entropy = ctx.needs_input_grad[3:]
        return (
            None,
            None,
            None,
            grad * d_logprob if needs_logprob else None,
            grad * d_entropy if needs_entropy and d_entropy is not None else None,
        )


class TokenLosses(NamedTuple):
    """`loss`: the token's share of the scalar loss, with its graph; `token_loss`: unweighted, detached; `flags`:
    `TokenFlag` bits."""

    loss: Tensor
    token_loss: Tensor
    flags: Tensor


def token_losses(
    objective: Objective, batch: TokenBatch, logprob: Tensor, entropy: Tensor, logprob_full: Tensor | None = None
) -> TokenLosses:
    """Compose the parts of `objective` for each token; differentiable in `logprob` and (for the entropy term)
    `entropy`.

    With `logprob_full` `logprob` is over the tokens that the sampler kept, and the KL and NLL terms choose between the
    two; old and rollout values are over the kept tokens, too.

    An inactive token (mask 0) must come with log-prob and entropy 0; it gives exactly 0 and an exactly zero gradient.
    """
    active = batch.mask != 0
    inputs = batch.ratio_inputs(logprob, entropy)
    terms = objective.ratio.terms(inputs)
    policy = terms.loss
    if terms.derivative is not None:
        policy = with_derivatives(policy, terms.derivative, None, logprob, entropy)
    if objective.rollout_correction is not None:
        policy = scaled_logprob(batch.policy_weight, policy)
    flags = torch.zeros_like(active, dtype=torch.int32)
    for clipped, flag in ((terms.clip_low, TokenFlag.CLIP_LOW), (terms.clip_high, TokenFlag.CLIP_HIGH)):
        if clipped is not None:
            flags = flags + clipped * flag

    filtered = filtered_tokens(objective, inputs)
    if filtered is not None:
        policy = torch.where(filtered, 0.0, policy)
        flags = flags + filtered * TokenFlag.FILTERED

    gate = objective.entropy_ratio
    if gate is not None:
        assert batch.old_entropy is not None  # the front desk asked for it
        dropped, below, above = gate.dropped(entropy.detach(), batch.old_entropy)
        policy = torch.where(dropped, policy.detach() if gate.value == "kept" else 0.0, policy)
        flags = flags + dropped * TokenFlag.ERC_DROPPED + below * TokenFlag.ERC_LOW + above * TokenFlag.ERC_HIGH

    token_loss = policy
    if objective.kl is not None and objective.kl.kind != "full" and objective.kl.coef:
        assert batch.ref_logprob is not None
        token_loss = token_loss + objective.kl.coef * objective.kl.estimate(
            logprob, inputs.old_logprob, batch.ref_logprob, logprob_full
        )
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
        imitated = logprob if logprob_full is None or objective.nll_over == "support" else logprob_full
        loss = loss + torch.where(weight == 0, 0.0, weight * imitated)
    flags = torch.where(active, flags, 0).to(torch.int32)
    return TokenLosses(loss, token_loss.detach(), flags)


def filtered_tokens(objective: Objective, inputs: RatioInputs) -> Tensor | None:
    """Which tokens the objective's filters take out of the policy term, or None without any filter."""
    dropped = []
    if objective.high_entropy is not None:
        dropped.append(objective.high_entropy.dropped(inputs.entropy.detach(), inputs.mask != 0))
    if objective.off_policy_mask is not None:
        assert inputs.sequences is not None
        dropped.append(
            objective.off_policy_mask.dropped(
                inputs.logprob, inputs.old_logprob, inputs.advantage, inputs.mask, inputs.sequences
            )
        )
    return torch.stack(dropped).any(0) if dropped else None
