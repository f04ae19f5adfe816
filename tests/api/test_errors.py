"""Bad input raises before any kernel runs, and names the argument and what was expected."""

from __future__ import annotations

import math

import pytest
import torch

import erc

B, T, V = 2, 3, 11


def call(**changes):
    arguments = {
        "logits": torch.zeros(B, T, V),
        "labels": torch.zeros(B, T, dtype=torch.long),
        "old_logprob": torch.zeros(B, T),
        "advantages": torch.ones(B),
        "old_entropy": torch.ones(B, T),
    } | changes
    return erc.policy_loss(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_the_unchanged_call_works():
    assert call().loss.isfinite()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor"),
        ({"logits": torch.zeros(B, T, V, dtype=torch.long)}, TypeError, "logits must be float32"),
        ({"logits": torch.zeros(B, T, 0)}, ValueError, "logits must be"),
        ({"labels": torch.zeros(B, T)}, TypeError, "labels must be an integer tensor"),
        ({"labels": torch.zeros(B, dtype=torch.long)}, ValueError, r"labels must have shape \(2, 3\)"),
        ({"labels": torch.full((B, T), V)}, IndexError, r"labels must lie in \[0, 11\).*got 11 at position \(0, 0\)"),
        ({"labels": torch.zeros(B, T, dtype=torch.long, device="meta")}, ValueError, "labels must be on cpu"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": torch.zeros(B, T)}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(B)}, ValueError, "temperature must have shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"logit_scale": -2.0}, ValueError, "logit_scale must be positive"),
        ({"advantages": None}, TypeError, "advantages must be a torch.Tensor"),
        ({"advantages": torch.tensor([1.0, math.nan])}, ValueError, "advantages must be finite, got nan"),
        ({"advantages": torch.ones(T)}, ValueError, "advantages must have shape"),
        ({"advantages": torch.ones(B, dtype=torch.long)}, TypeError, "advantages must be floating point"),
        ({"advantages": torch.ones(B, requires_grad=True)}, ValueError, "advantages must not require grad"),
        ({"old_logprob": torch.zeros(B, T, requires_grad=True)}, ValueError, "old_logprob must not require grad"),
        ({"old_logprob": torch.zeros(B)}, ValueError, "old_logprob must have shape"),
        ({"old_entropy": None}, ValueError, "old_entropy must be given"),
        ({"old_entropy": torch.ones(B, T, dtype=torch.bfloat16)}, TypeError, "old_entropy must be float32 or float64"),
        ({"objective": "erc_dapo"}, ValueError, "objective must be a preset name, got 'erc_dapo'"),
        ({"objective": 3}, TypeError, "objective must be a preset name or an erc.Objective"),
        ({"objective": erc.objective("dapo", kl=erc.KLPenalty())}, ValueError, "ref_logprob must be given"),
        ({"objective": erc.objective("dapo", nll_coef=0.1)}, ValueError, "nll_mask must be given"),
        (
            {"objective": erc.objective("dapo", rollout_correction=erc.RolloutCorrection())},
            ValueError,
            "rollout_logprob and old_logprob must be given",
        ),
        ({"mask": torch.full((B, T), -1.0)}, ValueError, "mask must be finite and >= 0"),
        ({"mask": torch.ones(B)}, ValueError, "mask must have shape"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be positive"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer must be a number or a 0-d tensor"),
        ({"grad_scale": -1.0}, ValueError, "grad_scale must be positive"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "cu_seqlens goes with packed rows"),
        ({"backend": "tpu"}, ValueError, "backend must be one of"),
        ({"backend": "cuda"}, ValueError, "backend 'cuda' .* does not run on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, error, match):
    with pytest.raises(error, match=match):
        call(**changes)


def test_a_nan_advantage_behind_the_mask_is_nobodys_business():
    mask = torch.tensor([[1.0] * T, [0.0] * T])
    assert call(advantages=torch.tensor([1.0, math.nan]), mask=mask).loss.isfinite()


def test_packed_offsets_are_checked():
    packed = {
        "logits": torch.zeros(6, V),
        "labels": torch.zeros(6, dtype=torch.long),
        "old_logprob": torch.zeros(6),
        "old_entropy": torch.ones(6),
        "advantages": torch.ones(6),
        "objective": "erc-grpo",
    }
    assert call(**packed, cu_seqlens=torch.tensor([0, 2, 6])).loss.isfinite()
    with pytest.raises(ValueError, match="rows must be"):
        call(**packed)
    for offsets in ([0, 7], [1, 6], [0, 4, 2, 6]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of rows 6"):
            call(**packed, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(TypeError, match="cu_seqlens"):
        call(**packed, cu_seqlens=[0, 6])


def test_a_backend_in_the_environment_is_named(monkeypatch):
    monkeypatch.setenv("ERC_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="backend must be one of"):
        call()


def test_use_backend_holds_inside_and_only_there():
    with erc.use_backend("torch"):
        assert erc.explain(torch.zeros(1, 2)).backend == "torch"
        with pytest.raises(ValueError, match="name must be one of"), erc.use_backend("nonsense"):
            pass
    assert erc.explain(torch.zeros(1, 2)).backend_reason == "the first available one for cpu tensors"
