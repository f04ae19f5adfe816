"""Everything that can be measured, by name."""

from __future__ import annotations

from benchmarks import ours
from benchmarks.peers import PEERS, Variant


def all_variants(backends: tuple[str, ...] = ours.BACKENDS, peers: bool = True) -> list[Variant]:
    """erc first, the plain reads and copies last."""
    return [
        *ours.variants(backends),
        *ours.rule_variants(backends),
        *(PEERS if peers else ()),
        *ours.BASELINES,
    ]
