"""The row that whole kernels are counted on: logits of a trained policy's spread, a token that its objective keeps, an
entropy bonus. Nothing in it takes a kernel off its usual path, and every result is compared with the float64 oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import erc
from benchmarks.machine_code.emulator import cubin
from benchmarks.machine_code.emulator.machine import Executed, Launch, Machine
from benchmarks.machine_code.emulator.memory import Memory
from erc.constants import Column

VOCABULARY = 151_936
TEMPERATURE, ENTROPY_COEF = 0.7, 0.01
SOFTCAP = 30.0
_RULE = (0.2, 0.28, math.inf, math.inf)
_GATE = {"beta_low": 0.05, "beta_high": 0.05, "gate_eps": 1e-8}
_KL = {"kl_coef": 0.0, "kl_clamp": math.inf}

# What a number of the policy loss is called, for kernels that take their arguments by name.
NUMBERS = {**dict(zip(("p0", "p1", "p2", "p3"), _RULE, strict=True)), **_GATE, **_KL}
_BOUND = 1e-5


def segment_size(segments: int) -> int:
    """Columns of a segment in csrc/cuda/rows.cuh: a multiple of 64."""
    return -(-VOCABULARY // (segments * 64)) * 64


@dataclass
class OrdinaryRow:
    """One row of bfloat16 logits in the emulated memory, `offset` bytes behind a multiple of 16."""

    softcap: bool = False
    offset: int = 0
    memory: Memory = field(default_factory=lambda: Memory(1 << 22))
    address: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.logits = (3 * torch.randn(1, VOCABULARY, generator=generator)).bfloat16()
        self.labels = torch.tensor([100_003])
        self.scaling = {"temperature": TEMPERATURE, "softcap": SOFTCAP if self.softcap else None}
        statistics = erc.reference.token_stats(self.logits.double(), self.labels, **self.scaling)
        token = {
            "old_logprob": statistics.logprob + 0.1,
            "old_entropy": statistics.entropy * 1.01,
            "advantages": torch.tensor([0.7], dtype=torch.float64),
        }
        self.expected = {"logprob": statistics.logprob, "entropy": statistics.entropy}
        for name, entropy_coef in (("gradient", ENTROPY_COEF), ("gradient without entropy", 0.0)):
            leaf = self.logits.double().requires_grad_()
            objective = erc.objective("erc-dapo", entropy_coef=entropy_coef, reduction="token-sum")
            out = erc.policy_loss(leaf, self.labels, **token, **self.scaling, objective=objective, backend="torch")
            out.loss.backward()
            self.expected[name] = leaf.grad
        self._put_states()
        self._put("logits", self.logits.view(torch.int16), self.offset)
        self._put("gradient", torch.full_like(self.logits, 7).view(torch.int16), self.offset)
        self._put("labels", self.labels)
        table = torch.zeros(1, len(Column))
        table[:, [Column.WEIGHT, Column.POLICY_WEIGHT]] = 1.0
        table[:, Column.ENTROPY_WEIGHT] = -ENTROPY_COEF
        table[:, Column.ADVANTAGE] = token["advantages"]
        table[:, Column.OLD_LOGPROB] = token["old_logprob"]
        table[:, Column.OLD_ENTROPY] = token["old_entropy"]
        self._put("table", table)
        self._put("grad_logprob", self._grad_logprob(statistics, token).float())
        self._put("grad_entropy", torch.full((1,), -ENTROPY_COEF))
        self._put("grad_logsumexp", torch.zeros(1))
        self._put("label_value", (self._scaled()[self.labels] * TEMPERATURE).float())
        for name in ("loss", "token_loss", "logprob", "entropy", "logsumexp", "flags"):
            self._put(name, torch.zeros(1))

    def _put(self, name: str, tensor: torch.Tensor, offset: int = 0) -> None:
        self.address[name] = self.memory.put(tensor.numpy(), offset)

    def _scaled(self) -> torch.Tensor:
        z = self.logits[0].double()
        return (SOFTCAP * torch.tanh(z / SOFTCAP) if self.softcap else z) / TEMPERATURE

    def _grad_logprob(self, statistics: erc.TokenStats, token: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return -token["advantages"] * (statistics.logprob - token["old_logprob"]).exp()

    def _put_states(self, segments: int = 8) -> None:
        """The states of the row (`saved`) and of its segments (`workspace`), as the kernels leave them."""
        x, size = self._scaled(), segment_size(segments)
        rows = [torch.tensor(state) for state in map(self._state, (x, *x.split(size)))]
        self._put("saved", rows[0][:3].float())
        self._put("workspace", torch.stack(rows[1:]).float())

    @staticmethod
    def _state(x: torch.Tensor) -> tuple[float, float, float, float]:
        below = x - x.max()
        e = below.exp()
        return float(x.max()) * TEMPERATURE, float(e.sum()) - 1, float((e * below).sum()), 0.0

    def check(self, outputs: tuple[str, ...]) -> None:
        """Raises ArithmeticError unless a kernel's outputs are the oracle's."""
        one = np.zeros(1, np.float32)
        for name in outputs:
            expected = self.expected[name].numpy()
            if name.startswith("gradient"):
                stored = self.memory.get(self.address["gradient"], self.logits.view(torch.int16).numpy())
                actual = torch.from_numpy(stored).view(torch.bfloat16).double().numpy()
                bound = 2.0**-8 * np.abs(expected) + 1e-5 * np.abs(expected).max()
                written = actual != 7  # a kernel of a part of the row
                wrong = ~(np.abs(actual - expected) <= bound) & written
                if wrong.any() or not written.any():
                    raise ArithmeticError(f"the gradient is wrong at {np.nonzero(wrong)[1][:4]}")
            else:
                actual = self.memory.get(self.address[name], one)
                if not abs(actual[0] - expected[0]) <= _BOUND * max(1.0, abs(expected[0])):
                    raise ArithmeticError(f"{name} is {actual[0]}, not {expected[0]}")


@dataclass(frozen=True)
class Work:
    """A launch on the ordinary row: the kernel's arguments, the columns that it works on, the results to compare."""

    params: bytes
    launch: Launch
    elements: int
    outputs: tuple[str, ...] = ()


def execute(image: bytes | Path, function: str | None, row: OrdinaryRow, work: Work) -> Executed:
    """Raises ArithmeticError if the results are not the oracle's."""
    executed = Machine(cubin.load(image, function), work.launch, work.params, row.memory).run()
    row.check(work.outputs)
    return executed
