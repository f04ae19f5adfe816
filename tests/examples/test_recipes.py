"""The papers' recipes in their `--smoke` form: every metric finite, a reward that does not fall."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integrations.verl_environment import lacks

if find_spec("math_verify") is None:
    pytest.skip("needs math-verify", allow_module_level=True)
from examples.recipes.verifier import compute_score, is_right, last_boxed, reward

ROOT = Path(__file__).parents[2]


def run(module: str, recipe: str, output: Path, timeout: int = 1500) -> list[dict[str, float]]:
    """The log of a recipe, a process of its own."""
    command = [sys.executable, "-m", f"examples.recipes.{module}", recipe, "--smoke", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(output.parent / "out.log", "w") as out:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=timeout
        ).returncode
    assert code == 0, (output.parent / "out.log").read_text()[-6000:]
    log = next(output.glob("log.json*"))
    if log.suffix == ".json":
        return json.loads(log.read_text())
    return [json.loads(line)["data"] for line in log.open()]


def assert_learns(log: list[dict[str, float]], reward: str, gradient: str) -> None:
    for entry in log:
        for name, value in entry.items():
            assert not isinstance(value, float) or math.isfinite(value), name
    rewards = [entry[reward] for entry in log if reward in entry]
    third = len(rewards) // 3
    assert len(rewards) >= 6 and sum(rewards[-third:]) >= sum(rewards[:third]) > 0
    assert max(entry[gradient] for entry in log if gradient in entry) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["erc-dapo-paper", "ic-dapo-paper"])
@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
def test_with_trl(recipe, tmp_path):
    log = run("with_trl", recipe, tmp_path / "run")
    assert_learns(log, "reward", "grad_norm")
    gated = [entry["erc/fraction"] for entry in log if "erc/fraction" in entry]
    assert bool(gated) == recipe.startswith("erc-")
    if gated:
        assert max(gated) > 0 and gated[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("recipe", ["erc-gppo-paper", "ic-dapo-paper"])
@pytest.mark.skipif(bool(lacks()), reason=lacks() or "verl is there")
def test_with_verl(recipe, tmp_path):
    log = run("with_verl", recipe, tmp_path / "run")
    assert_learns(log, "critic/score/mean", "actor/grad_norm")
    gated = [entry["actor/erc_fraction"] for entry in log if "actor/erc_fraction" in entry]
    assert (max(gated) > 0) == recipe.startswith("erc-")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", True),
        (r"first \boxed{3}, no: \boxed{4}.", "4", True),
        (r"first \boxed{3}, no: \boxed{4}.", "3", False),
        ("4", "4", False),
        (r"\boxed{4", "4", False),
        (r"\boxed{}", "4", False),
        (r"\boxed{2^{10}}", "1024", True),
    ],
)
def test_the_verifier_reads_the_last_box(text, answer, right):
    assert is_right(text, answer) == right
    assert reward([text, [{"role": "assistant", "content": text}]], [answer] * 2) == [float(right)] * 2
    assert compute_score("math", text, answer) == float(right)


def test_a_box_closes_where_its_braces_do():
    assert last_boxed(r"\boxed{a{b}c} and \boxed{\frac{1}{2}}}") == r"\boxed{\frac{1}{2}}"
    assert last_boxed("none") is None
