"""verl's own actor with erc installed makes the updates that `erc.reference` makes on the logits of the same model."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from tests.integrations.verl_environment import lacks

if reason := lacks():
    pytest.skip(reason, allow_module_level=True)

from tests.integrations.verl_actor import REPORTED, Run, train, train_twin
from tests.processes import on_ranks

pytestmark = pytest.mark.slow
BATCHES = 5  # of four updates each
VARIANTS = {
    "padded": ["model.use_remove_padding=False"],
    "packed": [
        "model.use_remove_padding=True",
        "actor.use_dynamic_bsz=True",
        "actor.ppo_max_token_len_per_gpu=40",
        "rollout.log_prob_use_dynamic_bsz=True",
        "rollout.log_prob_max_token_len_per_gpu=40",
    ],
    "fused": ["model.use_fused_kernels=True", "model.fused_kernel_options.impl_backend=torch"],
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    return on_ranks(1, train, "erc-dapo", BATCHES, VARIANTS)[0]


def assert_same_training(run: Run, reference: Run, names: Iterable[str] = REPORTED) -> None:
    for ours, theirs in zip(run.recorded, reference.recorded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for name in names:
        ours, theirs = ([update[name] for update in updates] for updates in (run.updates, reference.updates))
        assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5), name
    for name, value in reference.parameters.items():
        torch.testing.assert_close(run.parameters[name], value, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_updates_equal_those_of_the_reference(runs, variant):
    assert len(runs["twin"].updates) == 20
    # verl averages metrics over micro-batches, and dynamic ones are not the twin's
    names = ("loss", "grad_norm") if variant == "packed" else REPORTED
    assert_same_training(runs[variant], runs["twin"], names)


def test_the_old_entropies_gate_tokens(runs):
    fractions = [update["erc_fraction"] for update in runs["twin"].updates]
    assert fractions[0] == 0 and max(fractions) > 0.1


def test_a_wrong_gradient_or_a_missing_gate_fails_the_comparison(runs):
    scaled = [update | {"grad_norm": 1.01 * update["grad_norm"]} for update in runs["padded"].updates]
    with pytest.raises(AssertionError, match="grad_norm"):
        assert_same_training(runs["padded"]._replace(updates=scaled), runs["twin"])
    ungated, _ = train_twin("dapo", BATCHES)
    with pytest.raises(AssertionError):
        assert_same_training(runs["padded"], ungated)
