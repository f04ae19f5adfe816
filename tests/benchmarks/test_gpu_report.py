"""The report of a GPU machine, here without one: steps that fail, hang, lack a tool; and the real command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, gpu_steps
from benchmarks.gpu_report import Step

ROOT = Path(__file__).parents[2]


def outcome(tmp_path, code: str, *, gpu: bool = True, seconds: float = 60, **settings) -> gpu_report.Outcome:
    step = Step("part", "step", (sys.executable, "-c", code), **settings)
    return gpu_report.run(step, seconds, gpu, tmp_path / "log.txt")


def test_a_step_that_works_shows_its_figures_and_keeps_its_output(tmp_path):
    found = outcome(tmp_path, "print('hello\\n12 GB/s\\nbye')", figures="GB/s")
    assert (found.result, found.figures) == ("ok", ["12 GB/s"])
    assert "hello" in (tmp_path / "log.txt").read_text()
    assert outcome(tmp_path, "print('no GPU: ...')", gpu=False).result == "no GPU"


def test_a_step_that_fails_or_hangs_or_does_not_exist_ends_nothing(tmp_path):
    failed = outcome(tmp_path, "raise SystemExit('it broke')")
    assert (failed.result, failed.figures) == ("FAILED", ["it broke"])
    assert outcome(tmp_path, "raise SystemExit('it broke')", gpu=False).result == "FAILED"
    late = outcome(tmp_path, "import time; print('begun', flush=True); time.sleep(60)", seconds=5, figures="begun")
    assert (late.result, late.figures) == ("out of time", ["begun"])
    missing = gpu_report.run(Step("part", "step", ("no-such-tool", "x")), 5, True, tmp_path / "log.txt")
    assert missing.result == "FAILED" and "no-such-tool" in missing.figures[0]


def test_a_missing_profiler_is_named(tmp_path):
    code = "print('started')"
    step = Step(
        "part", "memcheck", ("no-such-tool", "--tool", "memcheck", sys.executable, "-c", code), tool="no-such-tool"
    )
    assert gpu_report.run(step, 60, True, tmp_path / "log.txt").result == "not installed"
    assert gpu_report.run(step, 60, False, tmp_path / "log.txt").result == "no GPU"
    assert "started" in (tmp_path / "log.txt").read_text(), "without a GPU what it would look at must still start"


def test_every_part_is_in_the_report_and_fits_its_ten_minutes(tmp_path):
    for part in gpu_report.PARTS:
        steps = [step for step in gpu_report.steps(tmp_path) if step.part == part]
        assert steps and all(step.limit <= gpu_report.PART_SECONDS <= 600 for step in steps)
    assert {"build", "check", "tests-cuda", "tests-triton", "bandwidth", "benchmarks"} < set(gpu_report.PARTS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", ["forms", "host", "counters"])
def test_without_a_gpu_the_report_is_complete_and_says_so(part, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--part", part, "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,) = json.loads((tmp_path / "summary.json").read_text())["outcomes"]
    assert stored["result"] == "no GPU" and gpu_steps.NO_GPU in (tmp_path / "log.txt").read_text()
    assert f"| {part} |" in (tmp_path / "summary.md").read_text()


def test_a_gpu_machine_needs_none_of_the_packages_that_only_the_command_line_needs():
    absent = "import sys; sys.modules |= dict.fromkeys(('rich', 'typer', 'matplotlib', 'pytest'))"
    for module in ("benchmarks.gpu_report", "benchmarks.gpu_steps", "tests.compat.__main__"):
        subprocess.run([sys.executable, "-c", f"{absent}; import {module}"], cwd=ROOT, check=True)


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","stats_row_kernel(erc::Call)","gpu__time_duration.sum","usecond","250.5"
"0","7","stats_row_kernel(erc::Call)","dram__bytes_read.sum","Mbyte","622.33"
"0","7","stats_row_kernel(erc::Call)","dram__bytes_write.sum","byte","1,024"
"0","7","stats_row_kernel(erc::Call)","lts__t_sectors_op_read.sum","sector","19,447,808"
"1","7","scale_rows_kernel","gpu__time_duration.sum","ns","1,000"
"""


def test_counters_by_hand():
    lines = gpu_steps.counter_table(NCU).splitlines()
    assert lines[2] == "| stats_row_kernel | 250.50 | 1.00 | 0.00 | 1.00 | nan | nan |"
    assert lines[3].startswith("| scale_rows_kernel | 1.00 | nan")
    assert gpu_steps.counter_table("==ERROR== no permission") == ""
