"""token_stats on the CPU backend against the float64 oracle: values, gradients, shapes, strides, dtypes, scalings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import erc
from tests.oracle import assert_entropy, assert_gradient_and_mutations, assert_logprob, peaked_rows

# 1 and 2 are the smallest rows; 31, 32, 33 stand around the block of 32 lanes; 2,047 to 2,053 around the segment of
# 2,048; 50,257 is GPT-2's vocabulary, odd, so that rows of a batch are misaligned.
SIZES = [1, 2, 31, 32, 33, 2047, 2048, 2053, 50_257]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCALINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "softcap": 30.0, "logit_scale": 1.2},
]


def compare(logits, labels, **scaling):
    """Statistics and gradients of `logits` against the oracle's, with mutations."""
    tested = (
        logits.detach().clone().as_strided(logits.size(), logits.stride())
        if logits.is_contiguous()
        else logits.detach()
    )
    tested.requires_grad_()
    stats = erc.token_stats(tested, labels, **scaling)
    exact_logits = logits.detach().double().requires_grad_()
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in scaling.items()}
    exact = erc.reference.token_stats(exact_logits, labels, **doubles)
    softcap = scaling.get("softcap")
    temperature = scaling.get("temperature", 1.0)
    x_max = logits.double().abs().amax(-1) * scaling.get("logit_scale", 1.0) / temperature
    assert_logprob(stats.logprob, exact.logprob.detach(), x_max)
    assert_logprob(stats.logsumexp, exact.logsumexp.detach(), x_max)
    assert_entropy(stats.entropy.detach(), exact.entropy.detach(), softcap)
    if logits.shape[-1] == 1:
        return
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(stats.entropy.shape, generator=generator) for _ in range(3)]
    dtype = stats.entropy.dtype
    (gradient,) = torch.autograd.grad(list(stats[:3]), tested, [u.to(dtype) for u in upstream])
    (expected,) = torch.autograd.grad(list(exact[:3]), exact_logits, [u.to(dtype).double() for u in upstream])
    assert_gradient_and_mutations(gradient, expected, softcap)


@pytest.mark.sanitize
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab_size", SIZES)
def test_statistics_and_gradients_meet_the_contract(vocab_size, dtype, scaling):
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (3 * torch.randn(5, vocab_size, generator=generator)).to(dtype)
    labels = torch.randint(vocab_size, (5,), generator=generator)
    labels[0] = logits[0].argmax()  # where 1 - p cancels
    compare(logits, labels, **scaling)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 2, 3)]),
    vocab_size=st.sampled_from([2, 33, 700]),
    layout=st.sampled_from(["plain", "sliced", "transposed", "padded", "strided"]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    per_row=st.booleans(),
)
def test_any_shape_and_stride_gives_the_oracles_answer(data, dtype, shape, vocab_size, layout, spread, per_row):
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return (spread * torch.randn(*size, generator=generator)).to(dtype)

    if layout == "sliced":
        logits = rand(*shape[:-1], shape[-1] + 1, vocab_size)[..., :-1, :]
    elif layout == "transposed":
        logits = rand(*reversed(shape), vocab_size).permute(*reversed(range(len(shape))), len(shape))
    elif layout == "padded":
        logits = rand(*shape, vocab_size + 3)[..., 2:-1]
    elif layout == "strided":
        logits = rand(*shape, 2 * vocab_size)[..., ::2]
    else:
        logits = rand(*shape, vocab_size)
    labels = torch.randint(vocab_size, shape, generator=generator)
    temperature = 0.5 + torch.rand(shape, generator=generator) if per_row else 0.9
    compare(logits, labels, temperature=temperature)


def test_entropy_keeps_its_relative_accuracy_from_1e_minus_6_to_10_nats():
    targets = [10.0 ** (-6 + 7 * i / 23) for i in range(24)]
    logits = peaked_rows(targets, 50_257)
    stats = erc.token_stats(logits)
    exact = erc.reference.token_stats(logits.double())
    relative = ((stats.entropy.double() - exact.entropy).abs() / exact.entropy).max()
    assert relative <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_the_float32_gradient_rounded_once(dtype):
    logits = (3 * torch.randn(6, 2053, generator=torch.Generator().manual_seed(0))).to(dtype)
    labels = torch.arange(6)
    narrow, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
    upstream = torch.randn(6, generator=torch.Generator().manual_seed(1))
    for tensor in (narrow, wide):
        stats = erc.token_stats(tensor, labels)
        (stats.logprob * upstream + stats.entropy).sum().backward()
    assert torch.equal(narrow.grad, wide.grad.to(dtype))


def test_an_output_that_takes_no_part_costs_no_gradient():
    logits = torch.randn(3, 50, requires_grad=True)
    labels = torch.arange(3)
    (lone,) = torch.autograd.grad(erc.token_stats(logits, labels).logprob.sum(), logits)
    stats = erc.token_stats(logits, labels)
    (with_zeros,) = torch.autograd.grad((stats.logprob + 0 * stats.entropy + 0 * stats.logsumexp).sum(), logits)
    torch.testing.assert_close(lone, with_zeros)
    assert erc.token_stats(logits).logprob is None


def test_inplace_backward_reuses_the_memory_of_the_logits():
    source = torch.randn(4, 300, requires_grad=True)
    labels = torch.arange(4)
    (expected,) = torch.autograd.grad(erc.token_stats(source * 2, labels).logprob.sum(), source)
    logits = source * 2
    version = logits._version
    stats = erc.token_stats(logits, labels, inplace_backward=True)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), source, retain_graph=True)
    assert torch.equal(gradient, expected)
    assert logits._version > version
    torch.testing.assert_close(logits.detach() * 2, expected)
    with pytest.raises(RuntimeError):
        stats.logprob.sum().backward()


def test_double_backward_raises():
    logits = torch.randn(2, 9, requires_grad=True)
    pair = erc.entropy_ratio(logits, torch.zeros(2, 9))
    for value in (erc.token_stats(logits, torch.arange(2)).logprob, pair.ratio):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(value.sum(), logits, create_graph=True)


# How much a row of 12 segments rises from one to the next: a little, so that a segment exceeds all before it without
# being swept again; beyond what its sums may hold; and further than float32's smallest exponential.
@pytest.mark.sanitize
@pytest.mark.parametrize("rise", [0.3, 5.0, 9.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_every_segment_exceeds_the_last(dtype, rise):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 12 * 2048 + 17, generator=generator)
    logits += rise * torch.arange(13).repeat_interleave(2048)[: logits.shape[1]]
    logits[1] = logits[1].flip(0)
    compare(logits.to(dtype), torch.tensor([5, 24_000]))


# 87 and 88 nats below the maximum lie around the last exponential whose exponent is a matter of integers, 89 around the
# last normal number; 1,000 and more are exactly zero. They stand in a whole block, and in the tail.
@pytest.mark.sanitize
@pytest.mark.parametrize("temperature", [1.0, 0.37])
@pytest.mark.parametrize("column", [100, 5000, 6200])
@pytest.mark.parametrize("distance", [86.0, 87.0, 88.0, 89.0, 1e3, 1e30, torch.inf])
def test_far_logits_beside_a_peak(distance, column, temperature):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 3 * 2048 + 65, generator=generator).clamp(max=2)
    logits[:, 3000] = 12.0
    logits[1] = -torch.inf  # nothing but the peak, the far logit, and two between them
    logits[1, [3000, 3001, 6000]] = torch.tensor([12.0, -1.0, -3.0])
    logits[:, column] = 12.0 - distance * temperature
    logits[2, column + 1] = 12.0 - 2.0 * temperature
    compare(logits, torch.tensor([3000, 3001, column + 1]), temperature=temperature)


def test_the_worst_rounding_of_a_temperature_meets_the_contract():
    """log2(e) / temperature halfway between two floats just above 1: every exponential is off by 6e-8 |x|."""
    temperature = 1.4426950408889634 / (1 + 2.0**-24)
    rows = peaked_rows([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0], 50_257) * temperature
    compare(rows, rows.argmax(-1), temperature=temperature)
