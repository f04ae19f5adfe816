"""This installation against the float64 oracle, backend by backend: what `python -m erc check` prints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from erc import reference
from erc.backend import backends
from erc.loss import policy_loss
from erc.stats import token_stats
from erc.surrogate.presets import objective

VOCAB_SIZE = 50_257  # GPT-2's: odd, so that rows are misaligned and end in a tail
ROWS = 32
SEEDS = 4
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Agreement:
    """Largest deviations from the oracle on the same inputs; `flips` counts ERC keep/drop decisions that differ.

    `gradient` is what exceeds the rounding of the log-prob itself: a ratio is the exponential of a difference of
    log-probs, so half a unit in the last place of the log-prob is a relative error of the gradient that no kernel can
    avoid (1e-6 at a log-prob of -20 in float32).
    """

    backend: str
    dtype: str
    logprob: float
    entropy: float
    gradient: float
    flips: int
    rows: int

    @property
    def passed(self) -> bool:
        """Whether the numerics contract holds: see the README."""
        gradient_bound = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}[self.dtype]
        return self.logprob <= 1e-6 and self.entropy <= 2e-6 and self.gradient <= gradient_bound and self.flips == 0


def peaked_logits(rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Rows like a trained policy's: entropies from about 1e-6 to 10 nats, the smallest ones where ERC decides most."""
    logits = torch.randn(rows, vocab_size, generator=generator)
    lead = torch.linspace(2.0, 30.0, rows)[:, None]
    top = torch.randint(vocab_size, (rows, 1), generator=generator)
    return logits.scatter_add(1, top, lead)


def half_ulp(values: Tensor) -> Tensor:
    """The largest error of rounding to these values."""
    magnitude = values.abs()
    return (torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf)) - magnitude).double() / 2


def check_backend(name: str, dtype: torch.dtype, device: str, seeds: int = SEEDS) -> Agreement:
    """Compare statistics, fused gradient and ERC decisions of backend `name` with the oracle, on several batches."""
    found = [_check_batch(name, dtype, device, seed) for seed in range(seeds)]
    worst = {field: max(getattr(one, field) for one in found) for field in ("logprob", "entropy", "gradient")}
    totals = {field: sum(getattr(one, field) for one in found) for field in ("flips", "rows")}
    return replace(found[0], **worst, **totals)


def _check_batch(name: str, dtype: torch.dtype, device: str, seed: int) -> Agreement:
    generator = torch.Generator().manual_seed(seed)
    logits = peaked_logits(ROWS, VOCAB_SIZE, generator).to(dtype)
    labels = torch.where(
        torch.rand(ROWS, generator=generator) < 0.5,
        logits.argmax(-1),
        torch.randint(VOCAB_SIZE, (ROWS,), generator=generator),
    )
    exact_logits = logits.double().requires_grad_()
    exact = reference.token_stats(exact_logits.detach(), labels, temperature=TEMPERATURE)
    old_entropy = (exact.entropy * (1 + 0.1 * torch.randn(ROWS, generator=generator))).float()
    arguments: dict[str, Any] = {
        "old_logprob": (exact.logprob + 0.1 * torch.randn(ROWS, generator=generator)).float(),
        "advantages": torch.randn(ROWS, generator=generator),
        "old_entropy": old_entropy,
    }
    chosen = objective("erc-dapo", entropy_coef=0.01)
    expected = reference.policy_loss(
        exact_logits, labels, objective=chosen, temperature=TEMPERATURE, **{k: v.double() for k, v in arguments.items()}
    )
    expected.loss.backward()

    there = {key: value.to(device) for key, value in arguments.items()}
    tested = logits.to(device).requires_grad_()
    stats = token_stats(tested.detach(), labels.to(device), temperature=TEMPERATURE, backend=name)
    out = policy_loss(
        tested,
        labels.to(device),
        objective=chosen,
        temperature=TEMPERATURE,
        grad_scale=1.0 if dtype == torch.float16 else None,
        backend=name,
        **there,
    )
    out.loss.backward()
    assert tested.grad is not None and exact_logits.grad is not None
    gradient_error = (tested.grad.cpu().double() - exact_logits.grad).abs().amax(-1)
    largest = exact_logits.grad.abs().amax(-1)
    # Scale 1 plus 1e-12, as in the contract: a row may have no gradient at all.
    gradient = (gradient_error / (largest + 1e-6) - half_ulp(out.logprob.cpu())).max()
    row_scale = exact_logits.detach().abs().amax(-1) / TEMPERATURE
    gate = chosen.entropy_ratio
    assert gate is not None
    dropped = [
        gate.dropped(entropy, old_entropy.double())[0] for entropy in (stats.entropy.cpu().double(), exact.entropy)
    ]
    return Agreement(
        backend=name,
        dtype=str(dtype).removeprefix("torch."),
        logprob=float(((stats.logprob.cpu() - exact.logprob).abs() / row_scale.clamp(min=1)).max()),
        entropy=float(((stats.entropy.cpu() - exact.entropy).abs() / (exact.entropy + 1e-13)).max()),
        gradient=float(gradient),
        flips=int((dropped[0] != dropped[1]).sum()),
        rows=ROWS,
    )


def check() -> list[Agreement]:
    """Every available backend in float32 and bfloat16, on the GPU where it needs one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [
        check_backend(name, dtype, "cpu" if name in ("cpu", "torch") else device)
        for name, state in backends().items()
        if state == "available"
        for dtype in (torch.float32, torch.bfloat16)
    ]
