"""Which backend and which path a policy loss would take, in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from erc.backend import select
from erc.call import choose_route
from erc.inputs import check_logits, resolve_objective
from erc.linear.head import check_head, narrowest_dtype, product_dtype
from erc.linear.plan import Plan, plan_of
from erc.parallel import Facts
from erc.surrogate.objective import Objective


@dataclass(frozen=True)
class Explanation:
    """`backend` and `path` ("fused", "two-phase" or "reference"), each with its reason, and of a linear form the `plan`
    of its chunks; prints as sentences."""

    backend: str
    backend_reason: str
    path: str
    path_reason: str
    plan: Plan | None = None

    def __str__(self) -> str:
        words = f"backend {self.backend}: {self.backend_reason}\npath {self.path}: {self.path_reason}"
        return words if self.plan is None else f"{words}\nplan: {self.plan}"


def explain(
    logits: Tensor,
    objective: str | Objective = "erc-dapo",
    *,
    grad_scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    logits_dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    sharded: bool = False,
    support: bool = False,
    backend: str | None = None,
) -> Explanation:
    """What `policy_loss(logits, ..., objective=objective)` would run, and why; with the `weight` of a head what
    `linear_policy_loss` would of hidden states in place of `logits`, and how many of their rows at a time; with
    `sharded` or `support` either of them with `vocab_shard=` or `support=`. Runs nothing. Meta tensors stand for those
    of a GPU.

    >>> import torch, erc
    >>> print(erc.explain(torch.zeros(2, 5), "gspo", backend="torch"))
    backend torch: the backend argument
    path reference: plain PyTorch: several tensors as large as the logits
    """
    chosen, plan = resolve_objective(objective), None
    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    if weight is None:
        check_logits(logits)
        dtype = grad_dtype = logits.dtype
        name, reason = _backend_of(logits, backend)
    else:
        like = check_head(logits, weight, None, logits_dtype, None, Facts())
        needs_grad = torch.is_grad_enabled() and (logits.requires_grad or weight.requires_grad)
        dtype, grad_dtype = like.dtype, narrowest_dtype(logits, weight)
        name, reason = _backend_of(like, backend)
        if name != "torch":
            plan = plan_of(
                like, weight.shape[1], product_dtype(weight), memory_budget, needs_grad, weight.requires_grad
            )
    path = choose_route(
        name, chosen, dtype, needs_grad=needs_grad, grad_scale=grad_scale, grad_dtype=grad_dtype, sharded=sharded,
        linear=weight is not None, support=support,
    )  # fmt: skip
    return Explanation(name, reason, path.name, path.reason, plan)


def _backend_of(logits: Tensor, backend: str | None) -> tuple[str, str]:
    if logits.device.type == "meta" and backend is None:
        return "cuda", "what a GPU takes first, for which meta tensors stand"
    return select(logits, backend)
