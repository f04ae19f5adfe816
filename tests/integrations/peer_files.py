"""Single files of packages whose own `__init__` needs a GPU stack."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest


@cache
def peer_file(name: str, *absent: str) -> ModuleType:
    """The module `name` of an installed package, imported without running the packages above it, which would import
    what a CPU has not. `absent` are libraries that the file imports and the tested functions do not use.

    Skips the test where the package or something it needs is not installed.
    """
    package, *inner = name.split(".")[:-1]
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"needs {package}")
    path = list(found.submodule_search_locations)
    stand_ins = {library: _empty(library, []) for library in absent if importlib.util.find_spec(library) is None}
    packages = {package: _empty(package, path)}
    for part in inner:
        package, path = f"{package}.{part}", [f"{folder}/{part}" for folder in path]
        packages[package] = _empty(package, path)
    sys.modules.update(stand_ins | packages)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} needs {error.name}")
    finally:
        for library in stand_ins:
            del sys.modules[library]


def _empty(name: str, path: list[str]) -> ModuleType:
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = path
    return importlib.util.module_from_spec(spec)
