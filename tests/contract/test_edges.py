"""The edges of docs/concepts.md on every backend: forbidden tokens, broken rows, ignored rows, extreme shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import erc
from erc.constants import ABSENT_LABEL, INVALID_VALUE
from tests.backends import INTERPRETED, params
from tests.oracle import (
    assert_entropy,
    assert_gradient_and_mutations,
    assert_logprob,
    random_labels,
    random_logits,
    same_bits,
)

INF, NAN, IGNORE = math.inf, math.nan, -100
pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
LONG = 4096 if INTERPRETED else 24_576  # a row of several segments in every form of the CUDA kernels


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
def test_minus_inf_logits_contribute_nothing(machine, dtype, softcap):
    """The first 2,048 columns, a whole segment, are forbidden: as if they were not there."""
    kept = random_logits(3, 100, dtype=dtype, spread=1.0)
    logits = torch.cat([torch.full((3, 2048), -INF, dtype=dtype), kept], 1)
    labels = torch.tensor([2050, 2100, 2147])
    stats, gradient = stats_and_gradient(logits, labels, softcap=softcap)
    alone, alone_gradient = stats_and_gradient(kept, labels - 2048, softcap=softcap)
    for tested, expected in zip(stats, alone, strict=True):
        torch.testing.assert_close(tested, expected, rtol=1e-6, atol=1e-6)
    assert not gradient[:, :2048].any()
    torch.testing.assert_close(gradient[:, 2048:], alone_gradient)


def test_a_single_allowed_token_is_certain(machine):
    logits = torch.full((1, 5000), -INF)
    logits[0, 4321] = -3.0
    stats, gradient = stats_and_gradient(logits, torch.tensor([4321]))
    assert stats.logprob == 0 and stats.entropy == 0 and stats.logsumexp == -3
    expected = torch.zeros_like(logits)
    expected[0, 4321] = 1  # of the logsumexp
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("poison", ["all -inf", "nan", "nan in a row of -inf", "+inf"])
def test_a_broken_row_is_nan_and_leaves_the_others_alone(machine, poison):
    logits = random_logits(3, 4100, spread=1.0)
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


@pytest.mark.parametrize("V", [1100, LONG])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_plus_inf_poison_their_row_alone_wherever_they_stand(value, V, machine):
    logits, labels = random_logits(4, V, dtype=torch.bfloat16), random_labels(4, V=V)
    clean = erc.token_stats(logits, labels)
    logits[1, 640] = logits[2, V - 1] = value
    stats, gradient = stats_and_gradient(logits, labels)
    for output, before in zip(stats, clean, strict=True):
        assert output[1:3].isnan().all() and same_bits(output[[0, 3]], before[[0, 3]])
    assert gradient[1:3].isnan().all() and gradient[[0, 3]].isfinite().all()
    objective = erc.Objective(erc.PPOClip(0.2, 0.2), reduction="none")
    _, gradient = fused(logits, labels, advantages=torch.tensor([1.0, 0.0, 1.0, 1.0]), objective=objective)
    assert gradient[1:3].isnan().all() and gradient[[0, 3]].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("V", [1027, 2053 if INTERPRETED else 20_488])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_forbidden_tokens(mask, V, softcap, machine):
    """-inf, and the lowest finite number that many programs write instead of it."""
    if softcap and mask != -INF:
        pytest.skip("a finite logit is capped, not forbidden")
    logits = random_logits(5, V)
    logits[0, : V // 2] = mask  # the first segments hold nothing
    logits[1, 3:] = mask  # most lanes hold nothing
    logits[2, :] = mask
    logits[2, 77] = 0.25  # all but one
    logits[3, ::2] = mask
    logits[4, V - 1] = mask  # only in the ragged end
    labels = torch.tensor([V - 5, 1, 77, 4, 9])  # row 3: the label itself is forbidden
    x = softcap * torch.tanh(logits.double() / softcap) if softcap else logits.double()
    kept = torch.where(logits == mask, -1e4, x).requires_grad_()  # p = 0 in float64
    expected = erc.reference.token_stats(kept, labels)
    leaf = logits.clone().requires_grad_()
    stats = erc.token_stats(leaf, labels, softcap=softcap)
    some = [0, 1, 2, 4]
    assert_logprob(stats.logprob[some], expected.logprob[some], torch.tensor(20.0))
    assert_logprob(stats.logsumexp[some], expected.logsumexp[some], torch.tensor(20.0))
    assert_entropy(stats.entropy, expected.entropy, softcap)
    assert stats.logprob[3] < -1e3
    (gradient,) = torch.autograd.grad((stats.entropy + stats.logsumexp).sum(), leaf)
    assert (gradient[logits == mask] == 0).all() and gradient.isfinite().all()
    if softcap is None:
        (exact,) = torch.autograd.grad((expected.entropy + expected.logsumexp).sum(), kept)
        assert_gradient_and_mutations(gradient, exact, relative=machine.gradient)
    _, gradient = fused(logits, labels, objective="ppo", mask=labels != 4, old_logprob=None, softcap=softcap)
    assert gradient.isfinite().all() and (gradient[logits == mask] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("V", [70, LONG])
def test_a_row_that_is_all_minus_inf_is_nan(V, machine):
    logits = torch.full((1, V), -INF, dtype=torch.bfloat16)
    assert all(output.isnan().all() for output in erc.token_stats(logits, torch.tensor([3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_lowest_number_is_uniform(dtype, machine):
    """What programs that know no -inf write over a forbidden token, over all of them."""
    logits = torch.full((1, 70), torch.finfo(dtype).min, dtype=dtype).requires_grad_()
    stats = erc.token_stats(logits, torch.tensor([3]))
    assert stats.entropy.item() == pytest.approx(math.log(70), rel=1e-6)
    (gradient,) = torch.autograd.grad(stats.logprob, logits)
    assert gradient[0, 3].item() == pytest.approx(69 / 70, rel=1e-2)
    assert gradient[0, 5].item() == pytest.approx(-1 / 70, rel=1e-2)


def test_a_nan_logit_shows_even_where_every_gate_would_hide_it(machine):
    """Advantage 0, a gate that drops everything, a clipped ratio: the row's loss and gradient are NaN all the same."""
    logits = random_logits(3, 50, spread=1.0)
    logits[1, 7] = NAN
    out, gradient = fused(logits, torch.arange(3), advantages=torch.zeros(3), old_entropy=torch.full((3,), 100.0))
    assert out.per_token_loss.isnan().tolist() == [False, True, False]
    assert gradient[1].isnan().any() and not gradient[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", ["old_entropy", "old_logprob", "advantages"])
def test_a_nan_among_what_a_token_brings_raises_and_says_where(machine, name):
    if machine.name not in ("cpu", "torch"):
        pytest.skip("where nobody reads values, the token is NaN: test_unread_values")
    values = torch.full((2, 3), 2.0)
    values[1, 2] = NAN
    labels = torch.arange(6).view(2, 3)
    with pytest.raises(ValueError, match=rf"{name} .* \(1, 2\)"):
        fused(random_logits(2, 3, 50, spread=1.0), labels, **{name: values})
    labels[1, 2] = -100  # a token that is not read may hold anything
    out, gradient = fused(random_logits(2, 3, 50, spread=1.0), labels, **{name: values})
    assert out.loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("objective", ["ppo", "reinforce", "cispo"])
def test_a_label_at_minus_inf_has_logprob_minus_inf_and_no_gradient_there(machine, objective):
    logits = random_logits(1, 40, spread=1.0)
    logits[0, 5] = -INF
    stats, gradient = stats_and_gradient(logits, torch.tensor([5]))
    assert stats.logprob == -INF and gradient[0, 5] == 0 and gradient.isfinite().all()
    out, gradient = fused(logits, torch.tensor([5]), objective=objective, old_logprob=torch.tensor([-INF]))
    assert out.metrics["ratio_max"] == 1, "-inf minus -inf counts as no difference"
    assert gradient[0, 5] == 0


def test_ignored_and_masked_rows_are_not_read(machine):
    logits = random_logits(4, 60, spread=1.0)
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


def test_a_label_out_of_range_raises_with_its_position(machine):
    if machine.name not in ("cpu", "torch"):
        pytest.skip("where nobody reads values, the token is NaN: test_unread_values")
    labels = torch.zeros(2, 3, dtype=torch.long)
    labels[1, 2] = 10
    with pytest.raises(IndexError, match=r"labels must lie in \[0, 10\).*got 10 at position \(1, 2\)"):
        erc.token_stats(torch.zeros(2, 3, 10), labels)
    with pytest.raises(IndexError, match="labels"):
        fused(torch.zeros(2, 3, 10), -labels)


@pytest.mark.parametrize("label", [300, -1, 2**62, ABSENT_LABEL])
def test_an_operator_never_reads_outside_a_row(label, native):
    """A label that nobody checked: an error on the CPU, and in what reads no values the row is NaN."""
    ops, logits, labels = native.ops, random_logits(1, 2, 300), torch.tensor([label, 7])
    rows, ones = (logits, labels, None, params(), IGNORE), torch.ones(2)
    if native.checks_values:
        with pytest.raises(RuntimeError, match=INVALID_VALUE):
            ops.stats_forward(*rows)
        saved = ops.stats_forward(logits, labels.clamp(0, 299), *rows[2:])[3]
    else:
        logprob, entropy, _, saved = ops.stats_forward(*rows)
        assert logprob[0].isnan() and entropy[0].isnan() and logprob[1].isfinite()
    gradient = ops.stats_backward(
        *rows, torch.full_like(saved, NAN) if native.checks_values else saved, ones, None, None
    )
    assert gradient[0, 0].isnan().all()
    assert native.checks_values or gradient[0, 1].isfinite().all()


def test_a_label_of_another_shard_counts_as_forbidden_here(native):
    logits, absent = random_logits(1, 1, 300), torch.tensor([ABSENT_LABEL])
    saved = native.ops.stats_forward(logits, None, None, params(), IGNORE)[3]
    gradient = native.ops.stats_backward(logits, absent, None, params(), IGNORE, saved, torch.ones(1), None, None)
    torch.testing.assert_close(gradient[0], -logits[0].double().softmax(-1).float(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_at_all(machine, dtype):
    stats, gradient = stats_and_gradient(torch.zeros(0, 7, dtype=dtype), torch.zeros(0, dtype=torch.long))
    assert stats.entropy.shape == (0,) and gradient.shape == (0, 7)
    out, _ = fused(torch.zeros(0, 7, dtype=dtype), torch.zeros(0, dtype=torch.long))
    assert out.loss == 0 and out.metrics["tokens"] == 0


def test_a_vocabulary_of_one_is_certain(machine):
    stats, gradient = stats_and_gradient(torch.tensor([[5.0], [-7.0]]), torch.zeros(2, dtype=torch.long))
    assert stats.logprob.tolist() == [0, 0] and stats.entropy.tolist() == [0, 0] and stats.logsumexp.tolist() == [5, -7]
    assert gradient.tolist() == [[1], [1]]


def test_tied_maxima_share_the_probability(machine):
    logits = torch.full((2, 4), 2.0)
    logits[:, 3] = -INF
    stats, gradient = stats_and_gradient(logits, torch.tensor([0, 2]))
    torch.testing.assert_close(stats.logprob, torch.full((2,), -math.log(3)))
    torch.testing.assert_close(stats.entropy, torch.full((2,), math.log(3)))
    torch.testing.assert_close(gradient[0], torch.tensor([1.0, 0, 0, 0]))  # (1 - 1/3) + 1/3 of the logsumexp
    torch.testing.assert_close(gradient[1], torch.tensor([0.0, 0, 1.0, 0]))


def test_no_active_token_gives_zero_and_not_nan(machine):
    for objective in ("dapo", "grpo", "dr-grpo"):
        logits, labels = random_logits(2, 3, 9, spread=1.0), torch.full((2, 3), -100)
        out, gradient = fused(logits, labels, objective=objective)
        assert out.loss == 0 and not gradient.any()


def test_more_rows_than_a_second_grid_dimension_holds(machine):
    """65,535 is where every dimension of a grid ends but the first."""
    if machine.name not in ("cpu", "torch") and torch.get_default_device().type == "cpu":
        pytest.skip("minutes without a GPU: test_triton and test_cuda_host look at the grid")
    logits, labels = random_logits(70_000, 3), random_labels(70_000, V=3)
    stats = erc.token_stats(logits, labels)
    exact = torch.log_softmax(logits.double(), -1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(stats.logprob.double(), exact, rtol=1e-6, atol=1e-5)


def test_rows_beyond_the_two_to_the_31st_element(machine):
    """Two rows, 2^31 elements apart, in a view of 4.3 GB of bfloat16 that is never written in between."""
    if torch.get_default_device().type == "cuda":
        available = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    if available < 6 * 2**30:
        pytest.skip(f"needs 6 GiB of memory, {available / 2**30:.1f} GiB are free")
    V, apart = 1000, 2**31 + 8
    storage = torch.empty(apart + V, dtype=torch.bfloat16)  # pages that nobody touches cost nothing
    logits = storage.as_strided((2, V), (apart, 1))
    logits.copy_(random_logits(2, V, dtype=torch.bfloat16))
    near, labels = logits.clone(), torch.tensor([5, 999])
    assert all(map(same_bits, erc.token_stats(logits, labels), erc.token_stats(near, labels)))
    if machine.name == "torch":
        return
    saved, ones = machine.ops.stats_forward(logits[None], labels, None, params(), IGNORE)[3], torch.ones(2)
    expected = machine.ops.stats_backward(near[None], labels, None, params(), IGNORE, saved, ones, None, None)
    machine.ops.stats_backward_(
        logits[None], labels, None, params(), IGNORE, None, 0, saved, ones, None, None, logits[None]
    )
    assert same_bits(logits, expected[0])
