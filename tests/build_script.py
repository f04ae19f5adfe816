"""setup.py as a module that builds nothing by itself: its flags and its builder serve the tests too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    """A fresh copy, with nothing of this machine remembered."""
    spec = importlib.util.spec_from_file_location("erc_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["erc_setup"] = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module
