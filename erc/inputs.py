"""Layer 1: what a caller may pass, checked before any kernel runs and brought into the form that kernels take.

Checks of values (a label out of range, a NaN advantage) look at CPU tensors only: on a GPU they would synchronise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, prod
from numbers import Real

import torch
from torch import Tensor

from erc.ops import stats_dtype
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective as preset
from erc.surrogate.reductions import token_weights
from erc.surrogate.sequences import Sequences
from erc.surrogate.token_loss import TokenBatch

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values_are_readable(tensor: Tensor) -> bool:
    """Whether reading values costs no synchronisation and breaks no trace."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not _is_fake(tensor)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def check_logits(logits: Tensor, name: str = "logits") -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must be [*, V] with V >= 1, got shape {tuple(logits.shape)}")


def check_constant(name: str, tensor: Tensor | None) -> None:
    """Refuse a graph that the loss would silently drop."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad: the loss treats it as a constant; pass {name}.detach()")


def row_tensor(name: str, tensor: Tensor, leading: tuple[int, ...], device: torch.device) -> Tensor:
    """A per-row argument as `[*]`, or an error that names it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} like logits, got {tensor.device}")
    if tuple(tensor.shape) != leading:
        raise ValueError(f"{name} must have shape {leading}, one value per row, got {tuple(tensor.shape)}")
    return tensor


def check_labels(
    labels: Tensor,
    leading: tuple[int, ...],
    device: torch.device,
    vocab_size: int,
    ignore_index: int,
    mask: Tensor | None = None,
) -> Tensor:
    """Labels as contiguous int64 `[N]`. A masked row's label is replaced by `ignore_index`: the row is not read.

    Raises:
        IndexError: for a label outside `[0, vocab_size)` that is not `ignore_index` (CPU; on a GPU such a row is NaN).
    """
    labels = row_tensor("labels", labels, leading, device)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"labels must be an integer tensor, got {labels.dtype}")
    labels = labels.reshape(-1).to(torch.int64).contiguous()
    if mask is not None:
        labels = torch.where(mask == 0, ignore_index, labels)
    if values_are_readable(labels):
        bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            position = tuple(int(i) for i in torch.unravel_index(torch.tensor(row), leading)) if leading else ()
            raise IndexError(
                f"labels must lie in [0, {vocab_size}) or equal ignore_index={ignore_index}, "
                f"got {int(labels[row])} at position {position}"
            )
    return labels


@dataclass(frozen=True)
class RowScaling:
    """`x = softcap(z * logit_scale) / temperature` for each row.

    `temperature` is `[N]` in the statistics dtype, or None where the scalar in `values` holds for every row.
    """

    values: tuple[float, float, float]
    temperature: Tensor | None

    def apply(self, logits: Tensor) -> Tensor:
        """The scaled logits of `[N, V]` rows, by plain PyTorch."""
        temperature, softcap, logit_scale = self.values
        if softcap:  # an infinite logit stays infinite: -inf forbids a token, +inf makes its row NaN
            x = torch.where(logits.isinf(), logits, softcap * torch.tanh(logits * (logit_scale / softcap)))
        else:
            x = logits if logit_scale == 1 else logits * logit_scale
        if self.temperature is not None:
            return x / self.temperature[:, None]
        return x if temperature == 1 else x / temperature


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a positive number, got {value!r}")
    if not torch.compiler.is_compiling() and not (isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def row_scaling(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, leading: tuple[int, ...], like: Tensor
) -> RowScaling:
    """Check and collect the scaling of `like`, the logits."""
    softcap = 0.0 if softcap is None else _positive("softcap", softcap)
    logit_scale = _positive("logit_scale", logit_scale)
    if not isinstance(temperature, Tensor):
        return RowScaling((_positive("temperature", temperature), softcap, logit_scale), None)
    check_constant("temperature", temperature)
    if temperature.dim() == 0:
        temperature = temperature.to(like.device, non_blocking=True).expand(leading)
    temperature = row_tensor("temperature", temperature, leading, like.device)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be floating point, got {temperature.dtype}")
    if values_are_readable(temperature) and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError("temperature must be positive and finite in every row")
    return RowScaling(
        (1.0, softcap, logit_scale), temperature.detach().reshape(-1).to(stats_dtype(like.dtype)).contiguous()
    )


def resolve_objective(objective: str | Objective) -> Objective:
    if isinstance(objective, str):
        return preset(objective)
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a preset name or an erc.Objective, got {type(objective).__name__}")
    return objective


@dataclass(frozen=True)
class TokenArguments:
    """The per-token arguments that every loss takes, as the caller gave them."""

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
    generator: torch.Generator | None = None


def _float_rows(name: str, tensor: Tensor | None, leading, device, dtype, *, exact: bool = False) -> Tensor | None:
    if tensor is None:
        return None
    tensor = row_tensor(name, tensor, leading, device)
    check_constant(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if exact and tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}: "
            "rounded to 16 bits it cannot decide a ratio of 1.05"
        )
    return tensor.detach().reshape(-1).to(dtype).contiguous()


def _advantages(advantages: Tensor, leading, device, dtype, sequences: Sequences | None, mask: Tensor) -> Tensor:
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages must be a torch.Tensor, got {type(advantages).__name__}")
    check_constant("advantages", advantages)
    if advantages.device != device:
        raise ValueError(f"advantages must be on {device} like logits, got {advantages.device}")
    if not advantages.dtype.is_floating_point:
        raise TypeError(f"advantages must be floating point, got {advantages.dtype}")
    shape = tuple(advantages.shape)
    rows = advantages.detach().to(dtype)
    if shape == leading:
        rows = rows.reshape(-1)
    elif len(leading) > 1 and shape in (leading[:1], (leading[0], *(1,) * (len(leading) - 1))):
        rows = rows.reshape(leading[0], *(1,) * (len(leading) - 1)).expand(leading).reshape(-1)
    elif sequences is not None and sequences.offsets is not None and shape == (sequences.offsets.shape[0] - 1,):
        rows = sequences.expand(rows)
    else:
        raise ValueError(f"advantages must have shape {leading}, or one value per sequence, got {shape}")
    if values_are_readable(rows):
        bad = ~rows.isfinite() & (mask != 0)
        if bool(bad.any()):
            raise ValueError(f"advantages must be finite, got {float(rows[bad][0])} at row {int(bad.nonzero()[0])}")
    return rows.contiguous()


def _sequences(cu_seqlens: Tensor | None, leading: tuple[int, ...], device: torch.device) -> Sequences | None:
    tokens = prod(leading)
    if cu_seqlens is None:
        return Sequences(tokens, length=leading[-1]) if len(leading) > 1 and leading[-1] > 0 else None
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.dim() != 1
    ):
        raise TypeError("cu_seqlens must be a 1-D int32 or int64 tensor of offsets [S + 1]")
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens must be on {device} like logits, got {cu_seqlens.device}")
    if len(leading) > 1 and prod(leading[:-1]) != 1:
        raise ValueError(f"cu_seqlens goes with packed rows [N] or [1, N], got rows of shape {leading}")
    if values_are_readable(cu_seqlens):
        steps = cu_seqlens.diff()
        if len(cu_seqlens) < 1 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((steps < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows {tokens}, got {cu_seqlens.tolist()}")
    return Sequences(tokens, offsets=cu_seqlens.to(torch.int64))


def _mask(mask: Tensor | None, active: Tensor | None, leading, device, dtype) -> Tensor:
    if mask is None:
        rows = torch.ones(prod(leading), dtype=dtype, device=device)
    else:
        rows = row_tensor("mask", mask, leading, device)
        check_constant("mask", mask)
        rows = rows.detach().reshape(-1).to(dtype)
        if values_are_readable(rows) and not bool((rows.isfinite() & (rows >= 0)).all()):
            raise ValueError("mask must be finite and >= 0: it weighs tokens")
    return rows if active is None else torch.where(active, rows, 0.0)


def token_batch(
    objective: Objective,
    arguments: TokenArguments,
    leading: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    active: Tensor | None = None,
) -> TokenBatch:
    """Check the per-token arguments against `objective` and compute the weight of each token.

    Args:
        leading: the shape `[*]` of the rows.
        dtype: the statistics dtype.
        active: bool `[N]`, False where a row's label is `ignore_index`.

    Raises:
        ValueError, TypeError: naming the argument and what was expected.
    """
    sequences = _sequences(arguments.cu_seqlens, leading, device)
    if objective.needs_sequences and sequences is None:
        raise ValueError(
            f"rows must be [B, T], or packed with cu_seqlens, for {objective}, got rows of shape {leading}"
        )
    mask = _mask(arguments.mask, active, leading, device, dtype)
    rows = {
        name: _float_rows(name, getattr(arguments, name), leading, device, dtype, exact=name == "old_entropy")
        for name in ("old_logprob", "old_entropy", "ref_logprob", "rollout_logprob", "nll_mask", "old_divergence")
    }
    ref_kl = _ref_kl(objective, arguments.ref_kl, leading, device, dtype)
    gate, correction = objective.entropy_ratio, objective.rollout_correction
    if gate is not None and rows["old_entropy"] is None:
        raise ValueError(
            "old_entropy must be given for an objective with an entropy-ratio gate: the rollout policy's entropies"
        )
    if objective.ratio.needs_divergence and rows["old_divergence"] is None:
        raise ValueError(
            f"old_divergence must be given for {objective.ratio}: total_variation or kl_old_new of erc.entropy_ratio"
        )
    if objective.kl is not None and objective.kl.kind != "full" and rows["ref_logprob"] is None:
        raise ValueError(
            "ref_logprob must be given for an objective with a KL penalty: the reference policy's log-probs"
        )
    if correction is not None and (rows["rollout_logprob"] is None or rows["old_logprob"] is None):
        raise ValueError("rollout_logprob and old_logprob must be given for an objective with a rollout correction")
    if objective.nll_coef and rows["nll_mask"] is None:
        raise ValueError(
            "nll_mask must be given for an objective with nll_coef: 1 on the rows that the NLL term covers"
        )

    max_length = objective.max_length
    if objective.reduction == "seq-mean-token-sum-norm" and max_length is None:
        if sequences.length is None:
            raise ValueError("max_length must be set in the objective for packed rows with seq-mean-token-sum-norm")
        max_length = sequences.length
    normalizer = _normalizer(arguments.normalizer, device, dtype)
    weight = token_weights(objective.reduction, mask, sequences, normalizer, max_length)

    entropy_weight = None
    if objective.entropy_coef:
        shared = objective.entropy_reduction == "loss" or objective.reduction == "none"
        bonus = weight if shared else token_weights("token-mean", mask, None, None, None)
        entropy_weight = -objective.entropy_coef * bonus
    policy_weight = None
    if correction is not None:
        policy_weight = correction.weights(rows["old_logprob"], rows["rollout_logprob"], mask, sequences)
    return TokenBatch(
        mask=mask,
        weight=weight,
        advantages=_advantages(arguments.advantages, leading, device, dtype, sequences, mask),
        old_logprob=rows["old_logprob"],
        old_entropy=rows["old_entropy"],
        ref_logprob=rows["ref_logprob"],
        policy_weight=policy_weight,
        entropy_weight=entropy_weight,
        logprob_weight=-objective.nll_coef * weight * rows["nll_mask"] if objective.nll_coef else None,
        sequences=sequences,
        old_divergence=rows["old_divergence"],
        ref_kl=ref_kl,
        generator=_generator(arguments.generator),
    )


def _ref_kl(objective: Objective, ref_kl: Tensor | None, leading, device, dtype) -> Tensor | None:
    if objective.kl is None or objective.kl.kind != "full":
        return None
    if ref_kl is None:
        raise ValueError('ref_kl must be given for KLPenalty("full"): erc.entropy_ratio(logits, ref_logits).kl_new_old')
    ref_kl = row_tensor("ref_kl", ref_kl, leading, device)
    if not ref_kl.dtype.is_floating_point:
        raise TypeError(f"ref_kl must be floating point, got {ref_kl.dtype}")
    return ref_kl.reshape(-1).to(dtype)


def _generator(generator: torch.Generator | None) -> torch.Generator | None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    return generator


def _normalizer(normalizer: float | Tensor | None, device: torch.device, dtype: torch.dtype) -> float | Tensor | None:
    if normalizer is None:
        return None
    if isinstance(normalizer, Tensor):
        check_constant("normalizer", normalizer)
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer must be a number or a 0-d tensor, got shape {tuple(normalizer.shape)}")
        if values_are_readable(normalizer) and not bool(normalizer > 0):
            raise ValueError(f"normalizer must be positive, got {float(normalizer)}")
        return normalizer.detach().to(device, dtype, non_blocking=True)
    return _positive("normalizer", normalizer)


def labelled_batch(
    objective: Objective,
    arguments: TokenArguments,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    vocab_size: int | None = None,
) -> tuple[Tensor, TokenBatch]:
    """Labels `[N]`, and the batch that goes with them. Mask 0 and label `ignore_index` are the same thing: each
    implies the other.

    `vocab_size` is the number of columns unless logits hold a shard of them.
    """
    leading, device, dtype = tuple(logits.shape[:-1]), logits.device, stats_dtype(logits.dtype)
    mask = None if arguments.mask is None else _mask(arguments.mask, None, leading, device, dtype)
    labels = check_labels(labels, leading, device, vocab_size or logits.shape[-1], ignore_index, mask)
    return labels, token_batch(objective, arguments, leading, device, dtype, labels != ignore_index)
