"""Rollout corrections against the functions of verl, OpenRLHF and SkyRL themselves: values and gradients in float32."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import erc
from tests.integrations.peer_files import peer_file

SHAPE = (6, 9)
BOUND = 2e-6


def make_batch() -> dict[str, Tensor]:
    """Sequences whose rollout log-probs are off by a little or by much, on either side."""
    generator = torch.Generator().manual_seed(0)
    old = -0.1 - 2 * torch.rand(SHAPE, generator=generator)
    off = torch.tensor([0.0, 0.02, -0.02, 0.3, -0.3, 1.0])[:, None]
    return {
        "logprob": old + 0.35 * torch.randn(SHAPE, generator=generator),
        "old_logprob": old,
        "rollout_logprob": old - off + 0.1 * torch.randn(SHAPE, generator=generator),
        "advantages": torch.tensor([1.2, -0.8, 0.4, -1.5, 0.7, 1.0]),
        "mask": (torch.arange(SHAPE[1]) < torch.tensor([[9], [6], [3], [8], [9], [7]])).float(),
    }


def ours(correction: erc.RolloutCorrection, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    objective = erc.Objective(erc.PPOClip(0.2, 0.28), rollout_correction=correction)
    given = dict(batch)
    logprob = given.pop("logprob").clone().requires_grad_()
    loss = erc.objective_loss(logprob, torch.ones(SHAPE), objective=objective, **given).loss
    loss.backward()
    return loss.detach(), logprob.grad


def disagreement(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    loss = (a[0] - b[0]).abs() / b[0].abs()
    return float(torch.maximum(loss, (a[1] - b[1]).abs().max() / b[1].abs().max()))


def assert_agree(correction: erc.RolloutCorrection, expected: tuple[Tensor, Tensor]) -> None:
    tested = ours(correction, make_batch())
    assert disagreement(tested, expected) <= BOUND
    assert disagreement((tested[0], 1.00001 * tested[1]), expected) > BOUND, "the bound must see a wrong gradient"


GEOMETRIC = erc.RolloutCorrection("mask", 0.9, 1.1, level="geometric")
OPENRLHF = {  # its level and mode
    ("seq", "mask"): GEOMETRIC,
    ("token", "mask"): erc.RolloutCorrection("mask", 0.9, 1.1),
    ("token", "clip"): erc.RolloutCorrection("truncate", 0.9, 1.1),
}


def openrlhf(batch: dict[str, Tensor], level: str, mode: str, **options) -> tuple[Tensor, Tensor]:
    policy_loss = peer_file("openrlhf.models.loss", "deepspeed").PolicyLoss
    logprob = batch["logprob"].clone().requires_grad_()
    loss, *_ = policy_loss(0.2, 0.28, is_correction_level=level, is_correction_mode=mode, **options)(
        logprob,
        batch["old_logprob"],
        batch["advantages"][:, None].expand(SHAPE),
        batch["mask"],
        batch["rollout_logprob"],
        batch_num_tokens=batch["mask"].sum(),
    )
    loss.backward()
    return loss.detach(), logprob.grad


@pytest.mark.parametrize(("level", "mode"), OPENRLHF)
def test_openrlhf(level, mode):
    expected = openrlhf(make_batch(), level, mode, is_correction_threshold=[0.9, 1.1])
    assert_agree(OPENRLHF[level, mode], expected)
    if level == "seq":
        silent = (expected[1] == 0).all(-1)
        assert silent.any() and not silent.all()


def test_where_we_differ_kpop_bounds_both_divergences_and_openrlhf_one():
    batch = make_batch()  # and far from each other: near ones have both divergences alike
    batch["rollout_logprob"] = (batch["old_logprob"] - 4 * (batch["old_logprob"] - batch["rollout_logprob"])).clamp(
        max=0
    )
    options = {"is_correction_gating": "binary_kl", "is_correction_threshold": [0.0, 0.25]}
    _, theirs = openrlhf(batch, "token", "mask", **options)
    _, gradient = ours(erc.RolloutCorrection("binary-kl", high=0.25), batch)
    kept = gradient != 0
    torch.testing.assert_close(gradient[kept], theirs[kept], rtol=BOUND, atol=0)
    dropped_by_us_alone = ~kept & (theirs != 0)
    assert kept.any() and 0 < dropped_by_us_alone.sum() < kept.sum()


def kept_sequences(correction: erc.RolloutCorrection) -> Tensor:
    """bool `[B]`; whole sequences are kept or dropped."""
    batch = make_batch()
    flat = {name: batch[name].flatten() for name in ("old_logprob", "rollout_logprob", "mask")}
    sequences = erc.surrogate.sequences.Sequences(flat["mask"].numel(), SHAPE[1])
    kept = correction.weights(sequences=sequences, **flat).view(SHAPE) != 0
    assert torch.equal(kept.all(-1), kept.any(-1)) and kept.any() and not kept.all()
    return kept.all(-1)


def test_skyrl_keeps_the_same_sequences():
    skyrl = peer_file("skyrl.backends.skyrl_train.utils.off_policy_correction_utils")
    batch = make_batch()
    config = SimpleNamespace(geo_mask_low=0.9, geo_mask_high=1.1)
    given = (batch["old_logprob"], batch["rollout_logprob"], batch["mask"])
    mask, _ = skyrl.compute_sequence_mask(*given, "geometric", config)
    assert torch.equal(kept_sequences(GEOMETRIC), mask.squeeze(-1) != 0)


def test_verl_keeps_the_same_sequences():
    """verl bounds the mean of `lp_rollout - lp_old`, the logarithm of the inverse ratio."""
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", reason="needs verl")
    batch = make_batch()
    log_ratio = batch["old_logprob"] - batch["rollout_logprob"]
    kept, _ = helper.compute_rollout_rejection_mask(log_ratio, batch["mask"], "seq_mean_k1", f"{1 / 1.1}_{1 / 0.9}")
    assert torch.equal(kept_sequences(GEOMETRIC), kept[:, 0] != 0)
