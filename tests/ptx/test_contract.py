"""The numerics contract on compiled GPU code: csrc/cuda as nvcc compiles it and the Triton kernels, through the public
functions and the library's own launchers, executed by the interpreter and held to the float64 oracle.

Approximate instructions err by all that they may, every access is checked, and two threads that touch the same bytes
must be ordered. Sizes: 5 is less than a vector; 2,053 is prime, so rows are not aligned; 20,488 float32 and 40,960
bfloat16 columns are several segments, the first with a ragged end; 151,936 is Qwen's vocabulary.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import erc
from erc.backend import operators
from erc.constants import Param
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import CEGPPO, CISPO, DPPO, DRO, GPPO, SAPO, NoClip, PPOClip, Reinforce
from tests import oracle
from tests.backends import shard_state
from tests.contract.test_row_operators import Problem, placed
from tests.oracle import random_labels, same_bits
from tests.ptx.machine import Checks
from tests.ptx.subjects import is_whole, subjects

pytestmark = pytest.mark.timeout(3600 if is_whole() else 900)  # of compiling, the first time
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF, IGNORE = math.nan, math.inf, -100


random_logits = partial(oracle.random_logits, spread=3.0)


def unaligned(logits: Tensor) -> Tensor:
    """The same numbers, rows one element further on and with a gap behind each."""
    rows, V = logits.shape
    return torch.full((rows * (V + 3) + 1,), NAN, dtype=logits.dtype)[1:].view(rows, V + 3)[:, :V].copy_(logits)


# ---- statistics ------------------------------------------------------------------------------------------------------


def check_statistics(subject, logits: Tensor, scaling: dict, checks: Checks | None = None) -> None:
    """Statistics against the oracle, and the gradient of each."""
    rows, V = logits.shape
    labels = random_labels(rows, V=V)
    labels[0] = logits[0].argmax()  # of a maximum, 1 - p_y must not cancel
    softcap, temperature = scaling.get("softcap"), scaling.get("temperature", 1.0)
    leaf, variable = logits.double().requires_grad_(), logits.detach().requires_grad_()
    exact_scaling = {**scaling, "temperature": temperature.double() if isinstance(temperature, Tensor) else temperature}
    expected = erc.reference.token_stats(leaf, labels, **exact_scaling)
    with subject.running(checks) as engine:
        actual = erc.token_stats(variable, labels, **scaling, backend=subject.name)
        upstream = torch.linspace(0.5, -1.5, rows)
        mix = [(w, (getattr(actual, n) * upstream.to(actual.entropy.dtype)).sum()) for n, w in WEIGHTS.items()]
        (gradient,) = torch.autograd.grad(sum(w * x for w, x in mix), variable)
    exact = sum(w * (getattr(expected, n) * upstream.double()).sum() for n, w in WEIGHTS.items())
    (reference,) = torch.autograd.grad(exact, leaf)
    assert len(engine.launches) >= 2
    largest = leaf.detach().abs().amax(-1) * scaling.get("logit_scale", 1.0) / torch.as_tensor(temperature)
    oracle.assert_logprob(actual.logprob, expected.logprob.detach(), largest)
    oracle.assert_logprob(actual.logsumexp, expected.logsumexp.detach(), largest)
    oracle.assert_entropy(actual.entropy, expected.entropy.detach(), softcap)
    oracle.assert_gradient_and_mutations(gradient, reference, softcap, relative=4e-6)


WEIGHTS = {"logprob": 1.0, "entropy": 0.7, "logsumexp": -0.3}


@pytest.mark.parametrize("subject", subjects("statistics"))
@pytest.mark.parametrize(
    ("dtype", "V"),
    [
        (BF16, 40_960),
        (F16, 2053),
        (F32, 20_488),
        (F64, 1027),
        (BF16, 151_936),
        (F32, 5),
        (BF16, 1),
        (F64, 10_242),
    ],
)
def test_statistics_and_their_gradients(dtype, V, subject):
    check_statistics(subject, random_logits(3, V, dtype=dtype), {"temperature": 0.7, "logit_scale": 1.3})


@pytest.mark.parametrize("subject", subjects("statistics"))
@pytest.mark.parametrize("kind", ["softcap", "temperature per row", "unaligned", "softcap, unaligned"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_statistics_of_every_kind_of_row(dtype, kind, subject):
    logits = random_logits(3, 24_576 if "unaligned" in kind else 1032, dtype=dtype)
    scaling = {"temperature": 0.7}
    if "softcap" in kind:
        scaling["softcap"] = 6.0
    if "unaligned" in kind:
        logits = unaligned(logits)
    if kind == "temperature per row":
        scaling["temperature"] = torch.tensor([0.5, 1.0, 1.7])
    check_statistics(subject, logits, scaling)


@pytest.mark.parametrize("subject", subjects("statistics"))
def test_peaked_rows_and_no_decision_flips(subject):
    """Entropies down to 1e-8, whatever way the exponentials err."""
    logits = oracle.peaked_rows([1e-8, 1e-6, 1e-4, 1e-2, 0.3, 2.0], 2048)
    expected = erc.reference.token_stats(logits.double()).entropy
    old = (expected * torch.tensor([0.94, 1.06, 0.97, 1.03, 0.949, 1.0501], dtype=F64)).float()
    wanted = EntropyRatioClip().dropped(expected, old.double())[0]
    assert wanted.any() and not wanted.all()
    for seed in range(3):
        with subject.running(Checks(seed=seed)):
            entropy = erc.token_stats(logits, backend=subject.name).entropy
        oracle.assert_entropy(entropy, expected)
        assert torch.equal(EntropyRatioClip().dropped(entropy, old)[0], wanted)


@pytest.mark.parametrize("subject", subjects("statistics"))
def test_edges_of_a_row(subject):
    """-inf forbids a token, NaN and +inf make their row NaN, an ignored row is not read."""
    V = 24_576
    logits = random_logits(7, V, dtype=BF16)
    logits[0, : V // 2] = -INF  # the first segments hold nothing
    logits[1, 3:] = -INF
    logits[2] = -INF
    logits[3, V - 1] = NAN
    logits[4, 77] = INF
    logits[5] = NAN
    labels = torch.tensor([V - 5, 1, 3, 4, 5, IGNORE, 9])
    kept = torch.where(logits == -INF, -1e4, logits.double()).requires_grad_()
    expected = erc.reference.token_stats(kept, labels.clamp(min=0))
    variable = logits.detach().requires_grad_()
    with subject.running():
        actual = erc.token_stats(variable, labels, backend=subject.name)
        (gradient,) = torch.autograd.grad((actual.entropy - actual.logprob).sum(), variable)
    (reference,) = torch.autograd.grad((expected.entropy - expected.logprob)[[0, 1, 6]].sum(), kept)
    for output, exact in zip(actual, expected, strict=True):
        assert output[2:5].isnan().all() and output[5] == 0
        assert torch.allclose(output[[0, 1, 6]].double(), exact[[0, 1, 6]], rtol=2e-6, atol=2e-5)
    gradient[2, labels[2]] = NAN  # a label at -inf: 0 in one backend, in a row that has no distribution
    assert gradient[2:5].isnan().all() and (gradient[5] == 0).all() and (gradient[0, : V // 2] == 0).all()
    oracle.assert_gradient(gradient[[0, 1, 6]], reference[[0, 1, 6]], relative=4e-6)


@pytest.mark.parametrize("subject", subjects("statistics"))
def test_states_of_shards_merge_to_the_row(subject):
    logits, labels, cuts = random_logits(1, 3, 2000, dtype=BF16), torch.tensor([5, 512, 1400]), (0, 512, 513, 2000)
    logits[0, 0, 512] = -INF  # a shard without any token
    with subject.running():
        operators = erc.backend.operators(subject.name)
        states = [shard_state(operators, logits[:, :, start:end], labels, start) for start, end in pairwise(cuts)]
    row_max, rest, weighted, label = oracle.merged_states(states)
    expected = erc.reference.token_stats(logits[0].double(), labels)
    oracle.assert_entropy(rest.log1p() - weighted / (1 + rest), expected.entropy)
    torch.testing.assert_close(label - row_max - rest.log1p(), expected.logprob, rtol=2e-6, atol=2e-6)


# ---- the fused loss --------------------------------------------------------------------------------------------------


def rollout(logits: Tensor, seed: int = 0, **scaling) -> tuple[Tensor, dict]:
    """Labels, and what a trainer passes: ratios from e^-1 to e^1, entropies 10 % to both sides, both signs of the
    advantage and a zero, an ignored row."""
    rows, V = logits.shape
    labels = random_labels(rows, V=V, seed=seed)
    labels[::3] = logits[::3].argmax(-1)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in scaling.items()}
    statistics = erc.reference.token_stats(logits.double(), labels, **exact)
    steps = torch.linspace(-1, 1, rows)
    advantages = torch.where(torch.arange(rows) % 2 == 0, 1.0, -0.7) * (1 + steps.abs())
    if rows > 3:
        advantages[3] = 0.0
    labels[-1] = IGNORE
    given = {
        "old_logprob": (statistics.logprob + steps).float().clamp(max=-1e-3),
        "old_entropy": (statistics.entropy * (1 + 0.1 * steps.flip(0))).float(),
        "ref_logprob": (statistics.logprob + 0.7 * steps.flip(0)).float().clamp(max=-1e-3),
        "advantages": advantages,
    }
    return labels, given


def run_loss(backend: str, logits: Tensor, labels: Tensor, given: dict, objective: Objective, **options):
    """The loss and its gradient; in float64 on the reference."""
    exact = backend == "torch"
    leaf = (logits.double() if exact else logits).detach().requires_grad_()
    real = F64 if leaf.dtype == F64 else F32
    unused = {"old_entropy": objective.entropy_ratio, "ref_logprob": objective.kl}
    given = {k: v.to(real) for k, v in given.items() if unused.get(k, True) is not None}
    options = {k: v.to(real) if isinstance(v, Tensor) else v for k, v in options.items()}
    rows = leaf.clone() if options.get("inplace_backward") else leaf
    result = erc.policy_loss(rows, labels, **given, objective=objective, backend=backend, **options)
    result.loss.backward()
    return result, leaf.grad


def check_loss(actual, gradient: Tensor, expected, reference: Tensor, softcap: float | None = None) -> None:
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(actual.per_token_loss.double(), expected.per_token_loss.double(), rtol=1e-5, atol=3e-6)
    for name in ("clip_fraction_low", "clip_fraction_high", "erc_fraction", "entropy"):
        assert actual.metrics[name].item() == pytest.approx(expected.metrics[name].item(), rel=1e-5), name
    oracle.assert_entropy(actual.entropy, expected.entropy.double(), softcap)
    assert (gradient[-1] == 0).all(), "an ignored row has gradient zero"
    # The factor of a row carries the rounding of exp(logprob - old_logprob).
    live = reference.abs().amax(-1) > 0
    oracle.assert_gradient_and_mutations(gradient[live], reference[live], softcap, relative=1e-5)


GATED = erc.objective("erc-dapo", entropy_coef=0.01)


@pytest.mark.parametrize("subject", subjects("loss"))
@pytest.mark.parametrize(
    ("dtype", "V"),
    [
        (BF16, 40_960),
        (F16, 2053),
        (F32, 20_488),
        (F64, 1027),
        (BF16, 151_936),
        (F16, 1032),
        (F32, 5),
        (F64, 10_242),
    ],
)
def test_the_fused_loss_and_its_gradient(dtype, V, subject):
    logits = random_logits(5, V, dtype=dtype, spread=1.5)
    labels, given = rollout(logits, temperature=0.8)
    options = {"temperature": 0.8, "grad_scale": 1.0 if dtype == F16 else None}  # float16 is fused with a scale alone
    expected, reference = run_loss("torch", logits, labels, given, GATED, temperature=0.8)
    with subject.running() as engine:
        actual, gradient = run_loss(subject.name, logits, labels, given, GATED, **options)
    check_loss(actual, gradient, expected, reference)
    names = [launched.kernel for launched in engine.launches]
    form = {"cluster": "cluster", "block": "block" if subject.backend == "cuda" else "policy_loss"}.get(subject.form)
    if form and dtype not in (F64,) and V % 8 == 0:
        assert any(form in name for name in names), names


@pytest.mark.parametrize("subject", subjects("loss"))
@pytest.mark.parametrize("kind", ["softcap", "temperature per row", "unaligned", "softcap, unaligned", "in place"])
def test_the_fused_loss_of_every_kind_of_row(kind, subject):
    logits = random_logits(4, 1032 if kind == "softcap" else 24_576, dtype=BF16, spread=1.5)
    options: dict = {"temperature": 0.8}
    if "softcap" in kind:
        options["softcap"] = 6.0
    if "unaligned" in kind:
        logits = unaligned(logits)
    if kind == "temperature per row":
        options["temperature"] = torch.tensor([0.5, 0.8, 1.0, 1.7])
    labels, given = rollout(logits, **options)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected, reference = run_loss("torch", logits, labels, given, GATED, **exact)
    in_place = {"inplace_backward": True} if kind == "in place" else {}
    with subject.running(Checks(order_global=kind == "in place")):
        actual, gradient = run_loss(subject.name, logits, labels, given, GATED, **options, **in_place)
    check_loss(actual, gradient, expected, reference, options.get("softcap"))


@pytest.mark.parametrize("subject", subjects("loss"))
@pytest.mark.parametrize("softcap", [0.0, 9.0])
def test_a_narrower_gradient_of_misaligned_rows_is_that_of_aligned_ones_rounded_once(softcap, subject):
    """Of two segments and a ragged end; logits and gradient are misaligned differently, then alike."""
    p, results = Problem(F32, 10_261, [0]), []
    p.params[Param.SOFTCAP] = softcap
    for dtype, of_logits, of_gradient in ((F32, 0, 0), (BF16, 1, 3), (BF16, 2, 2)):
        gradient = placed(torch.empty_like(p.logits, dtype=dtype), of_gradient)
        per_token, flags = p.filled(4), p.filled(1, torch.int32)
        with subject.running():
            loss_rows = operators(subject.name).loss_rows_
            loss_rows(placed(p.logits, of_logits), *p.rows, None, 0, p.table, per_token, flags[0], None, gradient)
        results.append((gradient.bfloat16(), per_token, flags))
    assert gradient.any() and same_bits(gradient, results[-1][0])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("subject", subjects("loss"))
def test_without_a_gradient_nothing_is_written_for_one(subject):
    logits = random_logits(4, 24_576, dtype=BF16)
    labels, given = rollout(logits)
    given.pop("ref_logprob")
    with subject.running() as engine, torch.no_grad():
        quiet = erc.policy_loss(logits, labels, **given, backend=subject.name)
    assert sum(one.counts.stored for one in engine.launches) < 10_000
    with subject.running() as engine:
        loud = erc.policy_loss(logits.clone().requires_grad_(), labels, **given, backend=subject.name)
    assert sum(one.counts.stored for one in engine.launches) >= logits.numel() * 2
    assert torch.equal(quiet.loss, loud.loss.detach()) and not quiet.loss.requires_grad


@pytest.mark.parametrize(("dtype", "V"), [(BF16, 24_576), (F32, 20_488), (F64, 10_242)])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_form_gives_the_same_bits(backend, dtype, V):
    """A cluster, a block, several blocks, in place or not: the segments are the same, and their order."""
    forms = [p.values[0] for p in subjects("loss") if p.values[0].backend == backend and not p.marks]
    if len(forms) < 2:
        pytest.skip("these kernels cannot run here")
    logits = random_logits(4, V, dtype=dtype)
    logits[1, V // 2 : V // 2 + 900] = -INF
    labels, given = rollout(logits)
    labels[1] = 3
    results = []
    for subject in forms:
        with subject.running():
            statistics = erc.token_stats(logits, labels, backend=subject.name)
            loss, gradient = run_loss(subject.name, logits, labels, given, GATED)
            again, written = run_loss(subject.name, logits, labels, given, GATED, inplace_backward=True)
        assert same_bits(statistics.entropy, loss.entropy)
        assert same_bits(statistics.logprob, loss.logprob)
        assert same_bits(gradient, written) and same_bits(loss.entropy, again.entropy)
        results.append((statistics.logsumexp, loss.per_token_loss, loss.entropy, gradient))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


RULES = {
    "ppo": PPOClip(0.2, 0.28), "dual clip": PPOClip(0.2, 0.28, dual_clip=1.5),
    "two-sided": PPOClip(0.2, 0.28, delta=1.6), "gppo": GPPO(0.2, 0.28), "ce-gppo": CEGPPO(0.2, 0.2, 0.5, 1.0),
    "cispo": CISPO(0.8, 1.28), "sapo": SAPO(), "dppo tv": DPPO("tv", 0.01, 0.01), "dppo kl": DPPO("kl", 0.005, 0.005),
    "reinforce": Reinforce(), "dro": DRO(0.1), "no clip": NoClip(),
}  # fmt: skip
PENALTIES = [None, *(KLPenalty(kind, 0.1) for kind in ("k1", "k2", "k3", "abs", "k3+")), KLPenalty("k3", 0.1, True)]


@pytest.mark.parametrize("subject", subjects("loss"))
@pytest.mark.parametrize("rule", list(RULES))
def test_every_rule_gate_and_penalty(rule, subject):
    """A rule is a kernel of its own in Triton, a number in CUDA: here each with one gate and penalty, by turns."""
    if subject.form == "split" and subject.backend == "triton":
        pytest.skip("the token's loss is the same kernel as in one block")
    names = list(RULES) if subject.backend == "cuda" else [rule]
    logits = random_logits(10, 72, dtype=F32, spread=1.5)
    labels, given = rollout(logits)
    with subject.running():
        for name in names:
            i = list(RULES).index(name)
            gate = (EntropyRatioClip(), EntropyRatioClip(value="zero"), None)[i % 3]
            objective = Objective(
                ratio=RULES[name], entropy_ratio=gate, kl=PENALTIES[i % 7], entropy_coef=0.01 * (i % 2)
            )
            expected, reference = run_loss("torch", logits, labels, given, objective)
            actual, gradient = run_loss(subject.name, logits, labels, given, objective)
            torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=3e-6, atol=3e-6, msg=name)
            largest = float(reference.abs().max())
            torch.testing.assert_close(gradient.double(), reference, rtol=2e-5, atol=4e-6 * largest, msg=name)
            assert not torch.allclose(gradient.double() * 1.01, reference, rtol=2e-5, atol=4e-6 * largest)


# ---- pairs and scaling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", subjects("pairs"))
@pytest.mark.parametrize(
    ("dtype", "V", "softcap"),
    [(BF16, 20_480, None), (F32, 2053, None), (F16, 520, 6.0), (F64, 520, None), (BF16, 520, 6.0)],
)
def test_pairs_and_their_gradients(dtype, V, softcap, subject):
    logits, old = (random_logits(3, V, dtype=dtype, spread=2.0, seed=seed) for seed in (0, 9))
    old[1] = logits[1]  # no divergence
    old[2] = logits[2] + 0.05 * old[2]
    leaf, variable = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = erc.reference.entropy_ratio(leaf, old.double(), temperature=0.8, softcap=softcap)
    names = ("entropy", "ratio", "kl_new_old", "kl_old_new", "total_variation")
    with subject.running():
        actual = erc.entropy_ratio(variable, old, temperature=0.8, softcap=softcap, backend=subject.name)
        gradients = [torch.autograd.grad(getattr(actual, n).sum(), variable, retain_graph=True)[0] for n in names]
    for name in expected._fields:
        a, b = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(a.double(), b, rtol=3e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for name, gradient in zip(names, gradients, strict=True):
        (reference,) = torch.autograd.grad(getattr(expected, name).sum(), leaf, retain_graph=True)
        oracle.assert_gradient_and_mutations(gradient[:1], reference[:1], None, relative=3e-5)


@pytest.mark.parametrize("subject", subjects("scale"))
@pytest.mark.parametrize(("dtype", "V"), [(BF16, 1032), (F16, 2053), (F32, 1), (F64, 520)])
def test_scaling_rows_rounds_once(dtype, V, subject):
    grad = random_logits(2, 2, V, dtype=dtype)
    scale = torch.tensor([1.0, 0.5, -3.0, 0.0], dtype=F64 if dtype == F64 else F32)
    expected = (grad.to(scale.dtype) * scale.view(2, 2, 1)).to(dtype)
    with subject.running() as engine:
        operators = erc.backend.operators(subject.name)
        assert torch.equal(operators.scale_rows(grad, scale), expected)
        operators.scale_rows_(grad, scale)
    assert torch.equal(grad, expected)
    assert engine.launches[1].counts.stored == 3 * V * grad.element_size(), "a row whose factor is 1 is not written"
