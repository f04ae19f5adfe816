"""Rollout-correction weights that a trainer has truncated or masked already, as `policy_loss` takes them."""

from __future__ import annotations

from torch import Tensor

from erc.surrogate.rollout import RolloutCorrection

GIVEN_WEIGHTS = RolloutCorrection("mask", low=1e-8, high=1e9)
"""Lets a weight pass as it is, with an exact 0 for a masked one."""


def rollout_logprob(old_logprob: Tensor, weight: Tensor) -> Tensor:
    """The rollout log-probs whose ratio to `old_logprob` is `weight`."""
    return old_logprob - weight.log()
