"""Experiments as grids of independent cells: each cell's numbers are a file, so an interrupted grid goes on."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from examples.progress import Report, bars, silent
from examples.train_rlvr import TrainConfig, Trainer

_messages: Any = None


def _start_worker(messages: Any, threads: int) -> None:
    global _messages
    _messages = messages
    torch.set_num_threads(threads)


def _run_cell(run: Callable[..., dict[str, Any]], config: TrainConfig, path: Path, name: str) -> None:
    def report(phase: str, done: int, total: int, message: str) -> None:
        _messages.put((name, done, total, f"{phase}  {message}"))

    write_json(path, {"config": asdict(config), "result": run(config, report)})


def write_json(path: Path, value: Any) -> None:
    """Write so that no interruption leaves half a file."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def finished(path: Path, config: TrainConfig) -> bool:
    """Whether the file holds the numbers of this very configuration."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["config"] == _plain(config)


def _plain(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config)))


def run_cells(
    cells: dict[str, TrainConfig],
    run: Callable[[TrainConfig, Report], dict[str, Any]],
    folder: Path,
    workers: int = 1,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """What `run` returns for each cell, from its file `folder/<name>.json` where that is of the same configuration.

    `run` is a function of a module, so that `workers` processes can import it; one worker runs in this process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.json" for name in cells}
    missing = {name: config for name, config in cells.items() if not finished(paths[name], config)}
    if workers == 1:
        _run_here(missing, run, paths, console)
    elif missing:
        _run_in_processes(missing, run, paths, workers, console)
    return {name: json.loads(path.read_text(encoding="utf-8"))["result"] for name, path in paths.items()}


def _run_here(missing: dict[str, TrainConfig], run: Callable, paths: dict[str, Path], console: Console | None) -> None:
    for name, config in missing.items():
        if console is None:
            result = run(config, silent)
        else:
            console.rule(name)
            with bars(console) as report:
                result = run(config, report)
        write_json(paths[name], {"config": asdict(config), "result": result})


def _run_in_processes(
    missing: dict[str, TrainConfig], run: Callable, paths: dict[str, Path], workers: int, console: Console | None
) -> None:
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    with context.Manager() as manager, bars(console or Console(quiet=True)) as report:
        messages = manager.Queue()
        with ProcessPoolExecutor(workers, context, _start_worker, (messages, threads)) as pool:
            futures = [pool.submit(_run_cell, run, config, paths[name], name) for name, config in missing.items()]
            _follow(futures, messages, report)


def _follow(futures: list[Future], messages: Any, report: Report) -> None:
    while not all(future.done() for future in futures):
        try:
            report(*messages.get(timeout=0.5))
        except Empty:
            report("cells", sum(future.done() for future in futures), len(futures), "")
    for future in futures:
        future.result()


def reinforce(trainer: Trainer, report: Report) -> dict[str, Any]:
    """The history of a run of RL, with evaluations before and after."""
    trainer.history.before = trainer.evaluate()
    for step in range(trainer.config.steps):
        row = trainer.train_step()
        report("RL", step + 1, trainer.config.steps, f"reward {row['reward']:.2f}")
    trainer.history.after = trainer.evaluate()
    return trainer.history.numbers()


def write_results(
    output: Path, name: str, config: TrainConfig, seeds: int, results: dict[str, Any], table: str
) -> None:
    """`name.json` and `name.md` in `output`, with the command of this process."""
    output.mkdir(parents=True, exist_ok=True)
    command = " ".join([f"python -m examples.{name}", *sys.argv[1:]])
    record = {"command": command, "environment": environment(), "config": asdict(config), "seeds": seeds}
    write_json(output / f"{name}.json", record | results)
    (output / f"{name}.md").write_text(f"`{command}`, {seeds} seeds, mean ± deviation\n\n{table}")


def check_preset(preset: str) -> None:
    """Raise `typer.BadParameter` for a preset that the experiments do not have."""
    if preset not in ("laptop", "paper"):
        raise typer.BadParameter(f'preset must be "laptop" or "paper", got {preset!r}')


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def auc(positives: Tensor, negatives: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counting half: the area under the ROC curve."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    ties = torch.searchsorted(ordered, positives, right=True) - below
    return ((below + 0.5 * ties).sum() / (len(positives) * len(negatives))).item()


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows of equal keys as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    return "\n".join(lines + ["| " + " | ".join(row[name] for name in names) + " |" for row in rows]) + "\n"


def default_workers(model: str | None) -> int:
    """A process a core for the small decoder, at most 4; one for a checkpoint or on a GPU."""
    return 1 if model or torch.cuda.is_available() else min(4, multiprocessing.cpu_count())


def environment() -> dict[str, str]:
    """What the numbers may depend on besides the configuration."""
    processor = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"python": platform.python_version(), "torch": str(torch.__version__), "processor": processor}
