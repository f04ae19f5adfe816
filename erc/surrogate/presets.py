"""Objectives by name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any

from erc.surrogate.batch_rules import ClipCov, KLCov
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import CEGPPO, CISPO, DPPO, DRO, GPPO, IPO, SAPO, TOPR, NoClip, PPOClip, Reinforce
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
    "kimi-k1.5": Objective(DRO(0.1)),
    "ipo": Objective(IPO()),
    "topr": Objective(TOPR()),
    "no-clip": Objective(NoClip()),
}
_PLAIN = tuple(_PRESETS)
_PRESETS |= {f"erc-{name}": replace(preset, entropy_ratio=EntropyRatioClip()) for name, preset in _PRESETS.items()}

# Recipes as their authors ran them (scripts and actor of github.com/Kwai-Klear/ERC and github.com/Mithas-114/IC-DAPO):
# dual clip 10, no KL, and 0.1 times the mean negative log-prob of the rollouts with reward 1, which `nll_mask` marks.
_DAPO_PAPER = Objective(PPOClip(0.2, 0.28, dual_clip=10.0), nll_coef=0.1)
_GPPO_PAPER = Objective(GPPO(0.2, 0.2, dual_clip=10.0), nll_coef=0.1)
_RECIPES = {
    "erc-dapo-paper": replace(_DAPO_PAPER, entropy_ratio=EntropyRatioClip()),
    "erc-gppo-paper": replace(_GPPO_PAPER, entropy_ratio=EntropyRatioClip()),
    "ic-dapo-paper": _DAPO_PAPER,
}
_PRESETS |= _RECIPES


def objectives() -> list[str]:
    """The names that `objective` knows: rules, their `erc-` forms, and recipes of papers (`-paper`)."""
    return list(_PRESETS)


def objective(name: str, **overrides: Any) -> Objective:
    """The preset `name`, with any field of `Objective` replaced.

    Raises:
        ValueError: for an unknown name, suggesting the nearest ones, or a bad value.
        TypeError: for a field that `Objective` does not have, listing those it has.

    >>> objective("erc-dapo", entropy_ratio=EntropyRatioClip(0.1, 0.1)).entropy_ratio.beta_high
    0.1
    """
    if name not in _PRESETS:
        raise ValueError(_unknown(name))
    preset = _PRESETS[name]
    known = {field.name: getattr(preset, field.name) for field in fields(preset)}
    for field in overrides:
        if field not in known:
            listed = ", ".join(_listed(known_name, value) for known_name, value in known.items())
            raise TypeError(f"objective({name!r}) has no field {field!r}; its fields are {listed}")
    return replace(preset, **overrides) if overrides else preset


def _unknown(name: str) -> str:
    parts = str(name).lower().replace("_", "-").split("-")
    near = [known for known in _PRESETS if sorted(known.split("-")) == sorted(parts)]
    near = near or get_close_matches("-".join(parts), _PRESETS, n=3)
    if near:
        return f"objective must be a preset name, got {name!r}; did you mean {' or '.join(map(repr, near))}?"
    names = ", ".join(_PLAIN)
    return f"objective must be one of {names}, each also with erc- before it, or {', '.join(_RECIPES)}, got {name!r}"


def _listed(name: str, value: Any) -> str:
    """A field of an objective, with the fields of the part that it holds."""
    if not is_dataclass(value):
        return name
    return f"{name}={type(value).__name__}({', '.join(field.name for field in fields(value))})"
