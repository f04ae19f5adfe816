"""verl's policy losses, log-probs and entropies by erc, by one of verl's own settings:

    actor_rollout_ref.model.external_lib=erc.integrations.verl_plugin

which every process of verl's trainers reads. A loop of one's own calls `erc.integrations.verl.install()` in each
process that trains. Then `actor.policy_loss.loss_mode=erc_dapo actor.calculate_entropy=True` trains with the
entropy-ratio gate.

verl hands a registered loss neither entropies nor old ones, nor scores, so `install` also puts a loss function around
verl's `ppo_loss` that takes them from the batch (`erc.integrations.verl_batch`). Supported: verl 0.9.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from erc.integrations.verl_batch import (
    NOT_INSTALLED,
    OLD_ENTROPIES,
    carried_entropies,
    carried_nll,
    carried_support,
    counting_nll,
    entropies,
    nll_rows,
    with_batch,
    with_support,
)
from erc.integrations.versions import require
from erc.integrations.weights import GIVEN_WEIGHTS, rollout_logprob
from erc.linear.stats import linear_token_stats
from erc.loss import objective_loss
from erc.stats import token_stats
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective, objectives

require("verl", (0, 9), (0, 10))

import verl.utils.experimental.torch_functional as verl_linear  # noqa: E402
import verl.utils.torch_functional as verl_functional  # noqa: E402
from verl.trainer.ppo.core_algos import register_policy_loss  # noqa: E402
from verl.workers.config import ActorConfig  # noqa: E402

__all__ = ["entropies", "install", "nll_rows", "policy_loss_function", "register", "use_fused_statistics"]

_CLIPS = {
    "clip_ratio": "eps_low",
    "clip_ratio_low": "eps_low",
    "clip_ratio_high": "eps_high",
    "clip_ratio_c": "dual_clip",
}
"""verl's settings that an objective takes over, with their names there."""


def register() -> list[str]:
    """Register every `erc-` preset and the papers' recipes with verl, `erc-dapo` as `erc_dapo`; returns the names.

    The preset gives the rule and the gate (verl's `clip_ratio*` are not read), `loss_agg_mode` the reduction, and
    `config.global_batch_info` the normaliser, as in verl's `agg_loss`. Rollout weights multiply the policy term.
    """
    names = [name for name in objectives() if name.startswith("erc-") or name.endswith("-paper")]
    for name in names:
        register_policy_loss(name.replace("-", "_"))(policy_loss_function(objective(name)))
    return [name.replace("-", "_") for name in names]


def policy_loss_function(objective: Objective) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """`objective` as a function with the signature of verl's policy losses, for `register_policy_loss`.

    The function takes `[B, T]` tensors and returns a scalar loss, differentiable in `log_prob`, and verl's metrics. It
    raises RuntimeError if the objective has a gate and no `entropies` are set, and warns once of clip widths in verl's
    config that are neither verl's defaults nor the objective's: they are not read.
    """
    warned: set[str] = set()

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        carried = carried_entropies()
        if isinstance(carried, str) and objective.entropy_ratio is not None:
            raise RuntimeError(f"the entropy-ratio gate needs entropies and old entropies: {carried}")
        ignored = _ignored_clips(config, objective)
        if ignored and ignored not in warned:
            warned.add(ignored)
            warnings.warn(ignored, stacklevel=2)
        entropy, old_entropy = (torch.zeros_like(log_prob), None) if isinstance(carried, str) else carried
        weights = rollout_is_weights
        batch_info = dict(getattr(config, "global_batch_info", None) or {})
        out = objective_loss(
            log_prob,
            entropy.detach(),
            old_logprob=old_log_prob.detach(),
            advantages=advantages.detach(),
            objective=replace(
                objective,
                reduction=loss_agg_mode,
                max_length=batch_info.get("loss_scale_factor") or response_mask.shape[-1],
                rollout_correction=None if weights is None else GIVEN_WEIGHTS,
            ),
            mask=response_mask,
            old_entropy=None if old_entropy is None else old_entropy.detach().to(log_prob.dtype),
            rollout_logprob=None
            if rollout_is_weights is None
            else rollout_logprob(old_log_prob.detach(), rollout_is_weights),
            normalizer=_normalizer(loss_agg_mode, **batch_info),
            **_nll(objective, response_mask, **batch_info),
        )
        metrics = {"actor/pg_clipfrac": "clip_fraction_high", "actor/pg_clipfrac_lower": "clip_fraction_low"}
        metrics |= {"actor/ppo_kl": "approx_kl", "actor/erc_fraction": "erc_fraction"}
        metrics |= {"actor/entropy_ratio": "entropy_ratio"}
        return out.loss, {name: out.metrics[ours].item() for name, ours in metrics.items()}

    return policy_loss


def _nll(objective: Objective, response_mask: Tensor, dp_size: int = 1, **_: Any) -> dict[str, Any]:
    """The rows of the NLL term and its own denominator, as the loss's is one rank's part of a global count."""
    if not objective.nll_coef:
        return {}
    carried = carried_nll()
    if carried is None:
        raise RuntimeError("the NLL term needs the rows with reward 1, which the batch's scores tell: " + NOT_INSTALLED)
    rows, tokens = carried
    mask = rows[:, None].expand(response_mask.shape).float()
    return {"nll_mask": mask, "nll_normalizer": torch.as_tensor(tokens, device=rows.device).clamp(min=1) / dp_size}


def _ignored_clips(config: Any, objective: Objective) -> str:
    """The message about clip widths that verl's config sets and the objective does not have."""
    defaults = {field.name: field.default for field in fields(ActorConfig)}
    given = {name: getattr(config, name, defaults[name]) for name in _CLIPS}
    ignored = [
        f"{name}={value}"
        for name, value in given.items()
        if value not in (defaults[name], getattr(objective.ratio, _CLIPS[name], None))
    ]
    if not ignored:
        return ""
    return (
        f"verl's {', '.join(ignored)} are not read: the objective has {objective.ratio}. For other widths register one "
        f"of your own, in a module that external_lib names: register_policy_loss('mine')(erc.integrations.verl."
        f"policy_loss_function(erc.objective('erc-dapo', ratio=erc.PPOClip(0.2, 0.28, dual_clip=10.0))))"
    )


def _normalizer(
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    **_: Any,
) -> Any:
    """What verl's `agg_loss` divides by; None for the batch's own count."""
    if loss_agg_mode == "token-sum":
        return 1 / dp_size
    count = batch_num_tokens if loss_agg_mode == "token-mean" else global_batch_size
    if count is None and dp_size > 1:
        raise ValueError(f"config.global_batch_info must give the global count of {loss_agg_mode} when dp_size > 1")
    return None if count is None else count / dp_size


def _keeping_entropies(compute_old_log_prob: Callable[..., tuple]) -> Callable[..., tuple]:
    """`RayPPOTrainer._compute_old_log_prob`, which the trainer rids of its entropies once they are logged."""

    @wraps(compute_old_log_prob)
    def compute(self: Any, batch: Any) -> tuple:
        old_log_prob, utilisation = compute_old_log_prob(self, batch)
        old_log_prob.batch[OLD_ENTROPIES] = old_log_prob.batch["entropys"]
        return old_log_prob, utilisation

    return compute


@cache
def install() -> None:
    """All of it: `register()`, `use_fused_statistics()`, and old entropies carried by the batch and handed to the loss.
    Every process calls it, before workers are built, as verl does where `external_lib` names
    `erc.integrations.verl_plugin`; a second call does nothing.

    Raises:
        ImportError: if what verl needs for training is not installed.
    """
    import verl.workers.utils.losses as losses
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.engine.base import BaseEngine
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    register()
    use_fused_statistics()
    _replace(losses.ppo_loss, with_batch(losses.ppo_loss))
    BaseEngine.train_batch = counting_nll(BaseEngine.train_batch)
    FSDPEngineWithLMHead.forward_step = with_support(FSDPEngineWithLMHead.forward_step)
    RayPPOTrainer._compute_old_log_prob = _keeping_entropies(RayPPOTrainer._compute_old_log_prob)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """verl's function of that name: log-probs `[*]` in float32, over what the sampler kept where the batch says so. The
    backward never writes over the logits."""
    return token_stats(logits, labels, support=carried_support(labels)).logprob


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl's function of that name: entropies `[*]` in nats and float32, differentiable."""
    return token_stats(logits).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """verl's function of that name: there is nothing as large as the logits to save by chunks."""
    return entropy_from_logits(logits)


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of that name, which `use_fused_kernels` runs for its backends "torch" and "liger": log-probs and
    entropies `[*]` from hidden states `[*, D]`, without logits."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        labels = input_ids.long()
        support = carried_support(labels)
        stats = linear_token_stats(hidden_states, vocab_weights, labels, temperature=temperature, support=support)
        return stats.logprob, stats.entropy


def use_fused_statistics() -> None:
    """Replace verl's log-prob and entropy functions by ours, also where a module imported them by name already. Call it
    once, before workers are built."""
    for ours in (logprobs_from_logits, entropy_from_logits, entropy_from_logits_with_chunking):
        _replace(getattr(verl_functional, ours.__name__), ours)
    _replace(verl_linear.FusedLinearForPPO, FusedLinearForPPO)


def _replace(theirs: Any, ours: Any) -> None:
    attribute = theirs.__name__
    for name, module in list(sys.modules.items()):
        if name.startswith("verl.") and vars(module).get(attribute) is theirs:
            setattr(module, attribute, ours)
