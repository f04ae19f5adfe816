"""Rewards of groups of rollouts into advantages, and which groups are worth training on."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("grpo", "dr-grpo", "rloo")
STD_EPS = 1e-6


class _Groups:
    """Rewards in float64, sorted into groups. A NaN reward is unknown: no statistic of its group counts it."""

    def __init__(self, rewards: Tensor, group_ids: Tensor | None, group_size: int | None) -> None:
        if not isinstance(rewards, Tensor) or rewards.dim() != 1 or rewards.is_complex():
            raise ValueError(f"rewards must be a 1-D real tensor [B], got {_describe(rewards)}")
        if (group_ids is None) == (group_size is None):
            raise ValueError("exactly one of group_ids and group_size must be given")
        self.dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
        self.rewards = rewards.double()
        self.known = ~self.rewards.isnan()
        if group_size is not None:
            if group_size < 1 or len(rewards) % group_size:
                raise ValueError(f"group_size must divide the number of rewards {len(rewards)}, got {group_size}")
            self.groups = len(rewards) // group_size
            self.index = torch.arange(self.groups, device=rewards.device).repeat_interleave(group_size)
        else:
            if not isinstance(group_ids, Tensor) or group_ids.shape != rewards.shape:
                raise ValueError(
                    f"group_ids must be a tensor of the shape of rewards, {tuple(rewards.shape)}, "
                    f"got {_describe(group_ids)}"
                )
            ids, index = torch.unique(group_ids, return_inverse=True)
            self.groups, self.index = len(ids), index.to(rewards.device)
        self.count = self.sum(torch.ones_like(self.rewards))

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` `[B]` over the known rollouts of each group; `[groups]`."""
        known = torch.where(self.known, values, 0.0)
        return known.new_zeros(self.groups).index_add(0, self.index, known)

    def centred(self) -> Tensor:
        """`[B]` rewards minus their group's mean. They are counted from the group's lowest, so that the mean of equal
        ones has no rounding error and they give exactly 0, whatever their number and size."""
        candidates = torch.where(self.known, self.rewards, torch.inf)
        lowest = candidates.new_full((self.groups,), torch.inf).scatter_reduce(0, self.index, candidates, "amin")
        above = self.rewards - lowest[self.index]
        return above - (self.sum(above) / self.count)[self.index]


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    kind: str = "grpo",
) -> Tensor:
    """The advantage of each rollout over the others of its prompt; `[B]`, in the dtype of `rewards`, float32 for ints.

    Equal rewards give exactly 0. Statistics are float64, whatever the dtype. A NaN reward (a verifier that failed) is
    unknown: its rollout's advantage is NaN, and the others of its group are compared among themselves.

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
    groups = _Groups(rewards, group_ids, group_size)
    advantages = groups.centred()
    others = (groups.count - 1).clamp(min=1)
    if kind == "rloo":
        advantages = advantages * (groups.count / others)[groups.index]
    elif kind == "grpo":
        variance = groups.sum(advantages.square()) / others
        advantages = advantages / (variance.sqrt() + STD_EPS)[groups.index]
    return advantages.to(groups.dtype)


def informative_groups(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    threshold: float = 0.5,
) -> Tensor:
    """Bool `[B]`: the rollouts of groups in which some, but not all, are correct (`reward > threshold`).

    DAPO's dynamic sampling (arXiv 2503.14476) trains on these only: the others have no advantage. A rollout with a NaN
    reward is neither right nor wrong: False itself, and not counted in its group.

    >>> import torch
    >>> informative_groups(torch.tensor([1.0, 0.0, 1.0, 1.0]), group_size=2)
    tensor([ True,  True, False, False])
    """
    groups = _Groups(rewards, group_ids, group_size)
    correct = groups.sum((groups.rewards > threshold).double())
    return ((correct > 0) & (correct < groups.count))[groups.index] & groups.known


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
