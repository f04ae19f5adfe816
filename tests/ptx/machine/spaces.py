"""Loads, stores and atomic operations in every state space, and what each is checked for.

Global memory lies at its addresses on this machine, and may be touched where a tensor is. Shared and local memory have
windows of their own: addresses in them are offsets from the window's start, `SHARED_BASE` and `LOCAL_BASE` the lowest
valid ones. An address of shared::cluster names a block above `RANK_SHIFT`, as its rank + 1; without one it is of the
thread's own block.

`where` is the index of those threads of a group that execute a guarded instruction, None for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tests.ptx.machine.state import Group, Ledger, Threads
from tests.ptx.machine.tensors import Region
from tests.ptx.native import lanes
from tests.ptx.numeric import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.program import LOCAL_BASE, SHARED_BASE

RANK_SHIFT = 24
READ, WRITE, ATOMIC = range(3)  # as Access in lanes.c
GLOBAL_GRANULE = 2  # bytes
VERDICTS = {  # as Verdict in lanes.c
    1: "reads shared memory that nobody wrote",
    2: "reads what {other} wrote, with nothing between them that orders the two",
    3: "overwrites what {other} wrote, with nothing between them that orders the two",
    4: "overwrites what {other} read, with nothing between them that orders the two",
    5: "touches bytes of an asynchronous copy or store that it has not waited for",
    6: "overwrites the source of a bulk copy that it has not waited for",
}


class Spaces(Threads):
    """Memory as the generated code sees it: a load and a store for every space."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.site_region: dict[int, Region] = {}  # where each instruction found its tensor last

    # ---- threads that take part ----

    @staticmethod
    def chosen(addresses: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        if mask is None or mask.all():
            return np.ascontiguousarray(addresses), None
        index = np.flatnonzero(mask)
        return addresses[index], index

    @staticmethod
    def of(values: np.ndarray, where: np.ndarray | None) -> np.ndarray:
        return values if where is None else values[where]

    @staticmethod
    def spread(values: list[np.ndarray], where: np.ndarray | None, n: int) -> tuple[np.ndarray, ...]:
        """Values of the threads that took part, and zeros for the others."""
        if where is None:
            return tuple(values)
        out = [np.zeros(n, value.dtype) for value in values]
        for full, value in zip(out, values, strict=True):
            full[where] = value
        return tuple(out)

    @staticmethod
    def read(raw: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        load = getattr(lanes(), f"load{8 * size}")
        return [load(raw, np.uint64(size * i)) for i in range(count)]

    def write(self, raw: np.ndarray, size: int, values: tuple, where: np.ndarray | None, n: int) -> None:
        for i, value in enumerate(values):
            value = np.ascontiguousarray(self.of(np.broadcast_to(value, n), where))
            lanes().store(raw + np.uint64(size * i), value)

    # ---- the ledger ----

    def record(
        self, group: Group, site: int, ledger: Ledger, offsets: np.ndarray, size: int, where, access: int,
        in_shared: bool, values: tuple = (), copy: int = 0,
    ) -> None:  # fmt: skip
        """Enters accesses at `offsets` of the ledger's memory, and faults where one is out of order."""
        threads = self.of(group.threads, where)
        if values and len(threads) > 1:
            once = self.without_copies(threads, offsets, values, group.n, where)
            threads, offsets = threads[once], offsets[once]
        granules, span = (offsets // ledger.granule).astype(np.int64), max(1, size // ledger.granule)
        everyone = threads + self.first_thread
        result = lanes().touch(
            self.clocks(), ledger.cells, granules, span, everyone, access, int(in_shared), copy
        )  # fmt: skip
        if result is not None:
            verdict, which, other = result
            raise self.fault(site, threads[which], VERDICTS[verdict].format(other=self.who(other - self.first_thread)))

    def without_copies(self, threads, offsets, values: tuple, n: int, where) -> np.ndarray | slice:
        """Threads of a warp may store one value to one place in one instruction: one of them is enough."""
        order = np.lexsort((threads, offsets))
        same = (np.diff(offsets[order]) == 0) & (np.diff(self.warp_of(threads)[order]) == 0)
        if not same.any():
            return slice(None)
        for value in values:
            sorted_ = self.of(np.broadcast_to(value, n), where)[order]
            same &= sorted_[1:] == sorted_[:-1]
        return np.sort(order[np.concatenate(([True], ~same))])

    # ---- global memory ----

    def check_aligned(self, group: Group, site: int, addresses, where, size: int) -> None:
        k = lanes().misaligned(addresses, size)
        if k >= 0:
            text = f"accesses {size} bytes at {int(addresses[k]):#x}, which is misaligned"
            raise self.fault(site, self.of(group.threads, where)[k], text)

    def region_of(self, group: Group, site: int, address: int, size: int, thread: int, access: int) -> Region:
        region = self.grid.regions.reach(address, size, access == READ)
        if region is None:
            text = f"accesses {size} bytes of global memory out of bounds, {self.grid.regions.nearest(address)}"
            raise self.fault(site, thread, text)
        return region

    def check_global(self, group: Group, site: int, addresses, where, size: int, access: int, values=()) -> None:
        self.check_aligned(group, site, addresses, where, size)
        region = self.site_region.get(site)
        if region is None or lanes().outside(addresses, size, region.start, region.end) >= 0:
            for region, _ in self.by_region(group, site, addresses, where, size, access):
                self.site_region[site] = region
        if self.checks.order_global:
            self.record_global(group, site, addresses, where, size, access, values)

    def by_region(
        self, group: Group, site: int, addresses, where, size: int, access: int
    ) -> Iterator[tuple[Region, np.ndarray]]:
        """The tensors that addresses lie in, each with the index of its addresses."""
        left = np.arange(len(addresses))
        while len(left):
            thread = self.of(group.threads, where)[left[0]]
            region = self.region_of(group, site, int(addresses[left[0]]), size, thread, access)
            rim = region.readable(size) if access == READ else region
            at = addresses[left]
            inside = (at >= np.uint64(rim.start)) & (at + np.uint64(size) <= np.uint64(rim.end))
            yield region, left[inside]
            left = left[~inside]

    def record_global(
        self, group: Group, site: int, addresses, where, size: int, access: int, values=(), copy=0
    ) -> None:
        for region, index in self.by_region(group, site, addresses, where, size, access):
            begin = addresses[index]
            whole = (begin >= np.uint64(region.start)) & (begin + np.uint64(size) <= np.uint64(region.end))
            index = index[whole]  # the rim of a tensor is nobody's
            ledger = self.grid.ledgers.setdefault(region, None) or Ledger(region.end - region.start, GLOBAL_GRANULE)
            self.grid.ledgers[region] = ledger
            offsets = addresses[index] - np.uint64(region.start)
            threads = index if where is None else where[index]
            self.record(group, site, ledger, offsets, size, threads, access, False, values, copy)

    def sectors(self, group: Group, addresses, where, size: int) -> int:
        return lanes().sectors(addresses, size, self.warp_of(self.of(group.threads, where)))

    def load_global(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        addresses, where = self.chosen(addresses, mask)
        self.check_global(group, site, addresses, where, size * count, READ)
        self.counts.loaded += len(addresses) * size * count
        self.counts.sectors_loaded += self.sectors(group, addresses, where, size * count)
        return self.spread(self.read(addresses, size, count), where, group.n)

    def store_global(self, group: Group, site: int, addresses, size: int, values: tuple, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        self.check_global(group, site, addresses, where, size * len(values), WRITE, values)
        self.counts.stored += len(addresses) * size * len(values)
        self.counts.sectors_stored += self.sectors(group, addresses, where, size * len(values))
        self.write(addresses, size, values, where, group.n)

    # ---- shared memory ----

    def shared_place(
        self, group: Group, site: int, addresses: np.ndarray, where, size: int, access: int, slots=None, values=(),
        copy=0,
    ) -> np.ndarray:  # fmt: skip
        """Checks accesses to the shared memory of `slots`, by default the threads' own; returns where they really
        are."""
        self.check_aligned(group, site, addresses, where, min(size, 16))
        k = lanes().outside(addresses, size, SHARED_BASE, SHARED_BASE + self.shared_bytes)
        if k >= 0:
            offset = int(addresses[k]) - SHARED_BASE
            text = f"accesses {size} bytes at byte {offset} of its block's {self.shared_bytes} bytes of shared memory"
            raise self.fault(site, self.of(group.threads, where)[k], text)
        slots = self.of(self.slot(group), where) if slots is None else slots
        offsets = slots.astype(np.uint64) * np.uint64(self.stride) + addresses - np.uint64(SHARED_BASE)
        self.counts.shared += len(addresses)
        if self.ledger is not None:
            self.record(group, site, self.ledger, offsets, size, where, access, True, values, copy)
        return offsets + np.uint64(self.shared.ctypes.data)

    def load_shared(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        addresses, where = self.chosen(addresses, mask)
        raw = self.shared_place(group, site, addresses, where, size * count, READ)
        return self.spread(self.read(raw, size, count), where, group.n)

    def store_shared(self, group: Group, site: int, addresses, size: int, values: tuple, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        raw = self.shared_place(group, site, addresses, where, size * len(values), WRITE, values=values)
        self.write(raw, size, values, where, group.n)

    def load_cluster(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        addresses, where = self.chosen(addresses, mask)
        slots, offsets = self.peers(group, site, addresses, where)
        raw = self.shared_place(group, site, offsets, where, size * count, READ, slots)
        return self.spread(self.read(raw, size, count), where, group.n)

    def store_cluster(self, group: Group, site: int, addresses, size: int, values: tuple, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        slots, offsets = self.peers(group, site, addresses, where)
        raw = self.shared_place(group, site, offsets, where, size * len(values), WRITE, slots, values)
        self.write(raw, size, values, where, group.n)

    def peers(self, group: Group, site: int, addresses: np.ndarray, where) -> tuple[np.ndarray, np.ndarray]:
        """Whose shared memory addresses of shared::cluster are in, and where in it. A peer must be known to run."""
        own, threads, size = self.of(self.slot(group), where), self.of(group.threads, where), self.shape.cluster
        rank = (addresses >> np.uint64(RANK_SHIFT)).astype(np.int64)
        if (rank > size).any():
            k = int(np.flatnonzero(rank > size)[0])
            raise self.fault(site, threads[k], f"addresses block {rank[k] - 1} of a cluster of {size}")
        slots = np.where(rank == 0, own, own // size * size + rank - 1)
        for wrong, text in (
            ((slots != own) & (self.waited[threads] == 0), "accesses {}, which may not have begun"),
            ((slots != own) & (self.alive_in_block[slots] == 0), "accesses {}, which has left"),
        ):
            for k in np.flatnonzero(wrong)[:1]:
                raise self.fault(site, threads[k], text.format(self.who(slots[k] * self.threads, "block")))
        return slots, addresses & np.uint64((1 << RANK_SHIFT) - 1)

    def map_to_block(self, group: Group, site: int, address, rank) -> np.ndarray:
        """mapa: the same place in another block of the cluster."""
        address, rank = np.broadcast_to(address, group.n), np.broadcast_to(rank, group.n)
        for k in np.flatnonzero(rank >= self.shape.cluster)[:1]:
            raise self.fault(site, group.threads[k], f"maps to block {rank[k]} of a cluster of {self.shape.cluster}")
        return address & np.uint32((1 << RANK_SHIFT) - 1) | (rank + np.uint32(1)) << np.uint32(RANK_SHIFT)

    # ---- parameters, local memory, generic addresses ----

    def load_param(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        """Scalars where the address is one."""
        where = None
        if np.ndim(addresses):
            addresses, where = self.chosen(addresses, mask)
        for address in np.unique(addresses).tolist():
            buffers = ((b.ctypes.data, b.nbytes - size * count) for b in self.grid.parameters)
            starts = [start for start, most in buffers if 0 <= address - start <= most]
            if not starts or (address - starts[0]) % size:
                raise self.fault(
                    site, group.threads[0], f"reads {size * count} bytes outside of a parameter, or misaligned"
                )
        return self.spread(self.read(addresses, size, count), where, group.n)

    def local_place(self, group: Group, site: int, addresses: np.ndarray, where, size: int) -> np.ndarray:
        self.check_aligned(group, site, addresses, where, size)
        k = lanes().outside(addresses, size, LOCAL_BASE, max(self.program.local_bytes, LOCAL_BASE))
        threads = self.of(group.threads, where)
        if k >= 0:
            raise self.fault(site, threads[k], "accesses local memory out of bounds")
        return np.uint64(self.local.ctypes.data) + threads.astype(np.uint64) * np.uint64(self.local_stride) + addresses

    def load_local(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        addresses, where = self.chosen(addresses, mask)
        raw = self.local_place(group, site, addresses, where, size * count)
        return self.spread(self.read(raw, size, count), where, group.n)

    def store_local(self, group: Group, site: int, addresses, size: int, values: tuple, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        self.write(self.local_place(group, site, addresses, where, size * len(values)), size, values, where, group.n)

    def load_generic(self, group: Group, site: int, addresses, size: int, count: int, mask) -> tuple[np.ndarray, ...]:
        out = self.spread([np.zeros(0, f"u{size}")] * count, np.zeros(0, np.int64), group.n)
        for space, window, part in self.windows(addresses, mask):
            new = getattr(self, f"load_{space}")(group, site, addresses - window, size, count, part)
            out = tuple(np.where(part, a, b) for a, b in zip(new, out, strict=True))
        return out

    def store_generic(self, group: Group, site: int, addresses, size: int, values: tuple, mask) -> None:
        for space, window, part in self.windows(addresses, mask):
            getattr(self, f"store_{space}")(group, site, addresses - window, size, values, part)

    @staticmethod
    def windows(addresses: np.ndarray, mask: np.ndarray | None) -> Iterator[tuple[str, np.uint64, np.ndarray]]:
        """Generic addresses by space: which threads have one there."""
        everyone = np.ones(len(addresses), bool) if mask is None else mask
        bounds = (np.uint64(0), SHARED_WINDOW, LOCAL_WINDOW, LOCAL_WINDOW * np.uint64(2))
        for space, low, high in zip(("global", "cluster", "local"), bounds[:-1], bounds[1:], strict=True):
            part = everyone & (addresses >= low) & (addresses < high)
            if part.any():
                yield space, low, part

    # ---- atomic operations ----

    def atomic(
        self, group: Group, site: int, space: str, operation: str, dtype, addresses, values: tuple, mask
    ) -> np.ndarray:
        """One thread after another, in ascending order; returns what each found."""
        if space == "generic":
            spaces = list(self.windows(addresses, mask))
            if len(spaces) != 1 or spaces[0][0] == "local":
                raise self.fault(site, group.threads[0], "mixes spaces in an atomic operation: not modelled")
            space, window, _ = spaces[0]
            addresses = addresses - window
        dtype = np.dtype(dtype)
        addresses, where = self.chosen(addresses, mask)
        if space == "global":
            self.check_global(group, site, addresses, where, dtype.itemsize, ATOMIC)
            raw = addresses
            if self.checks.order_global:
                self.publish(self.of(group.threads, where))
        else:
            raw = self.shared_place(group, site, addresses, where, dtype.itemsize, ATOMIC)
        load, old = getattr(lanes(), f"load{8 * dtype.itemsize}"), np.zeros(len(raw), dtype)
        values = [self.of(value, where) for value in values]
        for k in range(len(raw)):
            old[k] = load(raw[k], np.uint64(0)).view(dtype)
            lanes().store(raw[k : k + 1], np.array([_result(operation, old[k], *(v[k] for v in values))], dtype))
        return self.spread([old], where, group.n)[0]

    def publish(self, threads: np.ndarray) -> None:
        """A block that does an atomic operation on global memory orders itself after the blocks that did one before."""
        for thread in threads.tolist():
            slot = thread // self.threads
            self.grid.atomics += 1
            row = (self.block_clock[slot], self.grid.atomics, self.first_thread + thread + 1)
            self.grid.published[self.first + slot] = row
            self.grid.informed[self.first + slot] = self.grid.atomics


def _result(operation: str, old, value, other=None):
    """What an atomic operation leaves behind."""
    return {
        "add": lambda: old + value,
        "exch": lambda: value,
        "cas": lambda: other if old == value else old,
        "min": lambda: min(old, value),
        "max": lambda: max(old, value),
        "and": lambda: old & value,
        "or": lambda: old | value,
        "xor": lambda: old ^ value,
        "inc": lambda: 0 if old >= value else old + 1,
        "dec": lambda: value if old == 0 or old > value else old - 1,
    }[operation]()
