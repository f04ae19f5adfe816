"""Which backend is available, and what happens where one is not: a loader that raises, kernels that do not run or
compute something else, a library built from other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.library import Library
from torch.utils.flop_counter import FlopCounterMode

import erc
from erc import backend, constants, ops

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def fresh(monkeypatch):
    """The module as after its import: nothing tried out, nobody warned, no environment variable of the caller's."""
    monkeypatch.setattr(backend, "_answers", {})
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.delenv("ERC_BACKEND", raising=False)
    backend._load.cache_clear()
    yield monkeypatch
    backend._load.cache_clear()


def spoil(monkeypatch, factor: float = 1.0, error: Exception | None = None) -> list[int]:
    """The CPU backend's statistics multiplied by `factor`, or raising `error`; returns what counts the calls."""
    calls = []

    class Spoilt:
        @staticmethod
        def stats_forward(*inputs):
            calls.append(1)
            if error is not None:
                raise error
            return [result * factor for result in REAL.stats_forward(*inputs)]

        def __getattr__(self, name):
            return getattr(REAL, name)

    monkeypatch.setattr(backend, "operators", lambda name: Spoilt())
    monkeypatch.setitem(backend._LOADERS, "cpu", lambda: None)
    return calls


class _Reference:
    """The two operators that are tried out, by the formulas, so that these tests need no compiled library."""

    @staticmethod
    def stats_forward(logits, labels, temperature, params, ignore_index):
        logp = logits[0].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(1, labels[:, None])[:, 0], entropy, logits[0].logsumexp(-1), logits.new_zeros(3, 2)

    @staticmethod
    def stats_backward(logits, labels, temperature, params, ignore_index, saved, *grads):
        return (torch.nn.functional.one_hot(labels, 4) - logits[0].softmax(-1))[None]


REAL = _Reference()


def test_a_loader_that_raises_gives_a_reason_and_the_next_backend_is_chosen(fresh):
    def load():
        raise ImportError("cannot import name 'x'") from OSError("libtoo_old.so: no such file")

    fresh.setitem(backend._LOADERS, "cpu", load)
    assert erc.backends()["cpu"] == "does not load: OSError: libtoo_old.so: no such file"
    with pytest.warns(UserWarning, match="float64 by plain PyTorch.*cpu: does not load: OSError: libtoo_old"):
        assert backend.select(torch.zeros(2, 3))[0] == "torch"
    with pytest.raises(ValueError, match="not available: does not load"):
        erc.token_stats(torch.zeros(2, 3), backend="cpu")


def test_a_backend_that_computes_the_right_numbers_is_available_and_tried_out_once(fresh):
    calls = spoil(fresh)
    assert erc.backends()["cpu"] == "available" and backend.select(torch.zeros(2, 3))[0] == "cpu"
    assert erc.backends()["cpu"] == "available" and len(calls) == 1


@pytest.mark.parametrize("factor", [1.001, 0.0, float("nan")])
def test_a_backend_that_computes_wrong_numbers_is_not_available(fresh, factor):
    spoil(fresh, factor)
    assert erc.backends()["cpu"].startswith("gives wrong numbers on cpu")


def test_a_wrong_gradient_alone_is_noticed(fresh):
    spoil(fresh)
    fresh.setattr(_Reference, "stats_backward", staticmethod(lambda logits, *_: torch.zeros_like(logits)))
    assert erc.backends()["cpu"].startswith("gives wrong numbers on cpu")


def test_kernels_that_do_not_run_give_a_reason(fresh):
    spoil(fresh, error=RuntimeError("no kernel image is available\nCompile with TORCH_USE_CUDA_DSA"))
    assert erc.backends()["cpu"] == "does not run on cpu: RuntimeError: no kernel image is available"


def test_a_fallback_warns_once_with_the_reasons_and_never_where_it_was_asked_for(fresh):
    fresh.setitem(backend._LOADERS, "cpu", lambda: "liberc_cpu.so was not built")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erc.token_stats(torch.zeros(2, 3), backend="torch")
        erc.explain(torch.zeros(2, 3, device="meta"), "dapo")
    with pytest.warns(UserWarning, match="many times slower.*cpu: liberc_cpu.so was not built") as caught:
        erc.token_stats(torch.zeros(2, 3))
        erc.token_stats(torch.zeros(2, 3))
    assert len(caught) == 1


def test_nothing_is_tried_out_under_a_mode_or_while_tracing(fresh):
    """There a result cannot be read; an earlier answer counts, else the launch has to say what is wrong."""
    calls = spoil(fresh, factor=2.0)
    with FlopCounterMode(display=False):
        assert backend.why_not("cpu", CPU) is None
    assert torch.compile(lambda x: backend.select(x)[0], fullgraph=True, backend="eager")(torch.zeros(3)) == "cpu"
    assert not calls
    assert "wrong numbers" in backend.why_not("cpu", CPU) and len(calls) == 1
    with FlopCounterMode(display=False):
        assert "wrong numbers" in backend.why_not("cpu", CPU)


def test_what_the_caller_set_for_tensors_does_not_matter(fresh):
    spoil(fresh)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        assert backend.why_not("cpu", CPU) is None
    finally:
        torch.set_default_dtype(default)
        torch.set_default_device(None)


# ---- the stamp -------------------------------------------------------------------------------------------------------


def test_the_stamp_in_the_sources_is_that_of_the_operators():
    stored = (ROOT / "csrc" / "common" / "stamp.h").read_text()
    assert f'"{ops.stamp()}"' in stored, "run `python -m erc.ops > csrc/common/stamp.h` and build again"


def test_every_schema_and_position_is_part_of_the_stamp(monkeypatch):
    before = ops.stamp()
    monkeypatch.setitem(ops.SCHEMAS, "scale_rows", "(Tensor scale, Tensor grad) -> Tensor")
    assert ops.stamp() != before
    monkeypatch.undo()
    monkeypatch.setattr(ops, "header", lambda: constants.header() + "\n")
    assert ops.stamp() != before


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("stamp", ["", 'const char* erc_stamp(void) { return "another"; }'])
def test_a_library_built_from_other_sources_is_refused(stamp, tmp_path):
    library = tmp_path / "liberc_cpu.so"
    (tmp_path / "library.c").write_text(stamp + "\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "library.c"], check=True)
    code = "import erc; print(erc.backends()['cpu'])"
    environment = {**os.environ, "ERC_CPU_LIBRARY": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "liberc_cpu.so was built from other sources than this package: build it again"


def test_a_namespace_defined_elsewhere_is_nobody_s_business():
    """A test build is selectable by name on any device, and not tried out."""
    library = Library("erc_test_backend", "DEF")
    library.define("stats_forward(Tensor x) -> Tensor")
    backend.register_namespace("test build", "erc_test_backend")
    assert backend.select(torch.zeros(2), "test build") == ("test build", "the backend argument")
