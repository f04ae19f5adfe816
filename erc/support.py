"""The tokens that a sampler kept, and what log-probs over them are.

Top-k, top-p, min-p and grammars cut the distribution that rollouts are sampled from. The log-prob that a rollout engine
reports (vLLM's `processed_logprobs`) is then over the kept tokens, and a ratio of it to one over the full vocabulary is
biased by the kept mass (DeepSeek-V3.2, arXiv 2512.02556 section 3.1, "keep sampling mask").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from erc.inputs import check_label_values
from erc.surrogate.validation import values_are_readable

if TYPE_CHECKING:
    from erc.parallel import Facts

_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class SamplingSupport:
    """The kept tokens of `N` rows: row `i` kept `token_ids[offsets[i] : offsets[i + 1]]`.

    Within a row, ids rise strictly; entries of -1 before them are skipped, so that padded forms need no compaction. A
    row without a token was not cut: it means the full vocabulary.

    `token_ids` is `[K]`, `offsets` `[N + 1]`; int32 or int64, held as int64. Rows are in the order of the flattened
    labels. The class methods read other forms and sort; this constructor takes what is sorted already. On the CPU it
    checks the values; on a GPU nothing is read here, and a row that breaks the rule is NaN.

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
        for name in ("token_ids", "offsets"):
            object.__setattr__(self, name, getattr(self, name).to(torch.int64).contiguous())
        _check_offsets(self.offsets, len(self.token_ids))
        if not values_are_readable(self.token_ids):
            return
        if len(self.token_ids) and int(self.token_ids.min()) < -1:
            raise ValueError(f"token_ids must be >= 0, or -1 for padding, got {int(self.token_ids.min())}")
        before, after, rows = self.token_ids[:-1], self.token_ids[1:], self.row_of_ids()
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
        outside = (self.token_ids < 0) | (self.token_ids >= vocab_size)
        column = torch.where(outside, vocab_size, self.token_ids.long())
        mask = torch.zeros(self.rows, vocab_size + 1, dtype=torch.bool, device=self.token_ids.device)
        mask[self.row_of_ids(), column] = True
        mask = mask[:, :vocab_size]
        return mask | ~mask.any(-1, keepdim=True)

    def row_of_ids(self) -> Tensor:
        """The row `[K]` of each of `token_ids`."""
        return _row_of(self.offsets, len(self.token_ids))

    def count(self, chosen: Tensor) -> Tensor:
        """How many of the chosen entries (bool `[K]`) each row has, `[N]`."""
        total = torch.cat([self.offsets.new_zeros(1), chosen.long().cumsum(0)])[self.offsets]
        return total.diff()

    def cut_rows(self, labels: Tensor, vocab_size: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Which rows were cut, and which break a rule and must be NaN (no row, on the CPU); bool `[N]` both.

        Ignored rows, and rows that kept the whole vocabulary, are not cut.

        Raises:
            IndexError: on the CPU, for a label that its row's support does not hold, or an id beyond the vocabulary.
        """
        ids, rows = self.token_ids.long(), self.row_of_ids()
        active, kept = labels != ignore_index, self.count(ids >= 0)
        lacking = (kept > 0) & (self.count(ids == labels[rows]) == 0)
        falling = (rows[1:] == rows[:-1]) & (ids[1:] <= ids[:-1]) & (ids[:-1] >= 0)
        broken = (ids >= vocab_size) | (ids < -1)
        broken = self.count(torch.cat([broken[:1], broken[1:] | falling])) > 0
        invalid = active & (lacking | broken)
        if values_are_readable(labels) and bool(invalid.any()):
            check_label_values(labels, vocab_size, ignore_index)
            self.to_mask(vocab_size)
            row = int(invalid.nonzero()[0])
            raise IndexError(f"labels must lie in their row's support, but that of row {row} lacks {int(labels[row])}")
        return active & ~invalid & (kept > 0) & (kept < vocab_size), invalid


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


def check_support(
    support: SamplingSupport | None,
    leading: tuple[int, ...],
    device: torch.device,
    labels: Tensor | None,
    facts: Facts | None = None,
) -> None:
    """Raises where `support` does not go with rows of shape `leading`; adds it to what ranks compare."""
    if support is None:
        return
    if not isinstance(support, SamplingSupport):
        raise TypeError(f"support must be an erc.SamplingSupport or None, got {type(support).__name__}")
    if labels is None:
        raise ValueError("labels must be given with support: it changes the log-prob of a label and nothing else")
    if support.rows != prod(leading):
        raise ValueError(f"support must have one row per row of logits, {prod(leading)}, got {support.rows}")
    if support.offsets.device != device:
        raise ValueError(f"support must be on {device} like logits, got {support.offsets.device}: support.to(device)")
    if facts is not None:
        facts.add(token_ids=support.token_ids, offsets=support.offsets)
