"""This source tree against a PyTorch release: the bindings' syntax, and a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests import build_script
from tests.compat.environments import ROOT, Environment, Unavailable

_PACKAGED = ("erc", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def check_bindings(include: Path) -> list[str]:
    """What the C++ compiler says of each file in csrc/bindings with these headers of PyTorch; empty where all compile.

    The few names of CUDA's run-time come from the header of the tests' host build, so no toolkit is needed.
    """
    setup, problems = build_script.builder(), []
    if setup.cxx() is None:
        raise Unavailable("no C++ compiler")
    flags = [*setup.CXX_FLAGS, "-Werror", f"-DTORCH_TARGET_VERSION={setup.OLDEST_TORCH}", "-DUSE_CUDA"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cuda_host'}", "-isystem", str(include)]
    for source in sorted(ROOT.glob("csrc/bindings/*.cpp")):
        command = [*setup.cxx(), "-fsyntax-only", *flags, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{source.name}: {next(s for s in done.stderr.splitlines() if 'error' in s)}")
    return problems


def build_wheel(environment: Environment, cuda: bool, target: Path) -> Path:
    """A wheel of a copy of this tree, built on the environment's PyTorch.

    Raises:
        subprocess.CalledProcessError: with the build's output.
    """
    with TemporaryDirectory(prefix="erc-compat-build-") as folder:
        for name in _PACKAGED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
            else:
                shutil.copy(source, folder)
        variables = os.environ | {"PYTHONPATH": str(environment.folder), "ERC_BUILD_CUDA": str(int(cuda))}
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(target)]
        subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True, text=True)
    return next(target.glob("*.whl"))
