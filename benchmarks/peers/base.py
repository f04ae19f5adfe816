"""What a variant is: a name, where it runs, and one function an operator that makes it ready to be called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import BETA, EPS, EPS_HIGH, EPS_LOW, Case, Inputs


class Unsupported(Exception):
    """This variant does not do this case; the message says why."""


class Runner(NamedTuple):
    """`call` is timed; `reset` runs before it, untimed."""

    call: Callable[[], Any]
    reset: Callable[[], Any] | None = None


Prepare = Callable[[Inputs], Runner]
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Variant:
    """An implementation. `requires` names the modules that must import; `devices` where it runs."""

    name: str
    operators: Mapping[str, Prepare]
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    unavailable: Callable[[], str | None] = field(default=lambda: None)

    def why_not(self, case: Case) -> str | None:
        """Why `case` cannot be measured here, or None."""
        if case.operator not in self.operators:
            return f"has no {case.operator}"
        if case.device not in self.devices:
            return f"does not run on {case.device}"
        return self.unavailable() or missing(self.requires)

    def prepare(self, inputs: Inputs) -> Runner:
        """Ready to be called again and again.

        Raises:
            Unsupported: with the reason.
        """
        return self.operators[inputs.case.operator](inputs)


def missing(modules: tuple[str, ...]) -> str | None:
    """The first of `modules` that does not import, and why."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and module.split(".")[0] == error.name.split(".")[0]:
                return f"{module.split('.')[0]} is not installed"
            return f"{module} needs {error.name}, which is not installed"
        except Exception as error:  # a peer may fail in any way on import; that is its reason
            return f"{module} does not import: {type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def token_loss(logprob: Tensor, entropy: Tensor | None, inputs: Inputs) -> Tensor:
    """The mean policy loss in plain PyTorch, as a trainer writes it: PPO clip (or GPPO), then the entropy-ratio gate.

    Raises:
        Unsupported: for an objective that needs the entropy where there is none.
    """
    objective = inputs.case.objective
    advantages = inputs.advantages
    ratio = (logprob - inputs.old_logprob).exp()
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    rule = objective.removeprefix("erc-")
    if rule == "gppo":
        clipped = clipped.detach() * ratio / ratio.detach()
    elif rule != "dapo":
        raise Unsupported(f"no plain form of {objective} here")
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if objective.startswith("erc-"):
        if entropy is None:
            raise Unsupported("gives no entropy, so no entropy-ratio gate")
        rho = (entropy.detach() + EPS) / (inputs.old_entropy + EPS)
        keep = (rho > 1 - BETA) & (rho < 1 + BETA)
        loss = torch.where(keep, loss, loss.detach())
    return loss.mean()


def from_statistics(
    statistics: Callable[[], Statistics],
    *,
    constant_entropy: Callable[[], Statistics] | None = None,
    wrap: Callable[[Callable], Callable] = lambda function: function,
) -> dict[str, Prepare]:
    """The operators of a peer that gives log-probs and entropies, with the plain token loss behind them.

    Args:
        statistics: loads `(logits, labels) -> (logprob, entropy)`, both differentiable.
        constant_entropy: the same with an entropy that needs no gradient, as a loss wants it; default: under `no_grad`.
        wrap: applied to each function as a whole, such as `torch.compile`.
    """

    def stats(inputs: Inputs) -> Runner:
        function = wrap(statistics())

        @torch.no_grad()
        def call() -> Any:
            return function(inputs.logits_master, inputs.labels)

        return Runner(call)

    def stats_backward(inputs: Inputs) -> Runner:
        both = statistics()
        weights = inputs.advantages

        def total(logits: Tensor, labels: Tensor) -> Tensor:
            logprob, entropy = both(logits, labels)
            return (weights * logprob + 0.01 * entropy).sum()

        function = wrap(total)
        return Runner(lambda: function(inputs.logits(), inputs.labels).backward())

    def policy_loss(inputs: Inputs) -> Runner:
        both = (constant_entropy or statistics)()

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            logprob, entropy = both(logits, labels)
            return token_loss(logprob, entropy, inputs)

        function = wrap(loss)
        return Runner(lambda: function(inputs.logits(), inputs.labels).backward())

    return {"stats": stats, "stats-backward": stats_backward, "policy-loss": policy_loss}
