"""The policy loss of a transformers model, from what it hands to its lm_head, without logits.

Supported: transformers 4.56 to 5.x, causal language models whose head is one linear layer (tied or not), with what they
do to its logits: `head_inputs` measures a scale and a softcap, and refuses anything else.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from erc.integrations.versions import require
from erc.linear.causal_lm import HeadInputs, head_inputs, takes_position_ids
from erc.results import PolicyLoss

require("transformers", (4, 56), (6, 0))

__all__ = ["HeadInputs", "fused_policy_forward", "head_inputs"]


def fused_policy_forward(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **loss_arguments: Any,
) -> PolicyLoss:
    """`model` up to its head, then `erc.linear_policy_loss`: the logits are never stored.

    Args:
        model, input_ids, attention_mask, position_ids: as `head_inputs`. With a mask and no `position_ids`, positions
            count from each row's first token, where the model takes positions at all.
        labels: `[B, T]`; position t predicts `labels[:, t]`; -100 where there is nothing to learn, padding included.
        loss_arguments: what `erc.linear_policy_loss` takes (`old_logprob`, `advantages`, `objective`, ...). Softcap
            and logit scale are the model's.

    Returns:
        PolicyLoss whose `loss` is differentiable, once, in the parameters of the model.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
        RuntimeError: for a model that FSDP2 shards, called outside a registered forward (`head_inputs`).
    """
    if position_ids is None and attention_mask is not None and takes_position_ids(model):
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return head_inputs(model, input_ids, attention_mask, position_ids).policy_loss(labels, **loss_arguments)
