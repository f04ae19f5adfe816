"""Our objectives against the policy losses of verl itself: values and gradients in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import erc

try:
    from verl.trainer.ppo import core_algos
    from verl.workers.config import ActorConfig, PolicyLossConfig
except ImportError as error:
    pytest.skip(f"needs verl: {error}", allow_module_level=True)

SHAPE = (4, 9)
BOUND = 2e-6
LOW, HIGH = 0.2, 0.28


def make_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -0.1 - 2 * torch.rand(SHAPE, generator=generator)
    return {
        "old_log_prob": old.to(dtype),
        "log_prob": (old + 0.35 * torch.randn(SHAPE, generator=generator)).clamp(max=-0.02).to(dtype),
        "advantages": torch.tensor([1.2, -0.8, 0.4, -1.5]).to(dtype)[:, None].expand(SHAPE),
        "response_mask": torch.arange(SHAPE[1]) < torch.tensor([[9], [6], [3], [8]]),
    }


def make_config(**options) -> ActorConfig:
    policy = PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.1, kl_cov_ratio=0.2, ppo_kl_coef=0.7, dro_beta=0.3)
    given = {"clip_ratio": LOW, "clip_ratio_low": LOW, "clip_ratio_high": HIGH, "clip_ratio_c": 1e9} | options
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, **given)


def theirs(name: str, mode: str, batch: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    log_prob = batch["log_prob"].clone().requires_grad_()
    function = core_algos.get_policy_loss_fn(name)
    loss, _ = function(**(batch | {"log_prob": log_prob}), loss_agg_mode=mode, config=make_config(**options))
    loss.backward()
    return loss.detach(), log_prob.grad


def ours(objective: erc.Objective, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logprob = batch["log_prob"].clone().requires_grad_()
    out = erc.objective_loss(
        logprob,
        torch.ones(SHAPE, dtype=logprob.dtype),
        objective=objective,
        old_logprob=batch["old_log_prob"],
        advantages=batch["advantages"],
        mask=batch["response_mask"],
    )
    out.loss.backward()
    return out.loss.detach(), logprob.grad


def disagreement(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """The larger of the relative errors of the loss and of the gradient, the latter against its largest entry."""
    loss = (a[0] - b[0]).abs() / b[0].abs()
    return float(torch.maximum(loss, (a[1] - b[1]).abs().max() / b[1].abs().max()))


def assert_agree(objective: erc.Objective, batch: dict[str, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    tested = ours(objective, batch)
    assert disagreement(tested, expected) <= BOUND
    assert disagreement((tested[0], 1.00001 * tested[1]), expected) > BOUND, "the bound must see a wrong gradient"


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
TOKEN_RULES = {
    "vanilla": erc.PPOClip(LOW, HIGH),
    "cispo": erc.CISPO(1 - LOW, 1 + HIGH),
    "gpg": erc.Reinforce(),
    "dro": erc.DRO(0.3),
    "clip_cov": erc.ClipCov(LOW, HIGH, fraction=1.0, low=0.1),
    "kl_cov": erc.KLCov(0.2, coef=0.7),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TOKEN_RULES)
def test_token_rules_in_every_aggregation(name, mode):
    batch = make_batch()
    expected = theirs(name, mode, batch)
    assert_agree(erc.Objective(TOKEN_RULES[name], reduction=mode), batch, expected)
    if name in ("vanilla", "cispo"):  # another width is another loss
        other = erc.Objective(type(TOKEN_RULES[name])(0.5, 1.6), reduction=mode)
        assert disagreement(ours(other, batch), expected) > 1e-3


def test_dual_clip():
    batch = make_batch()
    batch["log_prob"] = (batch["old_log_prob"] + 1.5).clamp(max=-0.01)
    expected = theirs("vanilla", "token-mean", batch, clip_ratio_c=1.5)
    rule = erc.PPOClip(LOW, HIGH, dual_clip=1.5)
    assert_agree(erc.Objective(rule), batch, expected)
    assert disagreement(ours(erc.objective("dapo"), batch), expected) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_gspo(mode):
    batch = make_batch()
    expected = theirs("gspo", mode, batch, clip_ratio_low=0.085, clip_ratio_high=0.1)
    assert_agree(erc.Objective(erc.GSPO(0.085, 0.1), reduction=mode), batch, expected)
    clipped = (expected[1] == 0).all(-1)
    assert clipped.any() and not clipped.all()


def test_sapo_is_aggregated_by_sequence_whatever_the_mode():
    batch = make_batch()
    assert_agree(erc.objective("sapo"), batch, theirs("sapo", "token-mean", batch))


def test_geometric_mean():
    batch = make_batch()
    objective = erc.objective("gmpo", ratio=erc.GMPO(LOW, HIGH))
    assert_agree(objective, batch, theirs("geo_mean", "token-mean", batch))


@pytest.mark.parametrize("kind", ["tv", "kl"])
def test_dppo(kind):
    """In float64: verl adds 1e-8 inside the logarithm of its binary KL, we take expm1."""
    batch = make_batch(torch.float64)
    expected = theirs(f"dppo_{kind}", "token-mean", batch, clip_ratio_low=0.05, clip_ratio_high=0.06, clip_ratio_c=1.4)
    rule = erc.DPPO(kind, 0.05, 0.06, ratio_max=1.4)
    assert_agree(erc.Objective(rule), batch, expected)
    blocked = ours(erc.Objective(rule), batch)[1] == 0
    assert 0 < (blocked & batch["response_mask"]).sum() < batch["response_mask"].sum()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k3+"])
def test_kl_estimates(kind):
    batch = make_batch()
    logprob = batch["log_prob"].clone().requires_grad_()
    expected = core_algos.kl_penalty(logprob, batch["old_log_prob"], kind)
    estimate = erc.KLPenalty(kind, clamp=10.0).estimate(logprob, logprob.detach(), batch["old_log_prob"])
    pairs = [(estimate.detach(), expected.detach())]
    pairs.append(tuple(torch.autograd.grad(value.sum(), logprob)[0] for value in (estimate, expected)))
    for tested, exact in pairs:
        scale = exact.abs().max()
        assert (tested - exact).abs().max() <= BOUND * scale
        assert (1.0001 * tested - exact).abs().max() > BOUND * scale


def test_where_we_differ_clip_cov_draws_from_its_own_generator():
    """verl draws the tokens of Clip-Cov from PyTorch's global generator alone; ours takes one."""
    batch = make_batch()
    logprob = batch["log_prob"].clone().requires_grad_()
    objective = erc.Objective(erc.ClipCov(LOW, HIGH, fraction=0.05, low=-3.0, high=3.0))
    losses = []
    for noise in range(2):
        torch.manual_seed(noise)
        out = erc.objective_loss(
            logprob,
            torch.ones(SHAPE),
            objective=objective,
            old_logprob=batch["old_log_prob"],
            advantages=batch["advantages"],
            mask=batch["response_mask"],
            generator=torch.Generator().manual_seed(5),
        )
        losses.append(out.loss.item())
    assert losses[0] == losses[1]


def test_where_we_differ_an_empty_batch_is_zero_and_not_nan():
    batch = make_batch()
    batch["response_mask"] = torch.zeros(SHAPE, dtype=torch.bool)
    loss, gradient = ours(erc.objective("dapo"), batch)
    assert loss == 0 and not gradient.any()
    assert theirs("vanilla", "token-mean", batch)[0].isnan()
