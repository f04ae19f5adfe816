"""The Triton kernels against the float64 oracle: in Triton's interpreter without a GPU, on the GPU where there is one.

Triton decides at import whether it interprets, for the whole process. So without a GPU `test_in_the_interpreter` runs
this module again in a process of its own, with TRITON_INTERPRET=1, and the tests below are skipped outside of it.

The interpreter's exp and log are NumPy's, more exact than a GPU's; its fused multiply-add rounds once, as hardware
does; its conversion to bfloat16 cuts off instead of rounding (`test_triton_machine_code` looks for the rounding
instruction).

Sizes: 5 is less than one load of a lane, 2,053 is prime (no alignment) and more than two segments of a program of 32
lanes, 2,048 is aligned; 40,000 is two segments and a tail at the size that GPUs run, 512 lanes.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import erc
from erc.constants import ABSENT_LABEL, TokenFlag
from erc.ops import stats_dtype
from erc.surrogate.entropy_ratio import EntropyRatioClip
from erc.surrogate.kl import KLPenalty
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import CEGPPO, CISPO, DPPO, DRO, GPPO, SAPO, NoClip, PPOClip, Reinforce

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = importlib.util.find_spec("triton") is not None and (INTERPRETED or DEVICE == "cuda")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NaN on purpose


def needs_kernels(test):
    """Runs where kernels do. Outside of the interpreter that is a GPU."""
    test = pytest.mark.skipif(not RUNS_HERE, reason="neither a GPU nor TRITON_INTERPRET=1 in this process")(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = math.nan, math.inf
IGNORE = -100

if RUNS_HERE:
    from erc.triton_kernels import OPERATORS, tuning
    from erc.triton_kernels.launch import launch
    from erc.triton_kernels.params import make_layout


@pytest.mark.skipif(RUNS_HERE, reason="the kernels run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.fixture
def small_programs(monkeypatch):
    """32 lanes: many tiles and segments at sizes that the interpreter gets through."""
    monkeypatch.setattr(tuning, "LANES", 32)


# ---- the oracle and the tolerances (DESIGN sections 5 and 8) ---------------------------------------------------------


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, spread: float = 4.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * spread).to(dtype).to(DEVICE)


def random_labels(*shape: int, V: int, seed: int = 1) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def oracle_statistics(logits: Tensor, labels: Tensor | None, **scaling) -> tuple[Tensor, erc.TokenStats]:
    """The float64 leaf and the reference's statistics of it."""
    leaf = logits.detach().double().requires_grad_(True)
    if isinstance(scaling.get("temperature"), Tensor):
        scaling = {**scaling, "temperature": scaling["temperature"].double()}
    return leaf, erc.reference.token_stats(leaf, labels, **scaling)


def assert_logprob_like(actual: Tensor, expected: Tensor, largest_x: float) -> None:
    both_infinite = actual.isinf() & (actual.double() == expected)
    error = torch.where(both_infinite, 0.0, (actual.double() - expected).abs())
    bound = 1e-6 * expected.abs().clamp(min=max(1.0, largest_x))
    assert (error <= torch.where(both_infinite, INF, bound)).all(), error.max()


def assert_entropy(actual: Tensor, expected: Tensor, softcap: float = 0.0) -> None:
    assert (actual >= 0).all()
    error = (actual.double() - expected).abs()
    assert (error <= (2e-6 + 2.0**-23 * softcap) * expected + 1e-13).all(), (error / expected).max()


def gradient_error(actual: Tensor, expected: Tensor) -> Tensor:
    """The largest error of each row against the largest gradient of the row."""
    error = (actual.double() - expected).abs().amax(-1)
    return (error - 1e-12).clamp(min=0) / expected.abs().amax(-1).clamp(min=1e-300)


def gradient_tolerance(dtype: torch.dtype, softcap: float = 0.0) -> float:
    """Two units of the relative bound of the entropy, and half an ulp where the gradient is stored in 16 bits."""
    rounding = {torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0)
    return rounding + 2e-6 + 2.0**-23 * softcap


def assert_gradient(actual: Tensor, expected: Tensor, dtype: torch.dtype, softcap: float = 0.0) -> None:
    """Accepts `actual`, and rejects what a broken kernel would write: zeros, a scaled gradient, a shifted one."""
    tolerance = gradient_tolerance(dtype, softcap)
    assert (gradient_error(actual, expected) <= tolerance).all(), gradient_error(actual, expected).max()
    moving = expected.abs().amax(-1) > 1e-6
    if actual.shape[-1] > 1 and moving.any():
        for mutation in (torch.zeros_like(actual), actual * 1.05, actual.roll(1, -1)):
            assert (gradient_error(mutation, expected)[moving] > tolerance).any()


# ---- statistics ------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "V", "softcap"),
    [
        *((dtype, V, None) for dtype in DTYPES for V in (1, 5, 2048, 2053)),
        *((dtype, V, 6.0) for dtype in DTYPES for V in (5, 520)),
    ],
)
def test_statistics_and_gradients_match_the_oracle(dtype, V, softcap, small_programs):
    logits = random_logits(3, V, dtype=dtype)
    labels = random_labels(3, V=V)
    labels[1] = logits[1].argmax()  # of a maximum, 1 - p_y must not cancel
    scaling = {"temperature": 0.7, "softcap": softcap, "logit_scale": 1.3}
    leaf, expected = oracle_statistics(logits, labels, **scaling)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, **scaling, backend="triton")
    largest_x = float(logits.double().abs().max()) * 1.3 / 0.7
    assert actual.logprob.dtype == stats_dtype(dtype)
    assert_logprob_like(actual.logprob, expected.logprob, largest_x)
    assert_logprob_like(actual.logsumexp, expected.logsumexp, largest_x)
    assert_entropy(actual.entropy, expected.entropy, softcap or 0.0)
    pairs = list(zip(actual, expected, strict=True))
    if V > 520:  # one sweep for all of them
        pairs = [(sum(actual), sum(expected))]
    for output, oracle in pairs:
        upstream = torch.tensor([0.7, -1.3, 0.4], device=DEVICE)
        (gradient,) = torch.autograd.grad((output * upstream.to(output.dtype)).sum(), variable, retain_graph=True)
        (reference,) = torch.autograd.grad((oracle * upstream.double()).sum(), leaf, retain_graph=True)
        assert_gradient(gradient, reference, dtype, softcap or 0.0)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_at_the_size_of_a_gpu_program(dtype):
    logits = random_logits(2, 40_000, dtype=dtype)
    labels = random_labels(2, V=40_000)
    leaf, expected = oracle_statistics(logits, labels)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, backend="triton")
    assert_logprob_like(actual.logprob, expected.logprob, 20.0)
    assert_entropy(actual.entropy, expected.entropy)
    (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
    (reference,) = torch.autograd.grad((expected.logprob + expected.entropy).sum(), leaf)
    assert_gradient(gradient, reference, dtype)


@needs_kernels
@pytest.mark.parametrize("gap", [2.0, 8.0, 14.0, 17.0, 24.0, 40.0])
def test_peaked_rows_keep_the_entropy_s_relative_precision(gap, small_programs):
    """H down to 1e-16: all of it is in the rest of the row, which 1 + R would have rounded away."""
    logits = random_logits(4, 777, spread=0.5)
    logits[:, 123] = logits.amax(-1) + gap
    _, expected = oracle_statistics(logits, None)
    actual = erc.token_stats(logits, backend="triton")
    assert_entropy(actual.entropy, expected.entropy)


@needs_kernels
def test_no_entropy_ratio_decision_flips(small_programs):
    logits = torch.cat([random_logits(8, 513, spread=s, seed=int(s)) for s in (1.0, 4.0, 9.0)])
    _, expected = oracle_statistics(logits, None)
    entropy = erc.token_stats(logits, backend="triton").entropy
    old = (expected.entropy * torch.linspace(0.9, 1.1, len(logits), device=DEVICE, dtype=torch.float64)).float()
    gate = EntropyRatioClip()
    actual, oracle = (gate.dropped(h, old.to(h.dtype))[0] for h in (entropy, expected.entropy))
    assert torch.equal(actual, oracle)
    assert oracle.any() and not oracle.all()


@needs_kernels
def test_one_temperature_a_row(small_programs):
    logits, labels = random_logits(3, 300), random_labels(3, V=300)
    temperature = torch.tensor([0.5, 1.0, 1.7], device=DEVICE)
    leaf, expected = oracle_statistics(logits, labels, temperature=temperature)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, temperature=temperature, backend="triton")
    assert_logprob_like(actual.logprob, expected.logprob, 40.0)
    assert_entropy(actual.entropy, expected.entropy)
    (gradient,) = torch.autograd.grad((actual.logprob - actual.entropy).sum(), variable)
    (reference,) = torch.autograd.grad((expected.logprob - expected.entropy).sum(), leaf)
    assert_gradient(gradient, reference, torch.float32)


# ---- edges -----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_minus_inf_logits_are_forbidden_tokens(softcap, small_programs):
    logits = random_logits(5, 1100)
    logits[0, :600] = -INF  # the first tiles hold nothing
    logits[1, 3:] = -INF  # most lanes hold nothing
    logits[2, :] = -INF
    logits[2, 77] = 0.25  # all but one
    logits[3, ::2] = -INF
    labels = torch.tensor([700, 1, 77, 4, 9], device=DEVICE)  # row 3: the label itself is forbidden
    kept = logits.masked_fill(logits == -INF, -1e4).double()  # far below: p = 0 in float64
    if softcap:
        kept = torch.where(logits == -INF, -1e4, softcap * torch.tanh(logits.double() / softcap))
    kept.requires_grad_(True)
    expected = erc.reference.token_stats(kept, labels)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, softcap=softcap, backend="triton")
    assert actual.logprob[3] == -INF
    assert_logprob_like(actual.logprob[[0, 1, 2, 4]], expected.logprob[[0, 1, 2, 4]].detach(), 20.0)
    assert_entropy(actual.entropy, expected.entropy.detach(), softcap or 0.0)
    (gradient,) = torch.autograd.grad((actual.entropy + actual.logsumexp).sum(), variable)
    assert (gradient[logits == -INF] == 0).all()
    if softcap is None:
        (reference,) = torch.autograd.grad((expected.entropy + expected.logsumexp).sum(), kept)
        assert_gradient(gradient, reference, torch.float32)
    (gradient,) = torch.autograd.grad(
        erc.token_stats(variable, labels, softcap=softcap, backend="triton").logprob[3], variable
    )
    assert gradient.isfinite().all() and (gradient[logits == -INF] == 0).all()


@needs_kernels
@pytest.mark.parametrize("where", [0, 640, 1099])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_plus_inf_poison_their_row_alone(value, where, small_programs):
    logits, labels = random_logits(3, 1100), random_labels(3, V=1100)
    clean = erc.token_stats(logits, labels, backend="triton")
    logits[1, where] = value
    variable = logits.requires_grad_(True)
    actual = erc.token_stats(variable, labels, backend="triton")
    for output, before in zip(actual, clean, strict=True):
        assert output[1].isnan()
        assert torch.equal(output[[0, 2]], before[[0, 2]])
    (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
    assert gradient[1].isnan().all() and gradient[[0, 2]].isfinite().all()


@needs_kernels
def test_a_row_that_is_all_minus_inf_is_nan(small_programs):
    logits = torch.full((1, 70), -INF, device=DEVICE)
    assert all(
        output.isnan().all() for output in erc.token_stats(logits, torch.tensor([3]).to(DEVICE), backend="triton")
    )


@needs_kernels
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", [1e7, 2e8, 1e9, 1e10, 1e30, 2e37])
def test_huge_logits_are_numbers_like_others(size, temperature, small_programs):
    """Where a float32 is so coarse that a row's probability belongs to its equal maxima."""
    logits = random_logits(3, 1100, spread=0.5) * size
    logits[1, ::5] = 2 * size  # ties
    logits[2, :] = -size
    labels = torch.tensor([7, 10, 3], device=DEVICE)
    leaf, expected = oracle_statistics(logits, labels, temperature=temperature)
    variable = logits.clone().requires_grad_(True)
    actual = erc.token_stats(variable, labels, temperature=temperature, backend="triton")
    assert_logprob_like(actual.logprob, expected.logprob, 4 * size / temperature)
    assert_entropy(actual.entropy, expected.entropy)
    (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
    (reference,) = torch.autograd.grad((expected.logprob + expected.entropy).sum(), leaf)
    assert_gradient(gradient, reference, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_the_lowest_number_is_uniform(dtype, small_programs):
    """What programs that know no -inf write over a forbidden token, over all of them."""
    logits = torch.full((1, 70), torch.finfo(dtype).min, dtype=dtype, device=DEVICE).requires_grad_(True)
    actual = erc.token_stats(logits, torch.tensor([3], device=DEVICE), backend="triton")
    assert actual.entropy.item() == pytest.approx(math.log(70), rel=1e-6)
    (gradient,) = torch.autograd.grad(actual.logprob, logits)
    assert gradient[0, 3].item() == pytest.approx(69 / 70, rel=1e-2)
    assert gradient[0, 5].item() == pytest.approx(-1 / 70, rel=1e-2)


@needs_kernels
def test_ignored_rows_are_not_read(small_programs):
    logits = random_logits(2, 300)
    logits[0] = NAN
    labels = torch.tensor([IGNORE, 5], device=DEVICE)
    variable = logits.requires_grad_(True)
    actual = erc.token_stats(variable, labels, backend="triton")
    assert all(output[0] == 0 for output in actual)
    (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
    assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


def operator_params(temperature=1.0, softcap=0.0, rule=(0.2, 0.28, INF, INF), kl=(0.0, INF)) -> Tensor:
    return torch.tensor([temperature, softcap, 1.0, *rule, 0.05, 0.05, 1e-8, *kl], dtype=torch.float64)


@needs_kernels
@pytest.mark.parametrize("label", [300, -1, 2**40, ABSENT_LABEL])
def test_a_label_out_of_range_makes_its_row_nan_and_reads_nothing_else(label, small_programs):
    logits = random_logits(1, 2, 300)
    labels = torch.tensor([label, 7], device=DEVICE)
    logprob, entropy, _, saved = OPERATORS["stats_forward"](logits, labels, None, operator_params(), IGNORE)
    assert logprob[0].isnan() and entropy[0].isnan() and logprob[1].isfinite()
    ones = torch.ones(2, device=DEVICE)
    gradient = OPERATORS["stats_backward"](logits, labels, None, operator_params(), IGNORE, saved, ones, None, None)
    assert gradient[0, 0].isnan().all() and gradient[0, 1].isfinite().all()


@needs_kernels
def test_a_label_of_another_shard_counts_as_forbidden_here(small_programs):
    logits = random_logits(1, 1, 300)
    absent = torch.tensor([ABSENT_LABEL], device=DEVICE)
    saved = OPERATORS["stats_forward"](logits, None, None, operator_params(), IGNORE)[3]
    one = torch.ones(1, device=DEVICE)
    gradient = OPERATORS["stats_backward"](logits, absent, None, operator_params(), IGNORE, saved, one, None, None)
    torch.testing.assert_close(gradient[0], -logits[0].double().softmax(-1).float(), rtol=1e-5, atol=1e-9)


@needs_kernels
def test_no_rows():
    actual = erc.token_stats(
        torch.zeros(0, 7, device=DEVICE), torch.zeros(0, dtype=torch.int64).to(DEVICE), backend="triton"
    )
    assert actual.logprob.shape == (0,)


class RecordedKernel:
    """Stands in for a kernel: remembers the grid."""

    __name__ = "recorded_kernel"

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *_, **__: None


@needs_kernels
def test_more_rows_than_a_second_grid_dimension_holds():
    """65,535 is where every dimension of a grid ends but the first."""
    recorded = RecordedKernel()
    launch(recorded, 70_000, torch.empty(0, device=DEVICE), L=make_layout(torch.float32))
    assert recorded.grid == (70_000,)


@needs_kernels
def test_rows_beyond_2_to_31_elements_are_addressed_in_64_bits():
    """Row 3 of rows 2^30 elements apart, in memory that is never touched in between."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    storage = torch.empty(3 * 2**30 + 8, dtype=torch.bfloat16, device=DEVICE)  # pages that are not written cost nothing
    logits = storage.as_strided((1, 4, 8), (8, 2**30, 1))
    logits.copy_(random_logits(1, 4, 8, dtype=torch.bfloat16))
    expected = erc.reference.token_stats(logits[0].double())
    assert_entropy(erc.token_stats(logits[0], backend="triton").entropy, expected.entropy)


# ---- addressing and order --------------------------------------------------------------------------------------------


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_and_alignment_change_no_bit(dtype, small_programs):
    """Rows 16 bytes apart from alignment, padded rows, `logits[:, :-1]`: the same columns meet in the same order."""
    V = 1032
    plain = random_logits(2, 2, V, dtype=dtype)
    padded = torch.zeros(2, 3, V + 64, dtype=dtype, device=DEVICE)
    padded[:, :2, :V] = plain
    shifted = torch.zeros(4 * V + 1, dtype=dtype, device=DEVICE)[1:].view(2, 2, V).copy_(plain)
    labels = random_labels(2, 2, V=V)
    results = []
    for logits in (plain, padded[:, :2, :V], shifted):
        variable = logits.detach().requires_grad_(True)
        actual = erc.token_stats(variable, labels, backend="triton")
        (gradient,) = torch.autograd.grad((actual.logprob + actual.entropy).sum(), variable)
        results.append((*actual, gradient.float()))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(bits(a), bits(b))


@needs_kernels
def test_a_row_does_not_depend_on_its_batch(small_programs):
    logits, labels = random_logits(4, 2053), random_labels(4, V=2053)
    together = erc.token_stats(logits, labels, backend="triton")
    alone = erc.token_stats(logits[2:3].clone(), labels[2:3], backend="triton")
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(bits(a[2:3]), bits(b))


def loss_call(logits: Tensor, labels: Tensor, entropy_weight: bool = True, in_place: bool = False):
    """The fused operator with every per-token input that a plain objective has."""
    n = labels.numel()
    values = torch.linspace(-1, 1, n, device=DEVICE)
    arguments = (
        labels, None, operator_params(), IGNORE, torch.full((n,), 0.3, device=DEVICE), values + 0.5, values - 6, None,
        None,
        None, values * 0.2 if entropy_weight else None, None, 0, 0, 0,
    )  # fmt: skip
    return (
        OPERATORS["policy_loss_"](logits, *arguments)
        if in_place
        else OPERATORS["policy_loss"](logits, *arguments, True)
    )


@needs_kernels
@pytest.mark.parametrize("forbidden", [False, True])
def test_rows_shared_by_several_programs_give_the_same_bits(forbidden, small_programs, monkeypatch):
    logits, labels = random_logits(1, 3, 2053), random_labels(3, V=2053)
    labels[1] = IGNORE
    if forbidden:
        logits[0, 2, 1500:] = -INF
    results = []
    for shared in (False, True):
        monkeypatch.setattr(tuning, "shares_rows", lambda *_, shared=shared: shared)
        statistics = OPERATORS["stats_forward"](logits, labels, None, operator_params(), IGNORE)
        partial = OPERATORS["partial_stats"](logits, labels, None, operator_params(), IGNORE, 0)
        results.append(
            (*statistics, partial, *loss_call(logits, labels), *loss_call(logits.clone(), labels, in_place=True))
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a), bits(b))


@needs_kernels
def test_the_fused_loss_and_the_statistics_agree_bit_by_bit(small_programs):
    logits, labels = random_logits(1, 3, 2053), random_labels(3, V=2053)
    logprob, entropy, *_ = OPERATORS["stats_forward"](logits, labels, None, operator_params(), IGNORE)
    _, _, fused_logprob, fused_entropy, _, _ = loss_call(logits, labels)
    assert torch.equal(bits(logprob), bits(fused_logprob)) and torch.equal(bits(entropy), bits(fused_entropy))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_in_place_are_the_same_bits(dtype, small_programs):
    logits, labels = random_logits(1, 3, 2053, dtype=dtype), random_labels(3, V=2053)
    *outputs, gradient = loss_call(logits, labels)
    overwritten = logits.clone()
    for a, b in zip(outputs, loss_call(overwritten, labels, in_place=True), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(gradient, overwritten)
    inputs = (labels, None, operator_params(), IGNORE)
    *_, saved = OPERATORS["stats_forward"](logits, *inputs)
    upstream = [torch.linspace(-1, 1, 3, device=DEVICE) for _ in range(3)]
    gradient, overwritten = OPERATORS["stats_backward"](logits, *inputs, saved, *upstream), logits.clone()
    OPERATORS["stats_backward_"](overwritten, *inputs, saved, *upstream)
    assert torch.equal(gradient, overwritten)


@needs_kernels
def test_several_rows_a_program(small_programs, monkeypatch):
    """On a GPU the fused loss caps the rows in flight: a program works through several."""
    logits, labels = random_logits(1, 5, 300), random_labels(5, V=300)
    expected = loss_call(logits, labels)
    monkeypatch.setattr(tuning, "programs_for_loss", lambda *_: 2)
    for a, b in zip(loss_call(logits, labels), expected, strict=True):
        assert torch.equal(a, b)


# ---- tuning ----------------------------------------------------------------------------------------------------------

MIB = 1 << 20
GPUS = {  # multiprocessors, warp size, cache between the sweeps: data sheets (for the MI300X, its Infinity Cache)
    "sm_80": (108, 32, 40 * MIB),
    "sm_90": (132, 32, 50 * MIB),
    "sm_100": (148, 32, 126 * MIB),
    "gfx942": (304, 64, 256 * MIB),
}


@needs_kernels
@pytest.mark.parametrize("V", [32_768, 131_072, 151_936, 262_144])
@pytest.mark.parametrize("architecture", GPUS)
def test_the_rows_in_flight_stay_in_the_cache(architecture, V):
    """A program holds half its row on average."""
    device = tuning.Device(architecture, *GPUS[architecture])
    programs = tuning.programs_for_loss(device, 2 * V, rows=100_000)
    assert device.multiprocessors * 0.8 < programs
    assert programs * V <= tuning.CACHE_SHARE * device.cache_bytes
    assert tuning.programs_for_loss(device, 4 * V, rows=100_000) <= programs, "float32 rows are twice as large"


@needs_kernels
def test_other_machines_and_rows_take_what_the_cache_holds():
    for architecture in ("sm_75", "sm_90"):
        device = tuning.Device(architecture, 100, 32, 50 * MIB)
        for kib in (1024, 4096):
            programs = tuning.programs_for_loss(device, kib * 1024, rows=100_000)
            assert programs >= 1 and programs * kib * 1024 / 2 <= max(0.6 * 50 * MIB, kib * 512)
    assert tuning.programs_for_loss(tuning.Device("sm_75", 100, 32, 50 * MIB), 1024, rows=100_000) == 200
    assert tuning.programs_for_loss(tuning.Device("sm_75", 100, 32, 50 * MIB), 1024, rows=7) == 7


@needs_kernels
def test_a_measured_line_holds_for_rows_up_to_its_size(monkeypatch):
    monkeypatch.setitem(tuning.MEASURED, ("sm_90", 64), tuning.Tuning(3, 0.25))
    device = tuning.Device("sm_90", *GPUS["sm_90"])
    assert tuning.tuning_of(device, 64 * 1024) == tuning.Tuning(3, 0.25)
    assert tuning.tuning_of(device, 64 * 1024 + 1) == tuning.tuning_of(device._replace(architecture="?"), 64 * 1024 + 1)


@needs_kernels
def test_autotuning_finds_the_fastest_line_and_leaves_no_trace(small_programs, monkeypatch):
    from erc.triton_kernels import autotune

    monkeypatch.setattr(tuning, "_INTERPRETER", None)  # so that the line counts, as on a GPU
    monkeypatch.setattr(autotune, "PROGRAMS", (1.0, 1.5, 2.0))
    monkeypatch.setattr(autotune, "SPLITS", (0.0, 0.25))
    device = tuning.Device("sm_90", *GPUS["sm_90"])
    monkeypatch.setattr(tuning, "device_of", lambda _: device)
    seen = []

    def seconds(call):
        line = tuning.tuning_of(device, 2 * 67)
        seen.append(line)
        assert call().loss.isfinite()
        return abs(line.loss_programs - 1.5) + abs(line.split_below - 0.25)

    before = tuning.tuning_of(device, 2 * 67)
    assert autotune.best_tuning(67, 2, 1, seconds, device=DEVICE) == tuning.Tuning(1.5, 0.25)
    assert len(set(seen)) == len(autotune.PROGRAMS) + len(autotune.SPLITS) - 1  # one line is in both
    assert tuning.tuning_of(device, 2 * 67) == before


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
CASES = [
    *((rule, gate, "no kl", 0.0) for rule in RULES for gate in ("no gate", "kept")),
    *(("ppo", "kept", kl, 0.01) for kl in KLS if kl != "no kl"),
    ("gppo", "zero", "k3", 0.0),
    ("cispo", "zero", "weighted k3", 0.02),
]


def token_batch(
    V: int, rows: int = 10, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, dict]:
    """Tokens around every bound: ratios from e^-1 to e^1, entropies 10 % to both sides, both signs and a zero
    advantage.
    """
    logits = random_logits(rows, V, dtype=dtype, spread=1.5, seed=seed)
    labels = random_labels(rows, V=V, seed=seed + 1)
    labels[::3] = logits[::3].argmax(-1)
    statistics = erc.reference.token_stats(logits.double(), labels)
    steps = torch.linspace(-1, 1, rows, device=DEVICE)
    advantages = torch.where(torch.arange(rows, device=DEVICE) % 2 == 0, 1.0, -0.7) * (1 + steps.abs())
    advantages[3] = 0.0
    labels[5] = IGNORE
    given = {
        "old_logprob": (statistics.logprob + steps).float().clamp(max=-1e-3),
        "old_entropy": (statistics.entropy * (1 + 0.1 * steps.flip(0))).float(),
        "ref_logprob": (statistics.logprob + 0.7 * steps.flip(0)).float().clamp(max=-1e-3),
        "advantages": advantages,
    }
    return logits, labels, given


def run_loss(logits: Tensor, labels: Tensor, given: dict, objective: Objective, backend: str):
    leaf = (logits.double() if backend == "torch" else logits).detach().clone().requires_grad_(True)
    dtype = stats_dtype(leaf.dtype)
    unused = set() if objective.entropy_ratio else {"old_entropy"}
    unused |= set() if objective.kl else {"ref_logprob"}
    inputs = {name: None if name in unused else tensor.to(dtype) for name, tensor in given.items()}
    result = erc.policy_loss(leaf, labels, **inputs, objective=objective, backend=backend)
    result.loss.backward()
    return result, leaf.grad


@needs_kernels
@pytest.mark.parametrize(("rule", "gate", "kl", "entropy_coef"), CASES)
def test_every_rule_gate_and_penalty_matches_the_oracle(rule, gate, kl, entropy_coef, small_programs):
    objective = Objective(ratio=RULES[rule], entropy_ratio=GATES[gate], kl=KLS[kl], entropy_coef=entropy_coef)
    logits, labels, given = token_batch(67)
    actual, gradient = run_loss(logits, labels, given, objective, "triton")
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


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_fused_loss_in_other_dtypes(dtype, small_programs):
    logits, labels, given = token_batch(520, rows=6, dtype=dtype)
    actual, gradient = run_loss(logits, labels, given, erc.objective("erc-dapo", entropy_coef=0.01), "triton")
    expected, reference = run_loss(logits, labels, given, erc.objective("erc-dapo", entropy_coef=0.01), "torch")
    torch.testing.assert_close(actual.loss.double(), expected.loss, rtol=2e-6, atol=2e-6)
    assert (gradient_error(gradient, reference) <= gradient_tolerance(dtype) + 4e-6).all()
    assert (gradient_error(torch.zeros_like(gradient), reference) > gradient_tolerance(dtype) + 4e-6).any()


@needs_kernels
def test_a_tie_on_a_bound_keeps_the_gradient(small_programs):
    """An old log-prob equal to the new one gives r = 1 exactly, which is on a bound of width 0."""
    logits, labels = torch.zeros(1, 2, 4, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    logprob = OPERATORS["stats_forward"](logits, labels, None, operator_params(), IGNORE)[0]
    one = torch.ones(2, device=DEVICE)
    for rule in (0, 1, 2):
        numbers = (0.0, 0.0, INF, INF) if rule < 2 else (0.0, 0.0, 1.0, 1.0)
        *_, flags, gradient = OPERATORS["policy_loss"](
            logits, labels, None, operator_params(rule=numbers), IGNORE,
            one, torch.tensor([1.0, -1.0], device=DEVICE), logprob, None, None, None, None, None, rule, 0, 0, True,
        )  # fmt: skip
        assert (flags == 0).all() and (gradient != 0).all()


@needs_kernels
def test_the_gate_drops_on_the_bound_and_on_nan(small_programs):
    """Strict bounds: rho on a bound drops. A NaN old entropy drops without making the loss NaN."""
    logits, labels = random_logits(1, 4, 50), random_labels(4, V=50)
    _, entropy, *_ = OPERATORS["stats_forward"](logits, labels, None, operator_params(), IGNORE)
    old = entropy * torch.tensor([1.0, 2.0, 0.5, NAN], device=DEVICE)
    ones = torch.ones(4, device=DEVICE)
    *_, flags, gradient = OPERATORS["policy_loss"](
        logits, labels, None, operator_params(), IGNORE, ones, ones, None, old, None, None, None, None, 0, 0, 1, True
    )
    dropped = TokenFlag.ERC_DROPPED
    assert flags.tolist() == [0, dropped | TokenFlag.ERC_LOW, dropped | TokenFlag.ERC_HIGH, dropped]
    assert (gradient[0, 0] != 0).any() and (gradient[0, 1:] == 0).all()


@needs_kernels
def test_a_nan_logit_makes_loss_and_gradient_nan_even_if_gated_or_without_advantage(small_programs):
    logits, labels = random_logits(1, 2, 50), random_labels(2, V=50)
    logits[0, :, 11] = NAN
    ones = torch.ones(2, device=DEVICE)
    loss, *_, gradient = OPERATORS["policy_loss"](
        logits, labels, None, operator_params(), IGNORE, ones, torch.tensor([1.0, 0.0], device=DEVICE), None,
        torch.tensor([1e9, NAN], device=DEVICE), None, None, None, None, 0, 0, 2, True,
    )  # fmt: skip
    assert loss.isnan().all() and gradient.isnan().all()


@needs_kernels
def test_without_a_gradient_nothing_of_the_logits_size_is_written(small_programs):
    logits, labels, given = token_batch(67, rows=6)
    with torch.no_grad():
        quiet = erc.policy_loss(
            logits, labels, **{k: v for k, v in given.items() if k != "ref_logprob"}, backend="triton"
        )
    loud, _ = run_loss(logits, labels, given, erc.objective("erc-dapo"), "triton")
    assert torch.equal(quiet.loss, loud.loss.detach()) and not quiet.loss.requires_grad


# ---- shards, pairs, scaling ------------------------------------------------------------------------------------------


def merged(states: list[Tensor], scale: float) -> Tensor:
    """[4, N] of the whole row from those of its shards, in float64 (DESIGN: merge)."""
    out = states[0].double()
    for state in states[1:]:
        first, second = (out, state.double())
        swap = second[0] > first[0]
        a, b = torch.where(swap, second, first), torch.where(swap, first, second)
        shift = torch.where(b[0] == -INF, 0.0, (b[0] - a[0]) * scale)
        factor = torch.where(b[0] == -INF, 0.0, shift.exp())
        rest = a[1] + factor * (1 + b[1])
        weighted = a[2] + factor * (b[2] + (1 + b[1]) * shift)
        out = torch.stack([a[0], rest, weighted, torch.maximum(first[3], second[3])])
    return out


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
def test_a_shard_without_any_token_is_the_empty_state(dtype, temperature, small_programs):
    logits = torch.full((1, 1, 7), -INF, dtype=dtype, device=DEVICE)
    labels = torch.tensor([900], device=DEVICE)
    params = operator_params(temperature=temperature)
    state = OPERATORS["partial_stats"](logits, labels, None, params, IGNORE, 512)
    assert state[:, 0].tolist() == [-INF, 0, 0, -INF]


@needs_kernels
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_shards_merge_to_the_whole_row(softcap, small_programs):
    V, cuts = 2053, (0, 700, 701, 2053)
    logits, labels = random_logits(1, 4, V), torch.tensor([3, 700, 1999, IGNORE], device=DEVICE)
    logits[0, 1, :700] = -INF  # a shard without any token
    params = operator_params(temperature=0.8, softcap=softcap)
    shards = [OPERATORS["partial_stats"](logits[..., a:b], labels, None, params, IGNORE, a) for a, b in pairwise(cuts)]
    state = merged(shards, 1 / 0.8)[:, :3]
    _, expected = oracle_statistics(logits[0, :3], labels[:3], temperature=0.8, softcap=softcap or None)
    finite = [0, 2] if softcap else [0, 1, 2]  # the reference does not forbid a capped -inf
    logprob = (state[3] - state[0]) / 0.8 - state[1].log1p()
    entropy = state[1].log1p() - state[2] / (1 + state[1])
    assert_logprob_like(logprob[finite], expected.logprob[finite], 25.0)
    assert_entropy(entropy[finite], expected.entropy[finite], softcap)
    assert shards[0][3, 0] != -INF and shards[1][3, 0] == -INF
    assert shards[0][0, 1] == -INF and shards[0][1, 1] == 0


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_paired_statistics_match_the_oracle(dtype, softcap, small_programs):
    new = random_logits(3, 530, dtype=dtype)
    old = (new.float() + random_logits(3, 530, spread=0.3, seed=9)).to(dtype)
    old[2] = new[2]  # identical rows: every divergence is exactly 0
    scaling = {"temperature": 0.9, "softcap": softcap}
    leaf, variable = new.double().requires_grad_(True), new.clone().requires_grad_(True)
    expected = erc.reference.entropy_ratio(leaf, old.double(), **scaling)
    actual = erc.entropy_ratio(variable, old, **scaling, backend="triton")
    assert_entropy(actual.entropy, expected.entropy, softcap or 0.0)
    assert_entropy(actual.old_entropy, expected.old_entropy, softcap or 0.0)
    for name in ("ratio", "kl_new_old", "kl_old_new", "total_variation"):
        torch.testing.assert_close(getattr(actual, name).double(), getattr(expected, name), rtol=2e-5, atol=1e-7)
    upstream = torch.linspace(0.3, 1.0, 3, device=DEVICE)
    rows = slice(0, 2)  # at identical rows the sign of p - q is noise
    for name in ("ratio", "entropy", "kl_new_old", "kl_old_new", "total_variation"):
        output = (getattr(actual, name) * upstream.to(actual.ratio.dtype)).sum()
        (gradient,) = torch.autograd.grad(output, variable, retain_graph=True)
        oracle = (getattr(expected, name) * upstream.double()).sum()
        (reference,) = torch.autograd.grad(oracle, leaf, retain_graph=True)
        error = gradient_error(gradient[rows], reference[rows])
        assert (error <= gradient_tolerance(dtype, softcap or 0.0) + 5e-6).all(), (name, error)
        assert (gradient_error(0.9 * gradient[rows], reference[rows]) > 1e-2).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaling_a_gradient(dtype, small_programs):
    gradient = random_logits(1, 3, 1030, dtype=dtype)
    factor = torch.tensor([1.0, -0.375, 0.0], dtype=stats_dtype(dtype), device=DEVICE)
    expected = gradient.double() * factor[None, :, None]
    scaled = OPERATORS["scale_rows"](gradient, factor)
    torch.testing.assert_close(scaled.double(), expected, rtol=gradient_tolerance(dtype), atol=0)
    assert torch.equal(scaled[0, 0], gradient[0, 0])
    OPERATORS["scale_rows_"](gradient, factor)
    assert torch.equal(gradient, scaled)


@needs_kernels
def test_operators_pass_opcheck(small_programs):
    erc.token_stats(torch.zeros(1, 2, device=DEVICE), backend="triton")  # defines the operators
    logits = random_logits(1, 2, 70).requires_grad_(True)
    labels = random_labels(2, V=70)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    namespace = torch.ops.erc_triton
    torch.library.opcheck(namespace.stats_forward, (logits, labels, None, operator_params(), IGNORE), test_utils=checks)
    ones = torch.ones(2, device=DEVICE)
    arguments = (logits, labels, None, operator_params(), IGNORE, ones, ones, *[None] * 6, 0, 0, 0, True)
    torch.library.opcheck(namespace.policy_loss, arguments, test_utils=checks)
    torch.library.opcheck(namespace.scale_rows, (logits.detach(), ones), test_utils=checks)


@needs_kernels
def test_compiles_into_one_graph(small_programs):
    logits, labels, advantages = random_logits(4, 70), random_labels(4, V=70), torch.ones(4, device=DEVICE)

    def forward(x: Tensor) -> Tensor:
        rest = {"old_logprob": None, "advantages": advantages, "objective": "ppo", "backend": "triton"}
        entropy = erc.token_stats(x, labels, backend="triton").entropy
        return erc.policy_loss(x, labels, **rest).loss + entropy.sum()

    eager, compiled = (logits.clone().requires_grad_(True) for _ in range(2))
    forward(eager).backward()
    torch.compile(forward, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(compiled.grad, eager.grad) and (eager.grad != 0).any()
