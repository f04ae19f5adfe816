"""The generated part of `docs/benchmarks.md`: what a run measured, the model of a training step, counted calls, linear
forms, and what the GPU kernels' instructions leave reachable."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.call import call_block
from benchmarks.linear_plans import linear_plans_block
from benchmarks.markdown import generated, markdown_table
from benchmarks.readme import measured_sections, step_share_sentence
from benchmarks.results import Results
from benchmarks.step_share import EFFICIENCY, HEADINGS, LENGTH, MFU, ROLLOUT_RATIO, step_share_rows


def docs_block(folder: Path, document: Path) -> str:
    """The generated part of `docs/benchmarks.md`, markers included: `folder` holds the checked-in results."""
    step = markdown_table(HEADINGS, step_share_rows())
    assumed = (
        f"Per token of {LENGTH:,}-token sequences, at {MFU:.0%} of the peak flops and {EFFICIENCY:.0%} of the peak "
        f"bandwidth; generation takes {ROLLOUT_RATIO:g} times as long as the update. "
        "`python -m benchmarks step-share` prints the formulas and takes other assumptions."
    )
    parts: list[str] = []
    for measured in (folder / "cpu.json", folder / "gpu.json"):
        if measured.exists():
            parts += [measured_sections(Results.load(measured), measured, document)]
    parts += ["## Share of a training step, H100, modelled", step_share_sentence(), step, assumed]
    parts += ["## Every call, counted; GPU times modelled", call_block()]
    plans = folder / "linear_plans.json"
    if plans.exists():
        parts += ["## Plans from hidden states, counted and modelled", linear_plans_block(plans)]
    linear = folder / "linear.json"
    if linear.exists():
        parts += ["## The loss from hidden states", _linear_table(Results.load(linear))]
    figure = folder / "machine_code_roofline.png"
    if figure.exists():
        link = Path(os.path.relpath(figure, document.parent)).as_posix()
        parts += [
            "## What the GPU kernels' instructions leave reachable, modelled",
            f"![Rate that the instructions allow, by GPU]({link})",
        ]
    return generated("benchmarks", *parts)


def _linear_table(results: Results) -> str:
    rows = [
        [
            f"{m.dtype}, N = {m.rows:,}, D = {m.hidden:,}",
            m.objective,
            m.variant,
            f"{m.median:.2f}",
            "" if m.peak_extra_bytes is None else f"{m.peak_extra_bytes / 2**20:,.0f}",
        ]
        for m in results.find(operator="linear")
    ]
    table = markdown_table(["case", "objective", "variant", "seconds", "peak memory beyond the inputs, MiB"], rows)
    machine = results.machine
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']}"
    return f"{table}\n\nV = {results.measurements[0].vocab:,}; {where}, commit {results.commit}, {results.date}."
