"""Global memory: the tensors that a kernel may touch."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple


class Region(NamedTuple):
    """The bytes of a tensor, from its first element to the end of its last."""

    start: int
    end: int
    name: str

    def readable(self, size: int) -> Region:
        """Where reads of `size` bytes may lie: sixteen aligned bytes cannot fault if one of them is the tensor's. What
        the others hold is nobody's business, so results that depend on it are wrong sooner or later."""
        if size % 16:
            return self
        return Region(self.start // 16 * 16, -(-self.end // 16) * 16, self.name)


class Regions:
    """The tensors that may be accessed. One that overlaps older ones, without lying in them or around them, takes
    their place: memory is freed and used again."""

    def __init__(self) -> None:
        self._regions: list[Region] = []

    def add(self, start: int, size: int, name: str) -> None:
        if size == 0:
            return
        new = Region(start, start + size, name)
        self._regions = sorted({new, *(r for r in self._regions if _apart(new, r) or _nested(new, r))})

    def reach(self, address: int, size: int, reads: bool = False) -> Region | None:
        """A region that holds `size` bytes at `address`; of a read, as far as it must."""
        candidates = self._regions[: bisect_right(self._regions, address, key=lambda r: r.start)]
        found = next((r for r in reversed(candidates) if address + size <= r.end), None)
        if found is None and reads:
            rims = ((r, r.readable(size)) for r in self._regions)
            found = next((r for r, rim in rims if rim.start <= address and address + size <= rim.end), None)
        return found

    def nearest(self, address: int) -> str:
        """Where an address lies, for a message."""
        if not self._regions:
            return "and no tensor is known"
        distance, region = min((max(r.start - address, address - r.end, 0), r) for r in self._regions)
        return f"{distance} bytes {'behind' if address >= region.end else 'before'} {region.name}"


def _apart(a: Region, b: Region) -> bool:
    return a.end <= b.start or b.end <= a.start


def _nested(a: Region, b: Region) -> bool:
    return (a.start <= b.start and b.end <= a.end) or (b.start <= a.start and a.end <= b.end)
