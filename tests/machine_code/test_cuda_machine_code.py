"""The machine code of csrc/cuda, by nvcc and without a GPU: no spills, no device-wide barriers, and no more
instructions than the targets allow, in the main loops and over a kernel's whole life, which an emulator executes.

A fresh machine compiles four files for three architectures, a few minutes of processor time; the cubins are kept by a
hash of their sources.
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
# Kernels of a file, at least: each dtype and feature is one.
KERNELS = {"stats": 30, "policy_loss": 30, "scale": 10, "tokens": 6}

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
NOT_YET = pytest.mark.xfail(strict=True, reason="the kernels are not that far yet")


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Measurement]:
    return {(m.name, m.arch): m for m in map(measure, cuda_variants.cuda_kernels(ARCHS))}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file", KERNELS)
def test_no_kernel_spills(file, arch, measured):
    kernels = disassemble_file(cuda_variants.cubin(file, arch))
    assert len(kernels) >= KERNELS[file]
    assert [kernel.name for kernel in kernels if kernel.spills()] == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["stats", "stats of a segment"])
def test_statistics_take_few_instructions(name, arch, measured):
    loop = measured[name, arch].statistics
    assert 3 < loop.instructions <= STATISTICS[arch]
    assert 1 <= loop.mufu <= MUFU
    assert loop.load_bits == (128,) and loop.barriers == 0 and loop.shuffles == 0


@NOT_YET
@pytest.mark.parametrize(("name", "arch"), WHOLE)
def test_whole_kernels_take_few_instructions(name, arch, measured):
    whole = measured[name, arch].whole
    assert whole.main_loops < whole.instructions <= WHOLE[name, arch]


def test_most_of_a_whole_kernel_is_executed_in_its_main_loops(measured):
    """What a count of main loops leaves out; and no kernel was executed for nothing."""
    for (name, _), found in measured.items():
        assert found.whole.instructions > 0.8 * found.whole.main_loops, name
    assert measured["stats", "sm_90"].whole.main_loops > 0.5 * measured["stats", "sm_90"].whole.instructions


@NOT_YET
@pytest.mark.parametrize("arch", ARCHS[1:])
def test_no_kernel_waits_for_the_whole_gpu(arch, measured):
    kernels = [kernel for file in KERNELS for kernel in disassemble_file(cuda_variants.cubin(file, arch))]
    assert [kernel.name for kernel in kernels if kernel.device_barriers()] == []


FUSED = [("loss, block", "sm_80"), ("loss, cluster", "sm_90"), ("loss, cluster", "sm_100")]


@pytest.mark.parametrize(("name", "arch"), FUSED)
def test_the_fused_loss_takes_few_instructions(name, arch, measured):
    found = measured[name, arch]
    assert 6 < found.instructions() <= LOSS[arch]
    assert 2 <= found.mufu() <= 2 * MUFU
    for loop in (found.statistics, found.gradient):
        assert loop.load_bits == (128,) and loop.barriers == 0 and loop.shuffles == 0
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
def test_registers_and_shared_memory_allow_two_resident_blocks(arch, measured):
    """Blocks of 256 threads; four where latency is hidden by other blocks alone. Of clusters of eight blocks, as many
    share eight multiprocessors."""
    for (name, of), found in measured.items():
        if of == arch and "unaligned" not in name:
            least = 4 if name in ("stats", "stats of a segment", "loss, cluster") else 2
            resident = found.occupancy.blocks * found.threads // 256
            assert resident >= least, f"{name}: {found.occupancy}"


def test_the_checked_in_report_is_what_the_sources_compile_to(measured):
    report = json.loads(document.REPORT.read_text())
    compiler = cli.toolchain(None)["nvcc"]
    if report["toolchain"]["nvcc"] != compiler:
        pytest.skip(f"the report is of nvcc {report['toolchain']['nvcc']}, here is {compiler}")
    stored = {(k["name"], k["arch"]): k for k in report["kernels"] if k["source"] == "cuda"}
    fresh = {key: json.loads(json.dumps(found.json())) for key, found in measured.items()}
    assert fresh == stored, "run `python -m benchmarks machine-code --json results/benchmarks/machine_code.json`"
