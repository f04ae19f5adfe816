"""Shuffles, votes and reductions: values that threads of a warp exchange.

The scheduler runs them when all threads of the member mask are there (PTX ISA: "waits until all non-exited threads
corresponding to membermask have executed" it).
"""

from __future__ import annotations

import numpy as np

from tests.ptx.machine.state import FULL, WARP, Group, Threads
from tests.ptx.native import lanes


class Warps(Threads):
    def check_member(self, group: Group, site: int, mask: np.ndarray) -> None:
        if mask.ndim == 0 and int(mask) == FULL:
            return
        outside = np.broadcast_to(mask, group.n) >> self.lane(group) & np.uint32(1) == 0
        if outside.any():
            raise self.fault(site, group.threads[np.flatnonzero(outside)[0]], "is not in its own member mask")

    def segments(self, group: Group, site: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each set of threads that exchange values starts in the group, and the set of each thread."""
        self.check_member(group, site, mask)
        if self.is_whole(group) and mask.ndim == 0 and int(mask) == FULL:
            return np.arange(0, group.n, WARP), np.arange(group.n) // WARP
        keys = self.warp_of(group.threads) << 32 | np.broadcast_to(mask, group.n).astype(np.int64)
        _, starts, sets = np.unique(keys, return_index=True, return_inverse=True)
        if (np.diff(sets) < 0).any():
            raise self.fault(site, group.threads[0], "uses member masks that interleave in a warp: not modelled")
        return starts, sets

    def shuffle(self, group: Group, site: int, mode: str, value, b, c, mask) -> tuple[np.ndarray, np.ndarray]:
        self.check_member(group, site, mask)
        lane, five = self.lane(group).astype(np.int64), np.uint32(31)
        offset, clamp, segment = (x.astype(np.int64) for x in (b & five, c & five, c >> np.uint32(8) & five))
        lowest, highest = lane & segment, lane & segment | clamp & ~segment
        source = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset}.get(
            mode, lowest | offset & ~segment
        )
        inside = source >= highest if mode == "up" else source <= highest
        step = np.where(inside, source, lane) - lane
        if self.is_whole(group):
            return value[np.arange(group.n) + step], inside
        position = np.full(self.n + WARP, -1)
        position[group.threads] = np.arange(group.n)
        at = position[group.threads + step]
        if (at < 0).any():
            thread = group.threads[np.flatnonzero(at < 0)[0]]
            raise self.fault(site, thread, "reads a register of a thread that is not there")
        return value[at], inside

    def vote(self, group: Group, site: int, mode: str, votes, mask) -> np.ndarray:
        starts, sets = self.segments(group, site, mask)
        if mode == "ballot":
            bits = np.where(votes, np.uint32(1) << self.lane(group), np.uint32(0))
            return np.bitwise_or.reduceat(bits, starts)[sets]
        every, some = np.logical_and.reduceat(votes, starts), np.logical_or.reduceat(votes, starts)
        return {"all": every, "any": some, "uni": every | ~some}[mode][sets]

    def reduce(self, group: Group, site: int, operation: str, nan: bool, values, mask) -> np.ndarray:
        starts, sets = self.segments(group, site, mask)
        if values.dtype == np.float32:
            function = getattr(lanes(), f"{operation}_{'nan' if nan else 'num'}")
        else:
            function = {
                "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor,
            }[operation]  # fmt: skip
        return function.reduceat(values, starts).astype(values.dtype)[sets]  # NumPy adds in a wider type
