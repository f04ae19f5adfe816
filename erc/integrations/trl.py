"""Layer 4: TRL's GRPO trainer with the objectives and fused kernels of erc.

    trainer = ERCTrainer(model, reward_funcs, args=ERCConfig(objective="erc-dapo", num_iterations=2), ...)

Supported: TRL 1.16 and later 1.x.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from erc.inputs import TokenArguments, token_batch
from erc.integrations.transformers import HeadInputs, head_inputs
from erc.integrations.versions import require
from erc.integrations.weights import GIVEN_WEIGHTS, rollout_logprob
from erc.ops import TokenFlag
from erc.results import PolicyLoss, TokenStats
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective
from erc.surrogate.token_loss import token_losses

require("trl", (1, 16), (2, 0))

LOSS_TYPES = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
"""TRL's name of the loss whose normaliser a reduction takes."""

_BELONGS_TO_THE_OBJECTIVE = {
    "epsilon": (0.2,),
    "epsilon_high": (None, 0.2),
    "delta": (None,),
    "importance_sampling_level": ("token",),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "use_adaptive_entropy": (False,),
    "sapo_temperature_neg": (1.05,),
    "sapo_temperature_pos": (1.0,),
    "vespo_k_pos": (2.0,),
    "vespo_lambda_pos": (3.0,),
    "vespo_k_neg": (3.0,),
    "vespo_lambda_neg": (2.0,),
}
"""Fields of TRL's config with the values that leave the matter to the objective: TRL's defaults."""

_LOGGED = {
    "entropy": "entropy",
    "kl": "kl",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "clip_fraction": "clip_ratio/region_mean",
    "erc_fraction": "erc/fraction",
    "erc_fraction_low": "erc/fraction_low",
    "erc_fraction_high": "erc/fraction_high",
    "entropy_ratio": "erc/entropy_ratio",
}


@dataclass
class ERCConfig(GRPOConfig):
    """`GRPOConfig` with an objective of erc. `loss_type` follows the objective's reduction; `beta` adds TRL's KL
    estimate and `entropy_coef` its bonus.

    Attributes:
        objective: a name of `erc.objectives()`; `ERCTrainer(objective=...)` takes any other `erc.Objective`.
        padding_free: pack the rows of a forward pass, prompts and completions without their padding, into one that
            position ids part. TRL pads. The model's attention must take packed rows, as transformers' own does.

    Raises:
        ValueError: for a name that erc does not know, or a field whose meaning the objective has taken over.
    """

    objective: str = "erc-dapo"
    padding_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, neutral in _BELONGS_TO_THE_OBJECTIVE.items():
            value = getattr(self, name, neutral[0])
            if value not in neutral:
                raise ValueError(f"{name} belongs to the objective: leave it at {neutral[0]!r}, got {value!r}")
        loss_type = _loss_type(objective(self.objective))
        if self.loss_type not in ("dapo", loss_type):
            raise ValueError(f"loss_type follows the objective: leave it out, got {self.loss_type!r}")
        self.loss_type = loss_type


def _loss_type(objective: Objective) -> str:
    if objective.reduction not in LOSS_TYPES:
        raise ValueError(f"objective must have a reduction of {list(LOSS_TYPES)}, got {objective.reduction!r}")
    return LOSS_TYPES[objective.reduction]


class ERCTrainer(GRPOTrainer):
    """`GRPOTrainer` whose update is one `erc.linear_policy_loss`: no logits, and the entropies of the rollout policy
    recorded in the pass that records its log-probs, by the same kernels.

    TRL's own normalisers, gradient accumulation, `num_iterations`, tool masks, reference KL and vLLM correction hold.
    Where every update of a generation belongs to one optimizer step TRL records nothing, because the policy is the
    rollout policy: the entropy ratio is then 1 and the gate is left out.

    Args:
        objective: an `erc.Objective` in place of the one that `args.objective` names.
        The others: as `GRPOTrainer`.

    Raises:
        ValueError: for a model with images or a router loss; an objective with terms that TRL's config has (`kl`,
            `entropy_coef`, `rollout_correction`), or that needs more of a batch than TRL keeps.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = _named(self.args) if objective is None else objective
        for name in ("kl", "rollout_correction", "entropy_coef"):
            if getattr(self.objective, name):
                raise ValueError(f"objective must leave {name} to the trainer's config, got {self.objective}")
        if self.objective.ratio.needs_divergence or self.objective.nll_coef:
            raise ValueError(f"objective must not need old_divergence or nll_mask, got {self.objective}")
        if self.aux_loss_enabled:
            raise ValueError("model must not have a router loss: set router_aux_loss_coef to 0")
        self.loss_type = self.args.loss_type = _loss_type(self.objective)
        self._old_entropies: Tensor | None = None
        self._records_old = False
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                _add_head_call(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        generate_every = self.args.steps_per_generation * self.num_iterations
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        self._records_old = self.args.gradient_accumulation_steps % generate_every != 0 or corrected
        output = super()._generate_and_score_completions(inputs)
        if self._old_entropies is not None:
            output["old_entropies"], self._old_entropies = self._old_entropies, None
        return output

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """TRL's method, from one read of the logits; the first call of a generation that records old log-probs records
        entropies too."""
        _refuse_images(others)
        records, self._records_old = self._records_old, False
        labels = input_ids[:, -logits_to_keep:].masked_fill(attention_mask[:, -logits_to_keep:] == 0, -100)
        parts = (values.split(batch_size or len(values)) for values in (input_ids, attention_mask, labels))
        found = [
            self._call_head(model, ids, mask, logits_to_keep, partial(_token_stats, kept, self.temperature))
            for ids, mask, kept in zip(*parts, strict=True)
        ]
        logps, entropies = (torch.cat([getattr(stats, name) for stats in found]) for name in ("logprob", "entropy"))
        if records:
            self._old_entropies = entropies
        return logps, entropies if compute_entropy else None, None

    def _call_head(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, kept: int, call: Callable[[HeadInputs], Any]
    ) -> Any:
        """`call` with the head and the `[B, kept, D]` hidden states that predict the last `kept` tokens."""

        def precisely(inputs: HeadInputs) -> Any:
            if not self.args.cast_lm_head_to_fp32:
                return call(inputs)
            with torch.autocast(inputs.hidden.device.type, enabled=False):
                return call(inputs._replace(hidden=inputs.hidden.float()))

        packed = getattr(self.args, "padding_free", False)
        with self.accelerator.autocast():
            return model(
                input_ids=input_ids, attention_mask=attention_mask, erc_call=precisely, erc_rows=(kept, packed)
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        _refuse_images({name: inputs.get(name) for name in ("pixel_values", "token_type_ids", "mm_token_type_ids")})
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        objective = self._objective_of(inputs)
        old_logprob, weight = inputs.get("old_per_token_logps"), inputs.get("importance_sampling_ratio")
        arguments = {
            "old_logprob": old_logprob,
            "old_entropy": inputs.get("old_entropies"),
            "advantages": inputs["advantages"],
            "mask": mask,
            "ref_logprob": inputs.get("ref_per_token_logps"),
            "rollout_logprob": None if weight is None else rollout_logprob(old_logprob, weight),
            "normalizer": self._normalizer(inputs, len(completion), accumulation, mode),
            "entropy_normalizer": mask.sum().clamp(min=1.0) * accumulation,
        }
        out = self._call_head(
            model,
            torch.cat([inputs["prompt_ids"], completion], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            completion.shape[1],
            lambda head: head.policy_loss(completion, objective=objective, temperature=self.temperature, **arguments),
        )
        self._record(out, mode)
        self._record_extremes(out, mode, objective, TokenArguments(**arguments))
        self._record_bonus(out, mode, accumulation)
        return out.loss

    def _objective_of(self, inputs: dict[str, Any]) -> Objective:
        """The objective with the terms of TRL's config, as far as this batch has what they need."""
        gated = inputs.get("old_entropies") is not None
        kl = KLPenalty("k3", self.beta, importance_weighted=self.args.use_bias_correction_kl) if self.beta else None
        corrected = inputs.get("importance_sampling_ratio") is not None
        return replace(
            self.objective,
            entropy_ratio=self.objective.entropy_ratio if gated else None,
            kl=kl,
            entropy_coef=self.entropy_coef,
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
        """Means in TRL's log, weighted by tokens over all ranks."""
        tokens = out.metrics["tokens"]
        logged = {ours: theirs for ours, theirs in _LOGGED.items() if ours != "kl" or self.beta}
        sums = torch.stack([out.metrics[name].float() * tokens for name in logged] + [tokens.float()])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(logged.values(), sums, strict=True):
            if total == total:  # NaN where the batch has no old entropies
                self._metrics[mode][name].append(total / max(count, 1.0))

    def _record_extremes(self, out: PolicyLoss, mode: str, objective: Objective, arguments: TokenArguments) -> None:
        """The least and the largest share of clipped tokens in a sequence of any rank, which TRL logs."""
        bare = Objective(objective.ratio, reduction="none")
        given = replace(arguments, normalizer=None, entropy_normalizer=None, ref_logprob=None, rollout_logprob=None)
        shape = tuple(out.logprob.shape)
        batch = token_batch(bare, given, shape, out.logprob.device, out.logprob.dtype)
        flags = token_losses(bare, batch, out.logprob.flatten(), out.entropy.flatten()).flags.view(shape)
        lengths = batch.mask.view(shape).sum(-1)
        for name, flag, extreme in (("low_min", TokenFlag.CLIP_LOW, min), ("high_max", TokenFlag.CLIP_HIGH, max)):
            shares = self.accelerator.gather(((flags & int(flag)) != 0).sum(-1) / lengths).tolist()
            shares = [share for share in shares if share == share]  # NaN where all of a sequence is masked
            if shares:
                self._metrics[mode][f"clip_ratio/{name}"].append(extreme(shares))

    def _record_bonus(self, out: PolicyLoss, mode: str, accumulation: float) -> None:
        """With an entropy bonus TRL logs the loss without it, and the coefficient."""
        if not self.entropy_coef:
            return
        policy_loss = out.loss.detach() + self.entropy_coef / accumulation * out.metrics["entropy"]
        if self.objective.reduction != "token-mean":  # TRL logs these before it divides by the accumulation steps
            policy_loss = policy_loss * accumulation
        self._metrics[mode]["policy_loss"].append(self.accelerator.gather(policy_loss).nanmean().item())
        if mode == "train" and self.accelerator.sync_gradients:
            self._metrics[mode]["entropy_coef"].append(self.entropy_coef)


def _named(args: Any) -> Objective:
    if not isinstance(args, ERCConfig):
        raise TypeError(f"args must be an ERCConfig, or objective be given, got {type(args).__name__}")
    return objective(args.objective)


def _token_stats(labels: Tensor, temperature: float, head: HeadInputs) -> TokenStats:
    return head.token_stats(labels, temperature=temperature)


def _refuse_images(inputs: dict[str, Any]) -> None:
    given = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    if given:
        raise ValueError(f"inputs must be text: ERCTrainer does not take {', '.join(given)}")


def _add_head_call(model: Any) -> None:
    """Let `model(input_ids=, attention_mask=, erc_call=, erc_rows=)` return `erc_call(HeadInputs)`: through the
    module's own forward, so that DDP, FSDP, autocast and PEFT see the call."""
    forward = model.forward

    def forward_or_call(self: Any, *args: Any, erc_call: Any = None, erc_rows: Any = None, **kwargs: Any) -> Any:
        if erc_call is None:
            return forward(*args, **kwargs)
        return erc_call(_completion_inputs(self, kwargs["input_ids"], kwargs["attention_mask"], *erc_rows))

    forward_or_call.__wrapped__ = forward  # generate() reads the model's own signature
    model.forward = types.MethodType(forward_or_call, model)


def _completion_inputs(model: Any, input_ids: Tensor, attention_mask: Tensor, kept: int, packed: bool) -> HeadInputs:
    """The head with the hidden states `[B, kept, D]` that predict the last `kept` tokens."""
    before = slice(-kept - 1, -1)
    if not packed:
        inputs = head_inputs(model, input_ids, attention_mask)
        return inputs._replace(hidden=inputs.hidden[:, before])
    present = attention_mask.bool()
    positions = attention_mask.cumsum(-1) - 1
    inputs = head_inputs(model, input_ids[present][None], position_ids=positions[present][None])
    # Padding is given the state of the token before it: a label or a mask leaves it out.
    place = (present.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)
    return inputs._replace(hidden=inputs.hidden[0][place[:, before]])
