"""The edges of docs/concepts.md on every backend: forbidden tokens, broken rows, ignored rows, extreme shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import erc
from erc.constants import INVALID_VALUE
from erc.rows import UNSCALED, scaling_params

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.sanitize


@pytest.fixture(params=["cpu", "torch"])
def backend(request):
    if erc.backends()[request.param] != "available":
        pytest.skip(f"backend {request.param}: {erc.backends()[request.param]}")
    with erc.use_backend(request.param):
        yield request.param


def stats_and_gradient(logits, labels, **scaling):
    logits = logits.clone().requires_grad_()
    stats = erc.token_stats(logits, labels, **scaling)
    (gradient,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum() + stats.logsumexp.sum(), logits)
    return stats, gradient


def fused(logits, labels, **arguments):
    logits = logits.clone().requires_grad_()
    rows = logits.shape[:-1]
    defaults = {
        "old_logprob": torch.full(rows, -2.0),
        "advantages": torch.ones(rows),
        "old_entropy": torch.full(rows, 2.0),
    }
    out = erc.policy_loss(logits, labels, **(defaults | arguments))
    out.loss.sum().backward()
    return out, logits.grad


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_minus_inf_logits_contribute_nothing(backend, dtype, softcap):
    """The first 2,048 columns, a whole segment, are forbidden: as if they were not there."""
    kept = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = torch.cat([torch.full((3, 2048), -INF, dtype=dtype), kept], 1)
    labels = torch.tensor([2050, 2100, 2147])
    stats, gradient = stats_and_gradient(logits, labels, softcap=softcap)
    alone, alone_gradient = stats_and_gradient(kept, labels - 2048, softcap=softcap)
    for tested, expected in zip(stats, alone, strict=True):
        torch.testing.assert_close(tested, expected, rtol=1e-6, atol=1e-6)
    assert not gradient[:, :2048].any()
    torch.testing.assert_close(gradient[:, 2048:], alone_gradient)


def test_a_single_allowed_token_is_certain(backend):
    logits = torch.full((1, 5000), -INF)
    logits[0, 4321] = -3.0
    stats, gradient = stats_and_gradient(logits, torch.tensor([4321]))
    assert stats.logprob == 0 and stats.entropy == 0 and stats.logsumexp == -3
    expected = torch.zeros_like(logits)
    expected[0, 4321] = 1  # of the logsumexp
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("poison", ["all -inf", "nan", "nan in a row of -inf", "+inf"])
def test_a_broken_row_is_nan_and_leaves_the_others_alone(backend, poison):
    logits = torch.randn(3, 4100, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 2, 3])
    clean, clean_gradient = stats_and_gradient(logits, labels)
    if "-inf" in poison:
        logits[1] = -INF
    if "nan" in poison:
        logits[1, 4099] = NAN
    if poison == "+inf":
        logits[1, 2500] = INF
    stats, gradient = stats_and_gradient(logits, labels)
    for tested, expected in zip(stats, clean, strict=True):
        assert tested[1].isnan()
        assert torch.equal(tested[[0, 2]], expected[[0, 2]])
    assert torch.equal(gradient[[0, 2]], clean_gradient[[0, 2]])
    assert gradient[1].isnan().any()


def test_a_nan_logit_shows_even_where_every_gate_would_hide_it(backend):
    """Advantage 0, a gate that drops everything, a clipped ratio: the row's loss and gradient are NaN all the same."""
    logits = torch.randn(3, 50)
    logits[1, 7] = NAN
    out, gradient = fused(logits, torch.arange(3), advantages=torch.zeros(3), old_entropy=torch.full((3,), 100.0))
    assert out.per_token_loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and not gradient[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", ["old_entropy", "old_logprob", "advantages"])
def test_a_nan_among_what_a_token_brings_raises_and_says_where(backend, name):
    values = torch.full((2, 3), 2.0)
    values[1, 2] = NAN
    labels = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match=rf"{name} .* \(1, 2\)"):
        fused(torch.randn(2, 3, 50), labels, **{name: values})
    labels[1, 2] = -100  # a token that is not read may hold anything
    out, gradient = fused(torch.randn(2, 3, 50), labels, **{name: values})
    assert out.loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("objective", ["ppo", "reinforce", "cispo"])
def test_a_label_at_minus_inf_has_logprob_minus_inf_and_no_gradient_there(backend, objective):
    logits = torch.randn(1, 40)
    logits[0, 5] = -INF
    stats, gradient = stats_and_gradient(logits, torch.tensor([5]))
    assert stats.logprob == -INF and gradient[0, 5] == 0 and gradient.isfinite().all()
    out, gradient = fused(logits, torch.tensor([5]), objective=objective, old_logprob=torch.tensor([-INF]))
    assert out.metrics["ratio_max"] == 1, "-inf minus -inf counts as no difference"
    assert gradient[0, 5] == 0


def test_ignored_and_masked_rows_are_not_read(backend):
    logits = torch.randn(4, 60)
    logits[1], logits[2] = NAN, INF
    labels = torch.tensor([3, -100, 4, 5])
    old_entropy = erc.token_stats(logits).entropy
    out, gradient = fused(logits, labels, mask=torch.tensor([1.0, 1.0, 0.0, 1.0]), old_entropy=old_entropy)
    assert out.loss.isfinite() and out.metrics["tokens"] == 2
    for row in (1, 2):
        assert out.logprob[row] == out.entropy[row] == out.per_token_loss[row] == 0
        assert not gradient[row].any()
    assert gradient[0].any()
    stats, gradient = stats_and_gradient(logits[:2], labels[:2])
    assert stats.entropy[1] == stats.logsumexp[1] == stats.logprob[1] == 0 and not gradient[1].any()


def test_a_label_out_of_range_raises_with_its_position(backend):
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 10
    with pytest.raises(IndexError, match=r"labels must lie in \[0, 10\).*got 10 at position \(1, 2\)"):
        erc.token_stats(torch.zeros(2, 3, 10), labels)
    with pytest.raises(IndexError, match="labels"):
        fused(torch.zeros(2, 3, 10), -labels)


def test_an_operator_never_reads_outside_a_row():
    """A label that nobody checked: an error on the CPU, and in what reads no values the row is NaN."""
    if erc.backends()["cpu"] != "available":
        pytest.skip("the cpu backend is not built")
    operators, logits = torch.ops.erc_cpu, torch.zeros(1, 1, 10)
    for label in (10, -1, 2**62):
        rows = (logits, torch.tensor([label]), None, scaling_params(UNSCALED), -100)
        with pytest.raises(RuntimeError, match=INVALID_VALUE):
            operators.stats_forward(*rows)
        gradient = operators.stats_backward(*rows, torch.full((3, 1), NAN), torch.ones(1), None, None)
        assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(backend, dtype):
    stats, gradient = stats_and_gradient(torch.zeros(0, 7, dtype=dtype), torch.zeros(0, dtype=torch.long))
    assert stats.entropy.shape == (0,) and gradient.shape == (0, 7)
    out, _ = fused(torch.zeros(0, 7, dtype=dtype), torch.zeros(0, dtype=torch.long))
    assert out.loss == 0 and out.metrics["tokens"] == 0


def test_a_vocabulary_of_one_is_certain(backend):
    stats, gradient = stats_and_gradient(torch.tensor([[5.0], [-7.0]]), torch.zeros(2, dtype=torch.long))
    assert stats.logprob.tolist() == [0, 0] and stats.entropy.tolist() == [0, 0] and stats.logsumexp.tolist() == [5, -7]
    assert gradient.tolist() == [[1], [1]]


def test_tied_maxima_share_the_probability(backend):
    logits = torch.full((2, 4), 2.0)
    logits[:, 3] = -INF
    stats, gradient = stats_and_gradient(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(stats.logprob, torch.full((2,), -math.log(3)))
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(3)))
    torch.testing.assert_close(gradient[0], torch.tensor([1.0, 0, 0, 0]))  # (1 - 1/3) + 1/3 of the logsumexp
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, 0, 1.0, 0]))


def test_no_active_token_gives_zero_and_not_nan(backend):
    for objective in ("dapo", "grpo", "dr-grpo"):
        logits, labels = torch.randn(2, 3, 9), torch.full((2, 3), -100)
        out, gradient = fused(logits, labels, objective=objective)
        assert out.loss == 0 and not gradient.any()


def test_more_rows_than_a_two_byte_grid_holds(backend):
    logits = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (70_000,), generator=torch.Generator().manual_seed(1))
    stats = erc.token_stats(logits, labels)
    exact = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(stats.logprob.double(), exact, rtol=1e-6, atol=1e-6)


def test_rows_beyond_the_two_to_the_31st_element():
    """Two rows, 2^31 elements apart, in a view of 4.3 GB of bfloat16 that is never written in between."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if available < 6 * 2**30:
        pytest.skip(f"needs 6 GiB of memory, {available / 2**30:.1f} GiB are free")
    vocab_size, apart = 1000, 2**31 + 8
    storage = torch.empty(apart + vocab_size, dtype=torch.bfloat16)  # pages that nobody touches cost nothing
    logits = storage.as_strided((2, vocab_size), (apart, 1))
    logits.copy_(torch.randn(2, vocab_size, generator=torch.Generator().manual_seed(0)))
    near = logits.clone()
    labels = torch.tensor([5, 999])
    far_stats, near_stats = erc.token_stats(logits, labels), erc.token_stats(near, labels)
    assert all(torch.equal(a, b) for a, b in zip(far_stats, near_stats, strict=True))
    params = scaling_params(UNSCALED)
    if erc.backends()["cpu"] != "available":
        return
    saved = torch.ops.erc_cpu.stats_forward(logits[None], labels, None, params, -100)[3]
    expected = torch.ops.erc_cpu.stats_backward(
        near[None], labels, None, params, -100, saved, torch.ones(2), None, None
    )
    torch.ops.erc_cpu.stats_backward_(
        logits[None], labels, None, params, -100, None, 0, saved, torch.ones(2), None, None, logits[None]
    )
    assert torch.equal(logits, expected[0])
