"""token_stats on every backend against the float64 oracle: values, gradients, shapes, strides, dtypes, scalings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import erc
from tests.backends import INTERPRETED, stored
from tests.oracle import (
    assert_entropy,
    assert_gradient_and_mutations,
    assert_logprob,
    peaked_rows,
    random_labels,
    random_logits,
)

pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def compare(logits, labels, relative=1e-6, **scaling):
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
    upstream = [random_logits(*stats.entropy.shape, spread=1.0, seed=seed).to(stats.entropy.dtype) for seed in range(3)]
    (gradient,) = torch.autograd.grad(list(stats[:3]), tested, upstream)
    (expected,) = torch.autograd.grad(list(exact[:3]), exact_logits, [u.double() for u in upstream])
    assert_gradient_and_mutations(gradient, expected, softcap, relative)


# 1 and 5 are less than one load, 33 is a block of the CPU and a tail, 2,053 is prime, so that rows are not aligned, and
# more than a segment of the CPU and of a Triton program of 32 lanes.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("V", "scaling"),
    [
        *((V, {"temperature": 0.7, "logit_scale": 1.3}) for V in (1, 5, 33, 2053)),
        *((V, {"temperature": 1.3, "softcap": 30.0, "logit_scale": 1.2}) for V in (5, 1032)),
    ],
)
def test_statistics_and_gradients_match_the_oracle(V, scaling, dtype, machine):
    logits, labels = random_logits(3, V, dtype=dtype), random_labels(3, V=V)
    labels[1] = logits[1].argmax()  # where 1 - p cancels
    compare(logits, labels, machine.gradient, **scaling)


# Several segments of a row in every form of the CUDA kernels, and with a ragged end; GPT-2's vocabulary; in the
# interpreter two segments and a tail of a program of the size that GPUs run.
@pytest.mark.parametrize(
    ("dtype", "V"),
    [(torch.bfloat16, 40_960), (torch.float32, 20_488), (torch.float32, 50_257), (torch.float64, 10_242)]
    if not INTERPRETED
    else [(dtype, 40_000) for dtype in DTYPES],
)
def test_long_rows_match_the_oracle(dtype, V, machine, monkeypatch):
    if machine.name == "triton":
        from erc.triton_kernels import tuning

        monkeypatch.setattr(tuning, "LANES", 512)
    logits, labels = random_logits(2, V, dtype=dtype), random_labels(2, V=V)
    labels[1] = logits[1].argmax()
    compare(logits, labels, machine.gradient)


def test_one_temperature_a_row(machine):
    temperature = torch.tensor([0.5, 1.0, 1.7])
    compare(random_logits(3, 300), random_labels(3, V=300), machine.gradient, temperature=temperature)


@pytest.mark.parametrize("gap", [2.0, 8.0, 14.0, 17.0, 24.0, 40.0])
def test_peaked_rows_keep_the_entropy_s_relative_precision(gap, machine):
    """H down to 1e-16: all of it is in the rest of the row, which 1 + R would have rounded away."""
    logits = random_logits(4, 1032, spread=0.5)
    logits[:, 123] = logits.amax(-1) + gap
    exact = erc.reference.token_stats(logits.double()).entropy
    assert_entropy(erc.token_stats(logits).entropy, exact)
    assert gap < 40 or ((1 + exact).float() == 1).all()


def test_no_entropy_ratio_decision_flips(machine):
    logits = torch.cat([random_logits(8, 520, spread=s, seed=int(s), dtype=torch.bfloat16) for s in (1.0, 4.0, 9.0)])
    exact = erc.reference.token_stats(logits.double()).entropy
    entropy = erc.token_stats(logits).entropy
    old = (exact * torch.linspace(0.9, 1.1, len(logits), dtype=torch.float64)).float()
    actual, oracle = (erc.EntropyRatioClip().dropped(h, old.to(h.dtype))[0] for h in (entropy, exact))
    assert torch.equal(actual, oracle) and oracle.any() and not oracle.all()


# 31, 32, 33 stand around the CPU's block of 32 lanes; 2,047 to 2,053 around its segment of 2,048; 50,257 is GPT-2's
# vocabulary, odd, so that rows of a batch are misaligned.
@pytest.mark.parametrize(
    "scaling", [{}, {"temperature": 0.7}, {"temperature": 1.3, "softcap": 30.0, "logit_scale": 1.2}]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2, 31, 32, 2047, 2048, 50_257])
def test_sizes_around_the_cpu_s_blocks(V, dtype, scaling, cpu):
    logits, labels = random_logits(5, V, dtype=dtype, seed=V), random_labels(5, V=V)
    labels[0] = logits[0].argmax()
    compare(logits, labels, **scaling)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 2, 3)]),
    vocab_size=st.sampled_from([2, 33, 700]),
    layout=st.sampled_from(["plain", "sliced", "transposed", "padded", "strided"]),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    per_row=st.booleans(),
)
def test_any_shape_and_stride_gives_the_oracles_answer(data, dtype, shape, vocab_size, layout, spread, per_row, cpu):
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


def test_entropy_keeps_its_relative_accuracy_from_1e_minus_6_to_10_nats(cpu):
    targets = [10.0 ** (-6 + 7 * i / 23) for i in range(24)]
    logits = peaked_rows(targets, 50_257)
    stats = erc.token_stats(logits)
    exact = erc.reference.token_stats(logits.double())
    relative = ((stats.entropy.double() - exact.entropy).abs() / exact.entropy).max()
    assert relative <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_the_float32_gradient_rounded_once(dtype, kernels):
    logits, labels = random_logits(6, 2053, dtype=dtype), torch.arange(6)
    narrow, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
    upstream = random_logits(6, spread=1.0)
    for tensor in (narrow, wide):
        stats = erc.token_stats(tensor, labels)
        (stats.logprob * upstream + stats.entropy).sum().backward()
    assert torch.equal(narrow.grad, stored(wide.grad, dtype))


def test_an_output_that_takes_no_part_costs_no_gradient(kernels):
    logits = random_logits(3, 50).requires_grad_()
    labels = torch.arange(3)
    (lone,) = torch.autograd.grad(erc.token_stats(logits, labels).logprob.sum(), logits)
    stats = erc.token_stats(logits, labels)
    (with_zeros,) = torch.autograd.grad((stats.logprob + 0 * stats.entropy + 0 * stats.logsumexp).sum(), logits)
    torch.testing.assert_close(lone, with_zeros)
    assert erc.token_stats(logits).logprob is None


def test_inplace_backward_reuses_the_memory_of_the_logits(kernels):
    if kernels == "torch":
        pytest.skip("PyTorch's operators have no such form")
    source = random_logits(4, 300).requires_grad_()
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


# How much a row of 12 segments rises from one to the next: a little, so that a segment exceeds all before it without
# being swept again; beyond what its sums may hold; and further than float32's smallest exponential.
@pytest.mark.parametrize("rise", [0.3, 5.0, 9.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_every_segment_exceeds_the_last(dtype, rise, cpu):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 12 * 2048 + 17, generator=generator)
    logits += rise * torch.arange(13).repeat_interleave(2048)[: logits.shape[1]]
    logits[1] = logits[1].flip(0)
    compare(logits.to(dtype), torch.tensor([5, 24_000]))


# 87 and 88 nats below the maximum lie around the last exponential whose exponent is a matter of integers, 89 around the
# last normal number; 1,000 and more are exactly zero. They stand in a whole block, and in the tail.
@pytest.mark.parametrize("temperature", [1.0, 0.37])
@pytest.mark.parametrize("column", [100, 5000, 6200])
@pytest.mark.parametrize("distance", [86.0, 87.0, 88.0, 89.0, 1e3, 1e30, torch.inf])
def test_far_logits_beside_a_peak(distance, column, temperature, cpu):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 3 * 2048 + 65, generator=generator).clamp(max=2)
    logits[:, 3000] = 12.0
    logits[1] = -torch.inf  # nothing but the peak, the far logit, and two between them
    logits[1, [3000, 3001, 6000]] = torch.tensor([12.0, -1.0, -3.0])
    logits[:, column] = 12.0 - distance * temperature
    logits[2, column + 1] = 12.0 - 2.0 * temperature
    compare(logits, torch.tensor([3000, 3001, column + 1]), temperature=temperature)


def test_the_worst_rounding_of_a_temperature_meets_the_contract(cpu):
    """log2(e) / temperature halfway between two floats just above 1: every exponential is off by 6e-8 |x|."""
    temperature = 1.4426950408889634 / (1 + 2.0**-24)
    rows = peaked_rows([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0], 50_257) * temperature
    compare(rows, rows.argmax(-1), temperature=temperature)
