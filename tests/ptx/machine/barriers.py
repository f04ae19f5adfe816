"""Barriers of blocks, warps and clusters, mbarriers, and the asynchronous operations that signal them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.machine.spaces import READ, WRITE, Spaces
from tests.ptx.machine.state import FULL, Fault, Group
from tests.ptx.machine.warps import Warps
from tests.ptx.native import lanes
from tests.ptx.program import SHARED_BASE

MAX_COUNT = (1 << 20) - 1  # of an mbarrier: arrivals, and bytes either way


@dataclass
class Mbarrier:
    """An mbarrier object (PTX ISA, 9.7.13.15): what its current phase still waits for."""

    number: int  # in its cluster
    expected: int  # arrivals per phase
    pending: int  # arrivals
    thread: int  # who initialised it, and when
    block_clock: int
    arrived: int
    tx: int = 0  # bytes
    phase: int = 0
    fenced: bool = (
        False  # fence.mbarrier_init followed: an arrival at the cluster barrier publishes it, even a relaxed one
    )

    def settle(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.expected


@dataclass
class Copy:
    """An asynchronous operation under way: to a block's shared memory, from a global address or of these bytes."""

    slot: int
    offset: int
    size: int
    source: int | bytes
    barrier: Mbarrier
    text: str


class Barriers(Spaces, Warps):
    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.barriers: dict[tuple[int, int], Mbarrier] = {}  # by slot and offset
        self.copies: list[Copy] = []
        self.relaxed: dict[tuple[int, int], bool] = {}  # of a block's arrival at a cluster barrier

    # ---- blocks, warps, clusters ----

    def block_barrier(self, group: Group) -> None:
        slots = np.unique(self.slot(group))
        self.block_clock[slots] += 1
        self.counts.block_barriers += len(slots)
        if self.barriers:  # what one thread has seen complete, all know from here on
            seen = self.seen.reshape(self.blocks, self.threads, *self.seen.shape[1:])
            seen[slots] = seen[slots].max(1, keepdims=True)

    def warp_barrier(self, group: Group, site: int, mask) -> None:
        self.check_member(group, site, mask)
        warps, here = np.unique(self.warp_of(group.threads), return_counts=True)
        self.warp_clock[warps[here == self.alive_in_warp[warps]]] += 1  # for a part of a warp the ledger has no clock

    def cluster_arrive(self, group: Group, site: int, relaxed: bool) -> None:
        threads = group.threads
        for thread in threads[self.arrived[threads] != self.waited[threads]][:1]:
            raise self.fault(site, thread, "arrives twice at a cluster barrier")
        self.arrived[threads] += 1
        self.events += 1
        arrivals = self.slot(group) << 32 | self.arrived[threads]
        for slot, phase in ((key >> 32, key & FULL) for key in np.unique(arrivals).tolist()):
            if phase >= self.released.shape[1]:
                self.released = np.concatenate((self.released, np.zeros_like(self.released)), 1)
                self._clocks = None
            if self.relaxed.setdefault((slot, phase), relaxed) != relaxed:
                raise self.fault(site, threads[0], "arrives relaxed where others of its block release, or the reverse")
            self.released[slot, phase] = self.released[slot, phase - 1] if relaxed else phase

    def cluster_wait(self, group: Group, site: int) -> None:
        for thread in group.threads[self.arrived[group.threads] == self.waited[group.threads]][:1]:
            raise self.fault(site, thread, "waits at a cluster barrier without having arrived")
        self.waited[group.threads] += 1
        self.counts.cluster_barriers += len(np.unique(self.slot(group)))

    # ---- mbarriers ----

    def mbarriers(self, group: Group, site: int, addresses, where, remote: bool = False) -> list[Mbarrier]:
        """The objects at addresses of shared memory: initialised, and known to be by those who use them."""
        threads, slots = self.of(group.threads, where), self.of(self.slot(group), where)
        if remote:
            slots, addresses = self.peers(group, site, addresses, where)
        keys, sets = np.unique(slots << 32 | addresses.astype(np.int64), return_inverse=True)
        found = []
        for number, key in enumerate(keys.tolist()):
            users, bar = threads[sets == number], self.barriers.get((key >> 32, key & FULL))
            if bar is None:
                text = f"uses an mbarrier at byte {(key & FULL) - SHARED_BASE} that nobody initialised"
                raise self.fault(site, users[0], text)
            for thread in users[~self.knows(bar, users)][:1] if self.checks.order else ():
                raise self.fault(site, thread, "uses an mbarrier with nothing that orders it after its initialisation")
            found.append(bar)
        return [found[i] for i in sets.tolist()]

    def knows(self, bar: Mbarrier, threads: np.ndarray) -> np.ndarray:
        """Which threads are ordered after the initialisation of an mbarrier."""
        slots, there = threads // self.threads, bar.thread // self.threads
        waited = self.waited[threads]
        in_block = (slots == there) & (self.block_clock[slots] > bar.block_clock)
        in_cluster = (waited > bar.arrived) & (bar.fenced | (self.released[there, waited] > bar.arrived))
        return (threads == bar.thread) | in_block | in_cluster

    def mbarrier_init(self, group: Group, site: int, addresses, counts, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        self.shared_place(group, site, addresses, where, 8, WRITE)
        each = (self.of(group.threads, where), addresses, self.of(counts, where))
        for thread, address, count in zip(*(values.tolist() for values in each), strict=True):
            slot = thread // self.threads
            if (slot, address) in self.barriers:
                raise self.fault(site, thread, "initialises an mbarrier that is one already")
            if not 0 < count <= MAX_COUNT:
                raise self.fault(site, thread, f"initialises an mbarrier for {count} arrivals")
            cluster = slot // self.shape.cluster
            number = sum(other // self.shape.cluster == cluster for other, _ in self.barriers)
            if number >= self.seen.shape[1]:
                self.seen = np.concatenate((self.seen, np.zeros_like(self.seen)), 1)
                self._clocks = None
            now = int(self.block_clock[slot]), int(self.arrived[thread])
            self.barriers[slot, address] = Mbarrier(number, count, count, thread, *now)

    def mbarrier_inval(self, group: Group, site: int, addresses, mask) -> None:
        addresses, where = self.chosen(addresses, mask)
        self.mbarriers(group, site, addresses, where)
        for slot, address in zip(self.of(self.slot(group), where).tolist(), addresses.tolist(), strict=True):
            self.barriers.pop((slot, address), None)

    def fence_mbarrier_init(self, group: Group, mask) -> None:
        threads = group.threads if mask is None else group.threads[mask]
        for bar in self.barriers.values():
            if bar.arrived == self.arrived[bar.thread] and bar.thread in threads:
                bar.fenced = True

    def mbarrier_arrive(self, group: Group, site: int, addresses, expected, arrivals, remote: bool, mask) -> None:
        """Expects so many bytes more, then arrives so many times."""
        addresses, where = self.chosen(addresses, mask)
        bars = self.mbarriers(group, site, addresses, where, remote)
        each = (self.of(np.broadcast_to(x, group.n), where).tolist() for x in (expected, arrivals))
        for k, (bar, size, count) in enumerate(zip(bars, *each, strict=True)):
            bar.tx += size
            bar.pending -= count
            if bar.pending < 0 or bar.tx > MAX_COUNT:
                text = "arrives more often, or expects more bytes, than an mbarrier counts"
                raise self.fault(site, self.of(group.threads, where)[k], text)
            bar.settle()
        self.events += 1

    def phases_complete(self, bars: list[Mbarrier], parity: np.ndarray) -> np.ndarray:
        """Whether the phase of a parity, the current one or the one before, is over."""
        phases = np.fromiter((bar.phase for bar in bars), np.int64, len(bars))
        return (phases & 1) != parity

    def mbarrier_wait(self, group: Group, site: int, addresses, parity, cluster: bool, relaxed: bool) -> np.ndarray:
        """try_wait. Who acquires a complete phase may touch what landed in it; what other blocks of the cluster stored
        needs the cluster's scope."""
        bars = self.mbarriers(group, site, np.ascontiguousarray(addresses), None)
        complete = self.phases_complete(bars, parity)
        if not relaxed and complete.any():
            threads = group.threads[complete]
            numbers = np.fromiter((bar.number for bar in bars), np.int64, group.n)[complete]
            phases = np.fromiter((bar.phase for bar in bars), np.int32, group.n)[complete]
            for scope in range(2 if cluster else 1):
                self.seen[threads, numbers, scope] = np.maximum(self.seen[threads, numbers, scope], phases)
        return complete

    # ---- asynchronous operations ----

    def begin(self, bar: Mbarrier, scope: int, is_source: bool) -> int:
        """Numbers an operation for the ledger. It belongs to the current phase of its mbarrier."""
        self.copy_rows.append((bar.number, bar.phase, scope, int(is_source)))
        self._clocks = None
        return len(self.copy_rows)

    def under_way(self, copy: Copy) -> None:
        start = copy.slot * self.stride + copy.offset - SHARED_BASE
        self.shared[start : start + copy.size] = self.checks.poison
        self.copies.append(copy)

    def one_block(self, group: Group, site: int, to, barrier, where) -> tuple[np.ndarray, np.ndarray]:
        """Block and offset of destinations; the mbarriers must lie in the same blocks."""
        slots, offsets = self.peers(group, site, to, where)
        others, _ = self.peers(group, site, barrier, where)
        for k in np.flatnonzero(slots != others)[:1]:
            text = "writes to one block and signals an mbarrier of another"
            raise self.fault(site, self.of(group.threads, where)[k], text)
        return slots, offsets

    def copy_bulk(self, group: Group, site: int, to, source, barrier, sizes, mask) -> None:
        """cp.async.bulk from global to shared memory: one operation for each thread that executes it."""
        for k in range(group.n) if mask is None else np.flatnonzero(mask):
            one = np.arange(k, k + 1)
            thread, size, begin = group.threads[k], int(sizes[k]), int(source[k])
            if (int(to[k]) | begin | size) % 16 or size == 0:
                raise self.fault(site, thread, f"copies {size} bytes from {begin:#x}: not all are multiples of 16")
            (bar,) = self.mbarriers(group, site, barrier[one], one, True)
            slots, offsets = self.one_block(group, site, to[one], barrier[one], one)
            self.region_of(group, site, begin, size, thread, READ)
            slot, offset = int(slots[0]), int(offsets[0])
            number = self.begin(bar, int(slot != self.slot(group)[k]), False)
            self.shared_place(group, site, offsets, one, size, WRITE, slots, copy=number)
            if self.checks.order_global:
                self.record_global(group, site, source[one], one, size, READ, copy=self.begin(bar, 0, True))
            text = f"{self.who(thread)}: `{self.program.kernel.instructions[site].text}`"
            self.under_way(Copy(slot, offset, size, begin, bar, text))
            self.counts.copied += size
            flying = sum(copy.size for copy in self.copies if copy.slot == slot and isinstance(copy.source, int))
            self.counts.in_flight = max(self.counts.in_flight, flying)

    def store_async(self, group: Group, site: int, addresses, size: int, values: tuple, barrier, mask) -> None:
        """st.async: a store to a block of the cluster that signals an mbarrier of that block."""
        if self.shape.cluster == 1:
            text = "stores asynchronously in a cluster of one block, which is undefined"
            raise self.fault(site, group.threads[0], text)
        addresses, where = self.chosen(addresses, mask)
        barrier = self.of(barrier, where)
        bars = self.mbarriers(group, site, barrier, where, True)
        slots, offsets = self.one_block(group, site, addresses, barrier, where)
        threads, own = self.of(group.threads, where), self.of(self.slot(group), where)
        data = np.stack([self.of(np.broadcast_to(value, group.n), where) for value in values], 1)
        for k, bar in enumerate(bars):
            one, total = np.arange(k, k + 1) if where is None else where[k : k + 1], size * len(values)
            number = self.begin(bar, int(slots[k] != own[k]), False)
            self.shared_place(group, site, offsets[k : k + 1], one, total, WRITE, slots[k : k + 1], copy=number)
            text = f"{self.who(threads[k])}: `{self.program.kernel.instructions[site].text}`"
            self.under_way(Copy(int(slots[k]), int(offsets[k]), total, data[k].tobytes(), bar, text))

    def complete(self, copy: Copy) -> None:
        """The operation lands: a bulk copy reads its source only now."""
        step = np.arange(copy.size, dtype=np.uint64)
        if isinstance(copy.source, bytes):
            data = np.frombuffer(copy.source, np.uint8)
        else:
            data = lanes().load8(step, np.uint64(copy.source))
        start = copy.slot * self.stride + copy.offset - SHARED_BASE
        self.shared[start : start + copy.size] = data
        copy.barrier.tx -= copy.size
        if copy.barrier.tx < -MAX_COUNT:
            raise Fault(f"{copy.text}: more bytes arrive at the mbarrier than it counts")
        copy.barrier.settle()

    def leave_block(self, slot: int) -> None:
        """A block's shared memory is gone when its last thread leaves: nobody may still access it."""
        begin, end = slot * self.threads, (slot + 1) * self.threads
        self.waited[begin:end] = self.waited[begin:end].max()  # any of them may be the last to leave
        self.seen[begin:end] = self.seen[begin:end].max(0)
        start, count = slot * self.stride // self.ledger.granule, self.shared_bytes // self.ledger.granule
        last = self.first_thread + begin
        found = lanes().unordered(self.clocks(), self.ledger.cells, start, count, last)
        if found >= 0:
            byte = found * self.ledger.granule
            raise Fault(
                f"{self.program.kernel.name}: {self.who(begin, 'block')} leaves, and with it its shared memory, while "
                f"byte {byte} may still be written by a copy, or touched by a peer that it did not wait for"
            )
