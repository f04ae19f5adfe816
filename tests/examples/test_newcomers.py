"""Mistakes of a first hour end in one line that says what to do, and in no traceback."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

import erc
from examples import plain_trainer


def refused(capsys, module, *arguments: str) -> str:
    """What the command line of a module prints as it ends, in one line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
    printed = capsys.readouterr().err or str(ended.value.code)
    assert ended.value.code not in (0, None) and "Traceback" not in printed
    return " ".join(printed.split())


def demo(*arguments: str) -> str:
    """As `refused`, of the demo's typer command."""
    typer = pytest.importorskip("typer")
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("reasoning_gym")
    pytest.importorskip("transformers")
    from examples import train_rlvr

    app = typer.Typer()
    app.command()(train_rlvr.main)
    result = testing.CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    return " ".join(result.output.split())


def test_a_typo_in_the_task():
    assert "task must be a family of reasoning-gym, got 'chain_sums'; did you mean 'chain_sum'" in demo(
        "--task", "chain_sums"
    )
    assert "did you mean" not in demo("--task", "xyzzy")


def test_a_typo_in_the_objective(capsys):
    expected = "objective must be a preset name, got 'ercdapo'; did you mean 'erc-dapo'"
    assert expected in demo("--objective", "ercdapo")
    assert expected in refused(capsys, plain_trainer, "--objective", "ercdapo")


def test_settings_of_the_demo_that_do_not_go_together():
    assert "band needs an objective with the entropy-ratio gate" in demo("--objective", "dapo", "--band", "0.1")
    assert 'optimizer must be "adamw" or "sgd"' in demo("--optimizer", "lion")


def test_fsdp_without_torchrun(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun --nproc-per-node 2 -m examples.plain_trainer --fsdp" in refused(capsys, plain_trainer, "--fsdp")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_autotuning_without_a_gpu(capsys):
    pytest.importorskip("triton")
    from erc.triton_kernels import autotune

    assert "run it on the machine to be tuned" in refused(capsys, autotune)


def test_use_backend_without_with():
    with pytest.warns(UserWarning, match=r"changes nothing by itself: write `with erc.use_backend\('torch'\):`"):
        erc.use_backend("torch")
    assert "torch" not in erc.backend._forced


def test_use_backend_as_it_is_meant(recwarn):
    logits = torch.zeros(1, 3)
    with erc.use_backend("torch"):
        assert erc.backend.select(logits) == ("torch", "use_backend")

    @erc.use_backend("torch")
    def decorated() -> tuple[str, str]:
        return erc.backend.select(logits)

    assert decorated() == decorated() == ("torch", "use_backend")
    assert erc.backend.select(logits)[1] != "use_backend"
    assert not [w for w in recwarn if "use_backend" in str(w.message)]
    with pytest.raises(ValueError, match="name must be one of"):
        erc.use_backend("gpu")


def test_a_weight_given_as_it_is_stored_elsewhere():
    hidden, weight, labels = torch.randn(2, 8), torch.randn(8, 11), torch.tensor([1, 2])
    for call in (erc.linear_token_stats, partial(erc.linear_policy_loss, old_logprob=labels, advantages=labels)):
        with pytest.raises(ValueError, match=r"weight must be \[V, D\], got shape \(8, 11\): pass weight.t\(\)"):
            call(hidden, weight, labels)
    assert erc.linear_token_stats(hidden, weight.t(), labels).entropy.shape == (2,)
