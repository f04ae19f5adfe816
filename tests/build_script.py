"""setup.py as a module that builds nothing by itself: its flags and its builder serve the tests too."""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from benchmarks.locks import one_process

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    """A fresh copy, with nothing of this machine remembered."""
    spec = importlib.util.spec_from_file_location("erc_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["erc_setup"] = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


@cache
def builder() -> ModuleType:
    """One copy for all that is built: `Object` and `Library`."""
    return load()


def built(library: Any) -> Path:
    """The path of a `Library`, compiled and linked where anything changed; one process at a time.

    Raises:
        setuptools.errors.CompileError: with the compiler's output.
    """
    with one_process(library.path):
        library.build(int(os.environ.get("ERC_BUILD_JOBS") or 2))
    return library.path
