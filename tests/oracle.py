"""The float64 oracle and the bounds of the numerics contract, shared by the tests of every backend."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import erc
from erc.check import half_ulp

# Triton's interpreter cuts bfloat16 off instead of rounding it.
BFLOAT16 = 2.0**-7 if os.environ.get("TRITON_INTERPRET") == "1" else 2.0**-8
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: BFLOAT16, torch.float16: 2.0**-11, torch.float64: 2.0**-53}
"""The largest relative error of one rounding to nearest."""


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 4.0, seed: int = 0) -> Tensor:
    """The same numbers on every device; on the default one, which a test of a GPU makes the GPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, device="cpu") * spread
    return numbers.to(torch.get_default_device(), dtype)


def random_labels(*shape: int, V: int, seed: int = 1) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(V, shape, generator=generator, device="cpu").to(torch.get_default_device())


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(*(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second)))


def peaked_rows(entropies: list[float], vocab_size: int, seed: int = 0) -> Tensor:
    """One float32 row for each target entropy: Gaussian logits with one token raised until the entropy is about
    right."""
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = torch.randn(len(entropies), vocab_size, generator=generator, device="cpu")
    top = torch.randint(vocab_size, (len(entropies), 1), generator=generator, device="cpu")
    targets = torch.tensor(entropies, dtype=torch.float64, device="cpu")
    low, high = torch.zeros(len(entropies), 1, device="cpu"), torch.full((len(entropies), 1), 60.0, device="cpu")
    for _ in range(40):
        lead = (low + high) / 2
        raised = rows.scatter_add(1, top, lead)
        above = (erc.reference.token_stats(raised.double()).entropy > targets)[:, None]
        low, high = torch.where(above, lead, low), torch.where(above, high, lead)
    return rows.scatter_add(1, top, low).to(torch.get_default_device())


def merged_states(states: list[Tensor], scale: float = 1.0) -> Tensor:
    """`[4, N]` of the whole row from those of its shards, in float64: the merge of row_state.h, written again."""
    out = states[0].double()
    for state in states[1:]:
        first, second = out, state.double()
        swap = second[0] > first[0]
        a, b = torch.where(swap, second, first), torch.where(swap, first, second)
        shift = torch.where(b[0] == -torch.inf, 0.0, (b[0] - a[0]) * scale)
        factor = torch.where(b[0] == -torch.inf, 0.0, shift.exp())
        rest = a[1] + factor * (1 + b[1])
        weighted = a[2] + factor * (b[2] + (1 + b[1]) * shift)
        out = torch.stack([a[0], rest, weighted, torch.maximum(first[3], second[3])])
    return out


def assert_logprob(tested: Tensor, exact: Tensor, x_max: Tensor) -> None:
    """|error| <= 1e-6 * max(1, |value|, max |x| of the row), and infinities alike."""
    finite = exact.isfinite()
    assert torch.equal(tested.double()[~finite], exact[~finite])
    bound = 1e-6 * torch.maximum(exact.abs(), x_max).clamp(min=1)
    assert ((tested.double() - exact).abs()[finite] <= bound[finite]).all()


def assert_entropy(tested: Tensor, exact: Tensor, softcap: float | None = None) -> None:
    """|error| <= (2e-6 + 2^-23 * softcap) * H + 1e-13, and never negative."""
    assert (tested >= 0).all()
    bound = (2e-6 + 2**-23 * (softcap or 0)) * exact + 1e-13
    assert ((tested.double() - exact).abs() <= bound).all()


def assert_gradient(
    tested: Tensor,
    exact: Tensor,
    softcap: float | None = None,
    relative: float = 1e-6,
    logprob: Tensor | None = None,
) -> None:
    """float32 within `relative` (with softcap c: 2e-6 + 2^-23 c) of the row's largest gradient, 16-bit that rounded
    once.

    A coefficient that is the exponential of a difference of log-probs adds half a unit in the last place of `logprob`,
    the float32 one that the loss used: `erc.check` says why. One that is a difference of log-probs needs a larger
    `relative`.
    Raises where the expected gradient is zero everywhere: it would test nothing.
    """
    largest = exact.abs().amax(-1, keepdim=True)
    assert (largest > 0).any(), "the expected gradient is zero everywhere"
    relative = relative if softcap is None else 2e-6 + 2**-23 * softcap
    if logprob is not None:
        relative = relative + half_ulp(logprob)[..., None]
    rounding = 0.0 if tested.dtype in (torch.float32, torch.float64) else ROUNDING[tested.dtype]
    subnormal = 2.0**-24 if tested.dtype == torch.float16 else 0.0
    bound = relative * largest + 1e-12 + rounding * exact.abs() * (1 + 1e-6) + subnormal
    assert ((tested.double() - exact).abs() <= bound).all()


def gradients_that_must_fail(gradient: Tensor) -> list[Tensor]:
    """Deliberately wrong gradients: none, 1 % (16-bit: 5 %) too large, and one row's largest entry left out."""
    factor = 1.01 if gradient.dtype in (torch.float32, torch.float64) else 1.05
    holed = gradient.clone()
    flat = holed.view(-1)
    flat[flat.abs().argmax()] = 0
    return [torch.zeros_like(gradient), (gradient.double() * factor).to(gradient.dtype), holed]


def assert_gradient_and_mutations(
    tested: Tensor,
    exact: Tensor,
    softcap: float | None = None,
    relative: float = 1e-6,
    logprob: Tensor | None = None,
) -> None:
    """`assert_gradient` holds, and fails for every deliberately wrong gradient."""
    assert_gradient(tested, exact, softcap, relative, logprob)
    for wrong in gradients_that_must_fail(tested):
        try:
            assert_gradient(wrong, exact, softcap, relative, logprob)
        except AssertionError:
            continue
        raise RuntimeError("the bound does not notice a wrong gradient")
