"""`python -m erc`: what a user runs first."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from erc.check import Agreement, check_backend

WITHOUT_RICH = "import runpy, sys; sys.modules['rich'] = None; runpy.run_module('erc', run_name='__main__')"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "erc", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("rich", [True, False])
def test_info_names_every_backend(rich):
    if rich:
        pytest.importorskip("rich")
    command = [sys.executable, "-c", WITHOUT_RICH, "info"]
    printed = run("info") if rich else subprocess.run(command, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    for name in ("cpu", "triton", "cuda", "torch"):
        assert f"backend {name}" in printed.stdout


def test_check_compares_every_available_backend_with_the_oracle():
    printed = run("check")
    assert printed.returncode == 0, printed.stdout + printed.stderr
    assert "holds" in printed.stdout and "BROKEN" not in printed.stdout


def test_check_would_notice_a_broken_backend():
    good = check_backend("torch", torch.float32, "cpu")
    assert good.passed
    for field, value in (("logprob", 1e-5), ("entropy", 1e-5), ("gradient", 1.0), ("flips", 1)):
        assert not Agreement(**(vars(good) | {field: value})).passed


def test_an_unknown_command_fails():
    assert run("frobnicate").returncode != 0
