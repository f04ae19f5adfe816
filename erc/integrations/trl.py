"""TRL's GRPO trainer with the objectives and fused kernels of erc.

    trainer = ERCTrainer(model, reward_funcs, args=ERCConfig(objective="erc-dapo", num_iterations=2), ...)

Supported: TRL 1.16 and later 1.x.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from erc.call import TokenArguments
from erc.constants import TokenFlag
from erc.integrations.sampling_masks import SAMPLING_MASK, padded_ids
from erc.integrations.transformers import HeadInputs, head_inputs
from erc.integrations.versions import require
from erc.integrations.weights import GIVEN_WEIGHTS, rollout_logprob
from erc.reference import OPERATORS
from erc.results import PolicyLoss, TokenStats, tokens_of
from erc.rlvr.in_context import InContextRollouts
from erc.support import SamplingSupport
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective

require("trl", (1, 16), (2, 0))

LOSS_TYPES = {
    "token-mean": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
    "seq-mean-token-sum": "luspo",
}
"""TRL's name of the loss whose normaliser a reduction takes."""

_BELONGS_TO_THE_OBJECTIVE: dict[str, tuple[tuple[Any, ...], str | tuple[str, str]]] = {
    "epsilon": ((0.2,), ("ratio", "eps_low")),
    "epsilon_high": ((None, 0.2), ("ratio", "eps_high")),
    "delta": ((None,), ("ratio", "delta")),
    "importance_sampling_level": (("token",), "an objective of sequences, as gspo"),
    "top_entropy_quantile": ((1.0,), "high_entropy=erc.HighEntropyMask({value})"),
    "off_policy_mask_threshold": ((None,), "off_policy_mask=erc.OffPolicySequenceMask({value})"),
    "use_adaptive_entropy": ((False,), "entropy_coef in the config, steered by erc.AdaptiveEntropyCoef"),
    "sapo_temperature_neg": ((1.05,), ("ratio", "tau_neg")),
    "sapo_temperature_pos": ((1.0,), ("ratio", "tau_pos")),
    "vespo_k_pos": ((2.0,), ("ratio", "k_pos")),
    "vespo_lambda_pos": ((3.0,), ("ratio", "lambda_pos")),
    "vespo_k_neg": ((3.0,), ("ratio", "k_neg")),
    "vespo_lambda_neg": ((2.0,), ("ratio", "lambda_neg")),
}
"""Fields of TRL's config: the values that leave the matter to the objective, TRL's defaults, and where it is set."""

_LOGGED = {
    "entropy": "entropy",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "clip_fraction": "clip_ratio/region_mean",
}
_LOGGED_WITH_KL = {"kl": "kl"}
_LOGGED_WITH_SUPPORT = {"kept_mass": "sampling/kept_mass"}
_LOGGED_WITH_GATE = {
    "erc_fraction": "erc/fraction",
    "erc_fraction_low": "erc/fraction_low",
    "erc_fraction_high": "erc/fraction_high",
    "entropy_ratio": "erc/entropy_ratio",
}

_GATE_IS_OFF = (
    "the entropy-ratio gate of the objective can do nothing: every update on a generation falls into one optimizer "
    "step, so the policy is still the rollout policy and the entropy ratio is 1. Set num_iterations=2, or "
    "steps_per_generation above gradient_accumulation_steps"
)


@dataclass
class ERCConfig(GRPOConfig):
    """`GRPOConfig` with an objective of erc. `loss_type` follows the objective's reduction; `beta` adds TRL's KL
    estimate and `entropy_coef` its bonus.

    Attributes:
        objective: a name of `erc.objectives()`; `ERCTrainer(objective=...)` takes any other `erc.Objective`.
        padding_free: pack the rows of a forward pass, prompts and completions without their padding, into one that
            position ids separate. TRL pads. The model's attention must take packed rows, as transformers' own does.
        keep_groups: the share of each generation's groups that is trained on, those with unequal rewards first; what is
            kept beyond them is masked. Every process filters its own rows, which must be whole groups. DAPO's dynamic
            sampling in one round: 0.5 makes 128 prompts of 256. TRL trains on all.
        nll_reward: the NLL term of an objective that has one covers the rollouts whose reward is at least this.

    Raises:
        ValueError: for a name that erc does not know, an objective that `ERCTrainer` does not take, or a field whose
            meaning the objective has taken over, with where to set it.
        TypeError: for an `erc.Objective`: a config is written to JSON, so `ERCTrainer` takes it.
    """

    objective: str = "erc-dapo"
    padding_free: bool = False
    keep_groups: float = 1.0
    nll_reward: float = 1.0
    if TYPE_CHECKING:
        loss_type: str = "dapo"  # of the base class

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.objective, str):
            raise TypeError(
                f"objective must be a name of erc.objectives() in a config; pass an Objective to "
                f"ERCTrainer(objective=...), got {self.objective!r}"
            )
        named = objective(self.objective)
        _check_objective(named)
        for name, (neutral, place) in _BELONGS_TO_THE_OBJECTIVE.items():
            value = getattr(self, name, neutral[0])
            if value not in neutral:
                raise ValueError(
                    f"{name} belongs to the objective: leave it at {neutral[0]!r} and set it by "
                    f"{_place(named, self.objective, place, value)}, got {value!r}"
                )
        if not 0 < self.keep_groups <= 1:
            raise ValueError(f"keep_groups must be in (0, 1], got {self.keep_groups!r}")
        loss_type = _loss_type(named)
        if self.loss_type not in ("dapo", loss_type):
            raise ValueError(f"loss_type follows the objective: leave it out, got {self.loss_type!r}")
        self.loss_type = loss_type


def _place(named: Objective, name: str, place: str | tuple[str, str], value: Any) -> str:
    """Where `value` is set in an objective."""
    if isinstance(place, tuple):
        part, field = place
        rule = getattr(named, part)
        if not hasattr(rule, field):
            return f"another objective than {name!r}, whose {type(rule).__name__} has no {field}"
        place = f"{part}=erc.{replace(rule, **{field: value})!r}"
    if "=erc." not in place:
        return place
    return f"ERCTrainer(objective=erc.objective({name!r}, {place.format(value=value)}))"


def _loss_type(objective: Objective) -> str:
    if objective.reduction not in LOSS_TYPES:
        raise ValueError(f"objective must have a reduction of {list(LOSS_TYPES)}, got {objective.reduction!r}")
    return LOSS_TYPES[objective.reduction]


def _check_objective(objective: Objective) -> None:
    for name in ("kl", "rollout_correction", "entropy_coef"):
        if getattr(objective, name):
            raise ValueError(f"objective must leave {name} to the trainer's config, got {objective}")
    if objective.ratio.needs_divergence:
        raise ValueError(f"objective must not need old_divergence, got {objective}")
    _loss_type(objective)


class ERCTrainer(GRPOTrainer):
    """`GRPOTrainer` whose update is one `erc.linear_policy_loss`: no logits, and the entropies of the rollout policy
    recorded in the pass that records its log-probs, by the same kernels.

    TRL's own normalisers, gradient accumulation, `num_iterations`, tool masks, reference KL and vLLM correction hold.
    Where every update of a generation belongs to one optimizer step, as with TRL's defaults, the policy is the rollout
    policy: the entropy ratio is then 1, and the gate is left out with a warning. It is left out in evaluation too.

    A `rollout_func` that samples with top-k, top-p or a grammar returns one more field, `sampling_mask`: per rollout
    which tokens the sampler kept (`erc.integrations.sampling_masks`), and log-probs over them. Ratios and TRL's vLLM
    correction are then over the kept tokens; reference KL, gate and bonus stay over the full vocabulary.

    Args:
        objective: an `erc.Objective` in place of the one that `args.objective` names.
        in_context: `erc.rlvr.InContextRollouts`: which rollouts of a group see which demonstrations, in training.
            Old, reference and new log-probs are conditioned on the prompt that the rollout saw. Prompts must be
            messages, and reward functions get them as the rollout saw them.
        The others: as `GRPOTrainer`.

    Raises:
        ValueError: for a model with images or a router loss; an objective with terms that TRL's config has (`kl`,
            `entropy_coef`, `rollout_correction`), or that needs more of a batch than TRL keeps.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective | None = None,
        in_context: InContextRollouts | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = _named(self.args) if objective is None else objective
        _check_objective(self.objective)
        self.in_context = in_context
        if self.aux_loss_enabled:
            raise ValueError("model must not have a router loss: set router_aux_loss_coef to 0")
        if self.objective.entropy_ratio is not None and not self._leaves_the_rollout_policy():
            warnings.warn(_GATE_IS_OFF, stacklevel=2)
        self.loss_type = self.args.loss_type = _loss_type(self.objective)
        self._old_entropies: Tensor | None = None
        self._rewards: Tensor | None = None
        self._records_old = False
        self._masks: list[Any] | None = None
        self._tool_mask: list[list[int]] | None = None
        self._masks_old = False
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                _add_head_call(model.get_base_model() if hasattr(model, "get_base_model") else model)

    def _leaves_the_rollout_policy(self) -> bool:
        """Whether an update starts from another policy than the one that made its rollouts."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        gated = self.objective.entropy_ratio is not None and self._leaves_the_rollout_policy()
        self._records_old = gated and self.model.training
        if self.in_context is not None and self.model.training:
            inputs = self._demonstrated(inputs)
        output = super()._generate_and_score_completions(inputs)
        if self._masks is not None:
            output["sampling_ids"] = self._sampling_ids(output["completion_mask"].bool())
            self._masks, self._masks_old = None, False
        if self._old_entropies is not None:
            output["old_entropies"], self._old_entropies = self._old_entropies, None
        if self.model.training:
            if self.objective.nll_coef:
                output["nll_mask"] = self._loss_mask(output) * self._rewarded(len(inputs))[:, None]
            if getattr(self.args, "keep_groups", 1.0) < 1:
                output = self._informative(output)
            if self.objective.nll_coef:
                output["num_nll_in_batch"] = self.accelerator.gather(output["nll_mask"].sum()).sum()
        return output

    def _generate(self, prompts: list) -> tuple:
        """TRL's method; what the sampler kept of each rollout is kept, too."""
        generated = super()._generate(prompts)
        fields = next((part for part in generated if isinstance(part, dict) and SAMPLING_MASK in part), {})
        self._masks, self._tool_mask = fields.pop(SAMPLING_MASK, None), generated[2]
        # TRL asks for log-probs of the rollout policy first, where it wants them, and for those of the reference then.
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        self._masks_old = self._masks is not None and (corrects or self._leaves_the_rollout_policy())
        return generated

    def _sampling_ids(self, present: Tensor) -> Tensor:
        """int32 `[B, T, k]` of the completions `[B, T]`: one row per token that the engine generated."""
        generated = present.clone()
        for row, mask in zip(generated, self._tool_mask or [], strict=False):
            row[: len(mask)] &= torch.tensor(mask, dtype=torch.bool, device=row.device)
        assert self._masks is not None
        return padded_ids(self._masks, generated)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's method; the rewards of all ranks are kept for the NLL term."""
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._rewards = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return rewards

    def _rewarded(self, count: int) -> Tensor:
        first = self.accelerator.process_index * count
        assert self._rewards is not None  # by _calculate_rewards
        return self._rewards[first : first + count] >= self.args.nll_reward

    @staticmethod
    def _loss_mask(batch: dict[str, Any]) -> Tensor:
        mask = batch["completion_mask"]
        return mask * batch["tool_mask"] if "tool_mask" in batch else mask

    def _informative(self, output: dict[str, Any]) -> dict[str, Any]:
        """`keep_groups` of the groups, those first in which an advantage is not 0."""
        size, rows = self.num_generations, len(output["advantages"])
        kept = round(self.args.keep_groups * rows / size)
        if rows % size or kept == 0 or kept * size % self.args.steps_per_generation:
            raise ValueError(
                f"keep_groups={self.args.keep_groups} must leave whole groups of {size} in each process, in "
                f"steps_per_generation={self.args.steps_per_generation} equal parts, got {rows} rows"
            )
        informative = (output["advantages"].view(-1, size) != 0).any(-1)
        groups = (~informative).int().argsort(stable=True)[:kept]
        index = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
        output = {
            name: value[index] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
            for name, value in output.items()
        }
        trained = informative[groups].repeat_interleave(size)[:, None]
        for name in ("completion_mask", "nll_mask"):
            if name in output:
                output[name] = output[name] * trained
        output["num_items_in_batch"] = self.accelerator.gather(self._loss_mask(output).sum()).sum()
        share = self.accelerator.gather(informative.float().mean()).mean().item()
        self._metrics["train"]["informative_groups"].append(share)
        return output

    def _demonstrated(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows with the prompt of each rollout: TRL repeats a prompt `num_generations` times, over all ranks."""
        accumulation = self.args.gradient_accumulation_steps  # generations within one step are told apart by _step
        batch = self.state.global_step * accumulation + self._step % accumulation
        first = self.accelerator.process_index * len(inputs)
        assert self.in_context is not None
        demonstrated = []
        for row, given in enumerate(inputs):
            if isinstance(given["prompt"], str):
                raise ValueError("in_context needs prompts that are messages, got a string in train_dataset['prompt']")
            rollout = (first + row) % self.num_generations
            prompt = self.in_context.prompt(given["prompt"], rollout, self.num_generations, batch)
            demonstrated.append({**given, "prompt": prompt})
        return demonstrated

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
        present = attention_mask[:, -logits_to_keep:] != 0
        labels = input_ids[:, -logits_to_keep:].masked_fill(~present, -100)
        cut, self._masks_old = self._masks_old, False
        kept = self._sampling_ids(present) if cut else torch.full((*labels.shape, 1), -1, device=labels.device)
        size = batch_size or len(labels)
        parts = (values.split(size) for values in (input_ids, attention_mask, labels, kept))
        found = [
            self._call_head(
                model, ids, mask, logits_to_keep, partial(_token_stats, some, rows if cut else None, self.temperature)
            )
            for ids, mask, some, rows in zip(*parts, strict=True)
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
                return call(inputs)  # a float32 weight takes hidden states of 16 bit

        packed = getattr(self.args, "padding_free", False)
        with self.accelerator.autocast():
            return model(
                input_ids=input_ids, attention_mask=attention_mask, erc_call=precisely, erc_rows=(kept, packed)
            )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        _refuse_images({name: inputs.get(name) for name in ("pixel_values", "token_type_ids", "mm_token_type_ids")})
        completion, mask = inputs["completion_ids"], self._loss_mask(inputs)
        mode = "train" if self.model.training else "eval"
        accumulation = self.current_gradient_accumulation_steps if mode == "train" else 1.0
        objective = self._objective_of(inputs)
        old_logprob: Any = inputs.get("old_per_token_logps")
        weight = inputs.get("importance_sampling_ratio")
        arguments = {
            "old_logprob": old_logprob,
            "old_entropy": inputs.get("old_entropies"),
            "advantages": inputs["advantages"],
            "mask": mask,
            "ref_logprob": inputs.get("ref_per_token_logps"),
            "rollout_logprob": None if weight is None else rollout_logprob(old_logprob, weight),
            "nll_mask": inputs.get("nll_mask"),
            "normalizer": self._normalizer(inputs, len(completion), accumulation, mode),
            "entropy_normalizer": mask.sum().float() * accumulation if self.entropy_coef else None,
        }
        support = {"support": SamplingSupport.from_ids(inputs["sampling_ids"])} if "sampling_ids" in inputs else {}
        if "nll_mask" in inputs:
            arguments["nll_normalizer"] = self._per_rank(inputs["num_nll_in_batch"], accumulation)
        out = self._call_head(
            model,
            torch.cat([inputs["prompt_ids"], completion], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            completion.shape[1],
            lambda head: head.policy_loss(
                completion, objective=objective, temperature=self.temperature, **arguments, **support
            ),
        )
        self._record(out, mode, objective)
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
            nll_coef=self.objective.nll_coef if "nll_mask" in inputs else 0.0,
            entropy_coef=self.entropy_coef,
            max_length=self.max_completion_length,
            rollout_correction=GIVEN_WEIGHTS if corrected else None,
        )

    def _normalizer(self, inputs: dict[str, Any], sequences: int, accumulation: float, mode: str) -> Tensor | float:
        """What TRL divides the sum over tokens, or over sequences, by."""
        if self.objective.reduction != "token-mean":
            return sequences * accumulation
        tokens = inputs["num_items_in_batch"]
        return self._per_rank(tokens, accumulation if mode == "train" else self.args.steps_per_generation)

    def _per_rank(self, tokens: Tensor, accumulation: float) -> Tensor:
        """What TRL makes of a count over a whole generation and all ranks."""
        tokens = tokens.clamp(min=1.0) / self.accelerator.num_processes
        return tokens * accumulation / self.args.steps_per_generation

    def _record(self, out: PolicyLoss, mode: str, objective: Objective) -> None:
        """Means in TRL's log, weighted by tokens over all ranks."""
        tokens = out.metrics["tokens"]
        logged = (
            _LOGGED | (_LOGGED_WITH_KL if objective.kl else {}) | (_LOGGED_WITH_GATE if objective.entropy_ratio else {})
        )
        logged = logged | (_LOGGED_WITH_SUPPORT if "kept_mass" in out.metrics else {})
        sums = torch.stack([out.metrics[name].float() * tokens for name in logged] + [tokens.float()])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(logged.values(), sums, strict=True):
            self._metrics[mode][name].append(total / max(count, 1.0))

    def _record_extremes(self, out: PolicyLoss, mode: str, objective: Objective, arguments: TokenArguments) -> None:
        """The least and the largest share of clipped tokens in a sequence of any rank, which TRL logs."""
        bare = Objective(objective.ratio, reduction="none")
        given = replace(arguments, normalizer=None, ref_logprob=None, rollout_logprob=None)
        batch, losses = tokens_of(OPERATORS, out.logprob, out.entropy, bare, given).judged()
        flags, lengths = losses.flags.view(out.logprob.shape), batch.mask.view(out.logprob.shape).sum(-1)
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


def _token_stats(labels: Tensor, kept: Tensor | None, temperature: float, head: HeadInputs) -> TokenStats:
    support = None if kept is None else SamplingSupport.from_ids(kept)
    return head.token_stats(labels, temperature=temperature, support=support)


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

    forward_or_call.__wrapped__ = forward  # type: ignore[attr-defined]  # generate() reads the model's own signature
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
