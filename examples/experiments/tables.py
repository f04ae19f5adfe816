"""The tables of the docs, made of the checked-in results: `python -m examples.experiments.tables`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from examples.experiments.compare import shown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results/experiments"
Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def results(name: str) -> dict[str, Any]:
    """A checked-in results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def drift() -> Table:
    """After the last update: levels, and the difference that the gate makes to no gate and to the random drop."""
    found = results("erc_drift")
    header, rows = ["optimiser, rule"], []
    for title in ("KL, nats", "TV, un-sampled"):
        header += [f"{title}: without, with the gate", "difference", "to random drop"]
    for optimizer, runs in found["measures"].items():
        for rule in ("dapo", "gppo", "no-clip"):
            row = [f"{optimizer}, {rule}"]
            for measure in ("kl", "unsampled"):
                levels = (fmean(runs[f"{rule}, {gate}"][measure][-1]) for gate in ("no gate", "gate 0.05"))
                gaps = (
                    found["differences"][f"{optimizer}, {rule}, gate 0.05 - {other}"][measure]
                    for other in ("no gate", "random drop")
                )
                row += [", ".join(f"{level:.3g}" for level in levels), *map(shown, gaps)]
            rows.append(row)
    return header, rows


def regimes() -> Table:
    """Each rule at its best learning rate, and the differences that the gates make there."""
    found = results("erc_regimes")
    gates = ("gate 0.05", "gate 0.2", "random drop", "dppo-full-tv")
    gains = found["gain over the warm start at the best learning rate"]
    gaps = found["differences at the best learning rate"]
    rows = [
        [
            f"{rule}, {reuse}",
            shown(gains[f"{rule}, no gate, reuse {reuse}"]),
            *(shown(gaps[f"{rule}, {gate} - no gate, reuse {reuse}"]) for gate in gates),
        ]
        for reuse in (1, 4, 12)
        for rule in ("dapo", "gppo", "no-clip")
    ]
    return ["rule, uses of a token", "gain over the warm start", *gates], rows


def transformer() -> Table:
    """The final reward of each arm at both learning rates, with the difference that the gate makes."""
    found = results("erc_transformer")
    rates = found["settings"]["learning_rates"]
    rows = []
    arms = [
        ("dapo", "no gate"),
        ("dapo", "gate 0.05"),
        *(("gppo", gate) for gate in ("no gate", "gate 0.05", "gate 0.2")),
    ]
    for rule, gate in arms:
        row = [f"{rule}, {gate}"]
        for rate in rates:
            gap = found["differences of the final reward"].get(f"{rule}, {gate} - no gate, learning rate {rate:g}")
            level = shown(found["final reward"][f"{rule}, {gate}, learning rate {rate:g}"])
            row += [level, shown(gap) if gap else ""]
        rows.append(row)
    header = [title for rate in rates for title in (f"reward, learning rate {rate:g}", "difference")]
    return ["rule, gate", *header], rows


def in_context() -> Table:
    """Soundness after RL in the three settings, with differences to DAPO."""
    found = results("in_context")
    lucks = list(found["after RL"]["DAPO"])
    rows = []
    for name, settings in found["after RL"].items():
        row = [name]
        for luck in lucks:
            gap = found["minus DAPO"].get(name)
            level = f"{100 * settings[luck]['sound among right'][0]:.0f} %"
            row.append(f"{level}, {shown(gap[luck]['sound among right'])}" if gap else level)
        rows.append(row)
    return ["sound among right answers, bare prompts", *(f"verifier {luck}" for luck in lucks)], rows


BLOCKS: dict[str, tuple[Path, Callable[[], Table]]] = {
    "drift": (ROOT / "docs/entropy_ratio_clipping.md", drift),
    "regimes": (ROOT / "docs/entropy_ratio_clipping.md", regimes),
    "transformer": (ROOT / "docs/entropy_ratio_clipping.md", transformer),
    "in-context": (ROOT / "docs/in_context_rlvr.md", in_context),
}


def markdown(table: Table) -> str:
    """The first column to the left, the others to the right."""
    header, rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text: str, name: str) -> str:
    """A document with the block `name` made anew.

    Raises:
        ValueError: where it does not have the markers of the block, once each.
    """
    begin, end = f"<!-- {name}:begin -->\n\n", f"\n\n<!-- {name}:end -->"
    new, count = re.subn(
        f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: markdown(BLOCKS[name][1]()), text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"expected {begin.strip()} and {end.strip()} once, got {count} such blocks")
    return new


def main() -> None:
    """Rewrite the tables in place."""
    for name, (document, _) in BLOCKS.items():
        document.write_text(with_table(document.read_text(encoding="utf-8"), name), encoding="utf-8")


if __name__ == "__main__":
    main()
