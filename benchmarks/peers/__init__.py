"""Everything that a user might run instead, one adapter a file, each used as its own documentation says."""

from __future__ import annotations

from benchmarks.peers import compiled, cut_cross_entropy, eager, flash_attn, liger, quack, torch_linear, trl, verl
from benchmarks.peers.base import Runner, Unsupported, Variant

PEERS: tuple[Variant, ...] = (
    *(
        module.PEER
        for module in (eager, compiled, trl, verl, liger, cut_cross_entropy, torch_linear, flash_attn, quack)
    ),
    liger.IN_PLACE,
)

__all__ = ["PEERS", "Runner", "Unsupported", "Variant"]
