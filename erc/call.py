"""The front desk of every loss. It checks what the caller gave, brings it into the form that operators take,
and chooses the route.

The route of a call, station by station: here -> token table -> rows -> token summary -> result (docs/architecture.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from erc.constants import INVALID_VALUE, Present
from erc.inputs import (
    check_constant,
    check_label_values,
    check_offsets,
    check_token_values,
    constant_rows,
    label_rows,
    row_tensor,
    scalar,
)
from erc.ops import stats_dtype
from erc.parallel import Facts
from erc.rows import RowScaling, params_tensor
from erc.support import SamplingSupport
from erc.surrogate.objective import Objective
from erc.surrogate.reductions import reduction_id
from erc.surrogate.sequences import Sequences
from erc.surrogate.token_loss import TokenBatch
from erc.surrogate.token_table import sequences_of, token_table
from erc.surrogate.validation import values_are_readable

# ---- the route -------------------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """How a loss runs: "fused", "two-phase" or "reference", and the reason."""

    name: str
    reason: str


def choose_route(
    backend: str,
    objective: Objective,
    logits_dtype: torch.dtype,
    *,
    needs_grad: bool,
    grad_scale: float | Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    sharded: bool = False,
    split: bool = False,
    linear: bool = False,
    support: bool = False,
) -> Route:
    """The route of a call. Everything that decides it is here, for the logits forms, the linear forms and `explain`.

    `grad_dtype` is that of the logits' gradient, None for the logits' own.
    """
    if backend == "torch":
        return Route("reference", "plain PyTorch: several tensors as large as the logits")
    if sharded:
        return Route("two-phase", "a sharded row needs the other ranks' columns before any gradient")
    if not objective.fused:
        return Route("two-phase", str(objective.two_phase_reason))
    if split and not linear:
        return Route("two-phase", "the weights of split sequences need the other ranks' sums before any row is read")
    if linear and needs_grad and objective.reduction == "none":
        return Route("two-phase", 'the gradients of a head have one upstream gradient, reduction "none" one per token')
    if (grad_dtype or logits_dtype) == torch.float16 and needs_grad and grad_scale is None:
        return Route("two-phase", "a fused float16 gradient would be rounded before the loss scale: pass grad_scale")
    around = ", between two sparse kernels over the kept tokens" if support else ""
    return Route(
        "fused", f"one read of the logits and one write of the gradient, for forward and backward together{around}"
    )


# ---- the arguments ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenArguments:
    """The arguments that every loss takes, as the caller gave them; `erc.policy_loss` says what each of them is."""

    old_logprob: Tensor | None
    advantages: Tensor
    mask: Tensor | None = None
    old_entropy: Tensor | None = None
    ref_logprob: Tensor | None = None
    rollout_logprob: Tensor | None = None
    nll_mask: Tensor | None = None
    old_divergence: Tensor | None = None
    ref_kl: Tensor | None = None
    cu_seqlens: Tensor | None = None
    normalizer: float | Tensor | None = None
    entropy_normalizer: float | Tensor | None = None
    nll_normalizer: float | Tensor | None = None
    grad_scale: float | Tensor | None = None
    generator: torch.Generator | None = None
    sequence_group: dist.ProcessGroup | None = None


class TokenTensors(NamedTuple):
    """The per-token arguments of the operators `token_table` and `policy_loss`, in their order."""

    labels: Tensor
    advantages: Tensor
    mask: Tensor | None
    old_logprob: Tensor | None
    old_entropy: Tensor | None
    ref_logprob: Tensor | None
    policy_weight: Tensor | None
    nll_mask: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: Tensor | None
    entropy_normalizer: Tensor | None
    nll_normalizer: Tensor | None
    grad_scale: Tensor | None
    params: Tensor
    ignore_index: int


@dataclass
class LossCall:
    """A loss whose arguments passed their checks: what its operators take, and what its rules look at."""

    objective: Objective
    leading: tuple[int, ...]
    tokens: TokenTensors
    scaling: RowScaling
    vocab_size: int
    dtype: torch.dtype  # of the statistics
    arguments: TokenArguments
    sequence_length: int
    present: int
    scale: float | Tensor | None = None  # what the table's weights, hence gradients, are multiplied by

    @property
    def count(self) -> int:
        return prod(self.leading)

    @property
    def sequences(self) -> Sequences | None:
        return sequences_of(self.count, self.sequence_length, self.tokens.cu_seqlens, self.arguments.sequence_group)

    def add_facts(self, facts: Facts) -> None:
        """What must be the same on every rank that holds a part of the vocabulary."""
        tokens, scaling = self.tokens, self.scaling
        facts.add(scaling=scaling.values, temperature=scaling.temperature, objective=self.objective)
        facts.add(labels=tokens.labels, mask=tokens.mask, ignore_index=tokens.ignore_index)

    def explain(self, error: RuntimeError, support: SamplingSupport | None = None) -> None:
        """Raise what an operator that reads the tokens has found as what it is, if that is what `error` is about."""
        if INVALID_VALUE not in str(error):
            return
        self.check_values()
        if support is not None:
            tokens, labels = self.tokens, self.tokens.labels.reshape(-1)
            if tokens.mask is not None:
                labels = torch.where(tokens.mask.reshape(-1) == 0, tokens.ignore_index, labels)
            support.cut_rows(labels, self.vocab_size, tokens.ignore_index)

    def check_values(self) -> None:
        """Raises where an active token has a value that no loss is defined for."""
        given = self.arguments
        check_token_values(
            self.leading,
            self.vocab_size,
            self.tokens.ignore_index,
            self.tokens.labels,
            given.mask,
            given.advantages,
            normalizers={
                name: getattr(given, name)
                for name in ("normalizer", "entropy_normalizer", "nll_normalizer", "grad_scale")
            },
            statistics={
                name: getattr(given, name)
                for name in ("old_logprob", "old_entropy", "ref_logprob", "rollout_logprob", "nll_mask")
            },
        )

    def token_table(self, operators: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(table, labels, counter) of the operator, or by PyTorch where other ranks hold parts of the sequences."""
        arguments = (*self.tokens, self.vocab_size, self.dtype == torch.float64)
        try:
            if self.arguments.sequence_group is not None:
                return token_table(*arguments, self.arguments.sequence_group)
            return operators.token_table(*arguments)
        except RuntimeError as error:
            self.explain(error)
            raise

    def batch(self, table: Tensor, labels: Tensor) -> TokenBatch:
        """The table with all that two-phase rules look at."""
        given, ignored = self.arguments, labels == self.tokens.ignore_index
        if given.mask is None:
            mask = (~ignored).to(self.dtype)
        else:
            mask = given.mask.reshape(-1).to(self.dtype).masked_fill(ignored, 0.0)
        divergence = given.old_divergence
        return TokenBatch.of_table(
            table,
            self.present,
            mask,
            sequences=self.sequences,
            old_divergence=None if divergence is None else divergence.reshape(-1).to(self.dtype),
            ref_kl=None if given.ref_kl is None else given.ref_kl.reshape(-1).to(self.dtype),
            generator=given.generator,
        )


@contextmanager
def labels_explained(
    labels: Tensor | None, leading: tuple[int, ...], vocab_size: int, ignore_index: int
) -> Iterator[None]:
    """Around an operator that reads labels and nothing else per token."""
    try:
        yield
    except RuntimeError as error:
        if labels is not None and INVALID_VALUE in str(error):
            check_label_values(labels.view(leading), vocab_size, ignore_index)
        raise


def loss_call(
    objective: Objective,
    arguments: TokenArguments,
    labels: Tensor,
    ignore_index: int,
    like: Tensor,
    scaling: RowScaling,
    vocab_size: int,
    *,
    fused: bool,
    over_support: bool = False,
) -> LossCall:
    """Check the arguments of a loss on rows like `like`: logits, or whatever has their shape, dtype and device.

    A `fused` loss makes its gradient in the forward, so `grad_scale` is in the weights of its tokens. `over_support`:
    log-probs are over what a sampler kept, and some terms may take others.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
    """
    leading, device, dtype = like.shape[:-1], like.device, stats_dtype(like.dtype)
    given = arguments
    labels = label_rows(labels, leading, device, ignore_index)
    mask = given.mask
    if mask is not None:
        row_tensor("mask", mask, leading, device)
        check_constant("mask", mask)
        mask = mask.contiguous()
    rows = {
        name: constant_rows(name, getattr(given, name), leading, device)
        for name in ("old_logprob", "old_entropy", "ref_logprob", "rollout_logprob")
    }
    nll_mask = constant_rows("nll_mask", given.nll_mask, leading, device, exact=False)
    constant_rows("old_divergence", given.old_divergence, leading, device)
    _check_needs(objective, given, leading, device)

    offsets, length = _sequences(given.cu_seqlens, given.sequence_group, leading, device)
    if objective.needs_sequences and offsets is None and length == 0 and prod(leading) > 0:
        raise ValueError(
            f"rows must be [B, T], or packed with cu_seqlens, for {objective}, got rows of shape {tuple(leading)}"
        )
    advantages, advantage_length = _advantages(given.advantages, leading, device, offsets)
    split = given.sequence_group is not None
    max_length = objective.max_length or (0 if split else length)
    if objective.reduction == "seq-mean-token-sum-norm" and max_length == 0 and (split or prod(leading) > 0):
        raise ValueError(
            "max_length must be set in the objective for seq-mean-token-sum-norm with packed or split sequences"
        )

    normalizer, normalizer_tensor = scalar("normalizer", given.normalizer, device)
    entropy_normalizer, entropy_tensor = scalar("entropy_normalizer", given.entropy_normalizer, device)
    nll_normalizer, nll_tensor = scalar("nll_normalizer", given.nll_normalizer, device)
    grad_scale, scale_tensor = scalar("grad_scale", given.grad_scale, device)
    scale = None
    if fused and given.grad_scale is not None:
        scale = grad_scale if scale_tensor is None else scale_tensor
    shares = objective.entropy_reduction == "loss" or objective.reduction == "none"
    if given.normalizer is not None:
        for name in objective.own_normalizers:
            if getattr(given, name) is None:
                raise ValueError(
                    f"{name} must be given with normalizer: the term is a mean of its own, and k accumulated "
                    "micro-batches would give k times its gradient"
                )
    present = 0
    penalised = objective.kl is not None and objective.kl.kernel_id != 0
    for name, bit in _PRESENT.items():
        if rows[name] is not None and (penalised or bit != Present.REF_LOGPROB):
            present |= bit
    if objective.rollout_correction is not None:
        present |= Present.POLICY_WEIGHT
    if over_support and objective.kl_over_full:
        present |= Present.KL_OVER_FULL
    if over_support and objective.nll_over_full:
        present |= Present.NLL_OVER_FULL
    numbers = (
        *scaling.values,
        *objective.numbers,
        present,
        reduction_id(objective.reduction),
        max_length,
        length,
        advantage_length,
        objective.entropy_coef,
        objective.nll_coef,
        float(shares),
        normalizer,
        entropy_normalizer,
        1.0 if objective.reduction == "none" and nll_normalizer < 0 else nll_normalizer,
        scale if isinstance(scale, float) else 1.0,
    )
    policy_weight = None
    if objective.rollout_correction is not None:
        old_rows, rollout_rows = rows["old_logprob"], rows["rollout_logprob"]
        assert old_rows is not None and rollout_rows is not None
        flat_mask = (labels != ignore_index).reshape(-1).to(dtype)
        if mask is not None:
            flat_mask = torch.where(flat_mask == 0, 0.0, mask.reshape(-1).to(dtype))
        policy_weight = objective.rollout_correction.weights(
            old_rows.reshape(-1).to(dtype),
            rollout_rows.reshape(-1).to(dtype),
            flat_mask,
            sequences_of(prod(leading), length, offsets, given.sequence_group),
        )
    tokens = TokenTensors(
        labels=labels,
        advantages=advantages,
        mask=mask,
        old_logprob=rows["old_logprob"],
        old_entropy=rows["old_entropy"],
        ref_logprob=rows["ref_logprob"] if penalised else None,
        policy_weight=policy_weight,
        nll_mask=nll_mask if objective.nll_coef else None,
        cu_seqlens=offsets,
        normalizer=normalizer_tensor,
        entropy_normalizer=entropy_tensor,
        nll_normalizer=nll_tensor,
        grad_scale=scale_tensor if fused else None,
        params=params_tensor(numbers),
        ignore_index=ignore_index,
    )
    return LossCall(objective, leading, tokens, scaling, vocab_size, dtype, given, length, present, scale)


_PRESENT = {
    "old_logprob": Present.OLD_LOGPROB,
    "old_entropy": Present.OLD_ENTROPY,
    "ref_logprob": Present.REF_LOGPROB,
}


def _check_needs(objective: Objective, given: TokenArguments, leading: tuple[int, ...], device: torch.device) -> None:
    """What the objective cannot do without."""
    correction, kl = objective.rollout_correction, objective.kl
    if objective.entropy_ratio is not None and given.old_entropy is None:
        raise ValueError(
            "old_entropy must be given for an objective with an entropy-ratio gate: the rollout policy's entropies"
        )
    if objective.ratio.needs_divergence and given.old_divergence is None:
        raise ValueError(
            f"old_divergence must be given for {objective.ratio}: total_variation or kl_old_new of erc.entropy_ratio"
        )
    if kl is not None and kl.kind != "full" and given.ref_logprob is None:
        raise ValueError(
            "ref_logprob must be given for an objective with a KL penalty: the reference policy's log-probs"
        )
    if kl is not None and kl.kind == "full":
        if given.ref_kl is None:
            raise ValueError(
                'ref_kl must be given for KLPenalty("full"): erc.entropy_ratio(logits, ref_logits).kl_new_old'
            )
        row_tensor("ref_kl", given.ref_kl, leading, device)
        if not given.ref_kl.dtype.is_floating_point:
            raise TypeError(f"ref_kl must be floating point, got {given.ref_kl.dtype}")
    if correction is not None and (given.rollout_logprob is None or given.old_logprob is None):
        raise ValueError("rollout_logprob and old_logprob must be given for an objective with a rollout correction")
    if objective.nll_coef and given.nll_mask is None:
        raise ValueError(
            "nll_mask must be given for an objective with nll_coef: 1 on the rows that the NLL term covers"
        )
    if given.sequence_group is not None and objective.needs_batch:
        raise ValueError(f"sequence_group does not go with {objective}: it reads statistics of the whole batch")
    if given.generator is not None and not isinstance(given.generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(given.generator).__name__}")


def _sequences(
    cu_seqlens: Tensor | None, group: dist.ProcessGroup | None, leading: tuple[int, ...], device: torch.device
) -> tuple[Tensor | None, int]:
    """(offsets of packed sequences, length of padded ones): what the caller gave of the two, None and 0 for neither."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"sequence_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if cu_seqlens is not None:
        offsets = check_offsets(cu_seqlens, prod(leading), device)
        if len(leading) > 1 and prod(leading[:-1]) != 1:
            raise ValueError(f"cu_seqlens goes with packed rows [N] or [1, N], got rows of shape {tuple(leading)}")
        return offsets, 0
    if len(leading) < 2:
        if group is not None:
            raise ValueError(f"sequence_group needs rows [B, T] or cu_seqlens, got rows of shape {tuple(leading)}")
        return None, 0
    if leading[-1] == 0:  # sequences without tokens; of a group, such a rank takes part in the sums
        return torch.zeros(prod(leading[:-1]) + 1, dtype=torch.int64, device=device), 0
    return None, leading[-1]


def _are_single_tokens(offsets: Tensor) -> bool:
    """Whether every packed sequence is known to hold one token."""
    return values_are_readable(offsets) and bool((offsets.diff() == 1).all())


def _advantages(
    advantages: Tensor, leading: tuple[int, ...], device: torch.device, offsets: Tensor | None
) -> tuple[Tensor, int]:
    """The advantages, and how many tokens share one: 1, all of a padded sequence's, or (0) all of a packed one's."""
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages must be a torch.Tensor, got {type(advantages).__name__}")
    check_constant("advantages", advantages)
    if advantages.device != device:
        raise ValueError(f"advantages must be on {device} like logits, got {advantages.device}")
    if not advantages.dtype.is_floating_point:
        raise TypeError(f"advantages must be floating point, got {advantages.dtype}")
    shape, rows = advantages.shape, advantages.contiguous()
    if offsets is not None:
        count = offsets.shape[0] - 1
        if shape == leading == (count,) and not _are_single_tokens(offsets):
            raise ValueError(
                f"advantages of shape {tuple(shape)} may be one per token or one per sequence, of which there are as "
                f"many: pass [{count}, 1] for one per sequence, or [1, {count}] rows for one per token"
            )
        if shape != leading and shape in ((count,), (count, 1)):
            return (rows, 0) if prod(leading) else (rows.reshape(-1)[:0], 1)
    elif len(leading) > 1 and shape in (leading[:1], (leading[0], *(1,) * (len(leading) - 1))):
        return (rows, prod(leading[1:])) if prod(leading) else (rows.reshape(-1)[:0], 1)
    if shape == leading:
        return rows, 1
    raise ValueError(f"advantages must have shape {tuple(leading)}, or one value per sequence, got {tuple(shape)}")
