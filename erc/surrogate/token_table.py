"""The token table in plain PyTorch: everything that is known of a token before its logits are read.

The readable definition of the operator `token_table` (csrc/common/token_table.h, erc/triton_kernels/tokens.py), and
what the `torch` backend runs. A token's weight in the reduction, its rollout statistics and the weights of the terms
that do not go through the ratio become one row; `erc.constants.Column` names the columns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from erc.constants import INVALID_VALUE, Column, Param, Reduction
from erc.surrogate.reductions import SEQUENCE_REDUCTIONS
from erc.surrogate.sequences import Sequences
from erc.surrogate.validation import values_are_readable


def token_table(
    labels: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    old_logprob: Tensor | None,
    old_entropy: Tensor | None,
    ref_logprob: Tensor | None,
    policy_weight: Tensor | None,
    nll_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    entropy_normalizer: Tensor | None,
    nll_normalizer: Tensor | None,
    grad_scale: Tensor | None,
    params: Tensor,
    ignore_index: int,
    vocab_size: int,
    wide: bool,
    sequence_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Table `[N, 8]`, labels `[N]` with `ignore_index` where the mask is 0, and a counter that only kernels use.

    With `sequence_group`, which no operator takes, every sum and count is over all ranks that hold parts of the
    sequences.
    """
    numbers = params.tolist()
    dtype = torch.float64 if wide else torch.float32
    count = labels.numel()
    labels = labels.reshape(-1).to(torch.int64)

    def column(values: Tensor | None, otherwise: float) -> Tensor:
        if values is None:
            return torch.full((count,), otherwise, dtype=dtype, device=labels.device)
        return values.reshape(-1).to(dtype)

    weight = torch.where(labels == ignore_index, 0.0, column(mask, 1.0))
    active = weight != 0
    sequences = sequences_of(count, int(numbers[Param.SEQUENCE_LENGTH]), cu_seqlens, sequence_group)

    def divided(weights: Tensor, normalizer: Tensor | None, number: float, counted: Tensor | float) -> Tensor:
        if normalizer is not None:
            return torch.where(weights == 0, 0.0, weights / normalizer.to(dtype))
        if number >= 0:
            return torch.where(weights == 0, 0.0, weights / number)
        counted = torch.as_tensor(counted, device=labels.device).to(dtype)
        return weights / torch.where(counted == 0, 1.0, counted)

    # Sums in float64: a count of tokens is exact, and one of weights is what the kernels' is.
    def total(values: Tensor) -> Tensor:
        values = values.double()
        return values.sum() if sequences is None else sequences.total(values)

    token_count = total(weight)
    reduction = Reduction(int(numbers[Param.REDUCTION]))
    shares: Tensor = weight
    counted: Tensor | float = 1.0
    if reduction == Reduction.TOKEN_MEAN:
        counted = token_count
    elif reduction in SEQUENCE_REDUCTIONS:
        assert sequences is not None  # the front desk asked for them
        per_sequence = sequences.sum(weight.double())
        counted = (per_sequence != 0).sum()
        if reduction == Reduction.SEQ_MEAN_TOKEN_MEAN:
            shares = torch.where(active, weight / sequences.expand(per_sequence.to(dtype)), 0.0)
        elif reduction == Reduction.SEQ_MEAN_TOKEN_SUM_NORM:
            shares = weight / numbers[Param.MAX_LENGTH]
    shares = divided(shares, normalizer, numbers[Param.NORMALIZER], counted)

    entropy_shares = torch.zeros_like(shares)
    if numbers[Param.ENTROPY_COEF]:
        bonus = shares
        if not numbers[Param.ENTROPY_SHARES]:
            bonus = divided(weight, entropy_normalizer, numbers[Param.ENTROPY_NORMALIZER], token_count)
        entropy_shares = -numbers[Param.ENTROPY_COEF] * bonus
    logprob_shares = torch.zeros_like(shares)
    if numbers[Param.NLL_COEF]:
        covered = torch.where(active, weight * column(nll_mask, 0.0), 0.0)
        mean = divided(covered, nll_normalizer, numbers[Param.NLL_NORMALIZER], total(covered))
        logprob_shares = -numbers[Param.NLL_COEF] * mean

    scale = numbers[Param.GRAD_SCALE] if grad_scale is None else grad_scale.to(dtype)
    columns = {
        Column.WEIGHT: shares * scale,
        Column.ADVANTAGE: _advantage_column(advantages.to(dtype), int(numbers[Param.ADVANTAGE_LENGTH]), sequences),
        Column.OLD_LOGPROB: column(old_logprob, 0.0),
        Column.OLD_ENTROPY: column(old_entropy, 0.0),
        Column.REF_LOGPROB: column(ref_logprob, 0.0),
        Column.POLICY_WEIGHT: column(policy_weight, 1.0),
        Column.ENTROPY_WEIGHT: entropy_shares * scale,
        Column.LOGPROB_WEIGHT: logprob_shares * scale,
    }
    # A NaN input makes its token's loss and gradient NaN, also where a clip or the gate would hide it. A NaN old
    # entropy drops the token instead: it is what the gate compares with.
    inputs = (Column.ADVANTAGE, Column.OLD_LOGPROB, Column.REF_LOGPROB, Column.POLICY_WEIGHT)
    broken = torch.stack([columns[name].isnan() for name in inputs]).any(0)
    columns[Column.WEIGHT] = torch.where(broken, torch.nan, columns[Column.WEIGHT])
    table = torch.stack([columns[name] for name in Column], dim=1)
    unread = torch.zeros_like(table[:1]).index_fill(1, torch.tensor(Column.POLICY_WEIGHT, device=table.device), 1.0)
    table = torch.where(active[:, None], table, unread)
    if values_are_readable(labels):
        _check(table, weight, labels, active, vocab_size)
    counter = torch.zeros(1, dtype=torch.int32, device=labels.device)
    return table, torch.where(active, labels, ignore_index), counter


def _check(table: Tensor, mask: Tensor, labels: Tensor, active: Tensor, vocab_size: int) -> None:
    """Raises where no loss is defined for an active token; who called says for which, and why."""
    weights = (Column.WEIGHT, Column.ADVANTAGE, Column.ENTROPY_WEIGHT, Column.LOGPROB_WEIGHT)
    valid = table[:, weights].isfinite().all(1) & ~table[:, Column.OLD_ENTROPY].isnan()
    valid &= (mask > 0) & mask.isfinite() & (labels >= 0) & (labels < vocab_size)
    if bool((active & ~valid).any()):
        raise RuntimeError(INVALID_VALUE)


def sequences_of(
    tokens: int, length: int, cu_seqlens: Tensor | None, group: dist.ProcessGroup | None = None
) -> Sequences | None:
    """The sequence structure that params and `cu_seqlens` describe, None where there is none."""
    if cu_seqlens is not None:
        return Sequences(tokens, offsets=cu_seqlens.to(torch.int64), group=group)
    return Sequences(tokens, length=length, group=group) if length else None


def _advantage_column(advantages: Tensor, length: int, sequences: Sequences | None) -> Tensor:
    """One advantage per token, from one for every `length` tokens, or (0) from one per packed sequence."""
    advantages = advantages.reshape(-1)
    if length == 1:
        return advantages
    if length:
        return advantages.repeat_interleave(length)
    assert sequences is not None
    return sequences.expand(advantages)
