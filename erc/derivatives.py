"""Layer 1: the derivatives that kernels do not have. Each raises: a gradient without its second-order part, or a
tangent of 0, would be a wrong number that nobody sees."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_double_backward() -> None:
    """For the head of a backward. Grad mode is on there if and only if somebody builds a graph of it.

    Raises:
        RuntimeError: under `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) is not supported by the kernels of erc, whose gradients would be "
            'constants to it: backend="torch" has derivatives of every order'
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """For the arguments of an operator.

    Raises:
        NotImplementedError: one of them carries a forward-mode tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "forward-mode differentiation is not supported by the kernels of erc, which would drop the tangent: use "
            'reverse mode, or backend="torch"'
        )
