"""The gate and the recipes of the papers against the formulas of their authors' public code, written out in float64.

Sources: `compute_policy_loss_grpo_erc`, `compute_policy_loss_gppo_erc` and `update_policy` of
github.com/Kwai-Klear/ERC, `compute_policy_loss` and `update_policy` of github.com/Mithas-114/IC-DAPO: clamps, minima,
`where` with a detached branch and means over a mask, differentiated by autograd.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import erc

B, T = 6, 40
LOW, HIGH = 0.95, 1.05
REWARDS = torch.tensor([1.0, 0.0, 1.0, 0.0, -1.0, 1.0])


def tokens(seed: int = 0) -> dict[str, Tensor]:
    """Ratios beyond every clip, the dual clip at 10 included, and entropy ratios on both sides of the band."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(B, T, generator=generator, dtype=torch.float64) - 3
    log_ratio = 0.3 * torch.randn(B, T, generator=generator, dtype=torch.float64)
    log_ratio[:, :4] += 2.6
    log_ratio[:, 4] = 0.0
    old_entropy = 2 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    entropy = old_entropy * (1 + 0.06 * torch.randn(B, T, generator=generator, dtype=torch.float64))
    entropy[:, 6], old_entropy[:, 6] = 0.0, 0.0
    return {
        "logprob": (old + log_ratio).requires_grad_(),
        "entropy": entropy,
        "old_logprob": old,
        "old_entropy": old_entropy,
        "advantages": torch.tensor([1.3, -0.9, 0.4, -1.6, -0.5, 0.0], dtype=torch.float64),
        "mask": (torch.arange(T) < torch.tensor([[40], [33], [17], [40], [9], [5]])).double(),
    }


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum()


def clipped_loss(given: dict[str, Tensor], low: float, high: float, dual: float, gradient_preserving: bool) -> Tensor:
    advantage = given["advantages"][:, None].expand(B, T)
    ratio = (given["logprob"] - given["old_logprob"]).clamp(-20, 20).exp()
    one = ratio / ratio.detach() if gradient_preserving else torch.ones_like(ratio)
    plain = -advantage * ratio
    bounded = -advantage * torch.minimum(torch.maximum(ratio, (1 - low) * one), (1 + high) * one)
    clipped = torch.maximum(plain, bounded)
    return torch.where(advantage < 0, torch.minimum(-dual * advantage, clipped), clipped)


def gated(losses: Tensor, given: dict[str, Tensor]) -> Tensor:
    rho = (given["entropy"] + 1e-8) / (given["old_entropy"] + 1e-8)
    kept = (rho > LOW) & (rho < HIGH) & (given["mask"] != 0)
    assert 0 < kept.sum() < (given["mask"] != 0).sum()
    return torch.where(kept, losses, losses.detach())


def nll(given: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens of the rollouts with reward 1, and over nothing else."""
    rewarded = REWARDS == 1
    return masked_mean(-given["logprob"][rewarded], given["mask"][rewarded])


RECIPES = {
    "erc-dapo-paper": lambda given: gated(clipped_loss(given, 0.2, 0.28, 10.0, False), given),
    "erc-gppo-paper": lambda given: gated(clipped_loss(given, 0.2, 0.2, 10.0, True), given),
    "ic-dapo-paper": lambda given: clipped_loss(given, 0.2, 0.28, 10.0, False),
}


def ours(objective: erc.Objective, given: dict[str, Tensor], **more: Tensor) -> tuple[erc.PolicyLoss, Tensor]:
    arguments = {name: value for name, value in given.items() if name not in ("logprob", "entropy")}
    out = erc.objective_loss(given["logprob"], given["entropy"], objective=objective, **arguments, **more)
    return out, torch.autograd.grad(out.loss, given["logprob"])[0]


def assert_like(tested: tuple[erc.PolicyLoss, Tensor], expected: Tensor, given: dict[str, Tensor]) -> None:
    (exact,) = torch.autograd.grad(expected, given["logprob"], retain_graph=True)
    torch.testing.assert_close(tested[0].loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(tested[1], exact, rtol=1e-12, atol=1e-16)
    assert exact.any() and not torch.allclose(1.001 * tested[1], exact, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", RECIPES)
def test_the_policy_term(name):
    given = tokens()
    expected = masked_mean(RECIPES[name](given), given["mask"])
    tested = ours(erc.objective(name, nll_coef=0.0), given)
    assert_like(tested, expected, given)
    metrics = tested[0].metrics
    assert min(metrics[side] for side in ("clip_fraction_low", "clip_fraction_high")) > 0.05
    dual_clipped = (given["mask"] != 0) & (given["advantages"][:, None] < 0)
    assert (dual_clipped & (given["logprob"] - given["old_logprob"] > torch.tensor(10.0).log())).any()


@pytest.mark.parametrize("name", RECIPES)
def test_the_whole_recipe(name):
    given = tokens()
    expected = masked_mean(RECIPES[name](given), given["mask"]) + 0.1 * nll(given)
    nll_mask = (REWARDS == 1).double()[:, None].expand(B, T)
    assert_like(ours(erc.objective(name), given, nll_mask=nll_mask), expected, given)


def test_no_rewarded_rollout_leaves_the_policy_term():
    given = tokens()
    expected = masked_mean(RECIPES["erc-dapo-paper"](given), given["mask"])
    nothing = torch.zeros(B, T, dtype=torch.float64)
    assert_like(ours(erc.objective("erc-dapo-paper"), given, nll_mask=nothing), expected, given)


@pytest.mark.parametrize("nothing", [0.0, torch.tensor(0.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_a_micro_batch_without_a_rewarded_rollout_has_a_count_of_0(nothing):
    """What a trainer counts over a batch may be nothing; on the CPU backend and in PyTorch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, zeros = torch.randint(11, (2, 5), generator=generator), torch.zeros(2, 5, dtype=torch.float64)
    given = {"old_logprob": None, "old_entropy": zeros + 2.0, "advantages": torch.tensor([1.0, -2.0]).double()}
    plain = {"objective": erc.objective("erc-dapo-paper", nll_coef=0.0), "normalizer": 10.0}
    recipe = {"objective": "erc-dapo-paper", "normalizer": 10.0, "nll_normalizer": nothing, "nll_mask": zeros}
    for function in (erc.policy_loss, erc.reference.policy_loss):
        losses = [function(logits, labels, **given, **settings).loss for settings in (plain, recipe)]
        gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        assert losses[0] == losses[1] != 0 and torch.equal(*gradients) and gradients[0].any()
        with pytest.raises(ValueError, match="nll_normalizer must be positive where a token counts"):
            function(logits, labels, **given, **(recipe | {"nll_mask": zeros + 1}))


def test_the_gate_as_the_papers_formula():
    """An indicator multiplied into the loss: `value="zero"`. Value and gradient differ from the code's only where the
    value of dropped tokens is reported."""
    given = tokens()
    losses = clipped_loss(given, 0.2, 0.28, 10.0, False)
    rho = (given["entropy"] + 1e-8) / (given["old_entropy"] + 1e-8)
    expected = masked_mean(losses * ((rho > LOW) & (rho < HIGH)), given["mask"])
    objective = erc.objective("erc-dapo-paper", entropy_ratio=erc.EntropyRatioClip(value="zero"), nll_coef=0.0)
    tested = ours(objective, given)
    assert_like(tested, expected, given)
    kept = ours(erc.objective("erc-dapo-paper", nll_coef=0.0), given)
    assert torch.equal(kept[1], tested[1]) and kept[0].loss != tested[0].loss
