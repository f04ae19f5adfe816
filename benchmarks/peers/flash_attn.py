"""flash-attn's Triton cross entropy (GPU): log-probs of the labels, without entropy."""

from __future__ import annotations

from benchmarks.peers.base import Runner, Variant, token_loss
from benchmarks.workloads import Inputs


def _policy_loss(inputs: Inputs) -> Runner:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def call() -> None:
        losses, _ = cross_entropy_loss(inputs.logits(), inputs.labels)
        token_loss(-losses, None, inputs).backward()

    return Runner(call)


PEER = Variant(
    "flash-attn", {"policy-loss": _policy_loss}, requires=("flash_attn.ops.triton.cross_entropy",), devices=("cuda",)
)
