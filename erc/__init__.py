"""Fused loss and entropy kernels for reinforcement learning of language models: entropy-ratio clipping and friends."""

from erc import reference, rlvr
from erc.backend import backends, use_backend
from erc.diagnosis import Diagnosis, diagnose
from erc.explanation import explain
from erc.labels import shifted_labels
from erc.linear.entropy_ratio import linear_entropy_ratio
from erc.linear.loss import linear_policy_loss
from erc.linear.stats import linear_token_stats
from erc.loss import objective_loss, policy_loss
from erc.parallel import VocabShard
from erc.results import EntropyRatio, PolicyLoss, TokenStats
from erc.stats import entropy_ratio, token_stats
from erc.support import SamplingSupport
from erc.surrogate.batch_rules import ClipCov, KLCov
from erc.surrogate.entropy_control import AdaptiveEntropyCoef
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.presets import objective, objectives
from erc.surrogate.ratio_rules import (
    CEGPPO,
    CISPO,
    DPPO,
    DRO,
    GPPO,
    IPO,
    SAPO,
    TOPR,
    NoClip,
    PPOClip,
    RatioInputs,
    RatioRule,
    RatioTerms,
    Reinforce,
)
from erc.surrogate.rollout import RolloutCorrection
from erc.surrogate.sequence_rules import GMPO, GSPO, VESPO
from erc.surrogate.token_filters import HighEntropyMask, OffPolicySequenceMask

__version__ = "0.1.0"

__all__ = [
    "CEGPPO",
    "CISPO",
    "DPPO",
    "DRO",
    "GMPO",
    "GPPO",
    "GSPO",
    "IPO",
    "SAPO",
    "TOPR",
    "VESPO",
    "AdaptiveEntropyCoef",
    "ClipCov",
    "Diagnosis",
    "EntropyRatio",
    "EntropyRatioClip",
    "HighEntropyMask",
    "KLCov",
    "KLPenalty",
    "NoClip",
    "Objective",
    "OffPolicySequenceMask",
    "PPOClip",
    "PolicyLoss",
    "RatioInputs",
    "RatioRule",
    "RatioTerms",
    "Reinforce",
    "RolloutCorrection",
    "SamplingSupport",
    "TokenStats",
    "VocabShard",
    "backends",
    "diagnose",
    "entropy_ratio",
    "explain",
    "linear_entropy_ratio",
    "linear_policy_loss",
    "linear_token_stats",
    "objective",
    "objective_loss",
    "objectives",
    "policy_loss",
    "reference",
    "rlvr",
    "shifted_labels",
    "token_stats",
    "use_backend",
]
