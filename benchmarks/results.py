"""What is kept of a run: one JSON file, with everything that is needed to read it a year later."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import erc
from benchmarks import hardware
from erc.backend import cpu_isa

FORMAT = 1
_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "trl",
    "verl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-attn",
    "quack-kernels",
)
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Measurement:
    """One variant on one case. Times in seconds; `gbps` counts the essential bytes of the case only. On a GPU the times
    are the GPU's, and `host` is what the host needs to queue a call."""

    operator: str
    objective: str
    dtype: str
    rows: int
    vocab: int
    hidden: int
    device: str
    variant: str
    median: float
    q1: float
    q3: float
    samples: int
    gbps: float
    peak_extra_bytes: int | None = None
    host: float | None = None

    @property
    def case_key(self) -> tuple:
        """What identifies the case."""
        return self.operator, self.objective, self.dtype, self.rows, self.vocab, self.hidden, self.device


@dataclass(frozen=True)
class Skip:
    """A variant that was not measured on a case, and why."""

    case: str
    variant: str
    reason: str


@dataclass(frozen=True)
class AccuracyRow:
    """An implementation in one band of entropies. Errors against the float64 oracle on the same rounded logits."""

    implementation: str
    dtype: str
    band: str
    rows: int
    entropy_median_error: float
    entropy_max_error: float
    logprob_max_error: float
    flipped: float


@dataclass
class Results:
    """A run. `workload` tells what the logits looked like."""

    name: str
    commit: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    workload: dict[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    accuracy: list[AccuracyRow] = field(default_factory=list)
    format: int = FORMAT

    def cases(self) -> list[tuple]:
        """The cases in the order in which they were measured."""
        return list(dict.fromkeys(m.case_key for m in self.measurements))

    def of(self, key: tuple) -> dict[str, Measurement]:
        """The measurements of a case by variant."""
        return {m.variant: m for m in self.measurements if m.case_key == key}

    def find(self, **conditions: Any) -> list[Measurement]:
        """The measurements whose fields have these values."""
        return [m for m in self.measurements if all(getattr(m, k) == v for k, v in conditions.items())]

    def save(self, path: Path) -> None:
        """Write `path` (JSON), and the measurements as CSV beside it; an interruption leaves no half of a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        part.replace(path)
        if not self.measurements:
            return
        where = {name: self.machine.get(name) for name in ("cpu", "threads", "isa", "gpu")}
        made_by = "; ".join(f"{name} {version}" for name, version in self.versions.items())
        origin = {"commit": self.commit, "date": self.date, **where, "versions": made_by}
        with path.with_suffix(".csv").open("w", newline="") as file:
            rows = [asdict(m) | origin for m in self.measurements]
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote.

        Raises:
            ValueError: for a file of another format.
        """
        content = json.loads(Path(path).read_text())
        if content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a results file of format {FORMAT}")
        for name, kind in (("measurements", Measurement), ("skipped", Skip), ("accuracy", AccuracyRow)):
            content[name] = [kind(**row) for row in content[name]]
        return cls(**content)


def new_results(name: str) -> Results:
    """Empty results of this machine, now."""
    return Results(
        name=name,
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        machine=machine(),
        versions=versions(),
        workload={},
    )


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_isa() or "none",
        "load": round(os.getloadavg()[0], 2),
        **hardware.gpu(),
    }


def versions() -> dict[str, str]:
    """Python, erc, and the packages that took part."""
    found = {"python": platform.python_version(), "erc": erc.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "erc", "csrc", "benchmarks")
    return (commit + (" with changes" if changed else "")) or "unknown"
