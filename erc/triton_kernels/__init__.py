"""The Triton backend, for NVIDIA and AMD GPUs from one source, and for CPU tensors in Triton's interpreter.

Reading order: `rows`, `sweep` and `gradient` (a row, and all that follows from it), `stats`, `token_loss`,
`policy_loss`, `tokens`; then `support`, `paired` and `scale`. `params` and `launch` are the host side, `tuning` the
table of launch shapes.

In the interpreter exp and log are NumPy's, which are more exact than a GPU's; fused multiply-adds are emulated exactly;
cache hints do nothing; programs run one after another.
"""

from __future__ import annotations

import torch

from .paired import paired_backward, paired_forward
from .policy_loss import loss_rows_, policy_loss, policy_loss_
from .scale import scale_rows, scale_rows_
from .stats import partial_stats_, stats_backward, stats_backward_, stats_forward, stats_forward_
from .support import support_backward_, support_forward_
from .tokens import token_losses, token_summary, token_table

OPERATORS = {
    "stats_forward": stats_forward,
    "stats_forward_": stats_forward_,
    "stats_backward": stats_backward,
    "stats_backward_": stats_backward_,
    "partial_stats_": partial_stats_,
    "support_forward_": support_forward_,
    "support_backward_": support_backward_,
    "token_table": token_table,
    "loss_rows_": loss_rows_,
    "token_losses": token_losses,
    "token_summary": token_summary,
    "policy_loss": policy_loss,
    "policy_loss_": policy_loss_,
    "scale_rows": scale_rows,
    "scale_rows_": scale_rows_,
    "paired_forward": paired_forward,
    "paired_backward": paired_backward,
}


def register(library: torch.library.Library) -> None:
    """Implement every operator of `erc.ops.SCHEMAS` in the library's namespace.

    CompositeExplicitAutograd: one kernel for every device, chosen by the tensors themselves.
    """
    for name, function in OPERATORS.items():
        library.impl(name, function, "CompositeExplicitAutograd")


__all__ = ["OPERATORS", "register"]
