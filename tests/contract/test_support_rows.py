"""`support=` on every backend against the float64 definition: values, gradients, bits, memory, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import erc
from erc import SamplingSupport
from tests.backends import INTERPRETED
from tests.oracle import assert_entropy, assert_gradient_and_mutations, assert_logprob

# Triton's interpreter takes seconds for each: it gets what differs most.
DTYPES = [torch.bfloat16, torch.float64] + ([] if INTERPRETED else [torch.float32, torch.float16])
SCALINGS = [{"temperature": 1.3, "softcap": 30.0, "logit_scale": 1.2}]
SCALINGS += [] if INTERPRETED else [{}, {"temperature": 0.7}]
V = 67


def problem(dtype: torch.dtype = torch.float32, vocab_size: int = V, seed: int = 0):
    """Rows whose label is the largest kept token, and another; one not cut, ignored, certain, of everything, padded."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(8, vocab_size, generator=generator)).to(dtype)
    sizes = (5, vocab_size // 2, 0, 4, 1, vocab_size, 9, 2)
    kept = [torch.randperm(vocab_size, generator=generator)[:size] for size in sizes]
    labels = torch.stack([row[0] if len(row) else torch.tensor(1) for row in kept])
    labels[0] = kept[0][logits[0, kept[0]].argmax()]  # where 1 - p cancels
    labels[3] = -100
    ids = torch.full((8, vocab_size + 2), -1)
    for row, columns in enumerate(kept):
        ids[row, torch.randperm(vocab_size + 2, generator=generator)[: len(columns)]] = columns
    return logits, labels, SamplingSupport.from_ids(ids), kept


def unpadded(kept: list[Tensor]) -> SamplingSupport:
    return SamplingSupport.from_counts(torch.cat(kept), torch.tensor([len(row) for row in kept]))


def compare(logits: Tensor, labels: Tensor, support: SamplingSupport, **scaling):
    """Every statistic, and the gradient of each alone and of all together, with mutations."""
    tested, exact_logits = logits.detach().clone().requires_grad_(), logits.detach().double().requires_grad_()
    stats = erc.token_stats(tested, labels, support=support, **scaling)
    exact = erc.reference.token_stats(exact_logits, labels, support=support, **scaling)
    softcap = scaling.get("softcap")
    x_max = logits.double().abs().amax(-1) * scaling.get("logit_scale", 1.0) / scaling.get("temperature", 1.0)
    for name in ("logprob", "logprob_full", "logsumexp"):
        assert_logprob(getattr(stats, name).detach(), getattr(exact, name).detach(), x_max)
    assert_entropy(stats.entropy.detach(), exact.entropy.detach(), softcap)
    upstream = torch.randn(4, *labels.shape, generator=torch.Generator().manual_seed(5)).to(stats.entropy.dtype)
    for chosen in ((0,), (3,), (1, 2), (0, 1, 2, 3)):
        gradient, expected = (
            torch.autograd.grad(
                [given[i] for i in chosen], leaf, [upstream[i].to(given[0].dtype) for i in chosen], retain_graph=True
            )[0]
            for given, leaf in ((stats, tested), (exact, exact_logits))
        )
        assert gradient.dtype == logits.dtype
        assert_gradient_and_mutations(gradient, expected, softcap)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_and_gradients_meet_the_contract(dtype, scaling, kernels):
    logits, labels, support, kept = problem(dtype)
    compare(logits, labels, support, **scaling)
    compare(logits, labels, unpadded(kept), **scaling)


def test_rows_that_are_almost_certain_keep_their_relative_accuracy(kernels):
    """The label 16 above the rest: 1 - p is 1e-6, which the difference of two float32 numbers would lose."""
    logits, labels, support, _ = problem()
    active = labels != -100
    logits[active, labels[active]] += 16
    compare(logits, labels, support)
    gradient, expected = logits.clone().requires_grad_(), logits.double().requires_grad_()
    for leaf, stats in ((gradient, erc.token_stats), (expected, erc.reference.token_stats)):
        stats(leaf, labels, support=support).logprob.sum().backward()
    torch.testing.assert_close(gradient.grad.double(), expected.grad, rtol=3e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_are_the_float32_gradient_rounded_once(dtype, kernels):
    logits, labels, support, _ = problem(dtype)
    narrow, wide = logits.clone().requires_grad_(), logits.float().requires_grad_()
    for leaf in (narrow, wide):
        stats = erc.token_stats(leaf, labels, support=support)
        (stats.logprob * torch.linspace(-1, 1, 8) + stats.entropy - 0.3 * stats.logprob_full).sum().backward()
    if kernels == "triton" and dtype == torch.bfloat16:  # its interpreter cuts bfloat16 off
        torch.testing.assert_close(narrow.grad.float(), wide.grad, rtol=2**-7, atol=0)
    else:
        assert torch.equal(narrow.grad, wide.grad.to(dtype))


def test_columns_outside_the_support_get_an_exact_zero(kernels):
    logits, labels, support, _ = problem()
    logits.requires_grad_()
    erc.token_stats(logits, labels, support=support).logprob.sum().backward()
    outside = ~support.to_mask(V) | (labels == -100)[:, None]
    assert outside.any() and not logits.grad[outside].any() and logits.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_uncut_rows_and_rows_of_everything_equal_no_support_bit_for_bit(dtype, kernels):
    logits, labels, _, _ = problem(dtype)
    logits.requires_grad_()
    padding, everything = torch.full((8, 3), -1), torch.arange(V).expand(8, V)
    plain = erc.token_stats(logits, labels)
    assert plain.logprob_full is plain.logprob
    upstream = [plain.entropy.new_tensor(range(1, 9)) * factor for factor in (0.3, -0.2, 0.5)]
    (expected,) = torch.autograd.grad(list(plain[:3]), logits, upstream)
    for support in (
        SamplingSupport.from_ids(padding),
        SamplingSupport.from_ids(everything),
        unpadded([labels[:0]] * 8),
    ):
        stats = erc.token_stats(logits, labels, support=support)
        for tested, value in zip(stats, plain, strict=True):
            assert torch.equal(tested, value)
        (gradient,) = torch.autograd.grad(list(stats[:3]), logits, upstream)
        assert torch.equal(gradient, expected) and gradient.any()


def test_two_runs_agree_bit_for_bit(kernels):
    results = []
    for _ in range(2):
        logits, labels, support, _ = problem()
        stats = erc.token_stats(logits.requires_grad_(), labels, support=support)
        (stats.logprob + stats.entropy).sum().backward()
        results.append((*(stat.detach() for stat in stats), logits.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_ignored_rows_are_not_read(kernels):
    logits, labels, support, _ = problem()
    logits[3] = math.nan
    stats = erc.token_stats(logits.requires_grad_(), labels, support=support)
    assert all(stat[3] == 0 and stat.isfinite().all() for stat in stats)
    sum(stat.sum() for stat in stats).backward()
    assert not logits.grad[3].any() and logits.grad.isfinite().all()


@pytest.mark.parametrize("spoiled", ["kept", "dropped", "all kept are forbidden"])
def test_a_row_without_a_distribution_is_nan_and_leaves_the_others_alone(spoiled, kernels):
    logits, labels, support, kept = problem()
    clean = erc.token_stats(logits, labels, support=support)
    dropped = next(column for column in range(V) if column not in kept[1].tolist())
    if spoiled == "all kept are forbidden":
        logits[1, kept[1]] = -math.inf
    else:
        logits[1, int(kept[1][3]) if spoiled == "kept" else dropped] = math.nan
    stats = erc.token_stats(logits.requires_grad_(), labels, support=support)
    assert stats.logprob[1].isnan()
    others = torch.arange(8) != 1
    for tested, expected in zip(stats, clean, strict=True):
        assert torch.equal(tested[others].detach(), expected[others])
    stats.logprob.sum().backward()
    assert logits.grad[1].isnan().any() and logits.grad[others].isfinite().all()


def test_forbidden_tokens_in_the_support(kernels):
    """-inf on a kept token that is not the label: it weighs nothing. On the label: -inf, as without a support."""
    logits, labels, support, kept = problem()
    logits[1, kept[1][1:]] = -math.inf
    logits[6, labels[6]] = -math.inf
    exact = erc.reference.token_stats(logits.double().requires_grad_(), labels, support=support)
    stats = erc.token_stats(logits.requires_grad_(), labels, support=support)
    assert stats.logprob[1] == 0 and stats.logprob[6] == -math.inf == exact.logprob[6]
    stats.logprob[:6].sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[1].any()


def test_inplace_backward_reuses_the_memory_of_the_logits(kernels):
    if kernels == "torch":
        pytest.skip("the torch backend has nothing to reuse")
    source, labels, support, _ = problem()
    source.requires_grad_()
    (expected,) = torch.autograd.grad(erc.token_stats(source * 2, labels, support=support).logprob.sum(), source)
    logits = source * 2
    version = logits._version
    stats = erc.token_stats(logits, labels, support=support, inplace_backward=True)
    (gradient,) = torch.autograd.grad(stats.logprob.sum(), source, retain_graph=True)
    assert torch.equal(gradient, expected) and logits._version > version
    assert torch.equal(logits.detach() * 2, expected)
    with pytest.raises(RuntimeError, match="the logits are gone"):
        stats.logprob.sum().backward()


def test_no_second_derivative_and_no_rows(kernels):
    logits, labels, support, _ = problem()
    logits.requires_grad_()
    if kernels != "torch":
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(
                erc.token_stats(logits, labels, support=support).logprob.sum(), logits, create_graph=True
            )
    nothing = erc.token_stats(
        torch.zeros(0, V, requires_grad=True), labels[:0], support=SamplingSupport.from_counts([], [])
    )
    assert all(stat.shape == (0,) for stat in nothing)
    nothing.logprob.sum().backward()


@settings(max_examples=3 if INTERPRETED else 25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(1,), (7,), (2, 3), (2, 2, 3)]),
    vocab_size=st.sampled_from([2, 33, 700]),
    sliced=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    padded=st.booleans(),
)
def test_any_shape_stride_and_support_gives_the_oracles_answer(seed, dtype, shape, vocab_size, sliced, spread, padded):
    generator = torch.Generator().manual_seed(seed)
    held = (*shape[:-1], shape[-1] + 1) if sliced else shape
    logits = (spread * torch.randn(*held, vocab_size, generator=generator)).to(dtype)
    logits = logits[..., :-1, :] if sliced else logits
    labels = torch.randint(vocab_size, shape, generator=generator)
    mask = torch.rand(*shape, vocab_size, generator=generator) < torch.rand(*shape, 1, generator=generator)
    mask = mask.scatter(-1, labels[..., None], True)
    if padded:
        columns = torch.where(mask, torch.arange(vocab_size), -1)
        support = SamplingSupport.from_ids(columns)
    else:
        support = SamplingSupport.from_mask(mask)
    temperature = (0.5 + torch.rand(shape, generator=generator)).double()
    weights = torch.randn(2, *shape, generator=generator)
    tested, exact = logits.detach().requires_grad_(), logits.detach().double().requires_grad_()
    grads = []
    for leaf, function in ((tested, erc.token_stats), (exact, erc.reference.token_stats)):
        stats = function(leaf, labels, support=support, temperature=temperature)
        weighed = stats.logprob.double() * weights[0] + stats.entropy.double() * weights[1]
        grads.append(torch.autograd.grad(weighed.sum(), leaf)[0])
    scale = exact.detach().abs().amax(-1, keepdim=True).clamp(min=1)
    largest = grads[1].abs().amax(-1, keepdim=True)
    half_ulp = 2.0**-7 if INTERPRETED else 2.0**-8  # Triton's interpreter cuts bfloat16 off
    rounding = half_ulp if dtype == torch.bfloat16 else 0.0
    bound = 2e-6 * scale * largest + rounding * 1.00001 * grads[1].abs() + 1e-12
    assert ((grads[0].double() - grads[1]).abs() <= bound).all()


OBJECTIVES = {
    "erc-dapo": {},
    "gspo": {},
    "sapo": {"reduction": "none"},
    "dapo": {"kl": erc.KLPenalty("k3", 0.3), "nll_coef": 0.2},
    "grpo": {"kl": erc.KLPenalty("k2", 0.3, over="support"), "nll_coef": 0.2, "nll_over": "support"},
    "cispo": {"entropy_coef": 0.1, "rollout_correction": erc.RolloutCorrection("mask")},
    "erc-ppo": {"kl": erc.KLPenalty("k3", 0.3, importance_weighted=True), "nll_coef": 0.2, "entropy_coef": 0.1},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_their_gradients_meet_the_definition(name, kernels):
    objective = erc.objective(name, **OBJECTIVES[name])
    logits, labels, support, _ = problem()
    logits, labels = logits.view(2, 4, V), labels.view(2, 4)
    generator = torch.Generator().manual_seed(1)
    old = erc.reference.token_stats(logits.double(), labels, support=support, temperature=0.9)
    noise = 0.3 * torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    given = {
        "old_logprob": old.logprob + noise[0],
        "old_entropy": old.entropy * (1 + 0.2 * noise[1]),
        "rollout_logprob": old.logprob + noise[0] + noise[2],
        "ref_logprob": (old.logprob if objective.kl is None or not objective.kl_over_full else old.logprob_full)
        + noise[3],
        "nll_mask": torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0]]),
        "advantages": torch.tensor([[1.0, -1, 0.5, 2], [-0.5, 1, -2, 1]], dtype=torch.float64),
        "mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]),
    }
    leaves = logits.clone().requires_grad_(), logits.double().requires_grad_()
    single = {key: value.float() if value.is_floating_point() else value for key, value in given.items()}
    out = erc.policy_loss(leaves[0], labels, objective=objective, support=support, temperature=0.9, **single)
    exact = erc.reference.policy_loss(leaves[1], labels, objective=objective, support=support, temperature=0.9, **given)
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=2e-5, atol=2e-6)
    for field in ("logprob", "logprob_full", "entropy", "per_token_loss"):
        torch.testing.assert_close(getattr(out, field).double(), getattr(exact, field), rtol=2e-5, atol=2e-6)
        assert not getattr(out, field).requires_grad
    assert out.metrics.keys() == exact.metrics.keys()
    for metric, value in out.metrics.items():
        torch.testing.assert_close(value, exact.metrics[metric], rtol=2e-5, atol=2e-6, equal_nan=True, msg=metric)
    mass = (exact.logprob_full - exact.logprob).exp()[(labels != -100) & (given["mask"] != 0)].mean()
    torch.testing.assert_close(exact.metrics["kept_mass"], mass, rtol=1e-6, atol=0)
    for result in (out, exact):
        result.loss.sum().backward()
    relative = 4e-5 if name == "erc-ppo" else 1e-5  # a KL alone, of float32 log-probs that all but agree
    assert_gradient_and_mutations(leaves[0].grad, leaves[1].grad, relative=relative)
    path = "two-phase" if name == "gspo" else "fused"
    assert erc.explain(leaves[0], objective, support=True).path == ("reference" if kernels == "torch" else path)


EVERY_TERM = erc.objective("erc-dapo", kl=erc.KLPenalty("k3", 0.3), nll_coef=0.2, entropy_coef=0.1)
TOKENS = {
    "old_logprob": torch.full((8,), -2.0),
    "ref_logprob": torch.full((8,), -2.5),
    "old_entropy": torch.tensor([2.0, 2, 2, 2, 0.1, 3, 2, 0.5]),
    "nll_mask": torch.ones(8),
    "advantages": torch.linspace(-1, 1.2, 8),
    "grad_scale": 1.0,
    "objective": EVERY_TERM,
}


def loss_and_gradient(logits: Tensor, labels: Tensor, inplace: bool = False, **more) -> list[Tensor]:
    """Loss, what is of each token, and the gradient, which lies over the logits where `inplace` says so."""
    leaf = logits.detach().clone().requires_grad_()
    source = leaf * 1 if inplace else leaf
    out = erc.policy_loss(source, labels, inplace_backward=inplace, **(TOKENS | more))
    out.loss.backward()
    assert not inplace or torch.equal(source.detach(), leaf.grad)
    return [out.loss.detach(), out.per_token_loss, out.logprob, out.entropy, out.logprob_full, leaf.grad]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loss_over_uncut_rows_has_the_bits_of_none(dtype, kernels):
    logits, labels, _, _ = problem(dtype)
    plain = loss_and_gradient(logits, labels)
    for ids in (torch.full((8, 3), -1), torch.arange(V).expand(8, V)):
        kept = loss_and_gradient(logits, labels, support=SamplingSupport.from_ids(ids))
        assert all(torch.equal(*pair) for pair in zip(kept, plain, strict=True)) and plain[-1].any()


@pytest.mark.parametrize("objective", [EVERY_TERM, erc.objective("dapo")])
def test_a_loss_over_a_support_in_the_memory_of_the_logits(objective, kernels):
    if kernels == "torch":
        pytest.skip("the torch backend has nothing to reuse")
    logits, labels, support, _ = problem()
    own, over = (
        loss_and_gradient(logits, labels, inplace, support=support, objective=objective) for inplace in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(own, over, strict=True)) and own[-1].any()
    with torch.no_grad():
        alone = erc.policy_loss(logits, labels, support=support, **(TOKENS | {"objective": objective}))
    assert torch.equal(alone.loss, own[0]) and torch.equal(alone.logprob_full, own[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_gradient_over_a_support_is_rounded_once(dtype, kernels):
    logits, labels, support, _ = problem(dtype)
    narrow, wide = (loss_and_gradient(given, labels, support=support)[-1] for given in (logits, logits.float()))
    if kernels == "triton" and dtype == torch.bfloat16:  # its interpreter cuts bfloat16 off
        torch.testing.assert_close(narrow.float(), wide, rtol=2**-7, atol=0)
    else:
        assert torch.equal(narrow, wide.to(dtype)) and narrow.any()


@pytest.mark.parametrize("spoiled", ["kept", "dropped", "all kept are forbidden"])
def test_a_loss_of_a_row_without_a_distribution_is_nan_and_leaves_the_others_alone(spoiled, kernels):
    logits, labels, support, kept = problem()
    clean = loss_and_gradient(logits, labels, support=support)
    dropped = next(column for column in range(V) if column not in kept[1].tolist())
    if spoiled == "all kept are forbidden":
        logits[1, kept[1]] = -math.inf
    else:
        logits[1, int(kept[1][3]) if spoiled == "kept" else dropped] = math.nan
    spoilt = loss_and_gradient(logits, labels, support=support)
    others = torch.arange(8) != 1
    assert spoilt[0].isnan() and spoilt[1][1].isnan() and spoilt[2][1].isnan() and spoilt[-1][1].isnan().any()
    for tested, expected in zip(spoilt[1:], clean[1:], strict=True):
        assert torch.equal(tested[others], expected[others])


def test_a_loss_from_log_probs_takes_both(kernels):
    logits, labels, support, _ = problem()
    objective = erc.objective("dapo", kl=erc.KLPenalty("k3", 0.3), nll_coef=0.2)
    given = {
        "objective": objective,
        "old_logprob": torch.full((8,), -2.0),
        "ref_logprob": torch.full((8,), -2.5),
        "nll_mask": torch.ones(8),
        "advantages": torch.linspace(-1, 1, 8),
    }
    mask = (labels != -100).float()
    gradients = []
    for whole in (True, False):
        leaf = logits.clone().requires_grad_()
        if whole:
            loss = erc.policy_loss(leaf, labels, support=support, mask=mask, **given)
        else:
            stats = erc.token_stats(leaf, labels, support=support)
            loss = erc.objective_loss(stats.logprob, stats.entropy, logprob_full=stats.logprob_full, mask=mask, **given)
        loss.loss.backward()
        gradients.append((loss.loss.detach(), loss.metrics["kl"], leaf.grad))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-7)
    assert gradients[0][2].any()
    with pytest.raises(TypeError, match="logprob_full must be a float32 or float64 tensor"):
        erc.objective_loss(stats.logprob, stats.entropy, logprob_full=stats.logprob_full.half(), **given)


def test_what_does_not_fit_is_named(kernels):
    logits, labels, support, kept = problem()
    for function, arguments in (
        (erc.token_stats, {}),
        (erc.policy_loss, {"old_logprob": None, "advantages": torch.ones(8), "objective": "dapo"}),
    ):
        with pytest.raises(ValueError, match="one row per row of logits, 8, got 7"):
            function(logits, labels, support=unpadded(kept[:-1]), **arguments)
        with pytest.raises(TypeError, match=r"support must be an erc\.SamplingSupport or None, got list"):
            function(logits, labels, support=kept, **arguments)
        if kernels not in ("cpu", "torch"):
            continue  # they read no values on the host: see the next test
        wrong = labels.clone()
        wrong[1] = next(column for column in range(V) if column not in kept[1].tolist())
        with pytest.raises(IndexError, match=f"that of row 1 lacks {int(wrong[1])}"):
            function(logits, wrong, support=support, **arguments)
        with pytest.raises(IndexError, match=rf"labels must lie in \[0, {V}\)"):
            function(logits, torch.full_like(labels, V), support=support, **arguments)
        beyond = SamplingSupport.from_ids(torch.stack([labels.clamp(min=0), torch.full((8,), V)], 1))
        with pytest.raises(IndexError, match=f"token_ids must be below the vocabulary's {V}, got {V}"):
            function(logits, labels, support=beyond, **arguments)
    with pytest.raises(ValueError, match="labels must be given with support"):
        erc.token_stats(logits, support=support)


def test_where_no_value_is_read_rows_that_break_a_rule_are_nan(kernels, monkeypatch):
    """As on a GPU: a label outside its support, an id beyond the vocabulary, ids that fall or come twice."""
    if kernels == "cpu":
        pytest.skip("the CPU's kernels read values")
    for module in ("erc.support", "erc.reference", "erc.inputs"):
        monkeypatch.setattr(f"{module}.values_are_readable", lambda _: False)
    logits, labels = torch.randn(6, V, generator=torch.Generator().manual_seed(0)), torch.full((6,), 5)
    rows = [[5, 6], [6, 7], [5, V], [6, 5], [5, 5], [5, -1]]
    support = SamplingSupport(torch.tensor(rows).flatten(), torch.arange(0, 13, 2))
    stats = erc.token_stats(logits.requires_grad_(), labels, support=support)
    assert stats.logprob.isnan().tolist() == [False, True, True, True, True, True]
    stats.logprob.sum().backward()
    broken = [False, True, True, True, True, True]
    assert logits.grad.isnan().any(-1).tolist() == broken
    given = {name: value[:6] if isinstance(value, Tensor) else value for name, value in TOKENS.items()}
    _, token_loss, logprob, *_, gradient = loss_and_gradient(logits, labels, support=support, **given)
    assert token_loss.isnan().tolist() == logprob.isnan().tolist() == gradient.isnan().any(-1).tolist() == broken


def test_compiled_code_gives_the_same(kernels):
    if kernels != "cpu":
        pytest.skip("one backend is enough: the code around the operators is the same")
    logits, labels, support, _ = problem()

    def step(leaf: Tensor) -> Tensor:
        stats = erc.token_stats(leaf, labels, support=support)
        loss = erc.policy_loss(leaf, labels, support=support, **(TOKENS | {"grad_scale": None})).loss
        return (stats.logprob + 0.1 * stats.entropy).sum() + loss

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-8)
