"""The tokens that a sampler kept, and what log-probs over them are.

Top-k, top-p, min-p and grammars cut the distribution that rollouts are sampled from. The log-prob that a rollout engine
reports (vLLM's `processed_logprobs`) is then over the kept tokens, and a ratio of it to one over the full vocabulary is
biased by the kept mass (DeepSeek-V3.2, arXiv 2512.02556 section 3.1, "keep sampling mask").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.call import TokenArguments, loss_call
from erc.inputs import check_logits, label_rows, resolve_objective
from erc.ops import stats_dtype
from erc.reference import OPERATORS, Row
from erc.results import PolicyLoss, TokenCall, two_phase_result
from erc.rows import row_scaling
from erc.surrogate.objective import Objective
from erc.surrogate.validation import values_are_readable

_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SamplingSupport:
    """The kept tokens of `N` rows: row `i` kept `token_ids[offsets[i] : offsets[i + 1]]`.

    Within a row, ids rise strictly; entries of -1 before them are skipped, so that padded forms need no compaction. A
    row without a token was not cut: it means the full vocabulary.

    `token_ids` is `[K]`, int32 or int64, `offsets` `[N + 1]`, int64. Rows are in the order of the flattened labels.
    The class methods read other forms and sort; this constructor takes what is sorted already. On the CPU it checks the
    values; on a GPU nothing is read here, and a row that breaks the rule is NaN.

    Raises:
        TypeError, ValueError: naming the argument and what was expected.

    >>> kept = SamplingSupport.from_ids(torch.tensor([[7, 2, -1], [-1, -1, -1]]))
    >>> kept.to_mask(9).sum(-1)  # the second row was not cut
    tensor([2, 9])
    """

    token_ids: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        for name, tensor in (("token_ids", self.token_ids), ("offsets", self.offsets)):
            if not isinstance(tensor, Tensor) or tensor.dtype not in _ID_DTYPES or tensor.dim() != 1:
                raise TypeError(f"{name} must be a 1-D int32 or int64 tensor, got {_described(tensor)}")
        if self.token_ids.device != self.offsets.device:
            raise ValueError(f"offsets must be on {self.token_ids.device} like token_ids, got {self.offsets.device}")
        object.__setattr__(self, "offsets", self.offsets.to(torch.int64))
        _check_offsets(self.offsets, len(self.token_ids))
        if not values_are_readable(self.token_ids):
            return
        if len(self.token_ids) and int(self.token_ids.min()) < -1:
            raise ValueError(f"token_ids must be >= 0, or -1 for padding, got {int(self.token_ids.min())}")
        before, after, rows = self.token_ids[:-1], self.token_ids[1:], self._row_of_ids()
        bad = (rows[:-1] == rows[1:]) & (after <= before) & (after >= 0)
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            order = f"{int(before[i])}, {int(after[i])} in row {int(rows[i])}"
            raise ValueError(f"token_ids must rise strictly within a row (SamplingSupport.from_csr sorts), got {order}")
        if bool(((rows[:-1] == rows[1:]) & (after == -1) & (before >= 0)).any()):
            raise ValueError(
                "token_ids must have the padding of a row, -1, before its ids: SamplingSupport.from_csr sorts"
            )

    # ---- other forms -------------------------------------------------------------------------------------------------

    @classmethod
    def from_csr(cls, token_ids: Tensor | Sequence[int], offsets: Tensor | Sequence[int]) -> SamplingSupport:
        """Ids in any order within a row: one `SamplingMask(token_ids, offsets)` of vLLM, one row per generated token.

        >>> SamplingSupport.from_csr([5, 3, 8], [0, 2, 3]).token_ids.tolist()
        [3, 5, 8]
        """
        token_ids, offsets = (_as_ids(name, given) for name, given in (("token_ids", token_ids), ("offsets", offsets)))
        _check_offsets(offsets, len(token_ids))
        rows = _row_of(offsets.to(torch.int64), len(token_ids))
        order = (rows * 2**32 + token_ids).argsort(stable=True)  # rows keep their place: one sort for all of them
        return cls(token_ids[order], offsets)

    @classmethod
    def from_counts(cls, token_ids: Tensor | Sequence[int], counts: Tensor | Sequence[int]) -> SamplingSupport:
        """Flat ids and how many of them each row kept, 0 where it was not cut: prime-rl's `SamplingMask(ids, counts)`.

        >>> SamplingSupport.from_counts([5, 3, 8], [2, 0, 1]).offsets.tolist()
        [0, 2, 2, 3]
        """
        counts = _as_ids("counts", counts).to(torch.int64)
        return cls.from_csr(token_ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def from_ids(cls, ids: Tensor, padding: int = -1, *, sampled_first: bool = False) -> SamplingSupport:
        """Ids of fixed width `[*, k]`, filled up with `padding`. Nothing is read on the host.

        Args:
            sampled_first: the first column is the sampled token, which may stand among the others once more (SkyRL's
                form, vLLM's `flat_logprobs`). A repetition elsewhere is an error.
        """
        if not isinstance(ids, Tensor) or ids.dtype not in _ID_DTYPES or ids.dim() < 1:
            raise TypeError(f"ids must be an int32 or int64 tensor [*, k], got {_described(ids)}")
        count, width = prod(ids.shape[:-1]), ids.shape[-1]
        ids = ids.reshape(count, width)
        ids = torch.where(ids == padding, -1, ids)
        if sampled_first and width > 1:
            again = (ids[:, 1:] == ids[:, :1]).any(-1)
            ids = torch.cat([torch.where(again, -1, ids[:, 0])[:, None], ids[:, 1:]], 1)
        offsets = torch.arange(count + 1, device=ids.device) * width
        return cls(ids.sort(-1).values.flatten(), offsets)

    @classmethod
    def from_mask(cls, mask: Tensor) -> SamplingSupport:
        """A bool mask `[*, V]`, True where kept; counting it synchronises with a GPU. A row that keeps nothing is an
        error on the CPU: nothing could have been sampled from it."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() < 1:
            raise TypeError(f"mask must be a bool tensor [*, V], got {_described(mask)}")
        flat = mask.reshape(-1, mask.shape[-1])
        counts = flat.sum(-1)
        if values_are_readable(flat) and bool((counts == 0).any()):
            raise ValueError(
                f"mask must keep a token in every row, but row {int((counts == 0).nonzero()[0])} keeps none"
            )
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(flat.nonzero()[:, 1].to(torch.int32), offsets)

    @classmethod
    def cat(cls, parts: Iterable[SamplingSupport]) -> SamplingSupport:
        """The rows of several supports one after the other, such as those of the sequences of a batch."""
        parts = list(parts)
        if not parts:
            raise ValueError("parts must hold a SamplingSupport")
        counts = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(torch.cat([part.token_ids for part in parts]), offsets)

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1

    def spread(self, active: Tensor) -> SamplingSupport:
        """The same supports at the rows where `active` `[*]` is True, in order, and uncut rows elsewhere.

        Engines report one row per generated token, losses take one per position: pass `labels != ignore_index`.

        >>> engine = SamplingSupport.from_counts([1, 2, 3], [2, 1])
        >>> engine.spread(torch.tensor([[False, True], [True, False]])).offsets.tolist()
        [0, 0, 2, 3, 3]
        """
        if not isinstance(active, Tensor) or active.dtype != torch.bool or active.device != self.offsets.device:
            raise TypeError(f"active must be a bool tensor on {self.offsets.device}, got {_described(active)}")
        active = active.reshape(-1)
        if values_are_readable(active) and int(active.sum()) != self.rows:
            raise ValueError(f"active must be True once per row of the support, {self.rows}, got {int(active.sum())}")
        counts = torch.cat([self.offsets.diff(), self.offsets.new_zeros(1)])
        counts = torch.where(active, counts[(active.long().cumsum(0) - 1).clamp(0, self.rows)], 0)
        return SamplingSupport(self.token_ids, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SamplingSupport:
        """On another device."""
        return SamplingSupport(
            self.token_ids.to(device, non_blocking=non_blocking), self.offsets.to(device, non_blocking=non_blocking)
        )

    def to_mask(self, vocab_size: int) -> Tensor:
        """bool `[N, V]`, True for kept tokens; all of an uncut row.

        Raises:
            IndexError: on the CPU, for an id beyond the vocabulary.
        """
        if values_are_readable(self.token_ids) and len(self.token_ids) and int(self.token_ids.max()) >= vocab_size:
            raise IndexError(f"token_ids must be below the vocabulary's {vocab_size}, got {int(self.token_ids.max())}")
        column = torch.where(self.token_ids < 0, vocab_size, self.token_ids.long())
        mask = torch.zeros(self.rows, vocab_size + 1, dtype=torch.bool, device=self.token_ids.device)
        mask[self._row_of_ids(), column] = True
        mask = mask[:, :vocab_size]
        return mask | ~mask.any(-1, keepdim=True)

    def _row_of_ids(self) -> Tensor:
        return _row_of(self.offsets, len(self.token_ids))


def _check_offsets(offsets: Tensor, kept: int) -> None:
    if not values_are_readable(offsets):
        return
    if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != kept or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of token_ids, {kept}")


def _row_of(offsets: Tensor, kept: int) -> Tensor:
    """The row of each of `kept` ids."""
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff(), output_size=kept)


def _as_ids(name: str, given: Any) -> Tensor:
    tensor = given if isinstance(given, Tensor) else torch.as_tensor(given)
    tensor = tensor.to(torch.int64) if tensor.numel() == 0 else tensor
    if tensor.dtype not in _ID_DTYPES or tensor.dim() != 1:
        raise TypeError(f"{name} must be 1-D int32 or int64, got {_described(tensor)}")
    return tensor


def _described(given: Any) -> str:
    return (
        f"{given.dtype} {tuple(given.shape)} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
    )


# ---- the definition, in plain PyTorch --------------------------------------------------------------------------------


class SupportStats(NamedTuple):
    """Statistics of rows whose sampling was cut, each `[*]`. `logprob` is over the kept tokens, `logprob_full`, entropy
    and logsumexp over the full vocabulary; `kept_mass` is the probability that the full distribution gives the kept
    tokens, so `logprob = logprob_full - log(kept_mass)`."""

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor
    logprob_full: Tensor
    kept_mass: Tensor


def support_stats(
    logits: Tensor,
    labels: Tensor,
    support: SamplingSupport,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> SupportStats:
    """What every backend must compute with a support: in float64, rounded once, gradients by autograd.

    `d logprob / dx_j = 1[j = y] - p_support(j)` for a kept j and 0 for others; a row that was not cut, or kept all of
    the vocabulary, is computed as without a support, bit for bit. Ignored rows are not read and give 0.

    Raises:
        IndexError: on the CPU, for a label that its row's support does not hold; elsewhere that row is NaN.
    """
    check_logits(logits)
    leading, vocab_size = logits.shape[:-1], logits.shape[-1]
    if support.rows != prod(leading):
        raise ValueError(f"support must have one row per row of logits, {prod(leading)}, got {support.rows}")
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    labels = label_rows(labels, leading, logits.device, ignore_index).reshape(-1)
    active, kept = labels != ignore_index, support.to_mask(vocab_size)
    column = torch.where(active, labels, 0)[:, None]
    outside = active & ~kept.gather(-1, column).squeeze(-1)
    if values_are_readable(labels) and bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise IndexError(f"labels must lie in their row's support, but that of row {row} lacks {int(labels[row])}")
    x = torch.where(active[:, None], logits.reshape(-1, vocab_size).double(), 0.0)
    x = scaling.apply(torch.where(outside[:, None], torch.nan, x))
    full, cut = Row(x), Row(torch.where(kept, x, -torch.inf))
    column = column.squeeze(-1)
    stats = SupportStats(
        cut.logprob(column),
        full.entropy,
        full.logsumexp,
        full.logprob(column),
        (cut.logsumexp - full.logsumexp).exp(),
    )
    dtype = stats_dtype(logits.dtype)
    return SupportStats(*(torch.where(active, stat, 0.0).to(dtype).view(leading) for stat in stats))


def support_loss(
    logits: Tensor,
    labels: Tensor,
    support: SamplingSupport,
    *,
    objective: str | Objective = "erc-dapo",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    **arguments: Any,
) -> PolicyLoss:
    """`policy_loss` of rows whose sampling was cut, whose other arguments are these.

    Ratio rules, rollout corrections and `approx_kl` take the log-prob over the kept tokens, and old and rollout values
    must be over the same; gate, entropy bonus and exact KL are of the full vocabulary; KL estimates and the NLL say
    which they take (`KLPenalty(over=)`, `Objective.nll_over`). `out.logprob` is over the kept tokens; the metric
    `kept_mass` is the mean probability that the full distribution gives them.
    """
    objective, leading = resolve_objective(objective), logits.shape[:-1]
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    given, vocab_size = TokenArguments(**arguments), logits.shape[-1]
    call = loss_call(objective, given, labels, ignore_index, logits, scaling, vocab_size, fused=False)
    table = call.token_table(OPERATORS)
    scale = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    stats = support_stats(logits, table[1].view(leading), support, ignore_index=ignore_index, **scale)
    logprob, entropy, logprob_full = (
        getattr(stats, name).reshape(-1) for name in ("logprob", "entropy", "logprob_full")
    )
    return two_phase_result(TokenCall(call, OPERATORS, table, logprob, entropy, logprob_full))
