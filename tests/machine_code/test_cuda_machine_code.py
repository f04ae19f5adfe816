"""The machine code of csrc/cuda, by nvcc and without a GPU: no spills, no device-wide barriers, and no more
instructions than the targets allow, in the main loops and over a kernel's whole life, which an emulator executes.

A fresh machine compiles the report's variants for three architectures and four whole files for one of them, some
minutes of processor time; the cubins are kept by a hash of their sources.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="its package carries the disassembler")
pytest.importorskip("rich", reason="needs rich")
from benchmarks.machine_code import cli, cuda_variants, document
from benchmarks.machine_code.report import Measurement, measure
from benchmarks.machine_code.sass import disassemble_file

pytestmark = [
    pytest.mark.skipif(cuda_variants.nvcc() is None, reason="needs nvcc"),
    pytest.mark.timeout(900),
]
ARCHS = ("sm_80", "sm_90", "sm_100")
# Kernels of a file, at least: each dtype and feature is one. Of the architectures each file takes another one whenever
# the sources change: all of them would take the better part of an hour.
KERNELS = {"stats": 40, "policy_loss": 40, "scale": 10, "tokens": 6}
TURN = int(cuda_variants.digest(), 16) if cuda_variants.nvcc() else 0
WHOLE_FILES = [(file, ARCHS[(TURN + n) % len(ARCHS)]) for n, file in enumerate(KERNELS)]

# Instructions an element of bfloat16 logits: in the main loop of the statistics, and in both sweeps of the fused loss.
# On sm_100 two float32 operations share an instruction.
STATISTICS = {"sm_80": 6.5, "sm_90": 6.3, "sm_100": 5.0}
LOSS = {"sm_80": 13.0, "sm_90": 13.0, "sm_100": 10.0}
MUFU = 1.04
# Of the whole kernel: issue slots an element.
WHOLE = {
    ("loss, cluster", "sm_90"): 17.0,
    ("loss, cluster", "sm_100"): 14.0,
    ("stats, softcap", "sm_90"): 30.0,
}
SOFTCAP_MUFU = 2.1
UNALIGNED = 15.0  # both sweeps' main loops


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.arch): m for m in map(measure, cuda_variants.cuda_kernels(ARCHS))}


@pytest.mark.parametrize(("file", "arch"), WHOLE_FILES)
def test_no_kernel_spills(file, arch):
    kernels = disassemble_file(cuda_variants.cubin(file, arch))
    assert len(kernels) >= KERNELS[file]
    assert [kernel.name for kernel in kernels if kernel.spills()] == []


def test_no_kernel_of_the_report_spills(measured):
    assert [key for key, found in measured.items() if found.spills] == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["stats", "stats of a segment"])
def test_statistics_take_few_instructions(name, arch, measured):
    loop = measured[name, arch].statistics
    assert 3 < loop.instructions <= STATISTICS[arch]
    assert 1 <= loop.mufu <= MUFU
    assert loop.load_bits == (128,) and loop.barriers == 0 and loop.shuffles == 0


@pytest.mark.parametrize(("name", "arch"), WHOLE)
def test_whole_kernels_take_few_instructions(name, arch, measured):
    whole = measured[name, arch].whole
    assert whole.main_loops < whole.instructions <= WHOLE[name, arch]


def test_most_of_a_whole_kernel_is_executed_in_its_main_loops(measured):
    """What a count of main loops leaves out; and no kernel was executed for nothing."""
    for (name, _), found in measured.items():
        assert found.whole.instructions > 0.8 * found.whole.main_loops, name
    assert measured["stats", "sm_90"].whole.main_loops > 0.5 * measured["stats", "sm_90"].whole.instructions


def test_no_kernel_waits_for_the_whole_gpu(measured):
    assert [key for key, found in measured.items() if found.device_barriers] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_a_softcap_takes_one_tanh_an_element_and_sweep(arch, measured):
    assert measured["stats, softcap", arch].whole.mufu <= SOFTCAP_MUFU
    if arch != "sm_80":
        assert measured["loss, cluster, softcap", arch].whole.mufu <= 2 * SOFTCAP_MUFU


@pytest.mark.parametrize("arch", ARCHS)
def test_unaligned_rows_are_read_sixteen_bytes_at_a_time(arch, measured):
    for name in ("loss, block, unaligned", *(["loss, cluster, unaligned"] if arch != "sm_80" else [])):
        found = measured[name, arch]
        # Of the second vector one word may be enough.
        assert found.statistics.load_bits in ((128,), (32, 128)) and found.gradient.store_bits == (128,)
        assert found.instructions() <= UNALIGNED
        assert found.whole.main_loops > 0.5 * found.whole.instructions, "the loops are those that were executed"


FUSED = [("loss, block", "sm_80"), ("loss, cluster", "sm_90"), ("loss, cluster", "sm_100")]


@pytest.mark.parametrize(("name", "arch"), FUSED)
def test_the_fused_loss_takes_few_instructions(name, arch, measured):
    found = measured[name, arch]
    assert 6 < found.instructions() <= LOSS[arch]
    assert 2 <= found.mufu() <= 2 * MUFU
    for loop in (found.statistics, found.gradient):
        assert loop.load_bits == (128,) and loop.shuffles == 0
    # In a cluster the sweep waits for the part of the copy that it comes to.
    assert (found.statistics.barriers, found.gradient.barriers) == (int(found.cluster > 1), 0)
    assert found.gradient.store_bits == (128,)


def opcodes(name: str, arch: str) -> set[str]:
    """The names of a kernel's instructions."""
    (found,) = cuda_variants.cuda_kernels([arch], [kernel for kernel in cuda_variants.MAIN if kernel.name == name])
    return {instruction.name for instruction in found.kernel().instructions}


def test_a_cluster_loads_its_segments_by_bulk_copies_and_shares_states():
    for arch in ("sm_90", "sm_100"):
        assert {"UBLKCP", "SYNCS", "UCGABAR_ARV", "UCGABAR_WAIT"} <= opcodes("loss, cluster", arch)
        assert "UBLKCP" not in opcodes("loss, block", arch)


def test_sm_100_packs_two_float32_operations_in_an_instruction():
    for name in ("stats", "loss, cluster"):
        assert {"FFMA2", "FADD2"} <= opcodes(name, "sm_100")
        assert not {"FFMA2", "FADD2"} & opcodes(name, "sm_90")


@pytest.mark.parametrize(("name", "arch"), [("stats", "sm_80"), ("stats", "sm_90"), ("stats", "sm_100"), *FUSED])
def test_the_instructions_leave_the_memory_s_speed_reachable(name, arch, measured):
    found = measured[name, arch]
    assert found.reachable
    for gpu, reachable in found.reachable.items():
        assert reachable.share >= 0.95, f"{gpu}: {reachable}"


@pytest.mark.parametrize("arch", ARCHS)
def test_registers_and_shared_memory_hide_latency_by_other_blocks(arch, measured):
    """512 threads on a multiprocessor, 1,024 of the statistics; of clusters of eight blocks four over eight of them.
    Half as many where a softcap or misaligned rows take more registers."""
    for (name, of), found in measured.items():
        if of != arch:
            continue
        threads = found.occupancy.blocks * found.threads
        least = 4 * 128 if found.cluster > 1 else 1024 if name in ("stats", "stats of a segment") else 512
        assert threads >= least / (1 + ("," in name and name not in ("loss, cluster", "loss, block"))), name


def test_the_checked_in_report_is_what_the_sources_compile_to(measured):
    report = json.loads(document.REPORT.read_text())
    compiler = cli.toolchain(None)["nvcc"]
    if report["toolchain"]["nvcc"] != compiler:
        pytest.skip(f"the report is of nvcc {report['toolchain']['nvcc']}, here is {compiler}")
    stored = {(k["name"], k["arch"]): k for k in report["kernels"] if k["source"] == "cuda"}
    fresh = {key: json.loads(json.dumps(found.json())) for key, found in measured.items()}
    assert fresh == stored, "run `python -m benchmarks machine-code --json results/benchmarks/machine_code.json`"
