"""What is computed: cases, and inputs like a training step's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log

import torch
from torch import Tensor

VOCABULARIES = {"GPT-2": 50_257, "Llama-3": 128_256, "Qwen": 151_936, "Gemma": 262_144}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPERATORS = {
    "stats": "log-prob and entropy, no gradient",
    "stats-backward": "log-prob and entropy, both with gradient, forward and backward",
    "policy-loss": "policy loss from logits, forward and backward",
    "rules": "policy loss, one ratio rule beside the other",
    "entropy-ratio": "entropies, ratio and divergences of two sets of logits, no gradient",
    "linear": "policy loss from hidden states and the lm_head, forward and backward",
}
EPS_LOW, EPS_HIGH, BETA, EPS = (
    0.2,
    0.28,
    0.05,
    1e-8,
)  # DAPO's clip-higher and ERC's band, as in erc.objective("erc-dapo")
TEMPERATURE = 1.0  # the temperature of DAPO's rollouts; another one would cost the peers one more pass

# A trained policy is nearly certain of most tokens and undecided at a few "forks" (arXiv 2506.01939: 80 and 20 %).
FORK_SHARE = 0.2
BACKGROUND_SIGMA = 2.5
CERTAIN_GAP = (2.0, 12.0)
FORK_GAP = (-3.0, 1.0)


@dataclass(frozen=True)
class Case:
    """One thing to measure: `rows` tokens of `vocab` logits; `hidden` is the lm_head's input width, 0 without one."""

    operator: str
    dtype: str
    rows: int
    vocab: int
    objective: str = ""
    hidden: int = 0
    device: str = "cpu"

    @property
    def model(self) -> str:
        """Whose vocabulary this is."""
        return next((name for name, size in VOCABULARIES.items() if size == self.vocab), "")

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * DTYPES[self.dtype].itemsize

    @property
    def essential_bytes(self) -> int:
        """Bytes that must cross the memory bus: one read of what is given, and one write of what is asked for.

        That is the logits and their gradient; from hidden states those and the lm_head, with their gradients.
        """
        if self.hidden:
            return 2 * self.hidden * (self.rows + self.vocab) * DTYPES[self.dtype].itemsize
        return self.logits_bytes * (1 if self.operator == "stats" else 2)

    def __str__(self) -> str:
        what = f"{self.operator} {self.objective}".strip()
        head = f", D={self.hidden}" if self.hidden else ""
        return f"{what}, {self.dtype}, N={self.rows}, V={self.vocab}{head}"


def sequence_count(rows: int) -> int:
    """How many sequences the rows are cut into."""
    return 4 if rows % 4 == 0 else 1


def policy_logits(rows: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Float32 logits `[rows, vocab]` like a trained policy's, where the generator is: one token leads a Gaussian
    background by a drawn gap."""
    here = {"generator": generator, "device": generator.device}
    logits = torch.randn(rows, vocab, **here).mul_(BACKGROUND_SIGMA)
    background = log(vocab) + BACKGROUND_SIGMA**2 / 2  # the expected logsumexp of everything but the leader
    fork = torch.rand(rows, **here) < FORK_SHARE
    low = torch.where(fork, FORK_GAP[0], CERTAIN_GAP[0])
    high = torch.where(fork, FORK_GAP[1], CERTAIN_GAP[1])
    lead = background + low + (high - low) * torch.rand(rows, **here)
    top = torch.randint(vocab, (rows, 1), **here)
    return logits.scatter_(1, top, lead[:, None])


class Inputs:
    """The tensors of a case, made when they are first asked for; the same for every variant."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case = case
        self.device = torch.device(case.device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.dtype = DTYPES[case.dtype]
        self.sequences = sequence_count(case.rows)
        rows = case.rows
        logits = self.logits_master
        top = logits.argmax(-1)
        here = {"generator": self.generator, "device": self.device}
        other = torch.randint(case.vocab, (rows,), **here)
        self.labels = torch.where(torch.rand(rows, **here) < 0.9, top, other)
        self.logprob, self.entropy = plain_statistics(logits, self.labels)
        if case.hidden:
            del logits, self.logits_master  # gigabytes that no variant of a linear case reads
        self.old_logprob = (self.logprob + 0.1 * self._randn(rows)).clamp(max=0.0)
        self.old_entropy = self.entropy * (1 + 0.04 * self._randn(rows))
        self.sequence_advantages = self._randn(self.sequences)
        self.advantages = self.sequence_advantages.repeat_interleave(rows // self.sequences)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    @cached_property
    def logits_master(self) -> Tensor:
        """The logits `[N, V]`. Variants that overwrite their input work on a copy."""
        case = self.case
        if case.hidden:
            return self.hidden @ self.weight.t()
        return policy_logits(case.rows, case.vocab, self.generator).to(self.dtype)

    @cached_property
    def old_logits(self) -> Tensor:
        """Logits one update earlier: the same with a little noise."""
        noise = policy_logits(self.case.rows, self.case.vocab, self.generator)
        return (self.logits_master.float() + 0.02 * noise).to(self.dtype)

    @cached_property
    def weight(self) -> Tensor:
        """The lm_head `[V, D]`."""
        case = self.case
        return self._randn(case.vocab, case.hidden).to(self.dtype)

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states `[N, D]` that point at one token's row of the head, so that the logits are peaked."""
        case = self.case
        top = torch.randint(case.vocab, (case.rows,), generator=self.generator, device=self.device)
        scale = 20.0 / case.hidden  # the leader's logit is about 20, the background's sigma 20 / sqrt(D)
        return (self.weight[top].float() * scale).to(self.dtype)

    def logits(self, storage: Tensor | None = None) -> Tensor:
        """The logits as a model's output: a non-leaf that requires grad and whose gradient is taken and dropped."""
        head = torch.zeros((), device=self.device, requires_grad=True)
        return _ModelOutput.apply(head, self.logits_master if storage is None else storage)

    def head(self) -> tuple[Tensor, Tensor]:
        """Fresh leaves over `hidden` and `weight`."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()


class _ModelOutput(torch.autograd.Function):
    """Stands for the model: hands out logits, and takes their gradient without reading it."""

    @staticmethod
    def forward(ctx: object, head: Tensor, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, None]:
        return None, None


def plain_statistics(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in float32, a few rows at a time. What was true a step ago needs no oracle: it is drawn
    around these."""
    parts = []
    for rows, index in zip(logits.split(32), labels.split(32), strict=True):
        logp = torch.log_softmax(rows.float(), -1)
        parts.append((logp.gather(-1, index[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def entropy_quantiles(entropy: Tensor) -> dict[str, float]:
    """How certain the rows are, for the record."""
    levels = torch.tensor([0.1, 0.5, 0.8, 0.9], device=entropy.device)
    values = entropy.float().quantile(levels).tolist()
    return {f"p{int(100 * q)}": v for q, v in zip((0.1, 0.5, 0.8, 0.9), values, strict=True)} | {
        "mean": float(entropy.mean())
    }
