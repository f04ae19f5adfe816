"""The tokens that a sampler kept: readers of other forms, and what every backend must compute over them."""

from __future__ import annotations

import doctest
import math
import sys

import pytest
import torch
from torch import Tensor

import erc
from erc import SamplingSupport
from tests.oracle import gradients_that_must_fail

N, V = 7, 23


def problem(seed: int = 0) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Logits, labels, and kept ids of rows: some, an uncut row, one token, all tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    kept = [sorted(torch.randperm(V, generator=generator)[:size].tolist()) for size in (5, 2, 9, 1, V, 12, 3)]
    kept[2] = []
    labels = torch.tensor([row[len(row) // 2] if row else 4 for row in kept])
    return logits, labels, kept


def support_of(kept: list[list[int]]) -> SamplingSupport:
    return SamplingSupport.from_counts([i for row in kept for i in row], [len(row) for row in kept])


def support_stats(logits: Tensor, labels: Tensor, support: SamplingSupport, **options) -> erc.TokenStats:
    return erc.reference.token_stats(logits, labels, support=support, **options)


def kept_mass(stats: erc.TokenStats | erc.PolicyLoss) -> Tensor:
    return (stats.logprob_full - stats.logprob).exp()


def by_hand(logits: Tensor, labels: Tensor, kept: list[list[int]], temperature: float = 1.0) -> Tensor:
    """Row by row, over the kept columns alone."""
    logprobs = []
    for row, label, ids in zip(logits / temperature, labels.tolist(), kept, strict=True):
        ids = ids or list(range(V))
        logprobs.append(row[ids].log_softmax(-1)[ids.index(label)])
    return torch.stack(logprobs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_prob_is_over_the_kept_tokens_and_so_is_its_gradient(temperature):
    logits, labels, kept = problem()
    logits.requires_grad_()
    stats = support_stats(logits, labels, support_of(kept), temperature=temperature)
    expected = by_hand(logits, labels, kept, temperature)
    torch.testing.assert_close(stats.logprob, expected, rtol=1e-12, atol=1e-14)
    weights = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * stats.logprob).sum(), logits)
    (exact,) = torch.autograd.grad((weights * expected).sum(), logits)
    scale = exact.abs().max()
    assert (gradient - exact).abs().max() <= 1e-12 * scale
    assert all((wrong - exact).abs().max() > 1e-12 * scale for wrong in gradients_that_must_fail(gradient))
    for row, ids in enumerate(kept):
        outside = [column for column in range(V) if ids and column not in ids]
        assert not gradient[row, outside].any()
        p = torch.zeros(V, dtype=torch.float64)
        columns = ids or list(range(V))
        p[columns] = (logits.detach()[row, columns] / temperature).softmax(-1)
        one = torch.nn.functional.one_hot(labels[row], V)
        torch.testing.assert_close(gradient[row], weights[row] * (one - p) / temperature, rtol=1e-9, atol=1e-12)


def test_everything_else_is_over_the_full_vocabulary():
    logits, labels, kept = problem()
    stats, full = support_stats(logits, labels, support_of(kept)), erc.reference.token_stats(logits, labels)
    for name, expected in (("logprob_full", full.logprob), ("entropy", full.entropy), ("logsumexp", full.logsumexp)):
        assert torch.equal(getattr(stats, name), expected), name
    p = logits.softmax(-1)
    mass = torch.stack([p[row, ids or slice(None)].sum() for row, ids in enumerate(kept)])
    torch.testing.assert_close(kept_mass(stats), mass, rtol=1e-10, atol=0)
    torch.testing.assert_close(stats.logprob, stats.logprob_full - mass.log(), rtol=1e-10, atol=1e-12)


def test_an_uncut_row_and_a_row_of_all_tokens_equal_no_support_bit_for_bit():
    logits, labels, _ = problem()
    logits.requires_grad_()
    plain = erc.reference.token_stats(logits, labels).logprob
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    for kept in ([[]] * N, [list(range(V))] * N):
        stats = support_stats(logits, labels, support_of(kept))
        assert torch.equal(stats.logprob, plain) and (kept_mass(stats) == 1).all()
        (gradient,) = torch.autograd.grad(stats.logprob.sum(), logits)
        assert torch.equal(gradient, expected)


def test_a_support_of_one_token_is_certain():
    logits, labels, _ = problem()
    logits.requires_grad_()
    stats = support_stats(logits, labels, support_of([[label] for label in labels.tolist()]))
    assert (stats.logprob == 0).all()
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), logits)
    assert not gradient.any()


def test_forbidden_tokens_inside_and_outside_the_support():
    logits = torch.tensor([[0.0, -math.inf, 1.0, 2.0], [-math.inf, 1.0, -math.inf, 0.0], [1.0, -math.inf, 0.0, 2.0]])
    labels = torch.tensor([2, 1, 1])
    stats = support_stats(logits, labels, support_of([[1, 2, 3], [0, 1], [1]]))
    torch.testing.assert_close(stats.logprob[0], torch.tensor([1.0, 2.0]).log_softmax(-1)[0])
    assert stats.logprob[1] == 0, "the other kept token is forbidden"
    assert stats.logprob[2].isnan(), "nothing kept is possible: no distribution"


def test_ignored_rows_are_not_read():
    logits, labels, kept = problem()
    logits[1] = math.nan
    labels[1] = -100
    logits.requires_grad_()
    stats = support_stats(logits, labels, support_of(kept))
    assert all(stat[1] == 0 and stat.isfinite().all() for stat in stats)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), logits)
    assert not gradient[1].any() and gradient.isfinite().all()


def test_every_form_reads_the_same_support():
    generator = torch.Generator().manual_seed(1)
    _, _, kept = problem()
    kept[2] = [0, V - 1]
    mask = torch.zeros(N, V, dtype=torch.bool)
    shuffled = [[row[i] for i in torch.randperm(len(row), generator=generator)] for row in kept]
    ids = torch.full((N, V + 3), -7)
    for row, columns in enumerate(shuffled):
        mask[row, columns] = True
        ids[row, torch.randperm(V + 3, generator=generator)[: len(columns)]] = torch.tensor(columns)
    flat, counts = [i for row in shuffled for i in row], [len(row) for row in kept]
    offsets = [0, *torch.tensor(counts).cumsum(0).tolist()]
    by_row = [SamplingSupport.from_csr(row, [0, len(row)]) for row in shuffled]
    forms = {
        "vLLM": SamplingSupport.from_csr(torch.tensor(flat, dtype=torch.int32), torch.tensor(offsets)),
        "prime-rl": SamplingSupport.from_counts(torch.tensor(flat), torch.tensor(counts, dtype=torch.int32)),
        "fixed width": SamplingSupport.from_ids(ids, padding=-7),
        "dense": SamplingSupport.from_mask(mask),
        "dense, two dimensions": SamplingSupport.from_mask(mask[None]),
        "one after the other": SamplingSupport.cat(by_row),
    }
    for name, support in forms.items():
        assert support.rows == N and torch.equal(support.to_mask(V), mask), name
    assert forms["vLLM"].token_ids.tolist() == [i for row in kept for i in row]


def test_the_sampled_token_may_come_first_and_once_more():
    ids = torch.tensor([[4, 9, 4, 1], [4, 9, 2, 1], [4, -1, -1, -1]])
    support = SamplingSupport.from_ids(ids, sampled_first=True)
    assert [row.nonzero().flatten().tolist() for row in support.to_mask(10)] == [[1, 4, 9], [1, 2, 4, 9], [4]]
    with pytest.raises(ValueError, match=r"rise strictly within a row .* got 4, 4 in row 0"):
        SamplingSupport.from_ids(ids)


def test_the_supports_of_generated_tokens_are_spread_over_positions():
    tokens = torch.tensor([[1, 2, 3, 4, 0], [5, 6, 7, 8, 9]])
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = erc.shifted_labels(tokens, torch.tensor([2, 3]), attention_mask=attention)
    engine = SamplingSupport.cat([support_of([[3, 5], [4]]), support_of([[8], [2, 7, 9]])])
    spread = engine.spread(labels != -100)
    kept = [[], [3, 5], [4], [], [], [], [], [8], [2, 7, 9], []]
    assert torch.equal(spread.to_mask(10), support_of(kept).to_mask(10))
    stats = support_stats(torch.randn(2, 5, 10, dtype=torch.float64), labels, spread)
    assert stats.logprob.shape == (2, 5) and stats.logprob[0, 2] == 0 and stats.logprob[0, 1] < 0
    nothing = SamplingSupport.from_counts([], [])
    assert nothing.spread(torch.zeros(4, dtype=torch.bool)).offsets.tolist() == [0] * 5
    with pytest.raises(ValueError, match="once per row of the support, 4, got 3"):
        engine.spread(torch.tensor([True, True, True]))


def test_replaying_the_support_removes_the_bias_of_the_kept_mass():
    """Rollouts of top-p 0.9: the ratio of an unchanged policy is 1 over the support, and the kept mass without."""
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(400, 50, generator=generator, dtype=torch.float64)
    p, order = logits.softmax(-1).sort(-1, descending=True)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < 0.9)
    cut = torch.where(kept, logits, -math.inf)
    labels = torch.multinomial(cut.softmax(-1), 1, generator=generator).squeeze(-1)
    rollout_logprob = cut.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    stats = support_stats(logits, labels, SamplingSupport.from_mask(kept))
    torch.testing.assert_close((stats.logprob - rollout_logprob).exp(), torch.ones(400, dtype=torch.float64))
    biased = (stats.logprob_full - rollout_logprob).exp()
    torch.testing.assert_close(biased, kept_mass(stats))
    assert biased.min() >= 0.9 and biased.mean() < 0.95


@pytest.mark.parametrize("over", ["full", "support"])
def test_each_term_of_a_loss_takes_its_own_log_prob(over):
    """Ratio and rollout weight over the kept tokens, gate and bonus over the full vocabulary, KL and NLL as said."""
    logits, labels, kept = problem()
    logits.requires_grad_()
    generator = torch.Generator().manual_seed(2)
    noise = 0.2 * torch.randn(4, N, generator=generator, dtype=torch.float64)
    cut, full = by_hand(logits, labels, kept), by_hand(logits, labels, [[]] * N)
    compared = full if over == "full" else cut
    p = logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    given = {
        "old_logprob": cut.detach() + noise[0],
        "rollout_logprob": cut.detach() + noise[0] + noise[1],
        "ref_logprob": compared.detach() + noise[2],
        "old_entropy": entropy.detach() * (1 + 0.5 * noise[3]),
        "advantages": torch.linspace(-1, 1.2, N, dtype=torch.float64),
        "nll_mask": torch.tensor([1.0, 0, 1, 0, 1, 1, 0], dtype=torch.float64),
    }
    objective = erc.Objective(
        erc.PPOClip(0.1, 0.1),
        erc.EntropyRatioClip(),
        erc.KLPenalty("k3", 0.3, over=over),
        entropy_coef=0.1,
        rollout_correction=erc.RolloutCorrection("mask"),
        nll_coef=0.2,
        nll_over=over,
    )
    r, advantage = (cut - given["old_logprob"]).exp(), given["advantages"]
    policy = -torch.minimum(r * advantage, r.clamp(0.9, 1.1) * advantage)
    policy = policy * (given["old_logprob"] - given["rollout_logprob"]).exp()
    rho = entropy.detach() / given["old_entropy"]
    inside = (rho > 0.95) & (rho < 1.05)
    assert inside.any() and not inside.all()
    policy = torch.where(inside, policy, policy.detach())
    x = given["ref_logprob"] - compared
    k3 = x.expm1() - x
    expected = (policy + 0.3 * k3).mean() - 0.1 * entropy.mean()
    expected = expected - 0.2 * (compared * given["nll_mask"]).sum() / given["nll_mask"].sum()
    out = erc.reference.policy_loss(logits, labels, support=support_of(kept), objective=objective, **given)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(expected, logits)
    scale = exact.abs().max()
    assert (gradient - exact).abs().max() <= 1e-9 * scale
    assert all((wrong - exact).abs().max() > 1e-9 * scale for wrong in gradients_that_must_fail(gradient))
    torch.testing.assert_close(out.logprob, cut.detach())
    torch.testing.assert_close(out.metrics["kl"], k3.mean().detach())
    torch.testing.assert_close(out.metrics["kept_mass"], (full - cut).exp().mean().detach())
    mismatch = given["old_logprob"] - given["rollout_logprob"]
    torch.testing.assert_close(out.metrics["mismatch_kl"], (mismatch.expm1() - mismatch).mean())
    other = erc.KLPenalty("k3", 0.3, over="full" if over == "support" else "support")
    swapped, same = (
        erc.reference.policy_loss(logits, labels, support=support_of(kept), objective=erc.Objective(kl=kl), **given)
        for kl in (other, objective.kl)
    )
    assert abs(swapped.loss - same.loss) > 1e-3


def test_a_loss_over_uncut_rows_is_the_loss_without_a_support():
    logits, labels, _ = problem()
    logits.requires_grad_()
    arguments = {"old_logprob": torch.full((N,), -2.0).double(), "advantages": torch.linspace(-1, 1, N).double()}
    entropy = erc.reference.token_stats(logits.detach()).entropy
    arguments |= {"old_entropy": 1.02 * entropy, "mask": torch.tensor([1, 1, 0, 1, 1, 1, 1])}
    plain = erc.reference.policy_loss(logits, labels, **arguments)
    tested = erc.reference.policy_loss(logits, labels, support=support_of([[]] * N), **arguments)
    assert torch.equal(plain.loss, tested.loss) and torch.equal(plain.logprob, tested.logprob)
    gradients = [torch.autograd.grad(out.loss, logits)[0] for out in (plain, tested)]
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_get_float32_statistics_rounded_once(dtype):
    logits, labels, kept = problem()
    narrow = logits.to(dtype)
    stats, exact = (
        support_stats(narrow, labels, support_of(kept)),
        support_stats(narrow.double(), labels, support_of(kept)),
    )
    for tested, expected in zip(stats, exact, strict=True):
        assert tested.dtype == torch.float32 and torch.equal(tested, expected.float())


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: SamplingSupport(torch.tensor([3, 1]), torch.tensor([0, 2])),
            ValueError,
            "from_csr sorts.*3, 1 in row 0",
        ),
        (
            lambda: SamplingSupport(torch.tensor([3, 3]), torch.tensor([0, 2])),
            ValueError,
            "rise strictly.*3, 3 in row 0",
        ),
        (lambda: SamplingSupport(torch.tensor([3, -1]), torch.tensor([0, 2])), ValueError, "padding of a row"),
        (lambda: SamplingSupport(torch.tensor([-2]), torch.tensor([0, 1])), ValueError, "-1 for padding, got -2"),
        (lambda: SamplingSupport(torch.tensor([3]), torch.tensor([0, 2])), ValueError, "offsets must rise from 0"),
        (lambda: SamplingSupport(torch.tensor([3]), torch.tensor([1, 1])), ValueError, "offsets must rise from 0"),
        (
            lambda: SamplingSupport(torch.tensor([3.0]), torch.tensor([0, 1])),
            TypeError,
            "token_ids must be a 1-D int32",
        ),
        (lambda: SamplingSupport([3], torch.tensor([0, 1])), TypeError, "token_ids must be a 1-D int32"),
        (lambda: SamplingSupport.from_csr([5, 5], [0, 2]), ValueError, "rise strictly.*5, 5 in row 0"),
        (lambda: SamplingSupport.from_counts([1], [2]), ValueError, "offsets must rise"),
        (lambda: SamplingSupport.from_ids(torch.zeros(2, 3)), TypeError, "ids must be"),
        (lambda: SamplingSupport.from_mask(torch.ones(2, 3)), TypeError, "mask must be a bool tensor"),
        (lambda: SamplingSupport.from_mask(torch.zeros(2, 3, dtype=torch.bool)), ValueError, "row 0 keeps none"),
        (lambda: SamplingSupport.cat([]), ValueError, "parts"),
        (lambda: support_of([[9]]).to_mask(9), IndexError, "below the vocabulary's 9, got 9"),
        (lambda: support_of([[1]]).spread(torch.ones(1)), TypeError, "active must be a bool tensor"),
    ],
)
def test_bad_supports_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_label_outside_its_support_is_named():
    logits, labels, kept = problem()
    labels[1] = next(column for column in range(V) if column not in kept[1])
    with pytest.raises(IndexError, match=f"that of row 1 lacks {int(labels[1])}"):
        support_stats(logits, labels, support_of(kept))
    with pytest.raises(ValueError, match="one row per row of logits, 7, got 6"):
        support_stats(logits, labels, support_of(kept[:-1]))


def test_the_examples_run():
    assert doctest.testmod(sys.modules["erc.support"]).failed == 0
