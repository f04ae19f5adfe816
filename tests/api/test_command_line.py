"""`python -m erc`: what a user runs first."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import erc
from erc.check import Agreement, check_backend

BARE = (
    "import runpy, sys; sys.modules |= dict.fromkeys(['rich', 'numpy']); runpy.run_module('erc', run_name='__main__')"
)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "erc", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("rich", [True, False])
def test_info_names_every_backend(rich):
    if rich:
        pytest.importorskip("rich")
    command = [sys.executable, "-c", BARE, "info"]
    printed = run("info") if rich else subprocess.run(command, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    for name in ("cpu", "triton", "cuda", "torch"):
        assert f"backend {name}" in printed.stdout


def test_info_for_programs():
    facts = json.loads(run("info", "--json").stdout)
    assert facts["erc"] == erc.__version__ and facts["torch"] == torch.__version__
    assert set(facts["backends"]) == {"cpu", "triton", "cuda", "torch"}


def test_the_version():
    assert run("--version").stdout == f"erc {erc.__version__}\n"


def test_check_compares_every_available_backend_with_the_oracle():
    """With nothing but PyTorch: rich and numpy are conveniences."""
    printed = subprocess.run([sys.executable, "-c", BARE, "check"], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stdout + printed.stderr
    assert "holds" in printed.stdout and "BROKEN" not in printed.stdout


def test_check_would_notice_a_broken_backend():
    good = check_backend("torch", torch.float32, "cpu")
    assert good.passed
    for field, value in (("logprob", 1e-5), ("entropy", 1e-5), ("gradient", 1.0), ("flips", 1)):
        assert not Agreement(**(vars(good) | {field: value})).passed


def test_an_unknown_command_fails():
    assert run("frobnicate").returncode != 0
