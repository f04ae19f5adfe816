"""The CUDA kernels against the float64 oracle, without a GPU: `csrc/cuda/*.cu` compiled by g++ and run on fibers.

Every test goes through the public API with the backend `cuda_host`, on three machines: one with thread-block clusters
(the form for sm_90 and later), one without (sm_80), and one with so many multiprocessors that few rows are split over
blocks. The host's exponential has the hardware's error, 2^-22, and flushes subnormals.

Sizes: 1 and 5 are less than one 16-byte vector; 2,053 is prime, so rows are not aligned; 24,576 and 40,960 are two and
eight segments of a row (bfloat16 and float32), 20,488 two segments and a ragged end.
"""

from __future__ import annotations

import math
import os
import subprocess
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import erc
from erc import ops
from erc.backend import register_namespace
from erc.constants import Present, Reduction
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import CEGPPO, CISPO, DPPO, DRO, GPPO, SAPO, NoClip, PPOClip, Reinforce
from tests.backends import params
from tests.cuda_host import build

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs g++"),
    pytest.mark.sanitize,  # `make sanitize` runs the whole module again, on a sanitized build
]
BACKEND = "cuda_host"
NAN, INF, IGNORE = math.nan, math.inf, -100
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MACHINES = {"cluster": (True, 1), "block": (False, 1), "split": (False, 132)}


@pytest.fixture(scope="module")
def host():
    loaded = build.load()
    register_namespace(BACKEND, build.NAMESPACE)
    return loaded


@pytest.fixture(params=MACHINES)
def machine(request, host):
    clusters, multiprocessors = MACHINES[request.param]
    host.configure(clusters=clusters, multiprocessors=multiprocessors)
    return host


def random_logits(*shape: int, dtype=torch.float32, spread: float = 4.0, seed: int = 0) -> Tensor:
    """The same numbers on every device; on the default one, which test_cuda_gpu makes the GPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cpu") * spread).to(torch.get_default_device(), dtype)


def random_labels(*shape: int, V: int, seed: int = 1) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, V, shape, generator=generator, device="cpu").to(torch.get_default_device())


def bits(tensor: Tensor) -> Tensor:
    return torch.atleast_1d(tensor).contiguous().view(torch.uint8)


# ---- bounds (DESIGN sections 5 and 8) --------------------------------------------------------------------------------


def assert_statistics(actual: erc.TokenStats, expected: erc.TokenStats, largest_x: float, softcap: float = 0.0) -> None:
    for name in ("logprob", "logsumexp"):
        a, b = getattr(actual, name).double(), getattr(expected, name)
        assert ((a - b).abs() <= 1e-6 * b.abs().clamp(min=max(1.0, largest_x))).all(), name
    error = (actual.entropy.double() - expected.entropy).abs()
    assert (actual.entropy >= 0).all()
    assert (error <= (2e-6 + 2.0**-23 * softcap) * expected.entropy + 1e-13).all(), (error / expected.entropy).max()


def gradient_error(actual: Tensor, expected: Tensor) -> Tensor:
    """The largest error of each row, against the largest gradient of the row."""
    error = (actual.double() - expected).abs().amax(-1)
    return (error - 1e-12).clamp(min=0) / expected.abs().amax(-1).clamp(min=1e-300)


def assert_gradient(actual: Tensor, expected: Tensor, softcap: float = 0.0, slack: float = 0.0) -> None:
    """Within the bound of the dtype; and the bound rejects zeros, a scaled gradient and a shifted one."""
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(actual.dtype, 0.0)
    bound = rounding + 4e-6 + slack + 2.0**-23 * softcap
    assert (gradient_error(actual, expected) <= bound).all(), gradient_error(actual, expected).max()
    moving = expected.abs().amax(-1) > 1e-6
    if actual.shape[-1] > 1 and moving.any():
        for mutation in (torch.zeros_like(actual), actual * 1.05, actual.roll(1, -1)):
            assert (gradient_error(mutation, expected)[moving] > bound).any()


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "V", "softcap"),
    [
        *((dtype, V, None) for dtype in DTYPES for V in (1, 5, 2053)),
        *((dtype, V, 6.0) for dtype in DTYPES for V in (5, 1032)),
        (torch.bfloat16, 40_960, None),
        (torch.float32, 20_488, None),
        (torch.float64, 10_242, None),
    ],
)
def test_statistics_and_gradients_match_the_oracle(dtype, V, softcap, machine):
    logits = random_logits(3, V, dtype=dtype)
    labels = random_labels(3, V=V)
    labels[1] = logits[1].argmax()  # of a maximum, 1 - p_y must not cancel
    scaling = {"temperature": 0.7, "softcap": softcap, "logit_scale": 1.3}
    leaf, variable = logits.double().requires_grad_(True), logits.clone().requires_grad_(True)
    expected = erc.reference.token_stats(leaf, labels, **scaling)
    actual = erc.token_stats(variable, labels, **scaling, backend=BACKEND)
    assert_statistics(actual, expected, float(leaf.abs().max()) * 1.3 / 0.7, softcap or 0.0)
    upstream = torch.tensor([0.7, -1.3, 0.4])
    for a, b in zip(actual, expected, strict=True):
        (gradient,) = torch.autograd.grad((a * upstream.to(a.dtype)).sum(), variable, retain_graph=True)
        (reference,) = torch.autograd.grad((b * upstream.double()).sum(), leaf, retain_graph=True)
        assert_gradient(gradient, reference, softcap or 0.0)


@pytest.mark.parametrize("gap", [2.0, 8.0, 14.0, 17.0, 24.0, 40.0])
def test_peaked_rows_keep_the_entropys_relative_precision(gap, machine):
    """H down to 1e-16: all of it is in the rest of the row, which 1 + R would have rounded away."""
    logits = random_logits(4, 1032, spread=0.5)
    logits[:, 123] = logits.amax(-1) + gap
    expected = erc.reference.token_stats(logits.double()).entropy
    error = (erc.token_stats(logits, backend=BACKEND).entropy.double() - expected).abs()
    assert (error <= 2e-6 * expected + 1e-13).all()
    assert gap < 40 or ((1 + expected).float() == 1).all()


def test_no_entropy_ratio_decision_flips(machine):
    logits = torch.cat([random_logits(8, 520, spread=s, seed=int(s), dtype=torch.bfloat16) for s in (1.0, 4.0, 9.0)])
    expected = erc.reference.token_stats(logits.double()).entropy
    entropy = erc.token_stats(logits, backend=BACKEND).entropy
    old = (expected * torch.linspace(0.9, 1.1, len(logits), dtype=torch.float64)).float()
    actual, oracle = (EntropyRatioClip().dropped(h, old.to(h.dtype))[0] for h in (entropy, expected))
    assert torch.equal(actual, oracle) and oracle.any() and not oracle.all()


def test_one_temperature_a_row(machine):
    logits, labels, temperature = random_logits(3, 300), random_labels(3, V=300), torch.tensor([0.5, 1.0, 1.7])
    leaf, variable = logits.double().requires_grad_(True), logits.clone().requires_grad_(True)
    expected = erc.reference.token_stats(leaf, labels, temperature=temperature.double())
    actual = erc.token_stats(variable, labels, temperature=temperature, backend=BACKEND)
    assert_statistics(actual, expected, 40.0)
    (gradient,) = torch.autograd.grad((actual.logprob - actual.entropy).sum(), variable)
    (reference,) = torch.autograd.grad((expected.logprob - expected.entropy).sum(), leaf)
    assert_gradient(gradient, reference)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("V", [1027, 20_488])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_forbidden_tokens(mask, V, softcap, machine):
    """-inf, and the lowest finite number that many programs write instead of it."""
    logits = random_logits(5, V)
    logits[0, : V // 2] = mask  # the first segments hold nothing
    logits[1, 3:] = mask  # most lanes hold nothing
    logits[2, :] = mask
    logits[2, 77] = 0.25  # all but one
    logits[3, ::2] = mask
    logits[4, V - 1] = mask  # only in the ragged end
    labels = torch.tensor([V - 5, 1, 77, 4, 9])
    if softcap and mask != -INF:
        pytest.skip("a finite logit is capped, not forbidden")
    x = softcap * torch.tanh(logits.double() / softcap) if softcap else logits.double()
    kept = torch.where(logits == mask, -1e4, x).requires_grad_(True)  # p = 0 in float64
    expected = erc.reference.token_stats(kept, labels)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, softcap=softcap, backend=BACKEND)
    rows = [0, 1, 2, 4]  # row 3: the label itself is forbidden
    assert_statistics(
        erc.TokenStats(*(s[rows] for s in actual)), erc.TokenStats(*(s[rows] for s in expected)), 20.0, softcap or 0.0
    )
    assert actual.logprob[3] < -1e3
    (gradient,) = torch.autograd.grad((actual.entropy + actual.logsumexp).sum(), variable, retain_graph=True)
    assert (gradient[logits == mask] == 0).all() and gradient.isfinite().all()
    if softcap is None:
        (reference,) = torch.autograd.grad((expected.entropy + expected.logsumexp).sum(), kept)
        assert_gradient(gradient, reference)
    options = {"objective": "ppo", "mask": labels != 4, "softcap": softcap, "backend": BACKEND}
    loss = erc.policy_loss(variable, labels, old_logprob=None, advantages=torch.ones(5), **options)
    (gradient,) = torch.autograd.grad(loss.loss, variable)
    assert gradient.isfinite().all() and (gradient[logits == mask] == 0).all() and (gradient[0] != 0).any()


@pytest.mark.parametrize("V", [1100, 24_576])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_plus_inf_poison_their_row_alone(value, V, machine):
    logits, labels = random_logits(4, V, dtype=torch.bfloat16), random_labels(4, V=V)
    clean = erc.token_stats(logits, labels, backend=BACKEND)
    logits[1, 640] = value
    logits[2, V - 1] = value
    variable = logits.requires_grad_(True)
    actual = erc.token_stats(variable, labels, backend=BACKEND)
    for output, before in zip(actual, clean, strict=True):
        assert output[1:3].isnan().all() and torch.equal(bits(output[[0, 3]]), bits(before[[0, 3]]))
    (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
    assert gradient[1:3].isnan().all() and gradient[[0, 3]].isfinite().all()
    loss = erc.policy_loss(variable, labels, old_logprob=None, advantages=torch.tensor([1.0, 0.0, 1.0, 1.0]),
                           objective=Objective(ratio=PPOClip(0.2, 0.2), reduction="none"), backend=BACKEND)  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.loss.sum(), variable)
    assert gradient[1:3].isnan().all() and gradient[[0, 3]].isfinite().all()


def test_a_row_that_is_all_minus_inf_is_nan(machine):
    for V in (70, 24_576):
        logits = torch.full((1, V), -INF, dtype=torch.bfloat16)
        assert all(output.isnan().all() for output in erc.token_stats(logits, torch.tensor([3]), backend=BACKEND))


def test_ignored_rows_are_not_read(machine):
    logits = random_logits(2, 300)
    logits[0] = NAN
    variable = logits.requires_grad_(True)
    labels = torch.tensor([IGNORE, 5])
    actual = erc.token_stats(variable, labels, backend=BACKEND)
    assert all(output[0] == 0 for output in actual)
    loss = erc.policy_loss(
        variable, labels, old_logprob=None, advantages=torch.ones(2), objective="ppo", backend=BACKEND
    )
    for output in ((actual.logprob + actual.entropy).sum(), loss.loss):
        (gradient,) = torch.autograd.grad(output, variable)
        assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


@pytest.mark.parametrize("label", [300, -1, 2**40])
def test_a_label_out_of_range_makes_its_row_nan_and_reads_nothing_else(label, machine):
    logits, labels = random_logits(1, 2, 300), torch.tensor([label, 7])
    logprob, entropy, _, saved = machine.ops.stats_forward(logits, labels, None, params(), IGNORE)
    assert logprob[0].isnan() and entropy[0].isnan() and logprob[1].isfinite()
    ones = torch.ones(2)
    gradient = machine.ops.stats_backward(logits, labels, None, params(), IGNORE, saved, ones, None, None)
    fused = loss_call(machine, logits, labels)[-1]
    for grad in (gradient, fused):
        assert grad[0, 0].isnan().all() and grad[0, 1].isfinite().all()


def test_no_rows(machine):
    actual = erc.token_stats(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), backend=BACKEND)
    assert actual.logprob.shape == (0,)


def test_more_rows_than_a_second_grid_dimension_holds(host):
    host.configure(clusters=False)
    logits = random_logits(65_540, 2)
    expected = erc.reference.token_stats(logits.double()).entropy
    assert (erc.token_stats(logits, backend=BACKEND).entropy - expected).abs().max() < 1e-6


def test_rows_beyond_2_to_31_elements_are_addressed_in_64_bits(machine):
    """Row 3 of rows 2^30 elements apart, in memory that is never touched in between."""
    storage = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16)  # pages that are not written cost nothing
    logits = storage.as_strided((4, 8), (2**30, 1))
    logits.copy_(random_logits(4, 8, dtype=torch.bfloat16))
    expected = erc.reference.token_stats(logits.double()).entropy
    assert (erc.token_stats(logits, backend=BACKEND).entropy - expected).abs().max() < 1e-6


# ---- order -----------------------------------------------------------------------------------------------------------


def loss_call(host, logits: Tensor, labels: Tensor, in_place: bool = False, weights: Tensor | None = None, **numbers):
    """Loss, per-token loss, log-prob, entropy, flags, metrics, number of tokens, and the gradient unless it is written
    over the logits: a clipped loss with an entropy bonus, whose inputs change from token to token."""
    values = torch.linspace(-1, 1, labels.numel())
    weights = 1 + values.abs() if weights is None else weights
    numbers = {"reduction": Reduction.TOKEN_SUM, "entropy_coef": 0.2, "entropy_shares": 1, **numbers}
    arguments = (None, labels, values + 0.5, weights, values - 6, *[None] * 9)
    arguments += (params((0.2, 0.28, INF, INF), present=Present.OLD_LOGPROB, **numbers), IGNORE, False, True)
    operator = host.ops.policy_loss_ if in_place else host.ops.policy_loss
    loss, per_token, flags, metrics, tokens, gradient = operator(logits, *arguments)
    return loss, *per_token, flags, metrics, tokens, *([] if in_place else [gradient])


def shard_state(host, logits: Tensor, labels: Tensor, start: int) -> Tensor:
    state = torch.empty(4, labels.numel(), dtype=ops.stats_dtype(logits.dtype))
    host.ops.partial_stats_(logits, labels, None, params(), IGNORE, None, 0, start, state)
    return state


@pytest.mark.parametrize(("dtype", "V"), [(torch.bfloat16, 24_576), (torch.float32, 20_488), (torch.float64, 10_242)])
@pytest.mark.parametrize("forbidden", [False, True])
def test_cluster_block_and_split_give_the_same_bits(forbidden, dtype, V, host):
    logits, labels = random_logits(1, 3, V, dtype=dtype), random_labels(3, V=V)
    labels[1] = IGNORE
    if forbidden:
        logits[0, 2, V // 2 : V // 2 + 900] = -INF
    results = []
    for clusters, multiprocessors in MACHINES.values():
        host.configure(clusters=clusters, multiprocessors=multiprocessors)
        statistics = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
        partial = shard_state(host, logits, labels, 0)
        overwritten = logits.clone()
        in_place, fused = loss_call(host, overwritten, labels, in_place=True), loss_call(host, logits, labels)
        results.append((*statistics, partial, *fused, *in_place, overwritten))
        for a, b in zip((*statistics[:2], overwritten), (fused[2], fused[3], fused[-1]), strict=True):
            assert torch.equal(bits(a), bits(b))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_and_alignment_change_no_bit(dtype, machine):
    """Padded rows, `logits[:, :-1]`, rows that start two or four bytes off: the same columns meet in the same order."""
    V = 1032
    plain = random_logits(2, 2, V, dtype=dtype)
    padded = torch.zeros(2, 3, V + 64, dtype=dtype)
    padded[:, :2, :V] = plain
    shifted = torch.zeros(4 * V + 1, dtype=dtype)[1:].view(2, 2, V).copy_(plain)
    labels = random_labels(4, V=V)
    results = []
    for logits in (plain, padded[:, :2, :V], shifted):
        statistics = machine.ops.stats_forward(logits, labels, None, params(), IGNORE)
        results.append((*statistics, *loss_call(machine, logits, labels)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(bits(a), bits(b))


def test_a_row_does_not_depend_on_its_batch(machine):
    logits, labels = random_logits(4, 2053), random_labels(4, V=2053)
    together = erc.token_stats(logits, labels, backend=BACKEND)
    alone = erc.token_stats(logits[2:3].clone(), labels[2:3], backend=BACKEND)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(bits(a[2:3]), bits(b))


@pytest.mark.parametrize("order", [1, 7])
@pytest.mark.parametrize("poison", [0x00, 0x7F])
def test_neither_the_order_of_threads_nor_old_shared_memory_shows(order, poison, host):
    """Of blocks neither. A missing barrier shows up as a difference between orders, a read of uninitialised memory as
    one between poisons."""
    logits, labels = random_logits(1, 2, 24_576, dtype=torch.bfloat16), random_labels(2, V=24_576)
    for clusters, multiprocessors in MACHINES.values():
        results = []
        for choice in ({}, {"order": order, "poison": poison}):
            host.configure(clusters=clusters, multiprocessors=multiprocessors, **choice)
            statistics = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
            pair = host.ops.paired_forward(logits, logits.flip(2).contiguous(), None, params())
            tokens = (random_labels(1300, V=70), torch.ones(1300), *[None] * 11, params(), IGNORE, 70, False)
            table, active, counter = host.ops.token_table(*tokens)
            per_token = torch.rand(4, 1300, generator=torch.Generator().manual_seed(3))
            flags = torch.zeros(1300, dtype=torch.int32)
            summary = host.ops.token_summary(per_token, flags, table, active, counter, params(), IGNORE)
            results.append((*statistics, *pair, *loss_call(host, logits, labels), table, *summary))
        for a, b in zip(*results, strict=True):
            assert torch.equal(bits(a), bits(b))


# ---- PyTorch's own checks --------------------------------------------------------------------------------------------


def test_operators_pass_opcheck(host):
    host.configure()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    logits, labels, ones = random_logits(1, 2, 70), random_labels(2, V=70), torch.ones(2)
    leaf, scaling = logits.clone().requires_grad_(True), (labels, None, params(), IGNORE)
    saved = host.ops.stats_forward(logits, *scaling)[3]
    stats, paired = host.ops.paired_forward(logits, logits + 1, None, params())
    tokens = (labels, ones, *[None] * 11, params(), IGNORE)
    table, _, counter = host.ops.token_table(*tokens, 70, False)
    per_token = torch.empty(4, 2), torch.empty(2, dtype=torch.int32)
    summed = torch.ones(4, 2), torch.zeros(2, dtype=torch.int32)
    for operator, arguments in (
        (host.ops.stats_forward, (leaf, *scaling)),
        (host.ops.stats_backward, (logits, *scaling, saved, ones, None, ones)),
        (host.ops.stats_forward_, (logits, *scaling, None, 0, torch.empty(6, 2))),
        (host.ops.stats_backward_, (logits, *scaling, None, 0, saved, ones, None, ones, torch.empty_like(logits))),
        (host.ops.partial_stats_, (logits, *scaling, None, 0, 0, torch.empty(4, 2))),
        (host.ops.token_table, (*tokens, 70, False)),
        (host.ops.loss_rows_, (logits, *scaling, None, 0, table, *per_token, torch.empty_like(logits))),
        (host.ops.token_summary, (*summed, table, labels, counter, params(), IGNORE)),
        (host.ops.policy_loss, (leaf, None, *tokens, False, True)),
        (host.ops.policy_loss_, (logits, None, *tokens, False, True)),
        (host.ops.scale_rows, (logits, ones)),
        (host.ops.scale_rows_, (logits, ones[0])),
        (host.ops.paired_forward, (leaf, logits + 1, None, params())),
        (host.ops.paired_backward, (logits, logits + 1, None, params(), paired, stats)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_compiles_into_one_graph(host):
    host.configure()
    logits, labels, advantages = random_logits(4, 70), random_labels(4, V=70), torch.ones(4)

    def forward(x: Tensor) -> Tensor:
        rest = {"old_logprob": None, "advantages": advantages, "objective": "ppo", "backend": BACKEND}
        entropy = erc.token_stats(x, labels, backend=BACKEND).entropy
        return erc.policy_loss(x, labels, **rest).loss + entropy.sum()

    eager, compiled = (logits.clone().requires_grad_(True) for _ in range(2))
    forward(eager).backward()
    torch.compile(forward, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(compiled.grad, eager.grad) and (eager.grad != 0).any()


# ---- launches --------------------------------------------------------------------------------------------------------


def test_launches_have_the_shape_that_the_machine_code_report_assumes(host):
    """At Qwen's vocabulary in bfloat16: threads of a block, blocks of a cluster, bytes of shared memory."""
    cuda_variants = pytest.importorskip("benchmarks.machine_code.cuda_variants", reason="the report needs triton")
    assumed = {kernel.name: (kernel.threads, kernel.cluster, kernel.shared) for kernel in cuda_variants.MAIN}
    logits, labels = random_logits(1, 2, 151_936, dtype=torch.bfloat16), random_labels(2, V=151_936)
    seen = {}
    for clusters, multiprocessors in MACHINES.values():  # with room for one row in the cache, which is what counts
        host.configure(clusters=clusters, multiprocessors=multiprocessors, l2_bytes=1 << 19)
        *_, saved = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
        host.ops.stats_backward(logits, labels, None, params(), IGNORE, saved, torch.ones(2), None, None)
        loss_call(host, logits, labels)
        seen[clusters, multiprocessors] = [shape[1:] for shape in host.launches()]
    stats, gradient = assumed["stats"], assumed["stats gradient"]
    table, summary = (256, 1, 3 * 8 * 8), (256, 1, 8 * 18 * 8 + 16)
    assert seen[True, 1] == [stats, gradient, table, assumed["loss, cluster"], summary]
    assert seen[False, 1] == [stats, gradient, table, assumed["loss, block"], summary]
    segment, merge = assumed["stats of a segment"], (32, 1, 0)
    loss = [table, segment, assumed["loss gradient of shared rows"], summary]
    assert seen[False, 132] == [segment, merge, gradient, *loss]


class Recorded(TorchDispatchMode):
    """The names of the operators that PyTorch runs, but for views and what only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and not func.is_view and "empty" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in erc.objectives() if erc.objective(name).fused])
@pytest.mark.parametrize("form", MACHINES)
def test_a_fused_loss_and_its_backward_take_six_launches(form, name, host):
    """Count, table, rows, summary, the fill of the upstream 1, scale; one more where rows are split over blocks. With a
    mask and an advantage per sequence; counted, or with normalizers on the device."""
    shape, columns = (2, 2), 24_576
    logits, labels = random_logits(*shape, columns, dtype=torch.bfloat16), random_labels(*shape, V=columns)
    given = {"old_logprob": torch.full(shape, -9.0), "ref_logprob": torch.full(shape, -9.5)}
    given |= {"old_entropy": torch.full(shape, 3.0), "advantages": torch.ones(2), "mask": torch.ones(shape)}
    device_numbers = {name: torch.tensor(4.0) for name in ("normalizer", "entropy_normalizer")}
    objective = erc.objective(name, entropy_coef=0.01, entropy_reduction="active-mean")
    counts = []
    for normalizers in ({}, device_numbers):
        host.configure(*MACHINES[form])
        leaf = logits.clone().requires_grad_(True)
        with Recorded() as recorded:
            options = {**given, **normalizers, "objective": objective, "backend": BACKEND}
            erc.policy_loss(leaf, labels, **options).loss.backward()
        assert set(recorded.names) == {"aten::ones_like"} and leaf.grad.any()
        counts.append(len(host.launches()) + len(recorded.names))
    assert max(counts) == 6 + (form == "split") and min(counts) >= 5


def test_a_summary_of_the_same_tokens_again(host):
    """The last block leaves the counter as it found it."""
    host.configure()
    labels, ones = random_labels(1500, V=70), torch.ones(1500)
    table, labels, counter = host.ops.token_table(labels, ones, *[None] * 11, params(), IGNORE, 70, False)
    per_token, flags = torch.rand(4, 1500), torch.zeros(1500, dtype=torch.int32)
    arguments = (per_token, flags, table, labels, counter, params(), IGNORE)
    for a, b in zip(host.ops.token_summary(*arguments), host.ops.token_summary(*arguments), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert counter == 0 and len(host.launches()) == 4


def test_code_for_sm_80_runs_in_no_cluster_whatever_the_machine(host):
    """There the cluster kernel has an empty body: it would return garbage, and success."""
    logits, labels = random_logits(1, 2, 4096, dtype=torch.bfloat16), random_labels(2, V=4096)
    results = []
    for compiled_for in (90, 80):
        host.configure(clusters=True, compiled_for=compiled_for)
        results.append(loss_call(host, logits, labels))
        _, launch, _ = host.launches()  # between the token table and the summary
        assert (launch[3] > logits[0, 0].nbytes) == (compiled_for == 90), "a cluster keeps its row in shared memory"
    for cluster, block in zip(*results, strict=True):
        assert torch.equal(bits(cluster), bits(block))


# ---- the fused loss --------------------------------------------------------------------------------------------------

RULES = {
    "ppo": PPOClip(0.2, 0.28),
    "dual clip": PPOClip(0.2, 0.28, dual_clip=1.5),
    "two-sided": PPOClip(0.2, 0.28, delta=1.6),
    "gppo": GPPO(0.2, 0.28),
    "ce-gppo": CEGPPO(0.2, 0.2, 0.5, 1.0),
    "cispo": CISPO(0.8, 1.28),
    "sapo": SAPO(),
    "dppo tv": DPPO("tv", 0.01, 0.01),
    "dppo kl": DPPO("kl", 0.005, 0.005),
    "reinforce": Reinforce(),
    "dro": DRO(0.1),
    "no clip": NoClip(),
}
GATES = {"no gate": None, "kept": EntropyRatioClip(), "zero": EntropyRatioClip(value="zero")}
KLS = {
    "no kl": None,
    **{kind: KLPenalty(kind, 0.1) for kind in ("k1", "k2", "k3", "abs", "k3+")},
    "weighted k3": KLPenalty("k3", 0.1, importance_weighted=True),
}


def run_loss(logits: Tensor, labels: Tensor, given: dict, objective: Objective, backend: str):
    leaf = (logits.double() if backend == "torch" else logits).detach().clone().requires_grad_(True)
    unused = {"old_entropy"} if objective.entropy_ratio is None else set()
    unused |= {"ref_logprob"} if objective.kl is None else set()
    real = ops.stats_dtype(leaf.dtype)
    inputs = {name: None if name in unused else value.to(real) for name, value in given.items()}
    result = erc.policy_loss(leaf, labels, **inputs, objective=objective, backend=backend)
    result.loss.backward()
    return result, leaf.grad


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


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_gate_and_penalty_matches_the_oracle(rule, gate, kl, host):
    host.configure()
    objective = Objective(ratio=RULES[rule], entropy_ratio=GATES[gate], kl=KLS[kl], entropy_coef=0.01 * (kl != "no kl"))
    logits, labels, given = tokens_around_every_bound(72)
    actual, gradient = run_loss(logits, labels, given, objective, BACKEND)
    expected, reference = run_loss(logits, labels, given, objective, "torch")
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(actual.per_token_loss.double(), expected.per_token_loss.double(), rtol=5e-6, atol=2e-6)
    for name in ("clip_fraction_low", "clip_fraction_high", "erc_fraction_low", "erc_fraction_high", "erc_fraction"):
        assert actual.metrics[name].item() == pytest.approx(expected.metrics[name].item()), name
    assert (gradient[5] == 0).all()
    # The factor in front of a row's gradient carries the rounding of exp(logprob - old_logprob).
    scale = reference.abs().amax(-1)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=4e-6 * float(scale.max()))
    live = scale > 1e-6
    for mutation in (torch.zeros_like(gradient), 1.05 * gradient, gradient.roll(1, -1)):
        assert (gradient_error(mutation, reference)[live] > 1e-3).any()


@pytest.mark.parametrize(
    ("dtype", "V"),
    [
        (torch.bfloat16, 24_576),
        (torch.float16, 2053),
        (torch.float16, 1032),
        (torch.float32, 20_488),
        (torch.float64, 520),
    ],
)
def test_the_fused_loss_on_every_machine(dtype, V, machine):
    logits, labels, given = tokens_around_every_bound(V, rows=6, dtype=dtype)
    objective = erc.objective("erc-dapo", entropy_coef=0.01)
    actual, gradient = run_loss(logits, labels, given, objective, BACKEND)
    expected, reference = run_loss(logits, labels, given, objective, "torch")
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    assert_gradient(gradient, reference, slack=4e-6)


def test_large_weights_do_not_overflow_beside_masked_tokens(machine):
    """slope * x may leave float32 where p is 0: with a weight of 1e6 and logits of -3e38."""
    logits, labels = random_logits(1, 2, 1032), random_labels(2, V=1032)
    logits[0, :, 500:] = torch.finfo(torch.float32).min
    labels %= 500
    million = torch.full((2,), 1e6)
    gradient = loss_call(machine, logits, labels, weights=million, entropy_coef=-1, temperature=1.5)[-1]
    assert gradient.isfinite().all() and (gradient[0, :, 500:] == 0).all() and (gradient[0, :, :500] != 0).any()


def test_without_a_gradient_none_is_written(machine):
    logits, labels, given = tokens_around_every_bound(24_576, rows=6, dtype=torch.bfloat16)
    ref_logprob = given.pop("ref_logprob")
    with torch.no_grad():
        quiet = erc.policy_loss(logits, labels, **given, backend=BACKEND)
    loud, _ = run_loss(logits, labels, {**given, "ref_logprob": ref_logprob}, erc.objective("erc-dapo"), BACKEND)
    assert torch.equal(quiet.loss, loud.loss.detach()) and not quiet.loss.requires_grad


# ---- shards, pairs, scaling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_merge_to_the_whole_row(dtype, machine):
    V, cuts = 1500, (0, 512, 513, 1500)
    logits = random_logits(1, 3, V, dtype=dtype)
    logits[0, 0, 512] = -INF  # a shard without any token
    labels = torch.tensor([5, 512, 1400])
    real = ops.stats_dtype(dtype)
    row_max = torch.full((3,), -INF, dtype=torch.float64)
    rest, weighted, label = (
        torch.zeros(3).double(),
        torch.zeros(3).double(),
        torch.full((3,), -INF, dtype=torch.float64),
    )
    for start, end in pairwise(cuts):
        part = logits[:, :, start:end]
        state = shard_state(machine, part, labels, start)
        assert state.dtype == real
        m, r, t, y = state.double()
        high, low = torch.maximum(m, row_max), torch.minimum(m, row_max)
        first = m > row_max
        r1, t1, r2, t2 = (torch.where(first, a, b) for a, b in ((r, rest), (t, weighted), (rest, r), (weighted, t)))
        shift = torch.where(low == -INF, 0.0, low - high)
        factor = torch.where(low == -INF, 0.0, shift.exp())
        rest, weighted = r1 + factor * (1 + r2), t1 + factor * (t2 + (1 + r2) * shift)
        row_max, label = high, torch.maximum(label, y)
    expected = erc.reference.token_stats(logits[0].double(), labels)
    merged = erc.TokenStats(
        label - row_max - rest.log1p(), rest.log1p() - weighted / (1 + rest), row_max + rest.log1p()
    )
    assert_statistics(merged, expected, 20.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [520, 2053])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_pairs_match_the_oracle(softcap, V, dtype, machine):
    logits, old = random_logits(3, V, dtype=dtype, spread=2.0), random_logits(3, V, dtype=dtype, spread=2.0, seed=9)
    old[1] = logits[1]  # no divergence
    old[2] = logits[2] + 0.05 * old[2]
    leaf, variable = logits.double().requires_grad_(True), logits.clone().requires_grad_(True)
    expected = erc.reference.entropy_ratio(leaf, old.double(), temperature=0.8, softcap=softcap)
    actual = erc.entropy_ratio(variable, old, temperature=0.8, softcap=softcap, backend=BACKEND)
    for name in expected._fields:
        a, b = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    for name in ("entropy", "ratio", "kl_new_old", "kl_old_new", "total_variation"):
        (gradient,) = torch.autograd.grad(getattr(actual, name).sum(), variable, retain_graph=True)
        (reference,) = torch.autograd.grad(getattr(expected, name).sum(), leaf, retain_graph=True)
        assert_gradient(gradient[[0]], reference[[0]], softcap or 0.0, slack=1e-5)


# ---- the harness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("divergent_barrier", "divergent barrier"),
        ("missing_thread", "missing threads"),
        ("shuffle_without_a_lane", "missing threads"),
        ("vote_without_a_lane", "missing threads"),
        ("partial_mask", "fewer than 32 lanes"),
        ("copy_without_wait", "nobody waited"),
        ("wait_for_nobody", "nobody sends"),
        ("half_a_group", "missing threads"),
        ("misaligned_load", "not aligned"),
        ("cluster_wait_alone", "without arriving"),
    ],
)
def test_the_harness_finds_what_a_gpu_leaves_undefined(kernel, message, host):
    host.configure()
    assert message in host.fault(kernel, torch.zeros(64))


def test_the_harness_shows_races_and_uninitialised_memory(host):
    outs = {}
    for kernel in ("sound", "missing_barrier", "uninitialised_shared"):
        for choice in ({"order": 0, "poison": 0}, {"order": 1, "poison": 0x7F}):
            host.configure(**choice)
            out = torch.zeros(64)
            assert host.fault(kernel, out) == ""
            outs.setdefault(kernel, []).append(out)
    assert torch.equal(*outs["sound"])
    assert not torch.equal(*outs["missing_barrier"]) and not torch.equal(*outs["uninitialised_shared"])


def test_votes_and_atomics(host):
    host.configure(order=7)
    out = torch.zeros(64)
    assert host.fault("votes_and_atomics", out) == ""
    assert out[:4].tolist() == [16 * 2, 1, sum(range(32)), 19]


@pytest.mark.slow
def test_kernels_under_address_and_undefined_behaviour_sanitizers():
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it has its own
    done = subprocess.run([build.sanitized_program()], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0 and done.stdout == "ok\n", done.stdout + done.stderr[-4000:]
