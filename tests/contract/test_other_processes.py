"""The modules whose tests take a fixture of backends, again: in Triton's interpreter, and on other instruction sets."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import erc
from erc.backend import cpu_isa

HERE = Path(__file__).parent
EVERY_BACKEND = (
    "test_cpu_sweeps.py",
    "test_derivatives.py",
    "test_edges.py",
    "test_entropy_ratio.py",
    "test_extreme_rows.py",
    "test_fused_loss.py",
    "test_linear_dtypes.py",
    "test_linear_rows.py",
    "test_opcheck.py",
    "test_order.py",
    "test_random_search.py",
    "test_row_operators.py",
    "test_shards.py",
    "test_small_differences.py",
    "test_stats.py",
    "test_support_rows.py",
    "test_token_operators.py",
    "test_triton.py",
    "test_unread_values.py",
)
pytestmark = [
    pytest.mark.skipif(
        "ERC_CPU_ISA" in os.environ or os.environ.get("TRITON_INTERPRET") == "1", reason="one of the other processes"
    ),
    pytest.mark.timeout(1800),
]


def run_again(modules: tuple[str, ...], **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", *(HERE / name for name in modules), "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=1700)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("third", [0, 1, 2])
def test_in_triton_s_interpreter(third):
    run_again(EVERY_BACKEND[third::3], TRITON_INTERPRET="1")


@pytest.mark.skipif(erc.backends()["cpu"] != "available", reason="the cpu backend is not built")
@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_on_another_instruction_set(isa):
    if cpu_isa() == isa:
        pytest.skip("the other tests ran on it")
    run_again(EVERY_BACKEND, ERC_CPU_ISA=isa)
