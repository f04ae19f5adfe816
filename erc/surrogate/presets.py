"""Objectives by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from erc.surrogate.batch_rules import ClipCov, KLCov
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import CEGPPO, CISPO, DPPO, DRO, GPPO, SAPO, NoClip, PPOClip, Reinforce
from erc.surrogate.sequence_rules import GMPO, GSPO, VESPO

_PRESETS: dict[str, Objective] = {
    "ppo": Objective(PPOClip(0.2, 0.2)),
    "grpo": Objective(PPOClip(0.2, 0.2), reduction="seq-mean-token-mean"),
    "dr-grpo": Objective(PPOClip(0.2, 0.2), reduction="seq-mean-token-sum-norm"),
    "dapo": Objective(PPOClip(0.2, 0.28)),
    "gppo": Objective(GPPO(0.2, 0.28)),
    "ce-gppo": Objective(CEGPPO()),
    "cispo": Objective(CISPO()),
    "gspo": Objective(GSPO(), reduction="seq-mean-token-mean"),
    "luspo": Objective(GSPO(), reduction="seq-mean-token-sum"),
    "gmpo": Objective(GMPO(), reduction="seq-mean-token-mean"),
    "vespo": Objective(VESPO()),
    "sapo": Objective(SAPO(), reduction="seq-mean-token-mean"),
    "dppo-tv": Objective(DPPO("tv")),
    "dppo-kl": Objective(DPPO("kl")),
    "dppo-full-tv": Objective(DPPO("full-tv")),
    "dppo-full-kl": Objective(DPPO("full-kl")),
    "clip-cov": Objective(ClipCov()),
    "kl-cov": Objective(KLCov()),
    "reinforce": Objective(Reinforce()),
    "dro": Objective(DRO()),
    "no-clip": Objective(NoClip()),
}
_PRESETS |= {f"erc-{name}": replace(preset, entropy_ratio=EntropyRatioClip()) for name, preset in _PRESETS.items()}


def objectives() -> list[str]:
    """The names that `objective` knows."""
    return list(_PRESETS)


def objective(name: str, **overrides: Any) -> Objective:
    """The preset `name`, with any field of `Objective` replaced.

    Raises:
        ValueError: for an unknown name or a bad value.
        TypeError: for a field that `Objective` does not have.

    >>> objective("erc-dapo", entropy_ratio=EntropyRatioClip(0.1, 0.1)).entropy_ratio.beta_high
    0.1
    """
    if name not in _PRESETS:
        raise ValueError(f"objective must be one of {objectives()}, got {name!r}")
    return replace(_PRESETS[name], **overrides) if overrides else _PRESETS[name]
