"""A training run that is killed (SIGKILL) within a batch and resumed gives the numbers of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PLAIN = """
import os, signal
from pathlib import Path
import examples.plain_trainer as plain

update, done = plain.update, []

def update_until_killed(*args):
    done.append(None)
    if len(done) == 14:  # the second update of the fourth batch
        os.kill(os.getpid(), signal.SIGKILL)
    return update(*args)

plain.update = update_until_killed
plain.train(plain.warm_start(20), 6, "erc-dapo", checkpoint=Path("{path}"))
"""
TRL = """
import os, signal
from pathlib import Path
import transformers
from tests.integrations.test_trl import ERCConfig, ERCTrainer, train

class Killer(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train(Path("{path}"), ERCTrainer, ERCConfig, trainer={{"callbacks": [Killer()]}}, **{options})
"""


def run_until_killed(code: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr


def test_the_plain_trainer(tmp_path):
    from examples.plain_trainer import UPDATES, train, warm_start

    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    log = train(warm_start(20), 6, "erc-dapo", checkpoint=whole)
    run_until_killed(PLAIN.format(path=killed))
    # Compared as text, in which a NaN (a metric without its input) is itself.
    assert repr(torch.load(killed)["log"]) == repr(log[: 3 * UPDATES]), "three batches were kept"
    assert repr(train(warm_start(20), 6, "erc-dapo", checkpoint=killed)) == repr(log)
    ours, theirs = torch.load(killed), torch.load(whole)
    assert torch.equal(ours["random"], theirs["random"])
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    assert len({entry["loss"] for entry in log}) > 6, "numbers that never change compare nothing"


def test_trl(tmp_path):
    pytest.importorskip("transformers", reason="the small model comes from transformers")
    pytest.importorskip("reasoning_gym", reason="the verifier comes from reasoning-gym")
    pytest.importorskip("trl", reason="needs trl")
    from tests.integrations.test_trl import ERCConfig, ERCTrainer, train

    # 4 is a multiple of num_iterations: the checkpoint holds no buffered rollouts.
    options = {"steps": 8, "save_strategy": "steps", "save_steps": 4, "objective": "erc-dapo"}
    logs, parameters, _ = train(tmp_path / "whole", ERCTrainer, ERCConfig, **options)
    run_until_killed(TRL.format(path=tmp_path / "killed", options=options))
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    checkpoint = str(tmp_path / "killed" / "checkpoint-4")
    resumed_logs, resumed, _ = train(tmp_path / "killed", ERCTrainer, ERCConfig, resume=checkpoint, **options)
    for ours, theirs in zip(resumed_logs, logs, strict=True):
        assert {**ours, "step_time": 0} == {**theirs, "step_time": 0}
    for name, value in parameters.items():
        assert torch.equal(resumed[name], value), name
