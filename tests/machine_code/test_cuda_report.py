"""The machine-code report of the Triton, CUDA and peers' kernels: what is checked in, what the document says of it, and
how peers are found."""

from __future__ import annotations

import copy
import json
import os
import sys

import pytest

pytest.importorskip("triton", reason="its package carries the disassembler")
pytest.importorskip("rich", reason="the report is printed with rich")
pytest.importorskip("typer", reason="the command line needs it")
pytest.importorskip("matplotlib", reason="the command line draws")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: this process cannot compile kernels", allow_module_level=True)

import triton
from typer.testing import CliRunner

from benchmarks import __main__, loss_forms
from benchmarks.hardware import GPU, GPUS
from benchmarks.machine_code import cli, document, peers
from benchmarks.machine_code.blocks_in_flight import EFFICIENCY
from benchmarks.machine_code.occupancy import Occupancy
from benchmarks.machine_code.ordinary_row import VOCABULARY
from benchmarks.machine_code.report import CompiledKernel, from_triton, machine_code_table, measure
from benchmarks.machine_code.triton_variants import main_variants
from benchmarks.markdown import current_block
from benchmarks.targets import unmet

ARCHS = {"sm_80", "sm_90", "sm_100"}


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads(document.REPORT.read_text())


def test_the_document_holds_the_report(report):
    assert current_block(document.DOCUMENT, document.NAME) == document.block(report), (
        "run `python -m benchmarks readme results/benchmarks/cpu.json`"
    )


def test_the_checked_in_report_is_complete(report):
    assert {"triton", "nvcc", "trl", "liger-kernel"} <= set(report["toolchain"])
    archs = {}
    for kernel in report["kernels"]:
        archs.setdefault((kernel["source"], kernel["name"]), set()).add(kernel["arch"])
    for name in ("loss, cluster", "loss, cluster, softcap", "loss, cluster, unaligned"):
        assert archs.pop(("cuda", name)) == {"sm_90", "sm_100"}
    assert all(found == ARCHS for found in archs.values())
    assert {variant.name for variant in main_variants()} == {name for source, name in archs if source == "triton"}
    assert {peer.name for peer in peers.PEERS} == {name for source, name in archs if source == "peer"}


def test_the_checked_in_report_meets_every_target(report):
    assert unmet(document.TARGETS, report) == []


def test_a_target_that_is_not_met_shows(report):
    spoilt = copy.deepcopy(report)
    for kernel in spoilt["kernels"]:
        for cost in (kernel, kernel["whole"]):
            cost["instructions"] *= 4
            cost["mufu"] *= 4
        kernel["device_barriers"] += 1
        for gpu in kernel["reachable"].values():
            gpu["share"] /= 3
        kernel["occupancy"] = {"blocks": 0, "limit": "registers"}
    for line in spoilt["expected"]:
        line["shares"] = {rows: [share / 3 for share in shares] for rows, shares in line["shares"].items()}
    assert len(unmet(document.TARGETS, spoilt)) == len(document.TARGETS)
    assert document.block(spoilt).count("| no |") == len(document.TARGETS)


def test_every_kernel_of_the_report_was_executed_whole(report):
    for kernel in report["kernels"]:
        name, whole = kernel["name"], kernel["whole"]
        assert sum(whole["pipes"].values()) == pytest.approx(whole["instructions"]), name
        assert 0.3 * whole["instructions"] < whole["main_loops"] <= whole["instructions"], name


def test_the_model_covers_every_gpu_and_form(report):
    shares = {(line["name"], line["gpu"]): line["shares"] for line in report["expected"]}
    assert {gpu for name, gpu in shares if name == "loss, cluster"} == {"H100", "H200", "B200"}
    assert {gpu for name, gpu in shares if name == "loss, block"} == {gpu.name for gpu in GPUS}
    for by_rows in shares.values():
        assert {"2048", "8192", "65536"} <= set(by_rows)
        for expected, optimistic, pessimistic in by_rows.values():
            assert 0 < pessimistic <= expected * 1.02 and expected <= optimistic * 1.02 <= EFFICIENCY * 1.05


def test_the_launcher_takes_the_form_that_the_model_prefers_until_one_was_measured(report):
    """Of many rows, on every GPU with clusters, at the pessimistic end of the band."""
    table = loss_forms.read_lines(loss_forms.TABLE.read_text())
    shares = {(line["gpu"], line["name"]): line["shares"] for line in report["expected"] if line["source"] == "cuda"}
    seen = 0
    for gpu in (gpu for gpu in GPUS if (gpu.name, "loss, cluster") in shares):
        line = loss_forms.line_of(table, int(gpu.arch.removeprefix("sm_")), 2 * VOCABULARY)
        for n in ("2048", "65536"):
            cells = {form: shares[gpu.name, f"loss, {form}"][n] for form in ("cluster", "block")}
            cells = {f"k{form.title()}": pessimistic for form, (_, _, pessimistic) in cells.items()}
            seen += 1
            assert line.source.startswith("measured") or line.form == max(cells, key=cells.get), (gpu.name, n)
    assert seen == 6


def test_no_kernel_of_ours_spills_or_waits_in_its_main_loops(report):
    for kernel in report["kernels"]:
        if kernel["source"] != "peer":
            assert not kernel["spills"], kernel["name"]
            for loop in filter(None, (kernel["statistics"], kernel["gradient"])):
                # A block of a cluster waits for a part of its copy; a misaligned vector takes a word of the next one.
                assert loop["barriers"] <= ("loss, cluster" in kernel["name"]) and loop["shuffles"] == 0, kernel["name"]
                assert set(loop["load_bits"]) <= ({32, 128} if "unaligned" in kernel["name"] else {128}), kernel["name"]


@pytest.mark.parametrize("variant", main_variants()[::3], ids=lambda v: v.name)
def test_the_checked_in_report_is_what_the_sources_compile_to(variant, report):
    if report["toolchain"]["triton"] != triton.__version__:
        pytest.skip(f"the report is of triton {report['toolchain']['triton']}")
    (stored,) = (k for k in report["kernels"] if (k["name"], k["arch"]) == (variant.name, "sm_90"))
    fresh = measure(from_triton(variant.name, "sm_90", variant.compile("sm_90"), source="triton", work=variant.work))
    assert json.loads(json.dumps(fresh.json())) == stored, (
        "run `python -m benchmarks machine-code --json results/benchmarks/machine_code.json`"
    )


# ---- peers -----------------------------------------------------------------------------------------------------------

KERNEL = """
import triton
@triton.jit
def _grpo_loss_fwd_kernel(LOGITS): pass
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A stand-in for Liger on the path, which must not be imported for its kernels to be found."""
    (tmp_path / "liger_kernel" / "ops").mkdir(parents=True)
    (tmp_path / "liger_kernel" / "__init__.py").write_text("raise ImportError('imported')")
    file = tmp_path / "liger_kernel" / "ops" / "grpo_loss.py"
    file.write_text(KERNEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "liger_kernel", raising=False)
    peers._load.cache_clear()
    yield file
    peers._load.cache_clear()


def test_peers_are_measured_where_they_are_installed(installed):
    forward, backward = (peer for peer in peers.PEERS if peer.file.startswith("liger_kernel"))
    assert peers.why_not(forward) is None
    assert "no _grpo_loss_bwd_kernel" in peers.why_not(backward)
    assert "liger_kernel" not in sys.modules
    installed.unlink()
    assert "no " in peers.why_not(forward)


def test_a_peer_that_is_not_installed_is_left_out_with_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    reasons = peers.missing()
    assert set(reasons) == {peer.name for peer in peers.PEERS}
    assert all("is not installed" in reason for reason in reasons.values())
    assert peers.peer_kernels(ARCHS) == [] and peers.versions(tmp_path) == {}


def test_a_folder_of_unpacked_wheels_comes_first(installed, tmp_path):
    folder = tmp_path / "wheels"
    (folder / "liger_kernel" / "ops").mkdir(parents=True)
    (folder / "liger_kernel" / "ops" / "grpo_loss.py").write_text(KERNEL.replace("fwd", "bwd"))
    (folder / "liger_kernel-9.8.dist-info").mkdir()
    (folder / "liger_kernel-9.8.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: liger_kernel\nVersion: 9.8\n"
    )
    forward, backward = (peer for peer in peers.PEERS if peer.file.startswith("liger_kernel"))
    assert peers.why_not(backward, folder) is None and peers.why_not(forward, folder) is not None
    assert peers.versions(folder) == {"liger-kernel": "9.8"}


@pytest.mark.skipif(peers.why_not(peers.PEERS[0]) is not None, reason="TRL is not installed")
def test_trl_s_kernel_takes_more_instructions_and_waits_in_its_loop():
    found = measure(peers.PEERS[0].compile(None, "sm_90"))
    assert 15 < found.statistics.instructions < 40
    assert found.statistics.barriers + found.statistics.shuffles > 0


# ---- the command and its parts ---------------------------------------------------------------------------------------


def test_the_command_writes_and_prints_the_report(monkeypatch, tmp_path):
    variant = main_variants()[0]

    def kernels(archs, dtype) -> list[CompiledKernel]:
        compiled = {arch: variant.compile(arch) for arch in archs}
        return [from_triton(variant.name, a, c, source="triton", work=variant.work) for a, c in compiled.items()]

    monkeypatch.setattr(cli, "triton_kernels", kernels)
    monkeypatch.setattr(cli.cuda_variants, "nvcc", lambda: None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    path = tmp_path / "report.json"
    command = ["machine-code", "--arch", "sm_90", "--json", str(path), "--no-model"]
    done = CliRunner().invoke(__main__.app, command)
    assert done.exit_code == 0, done.output
    printed = done.output
    assert "triton: stats_forward" in printed and "H200 100%" in printed
    assert "left out: csrc/cuda: no nvcc" in printed and "trl is not installed" in printed
    written = json.loads(path.read_text())
    assert written["toolchain"]["triton"] == triton.__version__ and "nvcc" not in written["toolchain"]
    assert len(machine_code_table(written).splitlines()) == 3  # header, ruler, one kernel


def test_options_of_the_command_are_checked_before_anything_is_compiled():
    for options in (["--arch", "sm_70"], ["--dtype", "int8"], ["--cubin", "name:sm_90"]):
        done = CliRunner().invoke(__main__.app, ["machine-code", *options])
        assert done.exit_code == 2 and "must be" in done.output and isinstance(done.exception, SystemExit)


def test_occupancy_by_hand():
    # 512 threads of 64 registers: 32,768 of 65,536. 41,296 bytes and the system's 1,024: five blocks of 233,472.
    assert Occupancy.of("sm_90", 512, 64, 1024, 0) == Occupancy(2, "registers")
    assert Occupancy.of("sm_90", 256, 33, 1024, 41_296) == Occupancy(5, "shared memory")
    assert Occupancy.of("sm_80", 256, 33, 0, 41_296) == Occupancy(3, "shared memory")
    assert Occupancy.of("sm_80", 1024, 16, 0, 0) == Occupancy(2, "threads")
    assert Occupancy.of("sm_80", 32, 16, 0, 0) == Occupancy(32, "blocks")


def test_reachable_bandwidth_by_hand():
    sheet = {"multiprocessors": 100, "clock": 1e9, "bandwidth": 2e12, "fma": 64}  # 10 elements of 2 bytes a clock
    gpu = GPU("toy", "sm_90", **sheet, cache_bandwidth=4e12, cache_bytes=1 << 26)
    reachable = gpu.reachable({"fma": 4.0, "alu": 4.0, "mufu": 2.0, "uniform": 5.0}, 2)
    assert (reachable.resource, reachable.share) == ("mufu", 0.8)
    assert gpu.shares({"fma": 4.0, "uniform": 12.0}, 2) == {"issue": 0.8, "fma": 1.6}
    assert gpu.reachable({"fma": 4.0}, 2).share == 1 and gpu.reachable({"fma": 4.0}, 2).headroom == 1.6
