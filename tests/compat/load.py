"""Runs in a compat environment: the installed wheel holds its contract on the CPU, and compiles into one graph."""

from __future__ import annotations

import json
import sys

import torch

import erc
from erc.check import check


def compiles(objective: str) -> bool:
    """Whether the loss is one graph under torch.compile, with the gradient that it has eagerly."""
    shape = (1, 4)  # a sequence, which GSPO needs
    labels = torch.arange(4).view(shape)
    logits = torch.randn(*shape, 64)
    stats = erc.token_stats(logits, labels)  # an unchanged policy: GSPO's bounds are narrow
    rollout = {"old_logprob": stats.logprob, "old_entropy": stats.entropy}
    gradients = []

    def loss(logits: torch.Tensor) -> torch.Tensor:
        out = erc.policy_loss(logits, labels, advantages=torch.ones(1), objective=objective, **rollout)
        return out.loss + 0 * out.metrics["erc_fraction"]

    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    return bool(gradients[0].any()) and torch.allclose(*gradients)


def head_compiles(objective: str) -> bool:
    """The same from bfloat16 hidden states, with float32 logits: gradients of hidden states and weight."""
    leaves = [torch.randn(9, 8).bfloat16().requires_grad_(), torch.randn(64, 8).bfloat16().requires_grad_()]
    labels = torch.arange(9)
    rollout = dict(zip(("old_logprob", "old_entropy"), erc.linear_token_stats(*leaves, labels)[:2], strict=True))
    rollout = {name: value.detach() for name, value in rollout.items()}

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return erc.linear_policy_loss(
            hidden * 1,
            weight,
            labels,
            advantages=torch.ones(9),
            objective=objective,
            memory_budget=64 * 6 * 4,
            **rollout,
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (torch.autograd.grad(function(*leaves), leaves) for function in (loss, compiled))
    return all(bool(a.any()) and torch.allclose(a, b) for a, b in zip(eager, traced, strict=True))


def main() -> None:
    torch.manual_seed(0)
    facts = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "erc": erc.__file__,
        "backends": erc.backends(),
        "contract": {f"{each.backend} {each.dtype}": each.passed for each in check()},
        "compiles": {name: compiles(name) for name in ("erc-dapo", "erc-gspo", "clip-cov")}
        | {f"{name} from hidden states": head_compiles(name) for name in ("erc-dapo", "clip-cov")},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
