"""What is CUDA's alone, without a GPU: `csrc/cuda/*.cu` compiled by g++ and run on fibers.

On three machines: one with thread-block clusters (the form for sm_90 and later), one without (sm_80), and one with so
many multiprocessors that few rows are split over blocks. The contract that every backend shares runs on each of them in
the other modules of this folder. The host's exponential has the hardware's error, 2^-22, and flushes subnormals.

24,576 and 40,960 columns are two and eight segments of a row (bfloat16 and float32), 20,488 two and a ragged end.
"""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import erc
from benchmarks import loss_forms
from erc import inputs
from erc.backend import register_namespace
from tests.backends import CUDA_FORMS, CUDA_HOST, loss_call, params, shard_state
from tests.cuda_host import build
from tests.oracle import random_labels, random_logits, same_bits

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs g++"),
    pytest.mark.sanitize,  # `make sanitize` runs the whole module again, on a sanitized build
]
IGNORE = -100


@pytest.fixture(scope="module")
def host():
    loaded = build.load()
    register_namespace(CUDA_HOST, build.NAMESPACE)
    return loaded


# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "V"), [(torch.bfloat16, 24_576), (torch.float32, 20_488), (torch.float64, 10_242)])
@pytest.mark.parametrize("forbidden", [False, True])
def test_cluster_block_and_split_give_the_same_bits(forbidden, dtype, V, host):
    logits, labels = random_logits(1, 3, V, dtype=dtype), random_labels(3, V=V)
    labels[1] = IGNORE
    if forbidden:
        logits[0, 2, V // 2 : V // 2 + 900] = -torch.inf
    results = []
    for clusters, multiprocessors in CUDA_FORMS.values():
        host.configure(clusters=clusters, multiprocessors=multiprocessors)
        statistics = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
        partial = shard_state(host.ops, logits, labels, 0)
        overwritten = logits.clone()
        in_place, fused = loss_call(host.ops, overwritten, labels, in_place=True), loss_call(host.ops, logits, labels)
        results.append((*statistics, partial, *fused, *in_place, overwritten))
        for a, b in zip((*statistics[:2], overwritten), (fused[2], fused[3], fused[-1]), strict=True):
            assert same_bits(a, b)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("order", [1, 7])
@pytest.mark.parametrize("poison", [0x00, 0x7F])
def test_neither_the_order_of_threads_nor_old_shared_memory_shows(order, poison, host):
    """Of blocks neither. A missing barrier shows up as a difference between orders, a read of uninitialised memory as
    one between poisons."""
    logits, labels = random_logits(1, 2, 24_576, dtype=torch.bfloat16), random_labels(2, V=24_576)
    for clusters, multiprocessors in CUDA_FORMS.values():
        results = []
        for choice in ({}, {"order": order, "poison": poison}):
            host.configure(clusters=clusters, multiprocessors=multiprocessors, **choice)
            statistics = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
            pair = host.ops.paired_forward(logits, logits.flip(2).contiguous(), None, params())
            tokens = (random_labels(1300, V=70), torch.ones(1300), *[None] * 11, params(), IGNORE, 70, False)
            table, active, counter = host.ops.token_table(*tokens)
            per_token = torch.rand(4, 1300, generator=torch.Generator().manual_seed(3))
            flags = torch.zeros(1300, dtype=torch.int32)
            summary = host.ops.token_summary(per_token, None, flags, table, active, counter, params(), IGNORE)
            results.append((*statistics, *pair, *loss_call(host.ops, logits, labels), table, *summary))
        for a, b in zip(*results, strict=True):
            assert same_bits(a, b)


# ---- launches --------------------------------------------------------------------------------------------------------


def test_launches_have_the_shape_that_the_machine_code_report_assumes(host):
    """At Qwen's vocabulary in bfloat16: threads of a block, blocks of a cluster, bytes of shared memory."""
    cuda_variants = pytest.importorskip("benchmarks.machine_code.cuda_variants", reason="the report needs triton")
    assumed = {kernel.name: (kernel.threads, kernel.cluster, kernel.shared) for kernel in cuda_variants.MAIN}
    logits, labels = random_logits(1, 2, 151_936, dtype=torch.bfloat16), random_labels(2, V=151_936)
    seen = {}
    for clusters, multiprocessors in CUDA_FORMS.values():  # with room for two rows in the cache, which is what counts
        host.configure(clusters=clusters, multiprocessors=multiprocessors, l2_bytes=1 << 19)
        *_, saved = host.ops.stats_forward(logits, labels, None, params(), IGNORE)
        host.ops.stats_backward(logits, labels, None, params(), IGNORE, saved, torch.ones(2), None, None)
        loss_call(host.ops, logits, labels)
        seen[clusters, multiprocessors] = [shape[1:] for shape in host.launches()]
    stats, gradient = assumed["stats"], assumed["stats gradient"]
    table, summary = (256, 1, 3 * 8 * 8), (256, 1, 8 * 19 * 8 + 16)
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
@pytest.mark.parametrize("form", CUDA_FORMS)
def test_a_fused_loss_and_its_backward_take_six_launches(form, name, host, monkeypatch):
    """Count, table, rows, summary, the fill of the upstream 1, scale; one more where rows are split over blocks. With a
    mask and an advantage per sequence; counted, or with normalizers on the device."""
    shape, columns = (2, 2), 24_576
    logits, labels = random_logits(*shape, columns, dtype=torch.bfloat16), random_labels(*shape, V=columns)
    given = {"old_logprob": torch.full(shape, -9.0), "ref_logprob": torch.full(shape, -9.5)}
    given |= {"old_entropy": torch.full(shape, 3.0), "advantages": torch.ones(2), "mask": torch.ones(shape)}
    given |= {"nll_mask": torch.ones(shape)} if erc.objective(name).nll_coef else {}
    device_numbers = {name: torch.tensor(4.0) for name in ("normalizer", "entropy_normalizer", "nll_normalizer")}
    erc.token_stats(logits, backend=CUDA_HOST)  # a backend is tried on its first call
    monkeypatch.setattr(inputs, "values_are_readable", lambda tensor: False)  # as on a GPU
    objective = erc.objective(name, entropy_coef=0.01, entropy_reduction="active-mean")
    counts = []
    for normalizers in ({}, device_numbers):
        host.configure(*CUDA_FORMS[form])
        leaf = logits.clone().requires_grad_(True)
        with Recorded() as recorded:
            options = {**given, **normalizers, "objective": objective, "backend": CUDA_HOST}
            erc.policy_loss(leaf, labels, **options).loss.backward()
        assert set(recorded.names) == {"aten::ones_like"} and leaf.grad.any()
        counts.append(len(host.launches()) + len(recorded.names))
    assert max(counts) == 6 + (form == "cuda-split") and min(counts) >= 5


def test_a_summary_of_the_same_tokens_again(host):
    """The last block leaves the counter as it found it."""
    host.configure()
    labels, ones = random_labels(1500, V=70), torch.ones(1500)
    table, labels, counter = host.ops.token_table(labels, ones, *[None] * 11, params(), IGNORE, 70, False)
    per_token, flags = torch.rand(4, 1500), torch.zeros(1500, dtype=torch.int32)
    arguments = (per_token, None, flags, table, labels, counter, params(), IGNORE)
    for a, b in zip(host.ops.token_summary(*arguments), host.ops.token_summary(*arguments), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert counter == 0 and len(host.launches()) == 4


OTHER_LINES = {
    "none": ([], "cluster"),
    "a block": ([(90, 48, "kBlock")], "block"),
    "a block for smaller rows": ([(90, 47, "kBlock")], "cluster"),
    "a block on other GPUs": ([(80, 48, "kBlock"), (100, 48, "kBlock")], "cluster"),
    "the first that holds the row": ([(90, 47, "kCluster"), (90, 48, "kBlock"), (90, 512, "kCluster")], "block"),
}


@pytest.mark.parametrize("name", OTHER_LINES)
def test_a_table_chooses_between_cluster_and_block_and_changes_no_bit(name, host):
    """Rows of 48 KiB, two segments, on a GPU that has clusters. What the table does not give a cluster is split as on
    others, where there are few rows."""
    lines, form = OTHER_LINES[name]
    logits, labels = random_logits(1, 3, 24_576, dtype=torch.bfloat16), random_labels(3, V=24_576)
    host.configure(clusters=True)
    expected = loss_call(host.ops, logits, labels)
    for multiprocessors in (1, 132):
        host.configure(clusters=True, multiprocessors=multiprocessors)
        with loss_forms.override(host.library, [loss_forms.FormLine(*line) for line in lines]):
            results = loss_call(host.ops, logits, labels)
        split = form == "block" and multiprocessors > 1
        _, *rows, _ = host.launches()  # between table and summary
        assert [cluster for _, _, cluster, _ in rows] == [2 if form == "cluster" else 1] * (1 + split)
        assert all(same_bits(a, b) for a, b in zip(results, expected, strict=True))
    loss_call(host.ops, logits, labels)
    assert host.launches()[-2][2] == 2, "afterwards the table of the sources counts again"


def test_code_for_sm_80_runs_in_no_cluster_whatever_the_machine(host):
    """There the cluster kernel has an empty body: it would return garbage, and success."""
    logits, labels = random_logits(1, 2, 4096, dtype=torch.bfloat16), random_labels(2, V=4096)
    results = []
    for compiled_for in (90, 80):
        host.configure(clusters=True, compiled_for=compiled_for)
        results.append(loss_call(host.ops, logits, labels))
        _, rows, _ = host.launches()  # between table and summary
        assert (rows[3] > logits[0, 0].nbytes) == (compiled_for == 90), "a cluster keeps its row in shared memory"
    for cluster, block in zip(*results, strict=True):
        assert same_bits(cluster, block)


def test_more_rows_than_a_second_grid_dimension_holds(host):
    """Blocks stand in the first dimension of the grid. They are not run: 70,000 blocks of fibers take minutes."""
    grids = []
    host.configure(clusters=False)
    host.execute_with(lambda name, grid, *_: grids.append(grid))
    try:
        host.ops.stats_forward(torch.zeros(1, 70_000, 2), None, None, params(), IGNORE)
    finally:
        host.execute_with(None)
    assert grids == [70_000]


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
