"""What a trainer with verifiable rewards needs around the loss."""

from erc.rlvr.advantages import group_advantages, informative_groups, overlong_penalty
from erc.rlvr.answers import answer_logprobs
from erc.rlvr.demonstrations import (
    Demonstration,
    DemonstrationPool,
    GroupPrompts,
    InContextWording,
    group_prompts,
    with_demonstrations,
)
from erc.rlvr.evidence import EvidenceEstimate, EvidenceGain, evidence_gain
from erc.rlvr.in_context import InContextRollouts

__all__ = [
    "Demonstration",
    "DemonstrationPool",
    "EvidenceEstimate",
    "EvidenceGain",
    "GroupPrompts",
    "InContextRollouts",
    "InContextWording",
    "answer_logprobs",
    "evidence_gain",
    "group_advantages",
    "group_prompts",
    "informative_groups",
    "overlong_penalty",
    "with_demonstrations",
]
