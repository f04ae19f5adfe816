"""The plans cover what the benchmarks promise, run to their end, and keep what they have when they are stopped."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("rich", "typer", "matplotlib"):
    pytest.importorskip(package, reason=f"the benchmarks need {package}")
from typer.testing import CliRunner  # noqa: E402

from benchmarks import __main__, hardware, memory, ours, plans, readme, report, step_share, suite, timing, variants  # noqa: E402
from benchmarks.hardware import GPUS  # noqa: E402
from benchmarks.peers import PEERS, eager  # noqa: E402
from benchmarks.results import Results  # noqa: E402
from benchmarks.timing import Budget  # noqa: E402
from benchmarks.workloads import DTYPES, OPERATORS, VOCABULARIES, Case, Inputs  # noqa: E402
from erc import backend  # noqa: E402

SMALL = ("--rows", "4", "--vocab", "1000", "--seconds", "0.05")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_full_plan_covers_operators_objectives_vocabularies_dtypes_and_sweeps(device):
    plan = plans.Selection().apply(plans.full_plan(device))
    cases = [entry.case for entry in plan]
    assert {case.device for case in cases} == {device}
    assert {case.operator for case in cases} == set(OPERATORS)
    for operator, objectives in {
        "stats": {""},
        "stats-backward": {""},
        "policy-loss": {"erc-dapo", "erc-gppo", "dapo"},
    }.items():
        wanted = {(o, v, d) for o in objectives for v in VOCABULARIES.values() for d in DTYPES}
        assert wanted <= {(c.objective, c.vocab, c.dtype) for c in cases if c.operator == operator}
    for operator in ("stats", "policy-loss"):
        for dtype in ("float32", "bfloat16"):
            same = [c for c in cases if (c.operator, c.dtype) == (operator, dtype) and c.objective in ("", "erc-dapo")]
            assert len({c.rows for c in same if c.vocab == plans.QWEN}) >= 5
            assert len({c.vocab for c in same}) >= 8
    assert {c.dtype for c in cases if c.operator == "entropy-ratio"} == set(DTYPES)
    multiplied = {"float32", "bfloat16"} if device == "cpu" else set(DTYPES)
    assert {c.dtype for c in cases if c.operator == "linear"} == multiplied
    assert len({c.rows for c in cases if c.operator == "linear" and c.dtype == "float32"}) >= 3
    with_memory = {
        e.case.rows for e in plan if e.memory and (e.case.operator, e.case.dtype) == ("policy-loss", "bfloat16")
    }
    assert len(with_memory) >= 5, "memory grows with N"


def test_every_variant_meets_some_case_of_the_full_plan_and_no_name_is_misspelt():
    entries = plans.full_plan() + plans.linear_plan()
    for variant in variants.all_variants():
        taken = [entry for entry in entries if entry.case.operator in variant.operators and entry.takes(variant.name)]
        assert taken, variant.name
    known = {variant.name for variant in variants.all_variants()}
    assert {name for entry in entries for name in entry.variants or ()} <= known


def test_the_plans_last_as_long_as_the_documents_say():
    def minutes(plan: list[plans.Entry]) -> float:
        return sum(entry.expected_seconds() for entry in plans.Selection().apply(plan)) / 60

    assert minutes(plans.quick_plan()) < 4.2, "the accuracy takes most of a minute more"
    assert 15 < minutes(plans.full_plan()) < 30


def test_two_entries_of_one_case_become_one_with_the_variants_of_both():
    case = Case("stats", "float32", 4, 64)
    few = plans.Entry(case, Budget(3), ("read", "erc cpu"))
    more = plans.Entry(case, Budget(2), ("TRL", "read"), memory=True)
    (merged,) = plans.Selection().apply([few, more])
    assert merged == plans.Entry(case, Budget(3), ("read", "erc cpu", "TRL"), memory=True)
    (merged,) = plans.Selection().apply([few, plans.Entry(case, Budget(1))])
    assert merged.variants is None


def test_the_full_plan_runs_to_its_end_in_small_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "peaks", lambda case, names: dict.fromkeys(names, 1))  # a process a case otherwise
    path = tmp_path / "cpu.json"
    arguments = ["run", *SMALL, "--no-peers", "--no-accuracy", "--backends", "cpu", "--output", str(path)]
    printed = CliRunner().invoke(__main__.app, arguments)
    assert printed.exit_code == 0, printed.output
    assert "23/23" in printed.output and "min left" in printed.output
    results = Results.load(path)
    planned = {entry.case for entry in plans.Selection(rows=4, vocab=1000).apply(plans.full_plan())}
    assert {Case(*key) for key in (_as_case(key) for key in results.cases())} == planned
    assert all("erc cpu" in results.of(key) for key in results.cases() if key[0] != "rules")
    assert not [skip for skip in results.skipped if not skip.reason.startswith("does not run on")]
    assert path.with_name("cpu_roofline.png").exists()


def _as_case(key: tuple) -> tuple:
    operator, objective, dtype, rows, vocab, hidden, device = key
    return operator, dtype, rows, vocab, objective, hidden, device


def test_an_interrupted_run_keeps_and_reports_what_it_has(tmp_path, monkeypatch):
    measured = []

    def until_the_third_case(*arguments):
        measured.append(arguments)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return timed(*arguments)

    timed = suite.interleave
    monkeypatch.setattr(suite, "interleave", until_the_third_case)
    path = tmp_path / "cut.json"
    options = ("--no-peers", "--no-accuracy", "--backends", "cpu", "--operators", "stats", "--output", str(path))
    printed = CliRunner().invoke(__main__.app, ["run", *SMALL, *options])
    assert printed.exit_code == 130 and "interrupted" in printed.output
    assert len(Results.load(path).cases()) == 2
    assert path.with_suffix(".csv").exists() and not path.with_suffix(".part").exists()


def test_what_fails_is_skipped_with_its_reason_and_the_run_goes_on(monkeypatch):
    def too_large(case: Case) -> Inputs:
        if case.rows > 8:
            raise RuntimeError("out of memory")
        return Inputs(case)

    def no_process(case: Case, names: list[str]) -> dict[str, int]:
        raise RuntimeError("killed")

    monkeypatch.setattr(suite, "Inputs", too_large)
    monkeypatch.setattr(suite, "peaks", no_process)
    budget = Budget(seconds=0, min_rounds=1, max_rounds=1, max_repeats=1)
    plan = [plans.Entry(Case("stats", "float32", rows, 64), budget, memory=rows == 4) for rows in (16, 4)]
    results = suite.run("t", plan, plans.Selection(backends=("cpu",), peers=False), accuracy=False)
    assert {key[3] for key in results.cases()} == {4}
    reasons = {(skip.variant, skip.reason) for skip in results.skipped}
    assert {("all", "RuntimeError: out of memory"), ("peak memory", "RuntimeError: killed")} <= reasons


@pytest.fixture
def h100(monkeypatch):
    """A machine that says it has an H100, and computes on the CPU."""
    facts = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, total_memory=80 << 30)
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda index: facts,
        "current_device": lambda: 0,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 2**20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    nothing = {(name, torch.device("cuda", 0)): "the machine only says so" for name in ("cuda", "triton")}
    monkeypatch.setattr(backend, "_answers", nothing)
    on_cpu = lambda runner, repeats, host: [timing.time_once(runner, "cpu") for _ in range(repeats)]  # noqa: E731
    monkeypatch.setattr(timing, "gpu_seconds", on_cpu)  # test_gpu_timing.py has its events

    class OnTheCPU(Inputs):
        def __init__(self, case: Case) -> None:
            super().__init__(dataclasses.replace(case, device="cpu"))
            self.case = case

    for module in (suite, memory):
        monkeypatch.setattr(module, "Inputs", OnTheCPU)
    monkeypatch.setattr(variants, "PEERS", (eager.PEER, *(peer for peer in PEERS if peer.devices == ("cuda",))))


def test_the_gpu_command_goes_through_the_full_plan_and_reports_shares_of_the_data_sheet(h100, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    path = tmp_path / "gpu.json"
    options = ("--no-accuracy", "--backends", "cuda,torch", "--dtypes", "float32", "--output", str(path))
    printed = CliRunner().invoke(__main__.app, ["gpu", *SMALL, *options])
    assert printed.exit_code == 0, printed.output
    assert "of 3,350 GB/s" in printed.output and "flash_attn is not installed" in printed.output
    results = Results.load(path)
    assert results.machine["gpu_peak_gbps"] == 3350 and "H100" in results.machine["gpu"]
    assert {key[0] for key in results.cases()} == {*OPERATORS} - {"rules"}, "a rule needs a kernel"
    assert {key[6] for key in results.cases()} == {"cuda"}
    assert any(m.peak_extra_bytes == 2**20 for m in results.measurements), "the allocator's peak"

    # The reference stands in for a kernel that streams at 90 % of the peak: the targets of a GPU run, and its README.
    for number, m in enumerate(results.measurements):
        if m.variant == "erc torch":
            results.measurements[number] = dataclasses.replace(m, variant="erc cuda", gbps=0.9 * 3350)
    results.save(path)
    again = CliRunner().invoke(__main__.app, ["report", str(path)])
    assert again.exit_code == 0 and "share of the data-sheet peak bandwidth" in again.output and "90%" in again.output
    assert path.with_name("gpu_roofline.png").stat().st_size > 20_000
    assert "Measured on NVIDIA H100" in readme.block(results, path, tmp_path / "README.md")
    sections = readme.measured_sections(results, path, tmp_path / "benchmarks.md")
    assert "## Measured on NVIDIA H100" in sections and "time over erc cuda's" in sections
    assert f"at least {step_share.EFFICIENCY:.0%} | 90% | yes" in sections


def test_a_gpu_target_is_missed_below_what_the_step_model_counts_on():
    (target, *_) = (t for t in report.TARGETS if report.PEAK in t.text and "erc cuda" in t.text)
    assert target.bound == step_share.EFFICIENCY and target.holds(0.86) and not target.holds(0.84)


def test_without_a_gpu_the_gpu_command_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    printed = CliRunner().invoke(__main__.app, ["gpu"])
    assert printed.exit_code == 2 and "no GPU here" in printed.output
    assert hardware.gpu() == {"gpu": None, "gpu_peak_gbps": None}


@pytest.mark.parametrize(
    ("name", "terabytes"),
    [
        ("NVIDIA A100-SXM4-40GB", 1.555),
        ("NVIDIA A100-SXM4-80GB", 2.039),
        ("NVIDIA H100 80GB HBM3", 3.35),
        ("NVIDIA H100 PCIe", 2.0),
        ("NVIDIA H200", 4.8),
        ("NVIDIA GH200 480GB", 4.0),
        ("NVIDIA B200", 8.0),
    ],
)
def test_data_sheets_by_the_names_that_pytorch_gives(name, terabytes):
    assert hardware.data_sheet_bandwidth(name) == pytest.approx(terabytes * 1e12)


def test_one_data_sheet_for_measurements_models_and_machine_code():
    for gpu in GPUS:
        assert hardware.data_sheet_bandwidth(f"NVIDIA {gpu.name}") == gpu.bandwidth
    assert step_share.H100.bandwidth == hardware.data_sheet_bandwidth("NVIDIA H100 80GB HBM3")


def test_an_unlisted_gpu_takes_the_drivers_clock_and_bus(monkeypatch):
    facts = SimpleNamespace(
        name="NVIDIA X1", multi_processor_count=8, total_memory=2**30, memory_clock_rate=1_000_000, memory_bus_width=256
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    assert hardware.gpu()["gpu_peak_gbps"] == pytest.approx(64)


def test_the_linear_forms_count_what_they_must_move_and_not_the_logits():
    case = Case("linear", "bfloat16", 100, 1000, "dapo", 16)
    assert case.essential_bytes == 2 * 16 * (100 + 1000) * 2
    assert ours.PRODUCTS in next(e for e in plans.full_plan() if e.case.operator == "linear").variants


def test_make_bench_gpu_is_the_gpu_command():
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "bench-gpu:" in makefile and "-m benchmarks gpu $(BENCH_ARGS)" in makefile
