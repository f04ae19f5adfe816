"""Which backend and which path a policy loss would take, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erc.backend import select
from erc.call import choose_route
from erc.inputs import check_logits, resolve_objective
from erc.surrogate.objective import Objective


@dataclass(frozen=True)
class Explanation:
    """`backend` and `path` ("fused", "two-phase" or "reference"), each with its reason; prints as sentences."""

    backend: str
    backend_reason: str
    path: str
    path_reason: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.backend_reason}\npath {self.path}: {self.path_reason}"


def explain(
    logits: Tensor,
    objective: str | Objective = "erc-dapo",
    *,
    grad_scale: float | Tensor | None = None,
    linear: bool = False,
    sharded: bool = False,
    support: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `policy_loss(logits, ..., objective=objective)` would run, and why; with `linear` what `linear_policy_loss`
    would, of whose logits `logits` have dtype and device, and with `sharded` or `support` either of them with
    `vocab_shard=` or `support=`. Runs nothing.

    >>> import torch, erc
    >>> print(erc.explain(torch.zeros(2, 5), "gspo", backend="torch"))
    backend torch: the backend argument
    path reference: plain PyTorch: several tensors as large as the logits
    """
    check_logits(logits)
    name, reason = select(logits, backend)
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    path = choose_route(
        name, resolve_objective(objective), logits.dtype,
        needs_grad=needs_grad, grad_scale=grad_scale, sharded=sharded, linear=linear, support=support,
    )  # fmt: skip
    return Explanation(name, reason, path.name, path.reason)
