"""Layer 4: what a trainer with verifiable rewards needs around the loss."""

from erc.rlvr.advantages import group_advantages, informative_groups, overlong_penalty

__all__ = ["group_advantages", "informative_groups", "overlong_penalty"]
