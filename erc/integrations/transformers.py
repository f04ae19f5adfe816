"""Layer 4: the policy loss of a transformers model, from its backbone and lm_head, without logits.

Supported: transformers 4.56 to 5.x, causal language models whose head is one linear layer (tied or not).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from erc.integrations.versions import require
from erc.linear.loss import linear_policy_loss
from erc.linear.stats import linear_token_stats
from erc.results import PolicyLoss, TokenStats

require("transformers", (4, 56), (6, 0))


class HeadInputs(NamedTuple):
    """What the linear forms of erc need of a model: `hidden` `[B, T, D]`, `weight` `[V, D]`, `bias` `[V]` or None, and
    how the model treats its logits."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def token_stats(self, labels: Tensor, **options: Any) -> TokenStats:
        """`erc.linear_token_stats` of the model's own distribution; `labels` `[B, T]`."""
        return linear_token_stats(self.hidden, self.weight, labels, **self._head(), **options)

    def policy_loss(self, labels: Tensor, **options: Any) -> PolicyLoss:
        """`erc.linear_policy_loss` of the model's own distribution; `labels` `[B, T]`."""
        return linear_policy_loss(self.hidden, self.weight, labels, **self._head(), **options)

    def _head(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def logit_scaling(config: Any) -> tuple[float | None, float]:
    """Softcap (or None) and scale that the model with `config` applies to its logits: scale first, then softcap.

    Gemma caps (`final_logit_softcapping`); Cohere multiplies (`logit_scale`); Falcon-H1 multiplies
    (`lm_head_multiplier`); Granite divides, and HyperCLOVA X multiplies, by `logits_scaling`.
    """
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            break
    else:
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return getattr(config, "final_logit_softcapping", None), scale


def head_inputs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **backbone: Any,
) -> HeadInputs:
    """Run the backbone of `model` and name its head.

    Args:
        model: a `PreTrainedModel` with an lm_head; not a wrapper around one.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 on padding at either side; None where every token counts.
        position_ids: `[B, T]`. For packed sequences `[1, N]`, starting at 0 in each, without an attention mask. Without
            them the model counts as it does by itself.
        backbone: what else the backbone's forward takes.

    Returns:
        HeadInputs, attached to the graph. A head sharded by FSDP2 is gathered, differentiably.

    Raises:
        TypeError: if the head is not a plain linear layer, as where LoRA adapts it: its weight would not be what it
            applies.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise TypeError(f"model must have an nn.Linear as its lm_head, got {type(head).__name__}")
    if position_ids is not None:
        backbone["position_ids"] = position_ids
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **backbone
    ).last_hidden_state
    weight, bias = (value.full_tensor() if isinstance(value, DTensor) else value for value in (head.weight, head.bias))
    return HeadInputs(hidden, weight, bias, *logit_scaling(model.config))


def fused_policy_forward(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **loss_arguments: Any,
) -> PolicyLoss:
    """The backbone of `model`, then `erc.linear_policy_loss`: the logits are never stored.

    Args:
        model, input_ids, attention_mask, position_ids: as `head_inputs`. With left padding and no `position_ids`,
            positions count from each row's first token.
        labels: `[B, T]`; position t predicts `labels[:, t]`; -100 where there is nothing to learn, padding included.
        loss_arguments: what `erc.linear_policy_loss` takes (`old_logprob`, `advantages`, `objective`, ...). Softcap
            and logit scale come from the model's config.

    Returns:
        PolicyLoss whose `loss` is differentiable, once, in the parameters of the model.

    Raises:
        ValueError, TypeError, IndexError: naming the argument.
    """
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return head_inputs(model, input_ids, attention_mask, position_ids).policy_loss(labels, **loss_arguments)
