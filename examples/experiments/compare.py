"""Paired comparisons with intervals, and what every experiment writes beside its figure."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import erc

RESAMPLES = 10_000


def interval(differences: Tensor | Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and bootstrap interval of the differences of paired runs, one per warm start.

    Percentile bootstrap over warm starts, widened by sqrt(n / (n - 1)): resampling n values spreads their mean too
    little by that factor.
    """
    values = torch.as_tensor(differences, dtype=torch.float64)
    if values.dim() != 1 or len(values) < 2:
        raise ValueError(f"differences must be at least two, one per warm start, got {tuple(values.shape)}")
    count = len(values)
    chosen = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    mean = values.mean()
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = mean + (values[chosen].mean(1).quantile(tails) - mean) * (count / (count - 1)) ** 0.5
    return mean.item(), low.item(), high.item()


def auc(positives: Tensor, negatives: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counting half: the area under the ROC curve."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives.contiguous(), right=False)
    ties = torch.searchsorted(ordered, positives.contiguous(), right=True) - below
    return ((below + 0.5 * ties).sum() / (len(positives) * len(negatives))).item()


def shown(found: tuple[float, float, float]) -> str:
    """`+.088 [.066, .112]`."""
    mean, low, high = (re.sub(r"^([+-])0\.", r"\1.", f"{value:+.3f}") for value in found)
    return f"{mean} [{low}, {high}]"


def machine() -> str:
    """The processor and the threads in use, for the results and the docs."""
    name = platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} thread(s)"


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def minutes(self) -> dict[str, float]:
        """Both, in minutes."""
        spent = {"wall": time.perf_counter() - self.wall, "processor": time.process_time() - self.processor}
        return {name: round(seconds / 60, 2) for name, seconds in spent.items()}


def write(path: Path, module: str, settings: dict[str, Any], results: dict[str, Any], clock: Clock) -> None:
    """Results as JSON, with the command, versions, machine and time that gave them."""
    record = {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "versions": {"erc": erc.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "machine": machine(),
        "minutes": clock.minutes(),
        "settings": settings,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record | rounded(results), indent=1)
    # A line per interval, not per number.
    text = re.sub(r"\[([^][{}]*)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
    path.write_text(text + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, at any depth: a file that changes only where results do."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value
