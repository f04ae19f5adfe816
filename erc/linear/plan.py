"""How many rows of logits exist at a time, and what that costs.

Two buffers: a window of logits, which the loss kernel turns into rows of a larger buffer of their gradient, from which
the two gradient products run once. Where logits and gradient have one dtype a single buffer is both. A small window
reads the weight often; many chunks read and write the accumulator of its gradient often. The model of a plan's time
weighs the two: each product takes the longer of its arithmetic and its traffic, sweeps over the logits and the last
conversion come on top. It is a model: it chooses, and it was not measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from erc.linear.products import converts_weight

GPU_BUDGET = 2**30
CPU_BUDGET = 256 * 2**20
_ALIGNMENT = 128  # rows of a product's block on GPUs


class Machine(NamedTuple):
    """What a device called `name` reaches: flops per second of 16-bit products, bytes per second of its memory."""

    name: str
    flops: float
    bandwidth: float


H100 = Machine("an H100", 700e12, 3.0e12)
CPU = Machine("a small CPU", 1e12, 2e10)
"""Two cores with 16-bit matrix units."""


class Shape(NamedTuple):
    """`rows` hidden states of `width`, a weight of `columns` rows, bytes of an operand and of a logit, and whether the
    weight is converted to the logits' dtype for each window (`erc.linear.products`)."""

    rows: int
    width: int
    columns: int
    operand_bytes: int
    logit_bytes: int
    converts: bool

    def in_place(self) -> bool:  # no property: PyTorch 2.10 compiles none of a tuple
        """Whether the gradient is written over the logits."""
        return self.operand_bytes == self.logit_bytes


class RowPlan(NamedTuple):
    """`rows` of a chunk, whose gradient exists at a time, and of a `window`, whose logits do."""

    rows: int
    window: int

    def buffer_bytes(self, shape: Shape, gradient: bool = True) -> int:
        second = 0 if shape.in_place() or not gradient else self.rows * shape.operand_bytes
        return shape.columns * (self.window * shape.logit_bytes + second)

    def chunks(self, shape: Shape) -> int:
        return max(1, -(-shape.rows // self.rows))


class Seconds(NamedTuple):
    """Modelled times: `overlapped`, where products hide their traffic or their arithmetic; `additive`, where they hide
    nothing; `bare`, the arithmetic of the products alone."""

    overlapped: float
    additive: float
    bare: float


def memory_budget_of(memory_budget: int | None, device: torch.device) -> int:
    """Bytes that logits and their gradient may take.

    Raises:
        ValueError: if the caller's is not positive.
    """
    if memory_budget is None:
        return CPU_BUDGET if device.type == "cpu" else GPU_BUDGET
    if memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes, got {memory_budget!r}")
    return memory_budget


def plan_rows(shape: Shape, budget: int, machine: Machine) -> RowPlan:
    """The plan of the least modelled time within `budget` bytes, one row at least."""
    row_bytes = max(1, shape.columns)
    if shape.in_place():
        rows = _share(shape.rows, budget // (row_bytes * shape.logit_bytes))
        return RowPlan(rows, rows)
    both = budget // (row_bytes * (shape.logit_bytes + shape.operand_bytes))
    windows = [both, *range(_ALIGNMENT, min(both, shape.rows), _ALIGNMENT)]
    best, fastest = RowPlan(1, 1), float("inf")
    for window in windows:
        left = budget - row_bytes * shape.logit_bytes * window
        rows = _share(shape.rows, left // (row_bytes * shape.operand_bytes))
        plan = RowPlan(rows, _share(rows, window))
        seconds = modelled_seconds(plan, shape, machine).overlapped
        if seconds < fastest:
            best, fastest = plan, seconds
    return best


def window_rows(shape: Shape, budget: int) -> int:
    """Rows of a window where no gradient is wanted."""
    return _share(shape.rows, budget // (max(1, shape.columns) * shape.logit_bytes))


class Plan(NamedTuple):
    """A plan and what the model says of it; prints as a sentence."""

    rows: RowPlan
    shape: Shape
    machine: Machine
    gradient: bool
    seconds: Seconds

    def __str__(self) -> str:
        chunks, memory = self.rows.chunks(self.shape), self.rows.buffer_bytes(self.shape, self.gradient)
        words = f"{chunks} {'chunk' if chunks == 1 else 'chunks'} of {self.rows.rows:,} rows"
        if self.rows.window < self.rows.rows:
            words += f", logits of {self.rows.window:,} rows at a time"
        words += f"; {memory / 2**20:,.0f} MiB"
        if self.shape.converts:
            words += f"; the weight is converted once per {self.rows.window:,} rows of logits"
        if not self.gradient:
            return words
        if chunks > 1:
            total = self.shape.width * self.shape.columns * max(4, self.shape.operand_bytes)
            words += f", and {total / 2**20:,.0f} MiB for the sum of a weight's gradient"
        share, additive = (value / self.seconds.bare for value in self.seconds[:2])
        model = f"a model of {self.machine.name} says {share:.2f} times the bare products ({additive:.2f} added up)"
        return f"{words}; {model}"


def plan_of(
    like: torch.Tensor,
    width: int,
    operands: torch.dtype,
    memory_budget: int | None,
    gradient: bool = True,
    needs_weight: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """The plan for logits like `like` `[*, V]` from hidden states of `width`, timed on `machine`, by default one like
    the device; all of its rows count as active."""
    converts = converts_weight(like.device, operands, like.dtype)
    shape = Shape(like.shape[:-1].numel(), width, like.shape[-1], operands.itemsize, like.dtype.itemsize, converts)
    usual, budget = machine_of(like.device), memory_budget_of(memory_budget, like.device)
    rows = plan_rows(shape, budget, usual) if gradient else RowPlan(*(window_rows(shape, budget),) * 2)
    machine = usual if machine is None else machine
    return Plan(rows, shape, machine, gradient, modelled_seconds(rows, shape, machine, needs_weight))


def machine_of(device: torch.device) -> Machine:
    return CPU if device.type == "cpu" else H100


def _share(total: int, largest: int) -> int:
    """At most `largest`, and alike: products of a small remainder run slowly."""
    largest = max(1, largest)
    return max(1, -(-total // max(1, -(-total // largest))))


def modelled_seconds(plan: RowPlan, shape: Shape, machine: Machine, needs_weight: bool = True) -> Seconds:
    """Forward and backward of the fused loss under `plan`."""
    rows, width, columns = shape.rows, shape.width, shape.columns
    weight, logits = width * columns, rows * columns
    operand, logit = shape.operand_bytes, shape.logit_bytes
    flops = 2 * logits * width
    windows, chunks = max(1, -(-rows // plan.window)), plan.chunks(shape)
    converted = 6 * weight * windows if shape.converts else 0
    products = [
        (flops, operand * (weight * windows + rows * width) + logit * logits),
        (flops, operand * (logits + weight * chunks + rows * width)),
    ]
    swept = (logit + operand) * logits + converted
    if needs_weight:
        written = operand * weight if chunks == 1 else (8 * chunks - 4) * weight
        products.append((flops, operand * (logits + rows * width) + written))
        swept += 0 if chunks == 1 or operand >= 4 else (4 + operand) * weight
    sweeps = swept / machine.bandwidth
    arithmetic = sum(flops for flops, _ in products) / machine.flops
    traffic = sum(read for _, read in products) / machine.bandwidth
    longer = sum(max(flops / machine.flops, read / machine.bandwidth) for flops, read in products)
    return Seconds(longer + sweeps, arithmetic + traffic + sweeps, arithmetic)
