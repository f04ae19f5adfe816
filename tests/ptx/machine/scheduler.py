"""Which threads run next.

A group splits where its threads branch apart, and merges with the group that it meets; the one at the lowest basic
block runs first. What waits for other threads runs when they are all there. Asynchronous operations land as late as
the rules allow: when no thread can go on without them.
"""

from __future__ import annotations

import numpy as np

from tests.ptx.block import Block
from tests.ptx.machine.barriers import Barriers
from tests.ptx.machine.state import FULL, WARP, Fault, Group

STEPS = 50_000_000  # a machine that takes more does not end


class Machine(Barriers):
    """Blocks of a grid that run side by side."""

    def run(self) -> None:
        """Runs them to their end.

        Raises:
            Fault: for what a GPU leaves undefined.
        """
        blocks, executed = self.program.blocks, np.zeros(len(self.program.blocks), np.int64)
        groups = {0: self.everybody()}
        for _ in range(STEPS):
            if not groups:
                break
            number, group = self.next(groups)
            block = blocks[number]
            executed[number] += group.n
            condition = block.function(self, group)
            taken = 0 if condition is None else np.count_nonzero(condition)
            if taken in (0, group.n):
                self.move(groups, group, block.taken if taken else block.following)
                continue
            for target, mask in ((block.taken, condition), (block.following, ~condition)):
                names = frozenset() if target is None else blocks[target].live_in
                self.move(groups, group.part(mask, names), target)
        if groups:
            raise Fault(f"{self.program.kernel.name}: no end after {STEPS} steps")
        for copy in self.copies:
            raise Fault(f"{copy.text}: nobody waited for it")
        for block, times in zip(blocks, executed.tolist(), strict=True):
            for pipe, count in block.pipes.items():
                self.counts.pipes[pipe] += count * times

    def everybody(self) -> Group:
        """All threads at the kernel's entry. What some path reads before it is written holds nonsense."""
        nonsense = np.full(self.n, 0xDEADBEEF, np.uint64)
        registers = {name: nonsense.astype(self.program.held[name]) for name in self.program.blocks[0].live_in}
        return Group(np.arange(self.n), registers)

    def move(self, groups: dict[int, Group], group: Group, target: int | None) -> None:
        if target is None:
            self.leave(group)
        elif target in groups:
            groups[target] = groups[target].merged(group, self.program.blocks[target].live_in)
        else:
            groups[target] = group

    def leave(self, group: Group) -> None:
        self.alive[group.threads] = False
        self.alive_in_block -= np.bincount(self.slot(group), minlength=self.blocks)
        self.alive_in_warp -= np.bincount(self.warp_of(group.threads), minlength=self.warps)
        self.events += 1
        if self.ledger is not None and (self.shape.cluster > 1 or self.barriers):
            for slot in np.unique(self.slot(group)).tolist():
                if self.alive_in_block[slot] == 0:
                    self.leave_block(slot)

    def next(self, groups: dict[int, Group]) -> tuple[int, Group]:
        """Takes the lowest group that can go on, or those of its threads that can."""
        while True:
            for number in sorted(groups):
                group, block = groups[number], self.program.blocks[number]
                if block.sync is None:
                    return number, groups.pop(number)
                if group.parked_at == self.events:
                    continue
                ready = self.ready(block, group)
                count = np.count_nonzero(ready)
                if count == group.n:
                    return number, groups.pop(number)
                if count:
                    groups[number] = group.part(~ready, block.live_in)
                    groups[number].tried = group.tried
                    return number, group.part(ready, block.live_in)
                group.parked_at = self.events
            if not self.land(groups):
                self.stuck(groups)

    def ready(self, block: Block, group: Group) -> np.ndarray:
        """Which threads of a group find everybody that their instruction waits for."""
        instruction = block.instructions[0]
        if block.sync == "warp":
            is_arrival = instruction.opcode.startswith("barrier")
            return self.warps_complete(
                group, np.uint32(FULL) if is_arrival else self.operand(group, instruction.operands[-1])
            )
        slots = self.slot(group)
        if block.sync == "block":
            return np.bincount(slots, minlength=self.blocks)[slots] == self.alive_in_block[slots]
        if block.sync == "cluster":
            size = self.shape.cluster
            arrivals = np.where(self.alive, self.arrived, np.iinfo(np.int32).max)
            slowest = arrivals.reshape(self.blocks // size, size * self.threads).min(1)
            waited = self.waited[group.threads]
            return (slowest[slots // size] > waited) | (self.arrived[group.threads] == waited)  # the last is a fault
        _, address, parity = instruction.operands
        bars = self.mbarriers(group, instruction.index, self.operand(group, address), None)
        complete = self.phases_complete(bars, self.operand(group, parity))
        if not complete.any() and group.tried != block.number:  # it may answer "not yet", once
            group.tried = block.number
            return np.ones(group.n, bool)
        return complete

    def warps_complete(self, group: Group, mask: np.ndarray) -> np.ndarray:
        if mask.ndim == 0 and int(mask) == FULL:
            if self.is_whole(group):
                return np.ones(group.n, bool)
            warps = self.warp_of(group.threads)
            return np.bincount(warps, minlength=self.warps)[warps] == self.alive_in_warp[warps]
        here, living = self.bits(group.threads), self.bits(np.flatnonzero(self.alive))
        warps = self.warp_of(group.threads)
        return (np.broadcast_to(mask, group.n) & living[warps] & ~here[warps]) == 0

    def bits(self, threads: np.ndarray) -> np.ndarray:
        """For every warp the mask of its threads among `threads`."""
        out = np.zeros(self.warps, np.uint32)
        np.bitwise_or.at(out, self.warp_of(threads), np.uint32(1) << (threads % self.threads % WARP).astype(np.uint32))
        return out

    def waiting(self, groups: dict[int, Group], sync: str) -> list[tuple[Block, Group]]:
        found = ((self.program.blocks[number], group) for number, group in sorted(groups.items()))
        return [(block, group) for block, group in found if block.sync == sync]

    def land(self, groups: dict[int, Group]) -> bool:
        """Completes the operations on mbarriers that somebody waits for; False if there are none."""
        wanted = set()
        for block, group in self.waiting(groups, "mbarrier"):
            instruction = block.instructions[0]
            bars = self.mbarriers(group, instruction.index, self.operand(group, instruction.operands[1]), None)
            wanted |= {id(bar) for bar in bars}
        landing = [copy for copy in self.copies if id(copy.barrier) in wanted]
        self.copies = [copy for copy in self.copies if id(copy.barrier) not in wanted]
        for copy in landing:
            self.complete(copy)
        self.events += bool(landing)
        return bool(landing)

    def stuck(self, groups: dict[int, Group]) -> None:
        """Nobody can go on: says who waits where."""
        lines = []
        for number, group in sorted(groups.items()):
            ins = self.program.blocks[number].instructions[0]
            line = f"{self.who(group.threads[0])} and {group.n - 1} others wait at `{ins.text}`, line {ins.line}"
            if self.program.blocks[number].sync == "mbarrier":
                bar = self.mbarriers(group, ins.index, self.operand(group, ins.operands[1]), None)[0]
                line += f": arrivals still to come {bar.pending}, bytes announced and not here yet {bar.tx}"
            lines.append(line)
        lines.append(f"{self.n - np.count_nonzero(self.alive)} of {self.n} threads have left")
        meeting = len(self.waiting(groups, "block")) + len(self.waiting(groups, "warp")) > 0
        kind = "divergent barrier" if meeting else "a wait without end"
        raise Fault(f"{self.program.kernel.name}: {kind}\n  " + "\n  ".join(lines))
