"""Layer 1: what a caller may pass, checked before any kernel runs and brought into the form that kernels take.

Checks of values (a label out of range, a NaN advantage) look at CPU tensors only: on a GPU they would synchronise.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, log2, prod
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


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse what is no one strided tensor, and say how to pass what it holds."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} is a DTensor: pass {name}.to_local() with vocab_shard= where it is sharded by vocabulary, "
            f"else {name}.full_tensor()"
        )
    if tensor.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass {name}.values() as packed rows, with cu_seqlens={name}.offsets()"
        )


def check_logits(logits: Tensor, name: str = "logits") -> None:
    check_plain(name, logits)
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


def _factor_limit(dtype: torch.dtype) -> float:
    """What logits may be multiplied or divided by: its square, a logit and an upstream gradient have room beside each
    other in the statistics dtype."""
    return 2.0**400 if dtype == torch.float64 else 2.0**40


def row_scaling(
    temperature: float | Tensor, softcap: float | None, logit_scale: float, leading: tuple[int, ...], like: Tensor
) -> RowScaling:
    """Check and collect the scaling of `like`, the logits. A temperature that nobody reads makes a bad row NaN."""
    softcap = 0.0 if softcap is None else _positive("softcap", softcap)
    logit_scale = _positive("logit_scale", logit_scale)
    limit, by_row = _factor_limit(like.dtype), isinstance(temperature, Tensor)
    constant = 1.0 if by_row else _positive("temperature", temperature)
    factors = (logit_scale / softcap, 1 / constant) if softcap else ()
    for factor in (*factors, logit_scale / constant):
        if not torch.compiler.is_compiling() and not 1 / limit <= factor <= limit:
            raise ValueError(
                f"temperature, softcap and logit_scale must scale the logits by 2^-{log2(limit):.0f} to "
                f"2^{log2(limit):.0f} for {like.dtype} logits, got a factor of {factor:.3g}"
            )
    if not by_row:
        return RowScaling((temperature, softcap, logit_scale), None)
    check_constant("temperature", temperature)
    if temperature.dim() == 0:
        temperature = temperature.to(like.device, non_blocking=True).expand(leading)
    temperature = row_tensor("temperature", temperature, leading, like.device)
    if not temperature.dtype.is_floating_point:
        raise TypeError(f"temperature must be floating point, got {temperature.dtype}")
    rows = temperature.detach().reshape(-1).to(stats_dtype(like.dtype))
    valid = (
        (rows > 0) & rows.isfinite() & (rows >= max(1.0, logit_scale) / limit) & (rows <= min(1.0, logit_scale) * limit)
    )
    if not values_are_readable(temperature):
        rows = torch.where(valid, rows, torch.nan)
    elif not bool(valid.all()):
        bad = int((~valid).nonzero()[0])
        raise ValueError(
            f"temperature must be positive and finite in every row, and scale the logits by 2^-{log2(limit):.0f} to "
            f"2^{log2(limit):.0f} for {like.dtype} logits, got {float(temperature.reshape(-1)[bad])} at row {bad}"
        )
    return RowScaling((1.0, softcap, logit_scale), rows.contiguous())


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
    entropy_normalizer: float | Tensor | None = None
    nll_normalizer: float | Tensor | None = None
    generator: torch.Generator | None = None


_COMPARED = ("old_logprob", "old_entropy", "ref_logprob", "rollout_logprob")
"""What the current policy is compared with by a ratio: in bfloat16, 39 % of unchanged tokens have a ratio that is
off by more than 1 %."""


def _float_rows(name: str, tensor: Tensor | None, leading, device, dtype) -> Tensor | None:
    if tensor is None:
        return None
    tensor = row_tensor(name, tensor, leading, device)
    check_constant(name, tensor)
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if name in _COMPARED and tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {tensor.dtype}: "
            "rounded to 16 bits it cannot decide a ratio of 1.05"
        )
    return tensor.detach().reshape(-1).to(dtype).contiguous()


def _advantage_rows(advantages: Tensor, leading: tuple[int, ...], sequences: Sequences | None) -> Tensor:
    """`[N]` from `[*]`, or from one value per sequence: `[B]` or `[B, 1]`, of packed rows `[S]` or `[S, 1]`."""
    shape = tuple(advantages.shape)
    packed = sequences is not None and sequences.offsets is not None
    if packed:
        count = sequences.offsets.shape[0] - 1
        # Where every sequence is one token, both readings are the same.
        single = values_are_readable(sequences.offsets) and bool((sequences.offsets.diff() == 1).all())
        if shape == leading == (count,) and not single:
            raise ValueError(
                f"advantages of shape {shape} may be one per token or one per sequence, of which there are as many: "
                f"pass [{count}, 1] for one per sequence, or [1, {count}] rows for one per token"
            )
        if shape != leading and shape in ((count,), (count, 1)):
            return sequences.expand(advantages.reshape(-1))
    elif len(leading) > 1 and shape in (leading[:1], (leading[0], *(1,) * (len(leading) - 1))):
        return advantages.reshape(leading[0], *(1,) * (len(leading) - 1)).expand(leading).reshape(-1)
    if shape != leading:
        raise ValueError(f"advantages must have shape {leading}, or one value per sequence, got {shape}")
    return advantages.reshape(-1)


def _advantages(advantages: Tensor, leading, device, dtype, sequences: Sequences | None, mask: Tensor) -> Tensor:
    if not isinstance(advantages, Tensor):
        raise TypeError(f"advantages must be a torch.Tensor, got {type(advantages).__name__}")
    check_constant("advantages", advantages)
    if advantages.device != device:
        raise ValueError(f"advantages must be on {device} like logits, got {advantages.device}")
    if not advantages.dtype.is_floating_point:
        raise TypeError(f"advantages must be floating point, got {advantages.dtype}")
    rows = _advantage_rows(advantages.detach().to(dtype), leading, sequences)
    if values_are_readable(rows):
        bad = ~rows.isfinite() & (mask != 0)
        if bool(bad.any()):
            raise ValueError(f"advantages must be finite, got {float(rows[bad][0])} at row {int(bad.nonzero()[0])}")
    return rows.contiguous()


def _sequences(cu_seqlens: Tensor | None, leading: tuple[int, ...], device: torch.device) -> Sequences | None:
    tokens = prod(leading)
    if cu_seqlens is None:
        if len(leading) < 2:
            return None
        if leading[-1] > 0:
            return Sequences(tokens, length=leading[-1])
        empty = torch.zeros(prod(leading[:-1]) + 1, dtype=torch.int64, device=device)
        return Sequences(0, offsets=empty)  # sequences without any token
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
        name: _float_rows(name, getattr(arguments, name), leading, device, dtype)
        for name in (*_COMPARED, "nll_mask", "old_divergence")
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
        if arguments.cu_seqlens is not None:
            raise ValueError("max_length must be set in the objective for packed rows with seq-mean-token-sum-norm")
        max_length = max(1, leading[-1])
    _require_own_normalizers(objective, arguments)
    weight = token_weights(
        objective.reduction, mask, sequences, _normalizer("normalizer", arguments.normalizer, mask), max_length
    )
    own = objective.own_normalizers
    entropy_weight = logprob_weight = policy_weight = None
    if objective.entropy_coef:
        bonus = weight
        if "entropy_normalizer" in own:
            count = _normalizer("entropy_normalizer", arguments.entropy_normalizer, mask)
            bonus = token_weights("token-mean", mask, None, count, None)
        entropy_weight = -objective.entropy_coef * bonus
    if objective.nll_coef:
        covered = torch.where(mask == 0, 0.0, rows["nll_mask"])
        nll = weight * covered
        if "nll_normalizer" in own:
            count = _normalizer("nll_normalizer", arguments.nll_normalizer, mask * covered)
            nll = token_weights("token-mean", mask * covered, None, count, None)
        logprob_weight = -objective.nll_coef * nll
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
        logprob_weight=logprob_weight,
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


def _require_own_normalizers(objective: Objective, arguments: TokenArguments) -> None:
    """Refuse a count for a part of the loss only: of the other part, micro-batches and ranks would each add a mean."""
    if arguments.normalizer is None:
        return
    for name in objective.own_normalizers:
        if getattr(arguments, name) is None:
            raise ValueError(
                f"{name} must be given beside normalizer: {name.removesuffix('_normalizer')} is a mean over a count of "
                f"its own in {objective}"
            )


def _normalizer(name: str, value: float | Tensor | None, weights: Tensor) -> float | Tensor | None:
    """What divides `weights`: positive, or 0 where all of them are 0."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        check_constant(name, value)
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        readable = values_are_readable(value)
        value = value.detach().to(weights.device, weights.dtype, non_blocking=True)
    else:
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}")
        readable = not torch.compiler.is_compiling()
    if readable and not 0 <= value < inf:
        raise ValueError(f"{name} must be positive and finite, got {float(value)}")
    if readable and values_are_readable(weights) and value == 0 and bool(weights.any()):
        raise ValueError(f"{name} must be positive where a token is active, got 0")
    return value


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
