"""Liger: `LigerFusedLinearGRPOLoss` (PyTorch, chunked over sequences and compiled) and `triton_grpo_loss` (GPU).

Neither gives the entropy, so both run objectives without an entropy-ratio gate only. By default `triton_grpo_loss`
writes the gradient over the logits; that form is a variant of its own, beside erc's.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.peers.base import Runner, Unsupported, Variant
from benchmarks.workloads import EPS_HIGH, EPS_LOW, TEMPERATURE, Inputs


def _require_dapo(inputs: Inputs) -> None:
    if inputs.case.objective != "dapo":
        raise Unsupported(f"has no {inputs.case.objective}")


def logprob_of_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, None]:
    """The log-prob of its fused losses, which have no entropy."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None])[0], None


def _linear(inputs: Inputs) -> Runner:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    _require_dapo(inputs)
    loss_function = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=EPS_LOW,
        epsilon_high=EPS_HIGH,
        loss_type="dapo",
        temperature=TEMPERATURE,
    )
    batch, length = inputs.sequences, inputs.case.rows // inputs.sequences
    labels = inputs.labels.view(batch, length)
    old_logprob = inputs.old_logprob.view(batch, length)
    mask = torch.ones_like(labels)

    def call() -> None:
        hidden, weight = inputs.head()
        loss, _ = loss_function(
            hidden.view(batch, length, -1),
            weight,
            labels,
            mask,
            inputs.sequence_advantages,
            old_per_token_logps=old_logprob,
        )
        loss.backward()

    return Runner(call)


def _policy_loss(inputs: Inputs, inplace: bool = False) -> Runner:
    _require_dapo(inputs)
    if inputs.case.device != "cuda":
        raise Unsupported("its GRPO loss from logits is a Triton kernel and needs a GPU")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    batch, length, vocab = inputs.sequences, inputs.case.rows // inputs.sequences, inputs.case.vocab
    # The kernel takes one logit row more than tokens, a sequence: the row after the last token is there and unused.
    padded = torch.cat([inputs.logits_master.view(batch, length, vocab), inputs.logits_master[:batch, None]], dim=1)
    labels, old_logprob = inputs.labels.view(batch, length), inputs.old_logprob.view(batch, length)
    storage = padded.clone() if inplace else padded

    def call() -> None:
        loss, _ = triton_grpo_loss(
            inputs.logits(storage),
            old_logprob,
            None,
            labels,
            inputs.sequence_advantages,
            temperature=TEMPERATURE,
            beta=0.0,
            eps_low=EPS_LOW,
            eps_high=EPS_HIGH,
            inplace=inplace,
            loss_type="dapo",
            reduce=True,
        )
        loss.backward()

    return Runner(call, reset=(lambda: storage.copy_(padded)) if inplace else None)


PEER = Variant("Liger", {"linear": _linear, "policy-loss": _policy_loss}, requires=("liger_kernel.chunked_loss",))
IN_PLACE = Variant(
    "Liger, in place",
    {"policy-loss": partial(_policy_loss, inplace=True)},
    requires=("liger_kernel.transformers.grpo_loss",),
    devices=("cuda",),
)
