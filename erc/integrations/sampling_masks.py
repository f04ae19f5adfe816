"""What rollout engines report of the tokens that their samplers kept, as trainers' batches carry it.

vLLM's `SamplingMask(token_ids, offsets)` (pull request 49577), prime-rl's `SamplingMask(ids, counts)` (3431) and
SkyRL's ids of fixed width with the sampled token first (883): objects with these attributes, mappings with these keys,
or arrays. One of them is of one rollout and has a row per generated token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from erc.support import SamplingSupport

SAMPLING_MASK = "sampling_mask"
"""The name under which a rollout carries it: a field of TRL's `rollout_func`, a key of verl's batches."""

_READERS = {("token_ids", "offsets"): SamplingSupport.from_csr, ("ids", "counts"): SamplingSupport.from_counts}


def read_sampling_mask(mask: Any) -> SamplingSupport:
    """A rollout's mask in any of the forms above.

    Raises:
        TypeError: for something else. ValueError: for ids that come twice in a row.

    >>> read_sampling_mask({"token_ids": [5, 3, 8], "offsets": [0, 2, 3]}).token_ids.tolist()
    [3, 5, 8]
    >>> read_sampling_mask([[7, 2, 7], [4, -1, -1]]).offsets.tolist()  # the sampled token first, and once more
    [0, 3, 6]
    """
    if isinstance(mask, SamplingSupport):
        return mask
    for names, reader in _READERS.items():
        if isinstance(mask, Mapping) and all(name in mask for name in names):
            return reader(*(torch.as_tensor(mask[name]) for name in names))
        if all(hasattr(mask, name) for name in names):
            return reader(*(torch.as_tensor(getattr(mask, name)) for name in names))
    try:
        ids = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() != 2 or ids.dtype.is_floating_point:
        raise TypeError(
            "a sampling mask must have token_ids and offsets, or ids and counts, or be integers [tokens, k], got "
            f"{type(mask).__name__}"
        )
    return SamplingSupport.from_ids(ids, sampled_first=True)


def padded_ids(masks: Sequence[Any], generated: Tensor) -> Tensor:
    """The masks of a batch's rollouts as int32 `[B, T, k]`, filled up with -1, for `SamplingSupport.from_ids`.

    Args:
        masks: one per rollout, in a form that `read_sampling_mask` reads; None for a rollout that was not cut.
        generated: bool `[B, T]`, True where the engine sampled the token: not on padding, nor on what a tool wrote.

    Raises:
        ValueError: for a mask without a row per generated token, naming the rollout.
    """
    supports = [None if mask is None else read_sampling_mask(mask) for mask in masks]
    for rollout, (support, row) in enumerate(zip(supports, generated, strict=True)):
        if support is not None and support.rows != int(row.sum()):
            raise ValueError(
                f"{SAMPLING_MASK} must have a row per generated token: rollout {rollout} has {support.rows} for "
                f"{int(row.sum())} tokens"
            )
    counts = [torch.zeros(0) if support is None else support.offsets.diff() for support in supports]
    width = max((int(count.max()) for count in counts if count.numel()), default=0)
    ids = torch.full((*generated.shape, max(1, width)), -1, dtype=torch.int32)
    for place, support, row in zip(ids, supports, generated.cpu(), strict=True):
        if support is None:
            continue
        of_row = support.row_of_ids()
        column = torch.arange(len(of_row)) - support.offsets[of_row]
        place[row.nonzero().flatten()[of_row], column] = support.token_ids.int()
    return ids.to(generated.device)
