"""Compiles `lanes.c` once and imports it as the module `lanes`."""

from __future__ import annotations

import importlib.util
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy

from tests import build_script

SOURCE = Path(__file__).with_name("lanes.c")
BUILD_DIR = Path(__file__).parents[2] / "build" / "ptx"
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
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
        setuptools.errors.CompileError: with the compiler's output.
    """
    include = (f"-I{sysconfig.get_paths()['include']}", f"-I{numpy.get_include()}")
    script, folder = build_script.builder(), BUILD_DIR / str(sysconfig.get_config_var("SOABI"))
    objects = [script.Object(SOURCE, folder / "lanes.o", (str(_compiler()), *FLAGS, *include))]
    path = build_script.built(script.Library(folder / "lanes.so", (str(_compiler()), "-shared"), ("-lm",), objects))
    spec = importlib.util.spec_from_file_location("lanes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
