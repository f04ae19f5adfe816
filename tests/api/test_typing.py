"""What type checkers see: `make lint` runs mypy over the package, and these say that it would find something."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import erc

ROOT = Path(__file__).parents[2]
USER = """
import torch
import erc
from erc.integrations.transformers import head_inputs

logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
labelled, bare = erc.token_stats(logits, labels), erc.token_stats(logits)
reveal_type(labelled.logprob)
reveal_type(bare.logprob)
reveal_type(erc.linear_token_stats(logits, logits, labels).logprob_full)
reveal_type(head_inputs(None, labels).token_stats(labels).logprob)
reveal_type(erc.policy_loss(logits, labels, old_logprob=None, advantages=logits[:, 0]).loss)
reveal_type(erc.objective("dapo"))
with erc.use_backend("torch"):
    pass
reveal_type(erc.backends())
erc.token_stats(logits, temprature=1.0)
erc.policy_loss(logits, labels)
"""
EXPECTED = {
    8: 'is "torch._tensor.Tensor"',
    9: 'is "torch._tensor.Tensor | None"',
    10: 'is "torch._tensor.Tensor"',
    11: 'is "torch._tensor.Tensor"',
    12: 'is "torch._tensor.Tensor"',
    13: 'is "erc.surrogate.objective.Objective"',
    16: 'is "dict[str, str]"',
    17: 'Unexpected keyword argument "temprature"',
    18: 'Missing named argument "old_logprob"',
}


@pytest.mark.parametrize("function", [erc.token_stats, erc.linear_token_stats, erc.reference.token_stats])
def test_overloads_take_what_the_function_takes(function):
    typing = pytest.importorskip("typing")
    if not hasattr(typing, "get_overloads"):
        pytest.skip("needs Python 3.11")
    wanted = inspect.signature(function).parameters
    labelled, bare = map(inspect.signature, typing.get_overloads(function))
    for overload in (labelled, bare):
        assert list(overload.parameters) == list(wanted)
        for name, parameter in overload.parameters.items():
            assert parameter.kind == wanted[name].kind
            assert name == "labels" or parameter.annotation == wanted[name].annotation, name
            has_default = parameter.default is not inspect.Parameter.empty
            assert has_default == (wanted[name].default is not inspect.Parameter.empty) or name == "labels"
    assert labelled.parameters["labels"].annotation == "Tensor" and bare.parameters["labels"].annotation == "None"


@pytest.mark.parametrize("name", [name for name in erc.__all__ if inspect.isfunction(getattr(erc, name))])
def test_public_functions_are_typed_throughout(name):
    signature = inspect.signature(getattr(erc, name))
    assert signature.return_annotation is not inspect.Signature.empty
    untyped = [p.name for p in signature.parameters.values() if p.annotation is inspect.Parameter.empty]
    assert untyped == []


def test_a_user_s_code_is_checked_against_the_annotations(tmp_path):
    """By mypy, with the package as a library: what it must accept, infer and refuse."""
    pytest.importorskip("mypy", reason="needs the lint extra")
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir"]
    command += [str(ROOT / ".mypy_cache"), "user.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("user.py:"):
            number = int(line.split(":")[1])
            said[number] = said.get(number, "") + line
    assert set(said) == set(EXPECTED), done.stdout + done.stderr
    for number, expected in EXPECTED.items():
        assert expected in said[number]
