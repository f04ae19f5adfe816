"""erc's backends, and the plain reads, copies and matrix products that nothing can beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import erc
from benchmarks.peers.base import Prepare, Runner, Unsupported, Variant
from benchmarks.workloads import Inputs

BACKENDS = ("cpu", "triton", "cuda", "torch")
DEVICES = {"cpu": ("cpu",), "triton": ("cuda",), "cuda": ("cuda",), "torch": ("cpu", "cuda")}
_SAME_RULE_AS_DAPO = ("ppo", "grpo", "dr-grpo")  # other bounds and reductions, which kernels take as numbers


def _stats(backend: str, inputs: Inputs) -> Runner:
    @torch.no_grad()
    def call() -> Any:
        return erc.token_stats(inputs.logits_master, inputs.labels, backend=backend)

    return Runner(call)


def _stats_backward(backend: str, inputs: Inputs) -> Runner:
    def call() -> None:
        stats = erc.token_stats(inputs.logits(), inputs.labels, backend=backend)
        (inputs.advantages * stats.logprob + 0.01 * stats.entropy).sum().backward()

    return Runner(call)


def _loss_arguments(inputs: Inputs, backend: str, objective: str | None = None) -> dict[str, Any]:
    objective = objective or inputs.case.objective
    try:
        chosen = erc.objective(objective)
    except ValueError as error:
        raise Unsupported(str(error)) from None
    rows = (inputs.sequences, inputs.case.rows // inputs.sequences)
    arguments = {"old_logprob": inputs.old_logprob, "advantages": inputs.advantages, "old_entropy": inputs.old_entropy}
    arguments = {name: value.view(rows) for name, value in arguments.items()}
    # The count is known before the step, as in a trainer that accumulates: the upstream gradient is then 1.
    normalizer = {} if chosen.reduction != "token-mean" else {"normalizer": float(inputs.case.rows)}
    if inputs.dtype == torch.float16:
        normalizer["grad_scale"] = 1.0
    return arguments | normalizer | {"objective": chosen, "backend": backend}


def _policy_loss(backend: str, inputs: Inputs) -> Runner:
    arguments = _loss_arguments(inputs, backend)
    rows = (inputs.sequences, inputs.case.rows // inputs.sequences)
    storage, labels = inputs.logits_master.view(*rows, -1), inputs.labels.view(rows)
    return Runner(lambda: erc.policy_loss(inputs.logits(storage), labels, **arguments).loss.backward())


def _policy_loss_in_place(backend: str, inputs: Inputs, objective: str | None = None) -> Runner:
    arguments = _loss_arguments(inputs, backend, objective)
    rows = (inputs.sequences, inputs.case.rows // inputs.sequences)
    master, labels = inputs.logits_master.view(*rows, -1), inputs.labels.view(rows)
    storage = master.clone()
    return Runner(
        lambda: erc.policy_loss(inputs.logits(storage), labels, inplace_backward=True, **arguments).loss.backward(),
        reset=lambda: storage.copy_(master),
    )


def _entropy_ratio(backend: str, inputs: Inputs) -> Runner:
    @torch.no_grad()
    def call() -> Any:
        return erc.entropy_ratio(inputs.logits_master, inputs.old_logits, backend=backend)

    return Runner(call)


def _linear(backend: str, inputs: Inputs) -> Runner:
    arguments = _loss_arguments(inputs, backend)
    rows = (inputs.sequences, inputs.case.rows // inputs.sequences)
    labels = inputs.labels.view(rows)

    def call() -> None:
        hidden, weight = inputs.head()
        erc.linear_policy_loss(hidden.view(*rows, -1), weight, labels, **arguments).loss.backward()

    return Runner(call)


def _linear_stored(backend: str, inputs: Inputs) -> Runner:
    arguments = _loss_arguments(inputs, backend)
    rows = (inputs.sequences, inputs.case.rows // inputs.sequences)
    labels = inputs.labels.view(rows)

    def call() -> None:
        hidden, weight = inputs.head()
        logits = (hidden @ weight.t()).view(*rows, -1)
        erc.policy_loss(logits, labels, inplace_backward=True, **arguments).loss.backward()

    return Runner(call)


def _why_not(backend: str) -> str | None:
    state = erc.backends()[backend]
    return None if state == "available" else state


def variants(backends: tuple[str, ...] = BACKENDS) -> list[Variant]:
    """erc on each of `backends`; in place as a variant of its own."""
    chosen = []
    for backend in backends:
        operators: dict[str, Prepare] = {
            "stats": partial(_stats, backend),
            "stats-backward": partial(_stats_backward, backend),
            "policy-loss": partial(_policy_loss, backend),
            "entropy-ratio": partial(_entropy_ratio, backend),
            "linear": partial(_linear, backend),
        }
        known = {"devices": DEVICES[backend], "unavailable": partial(_why_not, backend)}
        chosen.append(Variant(f"erc {backend}", operators, **known))
        if backend != "torch":
            in_place = {"policy-loss": partial(_policy_loss_in_place, backend)}
            chosen.append(Variant(f"erc {backend}, in place", in_place, **known))
            stored = {"linear": partial(_linear_stored, backend)}
            chosen.append(Variant(f"erc {backend}, logits stored", stored, **known))
    return chosen


def rule_variants(backends: tuple[str, ...] = BACKENDS) -> list[Variant]:
    """Every token-level rule as a variant, in place: what a rule costs is not hidden behind a new gradient."""
    return [
        Variant(
            rule_name(backend, preset),
            {"rules": partial(_policy_loss_in_place, backend, objective=preset)},
            devices=DEVICES[backend],
            unavailable=partial(_why_not, backend),
        )
        for backend in backends
        if backend != "torch"
        for preset in erc.objectives()
        if erc.objective(preset).fused and preset.removeprefix("erc-") not in _SAME_RULE_AS_DAPO
        if not erc.objective(preset).nll_coef  # recipes: rules that others show
    ]


def rule_name(backend: str, preset: str) -> str:
    return f"erc {backend}: {preset}"


def _words(inputs: Inputs) -> torch.Tensor:
    """The bytes of the logits as 64-bit integers: reading them converts nothing."""
    flat = inputs.logits_master.view(-1).view(torch.uint8)
    return flat[: flat.numel() // 8 * 8].view(torch.int64)


def _read(inputs: Inputs) -> Runner:
    words = _words(inputs)
    return Runner(words.sum)


def _read_both(inputs: Inputs) -> Runner:
    words = _words(inputs)
    other = inputs.old_logits.view(-1).view(torch.uint8)[: words.numel() * 8].view(torch.int64)
    return Runner(lambda: (words.sum(), other.sum()))


def _copy(inputs: Inputs) -> Runner:
    source = inputs.logits_master
    destination = torch.empty_like(source)
    return Runner(lambda: destination.copy_(source))


def _clone(inputs: Inputs) -> Runner:
    return Runner(lambda: inputs.logits_master.clone())


def _matrix_products(inputs: Inputs) -> Runner:
    """The three products that any loss of an lm_head needs: 6 N V D flops."""

    def call() -> None:
        logits = inputs.hidden @ inputs.weight.t()
        logits @ inputs.weight, logits.t() @ inputs.hidden

    return Runner(call)


READ, COPY, CLONE, PRODUCTS = "read", "copy", "copy into fresh memory", "three matrix products"


def _over(operators: tuple[str, ...], prepare: Callable[[Inputs], Runner]) -> dict[str, Prepare]:
    return dict.fromkeys(operators, prepare)


_WRITING = ("stats-backward", "policy-loss")
BASELINES = (
    Variant(READ, _over(("stats",), _read) | {"entropy-ratio": _read_both}),
    Variant(COPY, _over(_WRITING, _copy)),
    Variant(CLONE, _over(_WRITING, _clone)),
    Variant(PRODUCTS, {"linear": _matrix_products}),
)
