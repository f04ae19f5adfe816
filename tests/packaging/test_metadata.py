"""What the package says of itself: one version, a description that an index can render, types, and the right files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import erc
from tests import build_script

ROOT = Path(__file__).parents[2]
REPOSITORY = "https://forge.example/erc/erc"


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 70.1")
    for name in ("ERC_BUILD_CUDA", "ERC_CUDA_ARCHS", "ERC_REPOSITORY_URL"):
        monkeypatch.delenv(name, raising=False)
    return build_script.load()


def test_the_version_stands_in_one_place(script):
    assert script.declared_version() == erc.__version__
    for name in ("pyproject.toml", "setup.py", "CITATION.cff", "README.md"):
        text = (ROOT / name).read_text()
        assert not re.search(rf"(?<![\d.]){re.escape(erc.__version__)}(?![\d.+])", text), name


def test_the_changelog_has_this_version_below_the_unreleased_changes():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", erc.__version__]


def test_a_wheel_with_cuda_says_for_which_gpus(script, monkeypatch):
    monkeypatch.setenv("ERC_CUDA_ARCHS", "8.0;9.0+PTX")
    assert script.declared_version() == erc.__version__  # nobody asked for CUDA: the build may go on without it
    monkeypatch.setenv("ERC_BUILD_CUDA", "1")
    assert script.declared_version() == f"{erc.__version__}+cuda.sm80.sm90.ptx90"
    monkeypatch.setattr(sys, "argv", ["setup.py", "sdist"])
    assert script.declared_version() == erc.__version__


def test_the_description_has_no_relative_link(script):
    text = script.long_description(REPOSITORY)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]*)"', prose)
    assert targets and all(re.match("https?:|#", target) for target in targets)
    assert f"{REPOSITORY}/blob/HEAD/docs/" in text


def test_links_of_the_description(script, monkeypatch, tmp_path):
    readme = "[a](docs/a.md) ![p](p.png) [b](https://b.example) [c](#c) [![d](d.png)](e.md)\n```\nx[i](y)\n```\n"
    (tmp_path / "README.md").write_text(readme)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    text = script.long_description(REPOSITORY)
    assert f"[a]({REPOSITORY}/blob/HEAD/docs/a.md)" in text and f"![p]({REPOSITORY}/raw/HEAD/p.png)" in text
    assert f"[![d]({REPOSITORY}/raw/HEAD/d.png)]({REPOSITORY}/blob/HEAD/e.md)" in text
    assert "[b](https://b.example) [c](#c)" in text and "x[i](y)" in text
    without = script.long_description("")
    assert without.startswith("a  [b](https://b.example) [c](#c) ") and ".png" not in without and "e.md" not in without


def test_workflows_and_hooks_call_targets_that_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = []
    callers = [".pre-commit-config.yaml", ".ci/run", *(ROOT / ".github" / "workflows").glob("*.yml")]
    for path in (ROOT / name for name in callers):
        found = re.findall(r"^\s*(?:- run: |entry: )?make ((?:[a-z-]+ ?)+)", path.read_text(), re.MULTILINE)
        assert found, path
        called += [name for names in found for name in names.split() if not name.startswith("--")]
    for document in ("CONTRIBUTING.md", "README.md"):
        called += re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text())
    assert called and set(called) <= targets, set(called) - targets


def test_pre_commit_checks_what_make_lint_checks():
    assert "entry: make lint\n" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_type_checkers_see_the_annotations():
    assert (ROOT / "erc" / "py.typed").exists()


def test_every_tracked_file_is_in_the_sdist():
    git = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    by_setuptools = {"erc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", ".gitignore"}
    listed = (ROOT / "MANIFEST.in").read_text().split()
    missing = {name.split("/")[0] for name in git.stdout.splitlines()} - by_setuptools - set(listed)
    assert not missing  # tests and documents of the sdist read them
