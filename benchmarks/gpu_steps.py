"""What `benchmarks.gpu_report` runs as processes of their own; needs PyTorch and nothing else.

python -m benchmarks.gpu_steps compile | bench FILE | forms | host | counters | launch
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

import erc
from benchmarks import loss_forms, plans, suite
from benchmarks.markdown import markdown_table
from benchmarks.peers.base import Runner
from benchmarks.report import full_report
from benchmarks.results import Results
from benchmarks.timing import host_seconds

NO_GPU = "no GPU: torch.cuda.is_available() is False"
ROWS, VOCAB = 2048, 151_936  # of the counters: 622 MB in bfloat16, which no cache holds
COUNTERS = {
    "us": "gpu__time_duration.sum",
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
    "L2 read": "lts__t_sectors_op_read.sum",
    "L2 written": "lts__t_sectors_op_write.sum",
    "L2 hits, %": "lts__t_sector_hit_rate.pct",
}
_SECTOR = 32  # bytes
_OURS = r"regex:^(stats|segment|merge|loss|policy_loss|gradient|sweep|scale|paired|partial|token)_?\w*"


def gpu_backends() -> list[str]:
    """The GPU backends that run here; says why the others do not."""
    states = {name: erc.backends()[name] for name in ("cuda", "triton")}
    for name, state in states.items():
        if state != "available":
            print(f"{name}: {state}")
    return [name for name, state in states.items() if state == "available"]


# ---- compiling -------------------------------------------------------------------------------------------------------


def compile_kernels(share: int | None = None, of: int = 1) -> int:
    """Fill Triton's cache for this GPU, with a process for each processor: what runs later finds its kernels there."""
    from tests import stub_driver
    from tests.compat import calls

    major, minor = torch.cuda.get_device_capability()
    if share is None:
        processes = len(os.sched_getaffinity(0))
        command = [sys.executable, "-m", "benchmarks.gpu_steps", "compile"]
        started = [subprocess.Popen([*command, str(part), str(processes)]) for part in range(processes)]
        return max(process.wait() for process in started)
    arch = f"sm_{major}{minor}"
    if torch.version.hip or arch not in stub_driver.TARGETS:
        print(f"not compiled ahead: {torch.cuda.get_device_name()}")
        return 0
    library = calls.register()
    with stub_driver.stub_driver(arch) as launches:
        for _, call in list(calls.calls())[share::of]:
            call()
    print(f"{len({id(launch.kernel) for launch in launches})} kernels for {arch}, compiled or found")
    del library
    return 0


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def bench(path: Path) -> int:
    """The short plan beside eager PyTorch, torch.compile, TRL and Liger; the file has the results so far."""
    plan = plans.Selection(backends=tuple(gpu_backends())).apply(plans.quick_plan("cuda"))
    suite.run("gpu-quick", plan, plans.Selection(), progress=print, keep=lambda results: results.save(path))
    print(full_report(Results.load(path)))
    return 0


# ---- forms -----------------------------------------------------------------------------------------------------------


def forms() -> int:
    """Cluster and block form of CUDA's fused loss, timed in turns: lines for the table of csrc/cuda/forms.cpp."""
    major, minor = torch.cuda.get_device_capability()
    if "cuda" not in gpu_backends():
        print("forms: skipped, the CUDA backend does not run here")
    elif major not in (9, 10):
        print(f"forms: skipped, with compute capability {major}.{minor} the fused loss takes a block")
    else:
        for line in loss_forms.measure():
            print(line, flush=True)
    return 0


# ---- host time -------------------------------------------------------------------------------------------------------


def host() -> int:
    """Microseconds of the host for a call on one token, median of 200, beside `F.cross_entropy`."""
    logits = torch.randn(1, 1024, device="cuda", dtype=torch.bfloat16)
    labels, value = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.ones(1, device="cuda")
    given = {"old_logprob": value, "old_entropy": value, "advantages": value}

    def leaf() -> torch.Tensor:
        return logits.detach().requires_grad_()

    calls: dict[str, Callable[[], object]] = {
        "F.cross_entropy, forward and backward": lambda: F.cross_entropy(leaf(), labels).backward(),
    }
    for name in gpu_backends():
        calls[f"token_stats, {name}"] = lambda name=name: erc.token_stats(logits, labels, backend=name)
        calls[f"policy_loss erc-dapo, forward and backward, {name}"] = lambda name=name: erc.policy_loss(
            leaf(), labels, objective="erc-dapo", backend=name, **given
        ).loss.backward()
    rows = []
    for name, call in calls.items():
        for _ in range(20):
            call()
        rows.append([name, f"{1e6 * median(host_seconds(Runner(call)) for _ in range(200)):.0f}"])
    print(markdown_table(["host time of a call on one token", "us"], rows))
    return 0


# ---- counters --------------------------------------------------------------------------------------------------------


def launch() -> int:
    """The main operators once each, on logits that no cache holds: what the profiler looks at."""
    logits = torch.randn(ROWS, VOCAB, device="cuda", dtype=torch.bfloat16)
    labels, values = torch.zeros(ROWS, dtype=torch.int64, device="cuda"), torch.ones(ROWS, device="cuda")
    given = {"old_logprob": values - 12, "old_entropy": 11 * values, "advantages": values}
    for name in gpu_backends():
        with torch.no_grad():
            erc.token_stats(logits, labels, backend=name)
        stats = erc.token_stats(logits.detach().requires_grad_(), labels, backend=name)
        (stats.logprob + stats.entropy).sum().backward()
        erc.policy_loss(
            logits.detach().requires_grad_(), labels, objective="dapo", backend=name, **given
        ).loss.backward()
    torch.cuda.synchronize()
    return 0


def counters() -> int:
    """DRAM and L2 traffic of every kernel of `launch`, by ncu, in units of the logits."""
    if shutil.which("ncu") is None:
        print("ncu is not installed")
        return 0
    command = ["ncu", "--clock-control", "none", "--csv", "--kernel-name", _OURS, "--kernel-name-base", "function"]
    command += ["--metrics", ",".join(COUNTERS.values()), sys.executable, "-m", "benchmarks.gpu_steps", "launch"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(counter_table(done.stdout) or f"{done.stdout}\n{done.stderr}")
    return done.returncode


def counter_table(text: str) -> str:
    """ncu's CSV as Markdown, a line for each launch; empty where there is none."""
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(lines[start:]):
        names[row["ID"]] = row["Kernel Name"].split("(")[0].split("<")[0]
        value = float(row["Metric Value"].replace(",", "")) * _UNITS.get(row["Metric Unit"], 1.0)
        launches.setdefault(row["ID"], {})[row["Metric Name"]] = value
    size = ROWS * VOCAB * 2
    rows = []
    for launch_id, values in launches.items():
        cells = []
        for title, metric in COUNTERS.items():
            value = values.get(metric, float("nan"))
            scale = 1e6 if title == "us" else 1 if "%" in title else (_SECTOR if title.startswith("L2") else 1) / size
            cells.append(f"{value * scale:.2f}")
        rows.append([names[launch_id], *cells])
    header = ["kernel", *(t if t == "us" or "%" in t else f"{t} / logits" for t in COUNTERS)]
    return markdown_table(header, rows) if rows else ""


_UNITS = {
    "nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1.0, "s": 1.0,
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    step, *rest = arguments or ["help"]
    steps = {"compile": compile_kernels, "bench": bench, "forms": forms, "host": host}
    steps |= {"counters": counters, "launch": launch}
    if step not in steps:
        print(__doc__)
        return 2
    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    return steps[step](*(Path(each) if step == "bench" else int(each) for each in rest))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
