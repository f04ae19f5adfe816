"""Layer 4: TRL's GRPO trainer with the objectives and fused kernels of erc.

    trainer = ERCTrainer(model, reward_funcs, args=ERCConfig(objective="erc-dapo", num_iterations=2), ...)

Supported: TRL 1.16 and later 1.x.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from erc.integrations.transformers import head_inputs
from erc.integrations.versions import require
from erc.integrations.weights import GIVEN_WEIGHTS, rollout_logprob
from erc.objectives import KLPenalty, Objective, objective
from erc.results import PolicyLoss

require("trl", (1, 16), (2, 0))

LOSS_TYPES = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}
"""TRL's name of the loss whose normaliser a reduction takes."""

_BELONGS_TO_THE_OBJECTIVE = {
    "epsilon": (0.2,),
    "epsilon_high": (None, 0.2),
    "delta": (None,),
    "importance_sampling_level": ("token",),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "use_adaptive_entropy": (False,),
}


@dataclass
class ERCConfig(GRPOConfig):
    """`GRPOConfig` with an objective of erc. `loss_type` follows the objective's reduction; `beta` adds TRL's KL
    estimate and `entropy_coef` its bonus.

    Attributes:
        objective: a name of `erc.objectives()`; `ERCTrainer(objective=...)` takes any other `erc.Objective`.

    Raises:
        ValueError: for a name that erc does not know, or a field whose meaning the objective has taken over.
    """

    objective: str = "erc-dapo"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, neutral in _BELONGS_TO_THE_OBJECTIVE.items():
            value = getattr(self, name, neutral[0])
            if value not in neutral:
                raise ValueError(f"{name} belongs to the objective: leave it at {neutral[0]!r}, got {value!r}")
        self.loss_type = _loss_type(objective(self.objective))


def _loss_type(objective: Objective) -> str:
    if objective.reduction not in LOSS_TYPES:
        raise ValueError(f"objective must have a reduction of {list(LOSS_TYPES)}, got {objective.reduction!r}")
    return LOSS_TYPES[objective.reduction]


class ERCTrainer(GRPOTrainer):
    """`GRPOTrainer` whose update is one `erc.linear_policy_loss`: no logits, and the entropies of the rollout policy
    recorded in the pass that records its log-probs.

    TRL's own normalisers, gradient accumulation, `num_iterations`, tool masks, reference KL and vLLM correction hold.
    Where every update of a generation belongs to one optimizer step TRL records nothing, because the policy is the
    rollout policy: the entropy ratio is then 1 and the gate is left out.

    Args:
        objective: an `erc.Objective` in place of the one that `args.objective` names.
        The others: as `GRPOTrainer`.

    Raises:
        ValueError: for a model with images or a router loss, or an objective with terms that TRL's config has (`kl`,
            `entropy_coef`, `rollout_correction`).
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = _named(self.args) if objective is None else objective
        for name in ("kl", "rollout_correction", "entropy_coef"):
            if getattr(self.objective, name):
                raise ValueError(f"objective must leave {name} to the trainer's config, got {self.objective}")
        if self.aux_loss_enabled:
            raise ValueError("model must not have a router loss: set router_aux_loss_coef to 0")
        self.loss_type = self.args.loss_type = _loss_type(self.objective)
        self._old_entropies: Tensor | None = None
        self._records_old = False
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        _add_policy_forward(base)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generate_every = self.args.steps_per_generation * self.num_iterations
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        self._records_old = self.args.gradient_accumulation_steps % generate_every != 0 or corrected
        output = super()._generate_and_score_completions(inputs)
        if self._old_entropies is not None:
            output["old_entropies"], self._old_entropies = self._old_entropies, None
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        """TRL's method; the first call of a generation that records old log-probs records entropies too."""
        records, self._records_old = self._records_old, False
        if records:
            kwargs["compute_entropy"] = True
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if records:
            self._old_entropies = entropies.float()
        return logps, entropies, aux_loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("pixel_values") is not None:
            raise ValueError("inputs must be text: ERCTrainer does not take images")
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        objective = self._objective_of(inputs, accumulation)
        old_logprob, weight = inputs.get("old_per_token_logps"), inputs.get("importance_sampling_ratio")
        with self.accelerator.autocast():
            out = model(
                input_ids=torch.cat([inputs["prompt_ids"], completion], 1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
                erc_labels=completion,
                erc_arguments={
                    "old_logprob": old_logprob,
                    "old_entropy": inputs.get("old_entropies"),
                    "advantages": inputs["advantages"],
                    "objective": objective,
                    "mask": mask,
                    "ref_logprob": inputs.get("ref_per_token_logps"),
                    "rollout_logprob": None if weight is None else rollout_logprob(old_logprob, weight),
                    "normalizer": self._normalizer(inputs, len(completion), accumulation, mode),
                    "temperature": self.temperature,
                },
            )
        self._record(out, mode)
        return out.loss

    def _objective_of(self, inputs: dict[str, Any], accumulation: float) -> Objective:
        """The objective with the terms of TRL's config, as far as this batch has what they need."""
        gated = inputs.get("old_entropies") is not None
        kl = KLPenalty("k3", self.beta, importance_weighted=self.args.use_bias_correction_kl) if self.beta else None
        corrected = inputs.get("importance_sampling_ratio") is not None
        return replace(
            self.objective,
            entropy_ratio=self.objective.entropy_ratio if gated else None,
            kl=kl,
            entropy_coef=self.entropy_coef / accumulation,
            max_length=self.max_completion_length,
            rollout_correction=GIVEN_WEIGHTS if corrected else None,
        )

    def _normalizer(self, inputs: dict[str, Any], sequences: int, accumulation: float, mode: str) -> Tensor | float:
        """What TRL divides the sum over tokens, or over sequences, by."""
        if self.objective.reduction != "token-mean":
            return sequences * accumulation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        return tokens * accumulation / self.args.steps_per_generation if mode == "train" else tokens

    def _record(self, out: PolicyLoss, mode: str) -> None:
        """Metrics in TRL's log, weighted by tokens over all ranks."""
        names = {"entropy": "entropy", "clip_fraction_low": "clip_ratio/low_mean"}
        names |= {"clip_fraction_high": "clip_ratio/high_mean", "clip_fraction": "clip_ratio/region_mean"}
        names |= {"erc_fraction": "erc/fraction", "erc_fraction_low": "erc/fraction_low"}
        names |= {"erc_fraction_high": "erc/fraction_high", "entropy_ratio": "erc/entropy_ratio"}
        if self.beta:
            names["kl"] = "kl"
        tokens = out.metrics["tokens"]
        sums = torch.stack([out.metrics[name].float() * tokens for name in names] + [tokens.float()])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(names.values(), sums, strict=True):
            if total == total:  # NaN where the batch has no old entropies
                self._metrics[mode][name].append(total / max(count, 1.0))


def _named(args: Any) -> Objective:
    if not isinstance(args, ERCConfig):
        raise TypeError(f"args must be an ERCConfig, or objective be given, got {type(args).__name__}")
    return objective(args.objective)


def _add_policy_forward(model: Any) -> None:
    """Let `model(..., erc_labels=, erc_arguments=)` return a `PolicyLoss`: through the module's own forward, so that
    DDP, FSDP, autocast and PEFT see the call."""
    forward = model.forward

    def policy_forward(
        self: Any, *args: Any, erc_labels: Tensor | None = None, erc_arguments: dict | None = None, **kwargs: Any
    ) -> Any:
        if erc_arguments is None:
            return forward(*args, **kwargs)
        inputs = head_inputs(self, **{name: value for name, value in kwargs.items() if torch.is_tensor(value)})
        kept = erc_labels.shape[1]
        return inputs._replace(hidden=inputs.hidden[:, -kept - 1 : -1]).policy_loss(erc_labels, **erc_arguments)

    policy_forward.__wrapped__ = forward  # generate() reads the model's own signature
    model.forward = types.MethodType(policy_forward, model)
