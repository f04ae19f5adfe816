"""Peak memory beyond the inputs: in a process of its own on a CPU, by PyTorch's allocator on a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.peers.base import Runner
from benchmarks.variants import all_variants
from benchmarks.workloads import Case, Inputs

# A fixed threshold sends every large block straight to the system and back, so that none hides in the heap; nor may the
# gradient of the call before, which the cpu backend keeps.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "ERC_CPU_KEEP_GRADIENT": "0"}
_TIMEOUT_SECONDS = 900


def peaks(case: Case, names: list[str]) -> dict[str, int]:
    """Extra peak bytes of the variants `names` on `case`; one that cannot be measured is missing.

    On a CPU this starts a process, because the peak of resident memory belongs to a process.
    """
    if case.device == "cuda":
        return _measure(case, names)
    if not Path("/proc/self/clear_refs").exists():
        return {}
    request = json.dumps({"case": asdict(case), "names": names, "threads": torch.get_num_threads()})
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", request],
        capture_output=True,
        text=True,
        env=os.environ | _ENVIRONMENT,
        cwd=Path(__file__).parents[1],
        timeout=_TIMEOUT_SECONDS,
    )
    if process.returncode:
        raise RuntimeError(f"the memory measurement of {case} failed:\n{process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def _peak_of(runner: Runner, device: str) -> int:
    if runner.reset is not None:
        runner.reset()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _status("VmRSS")
    runner.call()
    return max(0, _status("VmHWM") - before)


def _measure(case: Case, names: list[str]) -> dict[str, int]:
    inputs = Inputs(case)
    found = {}
    for variant in all_variants():
        if variant.name not in names or variant.why_not(case):
            continue
        try:
            runner = variant.prepare(inputs)
            _peak_of(runner, case.device)  # compiles, and touches what stays allocated
            found[variant.name] = _peak_of(runner, case.device)
        except Exception:  # what fails here failed when it was timed, and its reason was kept there
            continue
    return found


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    print(json.dumps(_measure(Case(**asked["case"]), asked["names"])))
