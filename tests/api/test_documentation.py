"""The documents say what the code has, and their Python runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import erc
from tests.api.documents import (
    DOCUMENTS,
    ROOT,
    blocks,
    is_there,
    names_of_demonstrations,
    names_of_models,
    names_of_tokens,
    names_of_trl,
    sampling_mask,
)

THIS = Path(__file__)


@pytest.mark.parametrize(
    "name", [name for name in erc.objectives() if not name.startswith("erc-") or name.endswith("-paper")]
)
def test_every_preset_is_explained(name):
    assert f"`{name}`" in (ROOT / "docs" / "objectives.md").read_text()


def test_the_plots_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    from examples import objective_plots

    path = tmp_path / "objectives.png"
    objective_plots.draw(path, points=9)
    assert path.stat().st_size > 20_000
    shown = {name for name in erc.objectives() if not name.startswith("erc-")} - set(objective_plots.SAME_RULE)
    assert set(objective_plots.presets()) == shown, "every rule has a panel"


def test_the_plot_of_supports_is_drawn_and_shows_what_it_says(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    import torch

    from examples import support_bias

    path = tmp_path / "support.png"
    support_bias.draw(path, count=50, vocab_size=300)
    assert path.stat().st_size > 20_000
    generator = torch.Generator().manual_seed(1)
    logits = support_bias.rows(200, 1000, generator)
    full, replayed, mass = support_bias.ratios(logits, support_bias.kept_tokens(logits, 0.9), generator)
    torch.testing.assert_close(replayed, torch.ones(200), rtol=1e-5, atol=0)
    torch.testing.assert_close(full, mass, rtol=1e-4, atol=0)
    assert full.mean() < 0.95


def test_the_curves_of_ppo():
    pytest.importorskip("matplotlib")
    pytest.importorskip("typer")
    from examples import objective_plots

    ratios = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
    loss, gradient = objective_plots.curve(erc.objective("ppo", reduction="none"), ratios, 1.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, -1.0, -1.2], dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.tensor([-0.5, -1.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("document", [path.relative_to(ROOT) for path in DOCUMENTS])
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert is_there(os.path.relpath(ROOT / document.parent / target, ROOT)), target


_POINTERS = re.compile(r"(?<![\w/.-])(?:erc|csrc|tests|docs|examples|benchmarks)/[\w/]*\w\w\.(?:py|h|cuh|cu|cpp|md)\b")


@pytest.mark.parametrize("folder", ["docs", "erc", "csrc", "tests", "benchmarks", "examples"])
def test_files_that_documents_and_comments_name_are_there(folder):
    kinds = {".md", ".py", ".h", ".cuh", ".cu", ".cpp"}
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds and path != THIS]
    for path in [*paths, ROOT / "README.md"]:
        missing = {name for name in _POINTERS.findall(path.read_text()) if not is_there(name)}
        assert not missing, f"{path.relative_to(ROOT)} names {missing}"


def test_every_page_is_in_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in DOCUMENTS[1:]:
        assert re.search(rf"\s{path.relative_to(ROOT / 'docs').as_posix()}$", navigation, re.MULTILINE), path


def test_the_api_reference_has_every_public_name():
    pages = "".join(path.read_text() for path in ROOT.glob("docs/api/*.md"))
    rules = (name for name in erc.__all__ if getattr(getattr(erc, name), "__module__", "").endswith("_rules"))
    shown = set(re.findall(r"::: erc\.(\w+)", pages)) | {"rlvr", "reference"} | set(rules)
    assert shown >= set(erc.__all__), set(erc.__all__) - shown
    for module in ("surrogate.ratio_rules", "surrogate.sequence_rules", "surrogate.batch_rules", "rlvr.advantages"):
        assert f"::: erc.{module}\n" in pages


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="`make docs` installs what builds the site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_says_what_no_gpu_has_run():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert "No GPU has run these kernels" in text and "docs/architecture.md" in text.split("##")[0]


def test_the_readme_s_numbers_are_those_of_code_and_results():
    text = (ROOT / "README.md").read_text()
    published = [name for name in erc.objectives() if not name.startswith("erc-") and not name.endswith("-paper")]
    named, more = re.search(r"\*\*Every objective.\*\* (.*?) and (\d+) more", text).groups()
    assert len(named.split(", ")) + int(more) == len(published)
    rows = json.loads((ROOT / "results" / "benchmarks" / "cpu.json").read_text())["accuracy"]
    (usual,) = (
        row["flipped"]
        for row in rows
        if (row["implementation"], row["dtype"], row["band"]) == ("eager, logits' dtype", "bfloat16", "all")
    )
    assert f"flips {100 * usual:.0f} % of these" in text
    assert all(r["flipped"] == 0 for r in rows if r["implementation"].startswith("erc "))


# ---- every Python block ----------------------------------------------------------------------------------------------

_WITH_BLOCKS = [path for path in DOCUMENTS if blocks(path)]
_MODELS = {"README.md", "docs/in_context_rlvr.md", "docs/trainers/transformers.md", "docs/trainers/trl.md"}
_NEEDS = {
    "docs/trainers/trl.md": ("trl", "peft", "datasets"),
    "docs/trainers/verl.md": ("verl", "tensordict"),
    **dict.fromkeys(_MODELS, ("transformers",)),
}


@pytest.fixture
def one_rank(tmp_path):
    """The process group of a rank that is alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("document", "number"),
    [
        pytest.param(path, number, id=f"{path.relative_to(ROOT)}:{block.line}")
        for path in _WITH_BLOCKS
        for number, block in enumerate(blocks(path))
        if block.reason is not None
    ],
)
def test_blocks_that_are_not_run_say_why_and_compile(document, number):
    block = blocks(document)[number]
    compile(block.code, str(document), "exec")
    pytest.skip(block.reason)


@pytest.mark.parametrize("document", _WITH_BLOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_document_runs(document, one_rank, tmp_path, monkeypatch):
    """Its blocks one after another, as a reader goes through them, on a small batch."""
    name = document.relative_to(ROOT).as_posix()
    for package in _NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"the document shows {package}")
    monkeypatch.chdir(tmp_path)
    names = names_of_tokens() | names_of_demonstrations(tmp_path) | (names_of_models() if name in _MODELS else {})
    names |= {"tp_group": one_rank, "cp_group": one_rank}
    if name == "docs/sampling_support.md":
        names["mask"] = sampling_mask(names["labels"])
    if name == "docs/trainers/trl.md":
        names |= names_of_trl(tmp_path, monkeypatch)
    if name == "docs/trainers/verl.md":  # it installs itself into verl for the whole process
        code = "\n".join(block.code for block in blocks(document) if block.reason is None)
        return subprocess.run([sys.executable, "-c", f"import erc\n{code}"], check=True, cwd=ROOT)
    for block in blocks(document):
        if block.reason is None:
            exec(compile("\n" * (block.line - 1) + block.code, str(document), "exec"), names)


def test_a_block_that_fails_is_found(tmp_path):
    broken = tmp_path / "page.md"
    code = "```python\n{}\n```\n\n"
    page = f"text\n\n{code.format('erc.no_such_function()')}<!-- not run: a cluster -->\n{code.format('x = 1')}"
    broken.write_text(page)
    failing, marked = blocks(broken)
    assert failing.reason is None and failing.line == 4 and marked.reason == "a cluster"
    with pytest.raises(AttributeError):
        exec(failing.code, {"erc": erc})
