"""`make gpu-report`: everything that a GPU machine can say about this library, in one folder, without a network.

Needs Python, PyTorch and what is on the machine: a missing tool or package is named in the summary, a failing step does
not end the report. PART=... runs one part, each within ten minutes; what was built and compiled stays for the next one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.markdown import markdown_table

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
PART_SECONDS = 570
_SUITE = "tests/contract"
_ON_A_GPU = "tests/contract/test_cuda_gpu.py"  # by its name every test of it matches "cuda"
_SMALL = "not triton and (forbidden_tokens or few_rows or in_place or runs_repeat)"


@dataclass(frozen=True)
class Step:
    """A command, with what it needs; lines of its output that match `figures` go into the summary."""

    part: str
    name: str
    command: tuple[str, ...]
    limit: int = PART_SECONDS
    tool: str = ""
    figures: str = ""


def _pytest(path: str, selection: str, *options: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "gpu", path, "-k", selection, *options)


def steps(output: Path) -> list[Step]:
    """Every step, in order."""
    tests = r"\d (passed|failed|skipped|error)|^(FAILED|ERROR|SKIPPED) "

    def run(name: str, *arguments: str) -> tuple[str, ...]:
        return (PYTHON, "-m", name, *arguments)

    return [
        Step("build", "library", (PYTHON, "setup.py", "-q", "build_ext", "--inplace")),
        Step("build", "triton kernels", run("benchmarks.gpu_steps", "compile"), figures="kernels for"),
        Step("check", "info", run("erc", "info"), figures="backend"),
        Step("check", "contract", run("erc", "check"), figures="holds|BROKEN"),
        Step("tests-cuda", "suite", _pytest(_SUITE, "not triton and not bandwidth"), figures=tests),
        Step("tests-triton", "suite", _pytest(_SUITE, "triton and not bandwidth"), figures=tests),
        Step("bandwidth", "bandwidth", _pytest(_ON_A_GPU, "bandwidth", "-s"), figures=f"{tests}|GB/s"),
        Step("benchmarks", "quick", run("benchmarks.gpu_steps", "bench", str(output / "gpu.json")), figures=r"^\||^$"),
        Step("forms", "cluster or block", run("benchmarks.gpu_steps", "forms"), figures="LossForm::|^forms:"),
        Step("host", "host time", run("benchmarks.gpu_steps", "host"), figures=r"^\|"),
        *(
            Step(
                "sanitizer", tool,
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_pytest(_SUITE, _SMALL)),
                limit=PART_SECONDS // 3, tool="compute-sanitizer", figures="ERROR SUMMARY|passed|failed|skipped",
            )
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step("counters", "ncu", run("benchmarks.gpu_steps", "counters"), figures=r"^\||ncu"),
    ]  # fmt: skip


PARTS = tuple(dict.fromkeys(step.part for step in steps(Path())))


@dataclass(frozen=True)
class Outcome:
    """`result` is "ok", "no GPU", "not installed", "out of time" or "FAILED"."""

    part: str
    name: str
    result: str
    seconds: float
    figures: list[str]


def environment(gpu: bool) -> dict[str, str]:
    """Builds for the GPU that is there, keeps compiled kernels in the tree, asks no network."""
    kept = ROOT / "build" / "gpu"
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "ERC_BUILD_CUDA": str(int(gpu and shutil.which("nvcc") is not None)),
        "TRITON_CACHE_DIR": str(kept / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "160",
    }


def run(step: Step, seconds: float, gpu: bool, log: Path) -> Outcome:
    """Run a step for at most so long; its output goes to the end of `log`."""
    command = step.command
    if step.tool and shutil.which(step.tool) is None:
        if gpu:
            return Outcome(step.part, step.name, "not installed", 0.0, [f"{step.tool} is not installed"])
        command = command[command.index(PYTHON) :]  # shows that what it would look at starts
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(gpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
        text, code = done.stdout.decode(errors="replace"), done.returncode
    except subprocess.TimeoutExpired as expired:
        text, code = (expired.stdout or b"").decode(errors="replace"), None
    except OSError as error:
        text, code = str(error), 1
    with log.open("a") as file:
        file.write(f"\n==== {step.part}: {step.name}: {' '.join(command)}\n{text}\n==== exit status {code}\n")
    figures = [line.strip() for line in text.splitlines() if step.figures and re.search(step.figures, line)]
    if code is None:
        result = "out of time"
    elif code != 0:
        result, figures = "FAILED", figures if any(figures) else text.strip().splitlines()[-3:]
    else:
        result = "ok" if gpu else "no GPU"
    return Outcome(step.part, step.name, result, time.monotonic() - started, figures)


def facts() -> dict[str, str]:
    """The machine, by tools that may be missing."""

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"not there: {error}"
        return (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]

    gpu = "import torch; n = torch.cuda.device_count(); print(n, torch.cuda.get_device_name() if n else '')"
    return {
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{platform.node()}, {os.cpu_count()} processors, {time.strftime('%Y-%m-%d %H:%M')}",
        "python": platform.python_version(),
        "torch": ask(PYTHON, "-c", "import torch; print(torch.__version__)"),
        "triton": ask(PYTHON, "-c", "import triton; print(triton.__version__)"),
        "nvcc": ask("nvcc", "--version"),
        "driver": ask("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "GPUs": ask(PYTHON, "-c", gpu),
    }


def summary(facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """The report's first page."""
    lines = ["# GPU report", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    rows = [(each.part, each.name, each.result, f"{each.seconds:.0f}") for each in outcomes]
    lines.append(markdown_table(("part", "step", "result", "seconds"), rows, left=3))
    for each in outcomes:
        if each.figures:
            lines += ["", f"## {each.part}: {each.name}", "", *each.figures]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Returns 1 where a step failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="one part, within ten minutes (default: all)")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "gpu-report", help="the report's folder")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / "log.txt").unlink(missing_ok=True)
    machine, outcomes = facts(), []
    gpu = not machine["GPUs"].startswith("0") and machine["GPUs"][:1].isdigit()
    chosen = [step for step in steps(output) if options.part in (None, step.part)]
    deadline = time.monotonic() + (PART_SECONDS if options.part else 24 * 3600)
    for step in chosen:
        left = deadline - time.monotonic()
        outcomes.append(run(step, min(step.limit, left), gpu, output / "log.txt") if left > 5 else _late(step))
        print(f"{outcomes[-1].part}: {step.name}: {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", flush=True)
        (output / "summary.md").write_text(summary(machine, outcomes))
        figures = {"facts": machine, "outcomes": [asdict(each) for each in outcomes]}
        (output / "summary.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{(output / 'summary.md').read_text()}\n{output} has the log and everything else.")
    return int(any(each.result == "FAILED" for each in outcomes))


def _late(step: Step) -> Outcome:
    return Outcome(step.part, step.name, "out of time", 0.0, [])


if __name__ == "__main__":
    sys.exit(main())
