"""Rewards of groups of rollouts into advantages, and which groups are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("grpo", "dr-grpo", "rloo")
STD_EPS = 1e-6


def _check_rewards(rewards: Tensor) -> Tensor:
    if not isinstance(rewards, Tensor) or rewards.dim() != 1:
        raise ValueError(f"rewards must be a 1-D tensor [B], got {getattr(rewards, 'shape', type(rewards).__name__)}")
    return rewards if rewards.dtype.is_floating_point else rewards.float()


def _group_index(rewards: Tensor, group_ids: Tensor | None, group_size: int | None) -> tuple[Tensor, int]:
    if (group_ids is None) == (group_size is None):
        raise ValueError("exactly one of group_ids and group_size must be given")
    if group_size is not None:
        if group_size < 1 or len(rewards) % group_size:
            raise ValueError(f"group_size must divide the number of rewards {len(rewards)}, got {group_size}")
        count = len(rewards) // group_size
        return torch.arange(count, device=rewards.device).repeat_interleave(group_size), count
    if group_ids.shape != rewards.shape:
        raise ValueError(
            f"group_ids must have the shape of rewards, {tuple(rewards.shape)}, got {tuple(group_ids.shape)}"
        )
    groups, index = torch.unique(group_ids, return_inverse=True)
    return index.to(rewards.device), len(groups)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    kind: str = "grpo",
) -> Tensor:
    """The advantage of each rollout over the others of its prompt; `[B]`, in the dtype of `rewards`, float32 for ints.

    Args:
        rewards: `[B]`.
        group_ids: `[B]` which prompt each rollout answers; or `group_size`, where rollouts of a prompt stand together.
        kind: "grpo" `(R - mean) / (std + 1e-6)` with the sample standard deviation (arXiv 2402.03300); "dr-grpo"
            `R - mean` (arXiv 2503.20783); "rloo" `R - mean of the others` (arXiv 2402.14740). A group of one gets 0.

    Raises:
        ValueError: naming the argument.

    >>> import torch
    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2, kind="dr-grpo")
    tensor([ 0.5000, -0.5000,  0.0000,  0.0000])
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    rewards = _check_rewards(rewards)
    index, groups = _group_index(rewards, group_ids, group_size)
    zeros = rewards.new_zeros(groups)
    count = zeros.index_add(0, index, torch.ones_like(rewards))
    centred = rewards - (zeros.index_add(0, index, rewards) / count)[index]
    others = (count - 1).clamp(min=1)
    if kind == "dr-grpo":
        return centred
    if kind == "rloo":
        return centred * (count / others)[index] * (count > 1)[index]
    variance = zeros.index_add(0, index, centred.square()) / others
    return centred / (variance.sqrt() + STD_EPS)[index]


def informative_groups(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    threshold: float = 0.5,
) -> Tensor:
    """Bool `[B]`: the rollouts of groups in which some, but not all, are correct (`reward > threshold`).

    DAPO's dynamic sampling (arXiv 2503.14476) trains on these only: the others have no advantage.

    >>> import torch
    >>> informative_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ True,  True, False, False])
    """
    rewards = _check_rewards(rewards)
    index, groups = _group_index(rewards, group_ids, group_size)
    correct = rewards.new_zeros(groups).index_add(0, index, (rewards > threshold).to(rewards.dtype))
    count = rewards.new_zeros(groups).index_add(0, index, torch.ones_like(rewards))
    return ((correct > 0) & (correct < count))[index]


def overlong_penalty(lengths: Tensor, max_length: int = 20_480, cache_length: int = 4_096) -> Tensor:
    """DAPO's soft punishment of overlong answers, to be added to the reward; float32 `[B]` (arXiv 2503.14476).

    0 up to `max_length - cache_length`, then falling linearly to -1 at `max_length`, -1 beyond.

    >>> import torch
    >>> overlong_penalty(torch.tensor([5, 9, 12]), max_length=10, cache_length=2)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"cache_length must be in (0, max_length={max_length}], got {cache_length}")
    return ((max_length - cache_length - lengths.float()) / cache_length).clamp(-1.0, 0.0)
