"""Calls that are right and once raised, and calls that are wrong and are told so by name."""

from __future__ import annotations

import math

import pytest
import torch

import erc


@pytest.mark.parametrize("name", [*erc.objectives(), "masked", "opsm", "corrected"])
@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (0,)])
def test_no_token_at_all(name, shape):
    """Rows [B, 0] are B sequences without a token; a batch may be empty too."""
    special = {
        "masked": erc.objective("dapo", high_entropy=erc.HighEntropyMask(0.2)),
        "opsm": erc.objective("grpo", off_policy_mask=erc.OffPolicySequenceMask(0.1)),
        "corrected": erc.objective("grpo", rollout_correction=erc.RolloutCorrection(level="sequence")),
    }
    objective = special.get(name) or erc.objective(name)
    if objective.needs_sequences and len(shape) == 1:
        return
    logits = torch.zeros(*shape, 7, requires_grad=True)
    rows = dict.fromkeys(
        ("old_logprob", "old_entropy", "rollout_logprob", "old_divergence", "nll_mask"), torch.zeros(shape)
    )
    out = erc.policy_loss(
        logits, torch.zeros(shape, dtype=torch.long), advantages=torch.zeros(shape[:1]), objective=objective, **rows
    )
    out.loss.backward()
    assert out.loss == 0 and out.metrics["tokens"] == 0 and logits.grad.shape == logits.shape


@pytest.mark.parametrize("shape", [(2, 3), (2, 0)])
def test_metrics_without_an_active_token_are_no_infinities(shape):
    logits, labels = torch.randn(*shape, 7), torch.full(shape, -100)
    rows = dict.fromkeys(("old_logprob", "old_entropy", "ref_logprob"), torch.zeros(shape))
    objective = erc.objective("erc-dapo", kl=erc.KLPenalty())
    metrics = erc.policy_loss(logits, labels, advantages=torch.zeros(shape), objective=objective, **rows).metrics
    extremes = {"entropy_ratio_min", "entropy_ratio_max", "ratio_max"}
    assert all(math.isnan(metrics[name]) for name in extremes)
    assert all(value == 0 for name, value in metrics.items() if name not in extremes)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.3, 0.5, 0.9, 1.0])
def test_the_high_entropy_mask_is_numpy_s_quantile(fraction):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 11, 101):
        entropy = torch.rand(count + 5, generator=generator)
        active = torch.arange(count + 5) < count
        expected = entropy < entropy[:count].quantile(1 - fraction)
        assert torch.equal(erc.HighEntropyMask(fraction).dropped(entropy, active)[:count], expected[:count])


def test_a_token_on_the_quantile_stays():
    entropy = torch.arange(11, dtype=torch.float64) * 0.1
    for fraction in (0.1, 0.2, 0.3, 0.4, 0.7):  # 1 - fraction of ten steps is a whole number, but for its rounding
        dropped = erc.HighEntropyMask(fraction).dropped(entropy, torch.ones(11, dtype=torch.bool))
        assert int(dropped.sum()) == round(10 * (1 - fraction))


def test_the_high_entropy_mask_of_no_token_and_of_more_than_two_to_the_24():
    mask = erc.HighEntropyMask(0.25)
    assert mask.dropped(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).shape == (0,)
    assert mask.dropped(torch.rand(5), torch.zeros(5, dtype=torch.bool)).shape == (5,)
    count = 2**24 + 8
    entropy = torch.rand(count, generator=torch.Generator().manual_seed(0))
    kept = (~mask.dropped(entropy, torch.ones(count, dtype=torch.bool))).double().mean()
    assert abs(kept - 0.25) < 1e-6


def test_nested_logits_are_told_how_to_be_packed():
    parts = [torch.randn(3, 7), torch.randn(2, 7)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(
        TypeError, match=r"logits is a nested tensor: pass logits.values\(\).*cu_seqlens=logits.offsets"
    ):
        erc.token_stats(nested)
    with pytest.raises(TypeError, match="hidden is a nested tensor"):
        erc.linear_token_stats(nested, torch.randn(9, 7))
    objective = erc.objective("gspo")
    arguments = {"old_logprob": None, "advantages": torch.ones(2), "objective": objective}
    labels = torch.tensor([0, 1, 2, 3, 4])
    packed = erc.policy_loss(nested.values(), labels, cu_seqlens=nested.offsets(), **arguments)
    assert packed.loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scaling",
    [
        {"temperature": 1e-39},
        {"temperature": 1e38},
        {"temperature": 1e-13},
        {"logit_scale": 1e20},
        {"temperature": 1e10, "logit_scale": 1e-10},
        {"softcap": 1e-20},
        {"softcap": 30.0, "temperature": 1e14},
        {"softcap": 1e30, "logit_scale": 1.0},
        {"temperature": torch.tensor([1.0, 1e-20])},
        {"temperature": torch.tensor([1.0, 1e20])},
        {"temperature": torch.tensor([1.0, 1e-9]), "logit_scale": 1e9},
    ],
)
def test_a_scaling_that_float32_cannot_carry_is_refused(scaling, dtype):
    with pytest.raises(ValueError, match=r"scale the logits by 2\^-40 to 2\^40 for torch\.(float32|bfloat16) logits"):
        erc.token_stats(torch.randn(2, 7).to(dtype), **scaling)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in scaling.items()}
    assert erc.token_stats(torch.randn(2, 7, dtype=torch.float64), **wide).entropy.isfinite().all()


def test_a_temperature_that_nobody_reads_makes_its_row_nan(monkeypatch):
    from erc import rows

    monkeypatch.setattr(rows, "values_are_readable", lambda tensor: False)
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan, math.inf, 1e-20, 1e20, 0.5])
    stats = erc.token_stats(torch.randn(8, 7), temperature=temperature)
    assert stats.entropy.isnan().tolist() == [False, *[True] * 6, False]


LOGPROBS = ["old_logprob", "ref_logprob", "rollout_logprob", "old_entropy"]


@pytest.mark.parametrize("name", LOGPROBS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["policy_loss", "linear_policy_loss", "objective_loss", "reference"])
def test_values_in_16_bits_are_refused_by_name(form, dtype, name):
    """Of unchanged tokens 39 % would get a ratio that is off by more than 1 %."""
    rows = {key: torch.full((4,), -1.0 if "logprob" in key else 1.0) for key in LOGPROBS}
    rows[name] = rows[name].to(dtype)
    objective = erc.objective("erc-dapo", kl=erc.KLPenalty(), rollout_correction=erc.RolloutCorrection())
    arguments = {"advantages": torch.ones(4), "objective": objective, **rows}
    labels = torch.zeros(4, dtype=torch.long)
    calls = {
        "policy_loss": lambda: erc.policy_loss(torch.zeros(4, 7), labels, **arguments),
        "linear_policy_loss": lambda: erc.linear_policy_loss(torch.zeros(4, 3), torch.zeros(7, 3), labels, **arguments),
        "objective_loss": lambda: erc.objective_loss(torch.zeros(4), torch.ones(4), **arguments),
        "reference": lambda: erc.reference.policy_loss(torch.zeros(4, 7), labels, **arguments),
    }
    with pytest.raises(TypeError, match=f"{name} must be float32 or float64, got {dtype}: rounded to 16 bits"):
        calls[form]()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", ["erc-dapo", "gspo", "clip-cov"])
@pytest.mark.parametrize("form", ["dense", "linear"])
def test_one_compiled_graph(form, name, dynamic):
    """With shapes that change, and a second call of another one."""
    torch._dynamo.reset()
    gate = {"entropy_ratio": erc.EntropyRatioClip(0.9, 9.0)} if name.startswith("erc") else {}
    objective = erc.objective(name, **gate)

    def loss(rows, weight, labels, old):
        rest = {"old_logprob": old, "old_entropy": old + 4, "advantages": torch.ones_like(old), "objective": objective}
        if form == "dense":
            return erc.policy_loss(rows @ weight.t(), labels, **rest).loss
        return erc.linear_policy_loss(rows, weight, labels, **rest).loss

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    generator = torch.Generator().manual_seed(0)
    for batch in (3, 5):
        rows = torch.randn(batch, 4, 6, generator=generator)
        weight = torch.randn(11, 6, generator=generator)
        labels = torch.randint(11, (batch, 4), generator=generator)
        labels[0, 1] = -100
        old = torch.full((batch, 4), -2.0)
        grads = []
        for function in (loss, compiled):
            leaves = [tensor.clone().requires_grad_() for tensor in (rows, weight)]
            torch.manual_seed(0)
            value = function(*leaves, labels, old)
            grads.append((value.detach(), *torch.autograd.grad(value, leaves)))
        for plain, other in zip(*grads, strict=True):
            assert plain.any()
            torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)
