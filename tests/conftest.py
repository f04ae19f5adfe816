"""Lets the tests run where pytest-timeout is not installed, such as a GPU machine without a network: no time limits
then. For the processes of pytest-xdist: a module stays together, and what takes minutes comes first and alone."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "ignored: pytest-timeout is not installed")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): ignored: pytest-timeout is not installed")


MINUTES = ("process_of_its_own", "triton_s_interpreter", "another_instruction_set", "undefined_behaviour_sanitizers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    first = [item for item in items if any(name in item.name for name in MINUTES)]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.nodeid if item in first else str(item.path)))
    items[:] = [*first, *(item for item in items if item not in first)]
