"""What is Triton's alone: the grid, rows that programs share, tuning. The contract that backends share runs on its
kernels in the other modules of this folder.

Triton decides at import whether it interprets, for the whole process: without a GPU `test_other_processes` runs these
modules with TRITON_INTERPRET=1. The interpreter's exp and log are NumPy's, more exact than a GPU's; its fused
multiply-add rounds once, as hardware does; its conversion to bfloat16 cuts off instead of rounding
(`test_triton_machine_code` looks for the rounding instruction).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tests.backends import INTERPRETED, loss_call, open_backend, params, shard_state
from tests.oracle import random_labels, random_logits, same_bits

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = importlib.util.find_spec("triton") is not None and (INTERPRETED or DEVICE == "cuda")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # NaN on purpose
    pytest.mark.skipif(not RUNS_HERE, reason="neither a GPU nor TRITON_INTERPRET=1 in this process"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
]
IGNORE = -100

if RUNS_HERE:
    from erc.triton_kernels import tuning
    from erc.triton_kernels.launch import launch
    from erc.triton_kernels.params import make_layout

    OPS = open_backend("triton").ops


@pytest.fixture(autouse=True)
def default_device():
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)


@pytest.fixture
def small_programs(monkeypatch):
    """32 lanes: many tiles and segments at sizes that the interpreter gets through."""
    monkeypatch.setattr(tuning, "LANES", 32)


class RecordedKernel:
    """Stands in for a kernel: remembers the grid."""

    __name__ = "recorded_kernel"

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *_, **__: None


def test_more_rows_than_a_second_grid_dimension_holds():
    """65,535 is where every dimension of a grid ends but the first."""
    recorded = RecordedKernel()
    launch(recorded, 70_000, torch.empty(0), L=make_layout(torch.float32))
    assert recorded.grid == (70_000,)


@pytest.mark.parametrize("forbidden", [False, True])
def test_rows_shared_by_several_programs_give_the_same_bits(forbidden, small_programs, monkeypatch):
    logits, labels = random_logits(1, 3, 2053), random_labels(3, V=2053)
    labels[1] = IGNORE
    if forbidden:
        logits[0, 2, 1500:] = -torch.inf
    results = []
    for shared in (False, True):
        monkeypatch.setattr(tuning, "shares_rows", lambda *_, shared=shared: shared)
        statistics, overwritten = OPS.stats_forward(logits, labels, None, params(), IGNORE), logits.clone()
        in_place = loss_call(OPS, overwritten, labels, in_place=True)
        fused = loss_call(OPS, logits, labels)
        results.append((*statistics, shard_state(OPS, logits, labels, 0), *fused, *in_place, overwritten))
    for a, b in zip(*results, strict=True):
        assert same_bits(a, b)


def test_several_rows_a_program(small_programs, monkeypatch):
    """On a GPU the fused loss caps the rows in flight: a program works through several."""
    logits, labels = random_logits(1, 5, 300), random_labels(5, V=300)
    expected = loss_call(OPS, logits, labels)
    monkeypatch.setattr(tuning, "programs_for_loss", lambda *_: 2)
    for a, b in zip(loss_call(OPS, logits, labels), expected, strict=True):
        assert same_bits(a, b)


# ---- tuning ----------------------------------------------------------------------------------------------------------

MIB = 1 << 20
GPUS = {  # multiprocessors, warp size, cache between the sweeps: data sheets (for the MI300X, its Infinity Cache)
    "sm_80": (108, 32, 40 * MIB),
    "sm_90": (132, 32, 50 * MIB),
    "sm_100": (148, 32, 126 * MIB),
    "gfx942": (304, 64, 256 * MIB),
}


@pytest.mark.parametrize("V", [32_768, 131_072, 151_936, 262_144])
@pytest.mark.parametrize("architecture", GPUS)
def test_the_rows_in_flight_stay_in_the_cache(architecture, V):
    """A program holds half its row on average."""
    device = tuning.Device(architecture, *GPUS[architecture])
    programs = tuning.programs_for_loss(device, 2 * V, rows=100_000)
    assert device.multiprocessors * 0.8 < programs
    assert programs * V <= tuning.CACHE_SHARE * device.cache_bytes
    of_float32 = tuning.programs_for_loss(device, 4 * V, rows=100_000)  # rows that are twice as large
    assert of_float32 == device.multiprocessors or of_float32 * 2 * V <= tuning.CACHE_SHARE * device.cache_bytes


def test_other_machines_and_rows_take_what_the_cache_holds():
    for architecture in ("sm_75", "sm_90", "gfx942"):
        device = tuning.Device(architecture, 100, 32, 50 * MIB)
        assert tuning.programs_for_loss(device, 512 * 1024, rows=100_000) == 120
        assert tuning.programs_for_loss(device, 800 * 1024, rows=100_000) == 76
        assert tuning.programs_for_loss(device, 1024, rows=100_000) == 200
        assert tuning.programs_for_loss(device, 1024, rows=100_000, resident=1) == 100
        assert tuning.programs_for_loss(device, 1024, rows=7) == 7


def test_a_cache_that_holds_next_to_nothing_leaves_no_multiprocessor_idle():
    """As the 4 MiB that PyTorch reports of an MI300X, whose rows wait in the Infinity Cache."""
    device = tuning.Device("gfx942", 304, 64, 4 * MIB)
    assert tuning.programs_for_loss(device, 2 * 151_936, rows=100_000) == 304


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [False, True])
def test_a_multiprocessor_gets_as_many_programs_as_its_registers_hold(dtype, softcap):
    for architecture in GPUS:
        layout = make_layout(dtype, softcap=softcap)
        resident = tuning.resident_programs(architecture, dtype, layout)
        limit = tuning.compile_options("policy_loss_kernel", architecture, 32, dtype, layout).get("maxnreg", 64)
        assert resident == 65_536 // (tuning.LANES * limit) or architecture == "gfx942"


def test_a_measured_line_holds_for_rows_up_to_its_size(monkeypatch):
    monkeypatch.setitem(tuning.MEASURED, ("sm_90", 64), tuning.Tuning(3, 0.25))
    device = tuning.Device("sm_90", *GPUS["sm_90"])
    assert tuning.tuning_of(device, 64 * 1024) == tuning.Tuning(3, 0.25)
    assert tuning.tuning_of(device, 64 * 1024 + 1) == tuning.tuning_of(device._replace(architecture="?"), 64 * 1024 + 1)


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
