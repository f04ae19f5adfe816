"""policy_loss: every preset against the float64 oracle, reductions, forms of its arguments, its gradient's rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import erc
from tests.oracle import assert_gradient, assert_gradient_and_mutations, peaked_rows

B, T, VOCAB = 4, 6, 2053  # a whole segment of the CPU sweep and a tail


COEFFICIENT_ERROR = 2e-5
"""A loss's coefficient holds differences of float32 log-probs of up to 20 nats, and may be a small difference
itself."""


def make_problem(dtype=torch.float32, seed=0):
    """Rows of all entropies, ratios on both sides of every clip, entropy ratios on both sides of the band."""
    generator = torch.Generator().manual_seed(seed)
    targets = [10.0 ** (-3 + 3.5 * i / (B * T - 1)) for i in range(B * T)]
    logits = peaked_rows(targets, VOCAB, seed).view(B, T, VOCAB).to(dtype)
    labels = torch.where(torch.rand(B, T, generator=generator) < 0.6, logits.argmax(-1), 7)
    labels[1, 2] = -100
    exact = erc.reference.token_stats(logits.double(), labels)
    arguments = {
        "old_logprob": (exact.logprob + 0.3 * torch.randn(B, T, generator=generator)).float(),
        "old_entropy": (exact.entropy * (1 + 0.1 * torch.randn(B, T, generator=generator))).float(),
        "ref_logprob": (exact.logprob + 0.3 * torch.randn(B, T, generator=generator)).float(),
        "old_divergence": 0.2 * torch.rand(B, T, generator=generator),
        "advantages": torch.randn(B, generator=generator),
        "mask": (torch.rand(B, T, generator=generator) < 0.8).float() * (0.5 + torch.rand(B, T, generator=generator)),
    }
    return logits, labels, arguments


def run(logits, labels, arguments, function=erc.policy_loss, upstream=None, **settings):
    torch.manual_seed(0)  # of the choice that Clip-Cov draws
    logits = logits.detach().clone().requires_grad_()
    out = function(logits, labels, **arguments, **settings)
    out.loss.backward(upstream)
    return out, logits.grad


def run_oracle(logits, labels, arguments, upstream=None, **settings):
    doubles = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()
    }
    upstream = None if upstream is None else upstream.double()
    return run(logits.double(), labels, doubles, erc.reference.policy_loss, upstream, **settings)


def assert_same(tested, exact):
    """Loss, per-token loss and metrics to float32 accuracy."""
    torch.testing.assert_close(tested.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tested.per_token_loss.double(), exact.per_token_loss, rtol=1e-5, atol=1e-5)
    assert tested.metrics.keys() == exact.metrics.keys()
    for name, value in tested.metrics.items():
        torch.testing.assert_close(value.double(), exact.metrics[name].double(), rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("name", erc.objectives())
def test_every_preset_matches_the_oracle(name, kernels):
    logits, labels, arguments = make_problem()
    if erc.objective(name).nll_coef:
        arguments["nll_mask"] = (arguments["advantages"] > 0).float()[:, None].expand(labels.shape)
    (tested, gradient), (exact, expected) = (f(logits, labels, arguments, objective=name) for f in (run, run_oracle))
    assert_same(tested, exact)
    assert_gradient_and_mutations(gradient, expected, relative=COEFFICIENT_ERROR)


@pytest.mark.parametrize("name", ["erc-dapo", "erc-gspo"])
@pytest.mark.parametrize("normalizer", [None, 17.0, torch.tensor(17.0)], ids=["count", "number", "tensor"])
@pytest.mark.parametrize(
    "reduction",
    ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "none"],
)
def test_every_reduction_and_arbitrary_upstream_gradients(name, reduction, normalizer):
    logits, labels, arguments = make_problem()
    objective = erc.objective(name, reduction=reduction, entropy_coef=0.02)
    upstream = (
        torch.randn(B, T, generator=torch.Generator().manual_seed(3)) if reduction == "none" else torch.tensor(-2.5)
    )
    settings = {"objective": objective, "normalizer": normalizer, "upstream": upstream}
    if normalizer is not None and reduction != "none":
        with pytest.raises(ValueError, match="entropy_normalizer must be given"):
            run(logits, labels, arguments, **settings)
        settings["entropy_normalizer"] = normalizer
    (tested, gradient), (exact, expected) = (f(logits, labels, arguments, **settings) for f in (run, run_oracle))
    assert tested.loss.shape == ((B, T) if reduction == "none" else ())
    assert_same(tested, exact)
    assert_gradient_and_mutations(gradient, expected)


def test_float16_is_fused_with_grad_scale_and_the_backward_undoes_it():
    logits, labels, arguments = make_problem(torch.float16)
    logits.requires_grad_()
    assert erc.explain(logits).path == "two-phase"
    assert erc.explain(logits, grad_scale=1024.0).path == "fused"
    leaf = logits.detach().requires_grad_()
    out = erc.policy_loss(leaf, labels, grad_scale=1024.0, **arguments)
    (1024.0 * out.loss).backward()  # as GradScaler does
    exact, expected = run_oracle(logits.detach(), labels, arguments)
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    assert_gradient(leaf.grad, expected * 1024)


@pytest.mark.parametrize(
    "correction",
    [erc.RolloutCorrection(), erc.RolloutCorrection("mask", 0.8, 1.2), erc.RolloutCorrection(level="sequence")],
    ids=["truncate", "mask", "sequence"],
)
def test_rollout_correction_and_nll(correction):
    logits, labels, arguments = make_problem()
    arguments["rollout_logprob"] = arguments["old_logprob"] + 0.3 * torch.randn(
        B, T, generator=torch.Generator().manual_seed(9)
    )
    arguments["nll_mask"] = torch.tensor([1.0, 0, 0, 1]).view(B, 1).expand(B, T)
    settings = {"objective": erc.objective("erc-dapo", rollout_correction=correction, nll_coef=0.1)}
    (tested, gradient), (exact, expected) = (f(logits, labels, arguments, **settings) for f in (run, run_oracle))
    assert_same(tested, exact)
    assert_gradient_and_mutations(gradient, expected)


def test_packed_rows_equal_padded_ones():
    logits, labels, arguments = make_problem()
    padded, expected = run(logits, labels, arguments, objective="grpo")
    packed_arguments = {k: v if k == "advantages" else v.reshape(-1) for k, v in arguments.items()}
    offsets = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    packed, gradient = run(
        logits.view(-1, VOCAB), labels.view(-1), packed_arguments, objective="grpo", cu_seqlens=offsets
    )
    torch.testing.assert_close(packed.loss, padded.loss)
    torch.testing.assert_close(gradient.view_as(expected), expected)


def test_advantages_broadcast_over_a_sequence():
    logits, labels, arguments = make_problem()
    advantages = arguments.pop("advantages")
    losses = {
        run(logits, labels, {**arguments, "advantages": form})[0].loss.item()
        for form in (advantages, advantages[:, None], advantages[:, None].expand(B, T))
    }
    assert len(losses) == 1


def test_on_policy_without_old_logprob_is_the_plain_policy_gradient():
    logits, labels, arguments = make_problem()
    arguments = {"advantages": arguments["advantages"], "old_logprob": None}
    (tested, gradient), (exact, expected) = (f(logits, labels, arguments, objective="dapo") for f in (run, run_oracle))
    assert_same(tested, exact)
    assert_gradient_and_mutations(gradient, expected)
    reinforce = run(logits, labels, arguments, objective="reinforce")[1]
    torch.testing.assert_close(gradient, reinforce, rtol=1e-5, atol=1e-9)


def test_an_unchanged_policy_has_ratios_of_exactly_one():
    logits, labels, arguments = make_problem(torch.bfloat16)
    old = erc.token_stats(logits, labels)
    arguments |= {"old_logprob": old.logprob, "old_entropy": old.entropy}
    out, _ = run(logits, labels, arguments)
    assert out.metrics["ratio_max"] == out.metrics["entropy_ratio_min"] == out.metrics["entropy_ratio_max"] == 1
    assert out.metrics["erc_fraction"] == out.metrics["clip_fraction"] == out.metrics["approx_kl"] == 0


def test_an_advantage_of_zero_is_never_clipped():
    logits, labels, arguments = make_problem()
    arguments |= {"advantages": torch.zeros(B), "old_logprob": arguments["old_logprob"] - 3}
    for name in ("ppo", "gppo", "cispo", "dppo-tv"):
        assert run(logits, labels, arguments, objective=name)[0].metrics["clip_fraction"] == 0


def test_no_graph_runs_through_the_entropy_unless_the_objective_has_an_entropy_term():
    logits, labels, arguments = make_problem()
    out, _ = run(logits, labels, arguments)
    assert not out.entropy.requires_grad and not out.logprob.requires_grad and not out.per_token_loss.requires_grad
    arguments["advantages"] = torch.zeros(B)
    assert not run(logits, labels, arguments)[1].any()
    assert run(logits, labels, arguments, objective=erc.objective("erc-dapo", entropy_coef=0.1))[1].any()


def test_without_grad_no_gradient_is_computed_and_the_numbers_are_the_same():
    logits, labels, arguments = make_problem()
    with_grad, _ = run(logits, labels, arguments)
    plain = erc.policy_loss(logits, labels, **arguments)
    with torch.no_grad():
        silent = erc.policy_loss(logits.clone().requires_grad_(), labels, **arguments)
    assert not plain.loss.requires_grad and not silent.loss.requires_grad
    assert torch.equal(plain.loss, with_grad.loss) and torch.equal(silent.loss, with_grad.loss)


def test_accumulated_micro_batches_equal_one_batch():
    logits, labels, arguments = make_problem()
    count = float((arguments["mask"] * (labels != -100)).sum())
    _, whole = run(logits, labels, arguments)
    leaf = logits.clone().requires_grad_()
    for part in (slice(0, 1), slice(1, B)):
        micro = {k: v[part] for k, v in arguments.items()}
        erc.policy_loss(leaf[part], labels[part], normalizer=count, **micro).loss.backward()
    torch.testing.assert_close(leaf.grad, whole, rtol=1e-5, atol=1e-9)


def test_a_second_backward_raises_and_so_does_double_backward():
    logits, labels, arguments = make_problem()
    leaf = logits.clone().requires_grad_()
    loss = erc.policy_loss(leaf, labels, **arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()
    loss = erc.policy_loss(leaf, labels, **arguments).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_inplace_writes_the_gradient_over_the_logits():
    logits, labels, arguments = make_problem()
    _, expected = run(logits, labels, arguments)
    leaf = logits.clone().requires_grad_()
    inner = leaf * 1.0
    version = inner._version
    out = erc.policy_loss(inner, labels, inplace_backward=True, **arguments)
    assert inner._version > version
    assert torch.equal(inner.detach(), expected)
    out.loss.backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.zeros(B, T, VOCAB, requires_grad=True), "leaf"),
        (lambda: torch.zeros(B, T + 1, VOCAB, requires_grad=True)[:, :-1], "a view of one"),
        (lambda: (torch.zeros(B, 2 * VOCAB, requires_grad=True) * 1).unfold(1, VOCAB, 3)[:, :T], "overlap"),
        (lambda: (torch.zeros(1, T, VOCAB, requires_grad=True) * 1).expand(B, T, VOCAB), "overlap"),
        (lambda: (torch.zeros(B, T, 2 * VOCAB, requires_grad=True) * 1)[..., ::2], "contiguous"),
    ],
)
def test_inplace_refuses_logits_that_it_must_not_overwrite(make, match):
    _, labels, arguments = make_problem()
    with pytest.raises(ValueError, match=match):
        erc.policy_loss(make(), labels, inplace_backward=True, **arguments)


def test_logits_changed_before_the_backward_are_noticed():
    logits, labels, arguments = make_problem()
    inner = logits.clone().requires_grad_() * 1.0
    loss = erc.policy_loss(inner, labels, inplace_backward=True, **arguments).loss
    inner.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    logits, labels, arguments = make_problem()
    _, expected = run(logits, labels, arguments)
    leaf = logits.clone().requires_grad_()
    checkpoint(lambda z: erc.policy_loss(z * 1.0, labels, **arguments).loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


def test_a_slice_of_the_sequence_costs_no_copy_and_gives_the_same_numbers():
    logits, labels, arguments = make_problem()
    wide = torch.cat([logits, torch.zeros(B, 1, VOCAB)], 1).requires_grad_()
    out = erc.policy_loss(wide[:, :-1], labels, **arguments)
    out.loss.backward()
    plain, expected = run(logits, labels, arguments)
    assert torch.equal(out.loss, plain.loss)
    assert torch.equal(wide.grad[:, :-1], expected) and not wide.grad[:, -1].any()


def test_explain_tells_backend_and_path():
    logits = torch.zeros(2, 5, requires_grad=True)
    explained = erc.explain(logits, "erc-dapo", backend="cpu" if erc.backends()["cpu"] == "available" else None)
    if explained.backend == "cpu":
        assert explained.path == "fused" and "one read" in str(explained) and "one write" in str(explained)
    assert erc.explain(logits, "gspo", backend="torch").path == "reference"
    assert "GSPO" in erc.explain(logits, "gspo").path_reason or explained.backend == "torch"


def test_explain_prints_the_plan_of_a_head_that_is_not_there():
    hidden, weight = (torch.empty(n, 3584, dtype=torch.bfloat16, device="meta") for n in (8192, 152_064))
    words = str(erc.explain(hidden.requires_grad_(), weight=weight.requires_grad_()))
    assert "path fused" in words and "plan: 7 chunks of 1,171 rows; 1,019 MiB" in words and "a model of" in words
    assert "plan" not in str(erc.explain(hidden))
    whole = erc.explain(hidden, weight=weight, memory_budget=2**40).plan
    assert whole.rows.chunks(whole.shape) == 1 and "1 chunk of 8,192 rows" in str(whole)
    frozen = erc.explain(hidden.detach(), weight=weight.detach())
    assert "bare products" not in str(frozen), "without a gradient there is one product"


def test_objective_loss_is_the_same_loss_from_logprobs_and_entropies():
    logits, labels, arguments = make_problem(torch.float64)
    arguments = {k: v.double() for k, v in arguments.items()}
    expected = erc.reference.policy_loss(logits, labels, **arguments)
    stats = erc.reference.token_stats(logits, labels)
    mask = arguments.pop("mask") * (labels != -100)
    out = erc.objective_loss(stats.logprob, stats.entropy, mask=mask, **arguments)
    torch.testing.assert_close(out.loss, expected.loss)
    logprob, entropy = stats.logprob.clone().requires_grad_(), stats.entropy.clone().requires_grad_()
    erc.objective_loss(logprob, entropy, mask=mask, **arguments).loss.backward()
    assert logprob.grad.any() and entropy.grad is None
    erc.objective_loss(
        logprob, entropy, mask=mask, objective=erc.objective("erc-dapo", entropy_coef=0.1), **arguments
    ).loss.backward()
    assert entropy.grad.any()
    assert math.isfinite(out.metrics["ratio_max"])
