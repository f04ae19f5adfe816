"""Our objectives against `GRPOTrainer._compute_loss` of TRL itself, for every loss type: values and gradients.

TRL's method runs on a stand-in for the trainer that answers with given log-probs and entropies, so that no model blurs
the comparison. `test_integrations_trl` compares whole trainings.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import erc

trl = pytest.importorskip("trl", reason="needs trl")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

SHAPE = (4, 9)
BOUND = 2e-6
MAX_LENGTH = 16


def make_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = -0.1 - 2 * torch.rand(SHAPE, generator=generator)
    return {
        "old_logprob": old,
        "logprob": old + 0.35 * torch.randn(SHAPE, generator=generator),
        "ref_logprob": old + 0.3 * torch.randn(SHAPE, generator=generator),
        "entropy": 2 * torch.rand(SHAPE, generator=generator),
        "advantages": torch.tensor([1.2, -0.8, 0.4, -1.5]),
        "mask": (torch.arange(SHAPE[1]) < torch.tensor([[9], [6], [3], [8]])).long(),
    }


def theirs(batch: dict[str, Tensor], tmp_path, **options) -> tuple[Tensor, Tensor]:
    args = GRPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, max_completion_length=MAX_LENGTH, report_to=[], **options
    )
    logprob, entropy = batch["logprob"].clone().requires_grad_(), batch["entropy"].clone().requires_grad_()
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            pad_across_processes=lambda x, dim, pad_index: x,
        ),
        current_gradient_accumulation_steps=1,
        aux_loss_enabled=False,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=args.entropy_coef != 0,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprob, entropy, None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon_high if args.epsilon_high is not None else args.epsilon,
    )
    trainer.get_high_entropy_mask = lambda *given: GRPOTrainer.get_high_entropy_mask(trainer, *given)
    for name in (
        "loss_type",
        "beta",
        "importance_sampling_level",
        "top_entropy_quantile",
        "entropy_coef",
        "off_policy_mask_threshold",
        "max_completion_length",
    ):
        setattr(trainer, name, getattr(args, name))
    args.steps_per_generation = 1
    ids = torch.zeros(SHAPE, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": batch["mask"],
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_logprob"],
        "ref_per_token_logps": batch["ref_logprob"],
        "num_items_in_batch": batch["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, logprob)[0]


def ours(objective: erc.Objective, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    given = dict(batch)
    logprob, entropy = given.pop("logprob").clone().requires_grad_(), given.pop("entropy")
    out = erc.objective_loss(logprob, entropy, objective=objective, **given)
    return out.loss.detach(), torch.autograd.grad(out.loss, logprob)[0]


def disagreement(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    loss = (a[0] - b[0]).abs() / b[0].abs()
    return float(torch.maximum(loss, (a[1] - b[1]).abs().max() / b[1].abs().max()))


def assert_agree(objective: erc.Objective, batch: dict[str, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    tested = ours(objective, batch)
    assert disagreement(tested, expected) <= BOUND
    assert disagreement((tested[0], 1.00001 * tested[1]), expected) > BOUND, "the bound must see a wrong gradient"


WIDTHS = {"epsilon": 0.2, "epsilon_high": 0.28}
SEQUENCE_WIDTHS = {"epsilon": 0.085, "epsilon_high": 0.1, "importance_sampling_level": "sequence"}
CLIP = erc.PPOClip(0.2, 0.28)
CASES = {
    "grpo": (WIDTHS, erc.Objective(CLIP, reduction="seq-mean-token-mean")),
    "bnpo": (WIDTHS, erc.Objective(CLIP, reduction="token-mean")),
    "dr_grpo": (WIDTHS, erc.Objective(CLIP, reduction="seq-mean-token-sum-norm", max_length=MAX_LENGTH)),
    "dapo": (WIDTHS, erc.objective("dapo")),
    "cispo": ({"epsilon_high": 1.2}, erc.objective("cispo", ratio=erc.CISPO(ratio_max=1.2))),
    "sapo": ({}, erc.objective("sapo")),
    "luspo": (SEQUENCE_WIDTHS, erc.objective("luspo", ratio=erc.GSPO(0.085, 0.1))),
    "vespo": ({}, erc.objective("vespo")),
}


@pytest.mark.parametrize("loss_type", CASES)
def test_every_loss_type(loss_type, tmp_path):
    options, objective = CASES[loss_type]
    batch = make_batch()
    assert_agree(objective, batch, theirs(batch, tmp_path, loss_type=loss_type, **options))


OPTIONS = {
    "two-sided clip": ({"delta": 1.3}, {"ratio": erc.PPOClip(0.2, 0.28, delta=1.3)}),
    "penalty": ({"beta": 0.3, "use_bias_correction_kl": False}, {"kl": erc.KLPenalty("k3", 0.3)}),
    "corrected penalty": (
        {"beta": 0.3, "use_bias_correction_kl": True},
        {"kl": erc.KLPenalty("k3", 0.3, importance_weighted=True)},
    ),
    "high-entropy mask": ({"top_entropy_quantile": 0.3}, {"high_entropy": erc.HighEntropyMask(0.3)}),
    "off-policy mask": ({"off_policy_mask_threshold": 0.02}, {"off_policy_mask": erc.OffPolicySequenceMask(0.02)}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tmp_path):
    options, overrides = OPTIONS[name]
    batch = make_batch()
    expected = theirs(batch, tmp_path, loss_type="dapo", **WIDTHS, **options)
    assert_agree(erc.objective("dapo", **overrides), batch, expected)
    assert disagreement(ours(erc.objective("dapo"), batch), expected) > 1e-4, "the option must change the loss"
