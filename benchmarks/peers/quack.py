"""quack's cross entropy (CuTe-DSL, Hopper and later GPUs): log-probs of the labels, without entropy."""

from __future__ import annotations

from benchmarks.peers.base import Runner, Variant, token_loss
from benchmarks.workloads import Inputs


def _policy_loss(inputs: Inputs) -> Runner:
    from quack.cross_entropy import cross_entropy

    def call() -> None:
        token_loss(-cross_entropy(inputs.logits(), inputs.labels, reduction="none"), None, inputs).backward()

    return Runner(call)


PEER = Variant("quack", {"policy-loss": _policy_loss}, requires=("quack.cross_entropy",), devices=("cuda",))
