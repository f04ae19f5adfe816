"""Apple's cut-cross-entropy: log-probs of the labels from the lm_head.

`impl="cce"` on a GPU, `"torch_compile"` elsewhere, as its README says.
It gives no entropy, so it runs objectives without an entropy-ratio gate only.
"""

from __future__ import annotations

from benchmarks.peers.base import Runner, Variant, token_loss
from benchmarks.workloads import Inputs


def _linear(inputs: Inputs) -> Runner:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if inputs.case.device == "cuda" else "torch_compile"

    def call() -> None:
        logprob = -linear_cross_entropy(*inputs.head(), inputs.labels, reduction="none", impl=impl)
        token_loss(logprob, None, inputs).backward()

    return Runner(call)


PEER = Variant("cut-cross-entropy", {"linear": _linear}, requires=("cut_cross_entropy",))
