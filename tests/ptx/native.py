"""Compiles `lanes.c` once and imports it as the module `lanes`."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy

SOURCES = tuple(Path(__file__).with_name(name) for name in ("lanes.c", "ledger.h"))
BUILD_DIR = Path(__file__).parents[2] / "build" / "ptx"
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-shared",
    "-fPIC",
    "-Wall",
    "-Wextra",
)


def _compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


def why_not() -> str | None:
    """Why the module cannot be compiled here, or None."""
    if _compiler() is None:
        return "needs a C compiler"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "needs Python's C headers"
    return None


@cache
def lanes() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: with the compiler's output.
    """
    include = [f"-I{sysconfig.get_paths()['include']}", f"-I{numpy.get_include()}"]
    key = " ".join([*FLAGS, *include, numpy.__version__, sysconfig.get_config_var("EXT_SUFFIX")]).encode()
    path = (
        BUILD_DIR / hashlib.sha256(key + b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:16] / "lanes.so"
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".partial")
        command = [_compiler(), *FLAGS, *include, str(SOURCES[0]), "-o", str(fresh), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        fresh.replace(path)
    spec = importlib.util.spec_from_file_location("lanes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
