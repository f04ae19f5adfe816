"""The fused loss of every backend against the float64 oracle: rules, gates and penalties, dtypes, ties, broken rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import erc
from erc import ops
from tests.backends import INTERPRETED, loss_call, stored
from tests.oracle import assert_gradient_and_mutations, random_labels, random_logits

pytestmark = [pytest.mark.sanitize, pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")]
NAN, IGNORE = math.nan, -100
LONG = 2053 if INTERPRETED else 24_576
RULES = {
    "ppo": erc.PPOClip(0.2, 0.28),
    "dual clip": erc.PPOClip(0.2, 0.28, dual_clip=1.5),
    "two-sided": erc.PPOClip(0.2, 0.28, delta=1.6),
    "gppo": erc.GPPO(0.2, 0.28),
    "ce-gppo": erc.CEGPPO(0.2, 0.2, 0.5, 1.0),
    "cispo": erc.CISPO(0.8, 1.28),
    "sapo": erc.SAPO(),
    "dppo tv": erc.DPPO("tv", 0.01, 0.01),
    "dppo kl": erc.DPPO("kl", 0.005, 0.005),
    "reinforce": erc.Reinforce(),
    "dro": erc.DRO(0.1),
    "no clip": erc.NoClip(),
    "ipo": erc.IPO(),
    "topr": erc.TOPR(),
}
GATES = {"no gate": None, "kept": erc.EntropyRatioClip(), "zero": erc.EntropyRatioClip(value="zero")}
KLS = {
    "no kl": None,
    **{kind: erc.KLPenalty(kind, 0.1) for kind in ("k1", "k2", "k3", "abs", "k3+")},
    "weighted k3": erc.KLPenalty("k3", 0.1, importance_weighted=True),
}
EVERY_CASE = [(rule, gate, kl) for rule in RULES for gate in GATES for kl in KLS]
# A second a call in the interpreter, and a full product on the CPU and one form of CUDA, which computes a token's loss
# in one place for all of them.
SOME_CASES = [
    *((rule, gate, "no kl") for rule in RULES for gate in ("no gate", "kept")),
    *(("ppo", "kept", kl) for kl in KLS if kl != "no kl"),
    ("gppo", "zero", "k3"),
    ("cispo", "zero", "weighted k3"),
]


def tokens_around_every_bound(V: int, rows: int = 10, dtype=torch.float32):
    """Ratios from e^-1 to e^1, entropies 10 % to both sides, both signs of the advantage and a zero, an ignored row."""
    logits, labels = random_logits(rows, V, dtype=dtype, spread=1.5), random_labels(rows, V=V)
    labels[::3] = logits[::3].argmax(-1)
    statistics = erc.reference.token_stats(logits.double(), labels)
    steps = torch.linspace(-1, 1, rows)
    advantages = torch.where(torch.arange(rows) % 2 == 0, 1.0, -0.7) * (1 + steps.abs())
    advantages[3] = 0.0
    labels[5] = IGNORE
    given = {
        "old_logprob": (statistics.logprob + steps).float().clamp(max=-1e-3),
        "old_entropy": (statistics.entropy * (1 + 0.1 * steps.flip(0))).float(),
        "ref_logprob": (statistics.logprob + 0.7 * steps.flip(0)).float().clamp(max=-1e-3),
        "advantages": advantages,
    }
    return logits, labels, given


def run_loss(logits: Tensor, labels: Tensor, given: dict, objective: erc.Objective, api=erc):
    leaf = (logits.double() if api is erc.reference else logits).detach().clone().requires_grad_()
    unused = {"old_entropy"} if objective.entropy_ratio is None else set()
    unused |= {"ref_logprob"} if objective.kl is None else set()
    real = ops.stats_dtype(leaf.dtype)
    inputs = {name: None if name in unused else value.to(real) for name, value in given.items()}
    result = api.policy_loss(leaf, labels, **inputs, objective=objective)
    result.loss.backward()
    return result, leaf.grad


@pytest.mark.parametrize(("rule", "gate", "kl"), SOME_CASES if INTERPRETED else EVERY_CASE)
def test_every_rule_gate_and_penalty_matches_the_oracle(rule, gate, kl, kernels):
    bonus = 0.01 * (kl != "no kl")
    objective = erc.Objective(ratio=RULES[rule], entropy_ratio=GATES[gate], kl=KLS[kl], entropy_coef=bonus)
    logits, labels, given = tokens_around_every_bound(72)
    actual, gradient = run_loss(logits, labels, given, objective)
    expected, exact = run_loss(logits, labels, given, objective, erc.reference)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(actual.per_token_loss.double(), expected.per_token_loss.double(), rtol=5e-6, atol=2e-6)
    for name in ("clip_fraction_low", "clip_fraction_high", "erc_fraction_low", "erc_fraction_high", "erc_fraction"):
        assert actual.metrics[name].item() == pytest.approx(expected.metrics[name].item()), name
    assert (gradient[5] == 0).all()
    # The factor in front of a row's gradient carries the rounding of exp(logprob - old_logprob).
    live = exact.abs().amax(-1) > 1e-6
    assert live.any()
    floor = 4e-6 * exact.abs().max()
    error = (gradient.double() - exact).abs()
    assert (error <= 1e-5 * exact.abs().amax(-1, keepdim=True) + floor).all()
    for wrong in (torch.zeros_like(gradient), 1.05 * gradient, gradient.roll(1, -1)):
        assert ((wrong.double() - exact).abs().amax(-1) > 1e-3 * exact.abs().amax(-1))[live].any()


@pytest.mark.parametrize(
    ("dtype", "V"),
    [
        (torch.bfloat16, LONG),
        (torch.float16, 2053),
        (torch.float16, 1032),
        (torch.float32, LONG - 4088 if LONG > 4096 else 777),
        (torch.float64, 520),
    ],
)
def test_the_fused_loss_on_every_machine(dtype, V, machine):
    logits, labels, given = tokens_around_every_bound(V, rows=6, dtype=dtype)
    objective = erc.objective("erc-dapo", entropy_coef=0.01)
    actual, gradient = run_loss(logits, labels, given, objective)
    expected, exact = run_loss(logits, labels, given, objective, erc.reference)
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    assert_gradient_and_mutations(gradient, exact, relative=1e-5)


def test_float16_with_a_scale(kernels):
    logits, labels, given = tokens_around_every_bound(520, rows=6, dtype=torch.float16)
    given.pop("ref_logprob")
    leaf = logits.clone().requires_grad_()
    (1024.0 * erc.policy_loss(leaf, labels, grad_scale=1024.0, **given).loss).backward()  # as GradScaler does
    _, exact = run_loss(logits, labels, given | {"ref_logprob": None}, erc.objective("erc-dapo"), erc.reference)
    assert_gradient_and_mutations(leaf.grad, 1024 * exact, relative=1e-5)


def four_tokens():
    """Rows, labels and their statistics as the backend sees them."""
    logits, labels = random_logits(4, 50), random_labels(4, V=50)
    return logits, labels, erc.token_stats(logits, labels)


@pytest.mark.parametrize("rule", [erc.PPOClip(0.0, 0.0), erc.GPPO(0.0, 0.0), erc.CEGPPO(0.0, 0.0), erc.CISPO(1.0, 1.0)])
def test_a_tie_on_a_bound_keeps_the_gradient(rule, machine):
    """An old log-prob equal to the new one gives r = 1 exactly, which is on a bound of width 0."""
    logits, labels, stats = four_tokens()
    leaf = logits.clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 2.0, -0.5])
    out = erc.policy_loss(leaf, labels, old_logprob=stats.logprob, advantages=advantages, objective=erc.Objective(rule))
    out.loss.backward()
    assert out.metrics["clip_fraction"] == 0 and out.metrics["ratio_max"] == 1
    assert (leaf.grad != 0).any(-1).all()


def test_the_gate_drops_on_the_bound_and_on_nan(native):
    """Strict bounds: rho on a bound drops. A NaN old entropy drops without making the loss NaN."""
    logits, labels, stats = four_tokens()
    old = stats.entropy * torch.tensor([1.0, 2.0, 0.5, 1.0])
    if not native.checks_values:
        old[3] = NAN
    for band, kept in ((0.05, True), (0.0, False)):
        leaf = logits.clone().requires_grad_()
        objective = erc.Objective(erc.PPOClip(), erc.EntropyRatioClip(band, band))
        out = erc.policy_loss(
            leaf, labels, old_logprob=stats.logprob, old_entropy=old, advantages=torch.ones(4), objective=objective
        )
        out.loss.backward()
        assert out.loss.isfinite() and leaf.grad[0].any() == kept
        last_kept = kept and native.checks_values
        assert not leaf.grad[1:3].any() and leaf.grad[3].any() == last_kept
        assert out.metrics["erc_fraction"] == 1 - (int(kept) + int(last_kept)) / 4
        assert out.metrics["erc_fraction_low"] >= 0.25 and out.metrics["erc_fraction_high"] >= 0.25


def test_a_nan_logit_makes_loss_and_gradient_nan_even_if_gated_or_without_advantage(machine):
    logits, labels, stats = four_tokens()
    logits[:2, 11] = NAN
    leaf = logits.clone().requires_grad_()
    old, advantages = torch.tensor([1e9, 1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    objective = erc.objective("erc-dapo", reduction="none")
    out = erc.policy_loss(
        leaf, labels, old_logprob=stats.logprob, old_entropy=old, advantages=advantages, objective=objective
    )
    out.loss.sum().backward()
    assert out.loss.isnan().tolist() == leaf.grad.isnan().any(-1).tolist() == [True, True, False, False]


def test_large_weights_do_not_overflow_beside_masked_tokens(native):
    """slope * x may leave float32 where p is 0: with a weight of 1e6 and logits of -3e38."""
    logits, labels = random_logits(1, 2, 1032), random_labels(2, V=1032)
    logits[0, :, 500:] = torch.finfo(torch.float32).min
    labels %= 500
    million = torch.full((2,), 1e6)
    gradient = loss_call(native.ops, logits, labels, weights=million, entropy_coef=-1, temperature=1.5)[-1]
    assert gradient.isfinite().all() and (gradient[0, :, 500:] == 0).all() and (gradient[0, :, :500] != 0).any()


def test_a_16_bit_loss_gradient_is_the_float32_one_rounded_once(kernels):
    logits, labels, given = tokens_around_every_bound(520, rows=6, dtype=torch.bfloat16)
    _, narrow = run_loss(logits, labels, given, erc.objective("erc-dapo"))
    _, wide = run_loss(logits.float(), labels, given, erc.objective("erc-dapo"))
    assert torch.equal(narrow, stored(wide, torch.bfloat16)) and narrow.any()


def test_without_a_gradient_none_is_written(machine):
    logits, labels, given = tokens_around_every_bound(LONG, rows=6, dtype=torch.bfloat16)
    quiet_given = {name: value for name, value in given.items() if name != "ref_logprob"}
    with torch.no_grad():
        quiet = erc.policy_loss(logits, labels, **quiet_given)
    loud, _ = run_loss(logits, labels, given, erc.objective("erc-dapo"))
    assert torch.equal(quiet.loss, loud.loss.detach()) and not quiet.loss.requires_grad
