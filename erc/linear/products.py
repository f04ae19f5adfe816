"""Matrix products of 16-bit operands whose results are float32.

A product that is rounded to 16 bit decides ERC tokens by its rounding, and one that is added up in 16 bit loses terms.
CUDA builds of PyTorch have products with a wider result (`out_dtype`). The `cpu` backend has one where the processor
multiplies bfloat16; elsewhere the weight is converted in tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erc.backend import cpu_wide_product, results_are_readable, synchronisation_allowed

TILE_ROWS = 512
"""Rows of a weight that are float32 at a time: with a few thousand columns they stay in a core's cache."""


def write_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`rows @ weight.T + bias` into `out`, whose dtype is the operands' or float32."""
    if out.dtype == weight.dtype:
        if bias is None:
            torch.mm(rows, weight.t(), out=out)
        else:
            torch.addmm(bias, rows, weight.t(), out=out)
    elif _widened_by_pytorch(weight.device):
        if bias is None:
            torch.mm(rows, weight.t(), out_dtype=out.dtype, out=out)
        else:  # with a 1-D bias, out= and out_dtype= at once PyTorch fails
            torch.addmm(out.copy_(bias), rows, weight.t(), out_dtype=out.dtype, out=out)
    elif _widened_by_the_cpu_backend(weight.device, weight.dtype, out.dtype):
        bias = None if bias is None else bias.to(out.dtype)
        torch.ops.erc_cpu.wide_product_(rows, weight, bias, False, out)
    else:
        _write_by_tiles(rows.to(out.dtype), weight, bias, out)


def converts_weight(device: torch.device, operands: torch.dtype, logits: torch.dtype) -> bool:
    """Whether every call of `write_logits` converts the weight, in tiles. Meta tensors stand for a GPU's."""
    if operands == logits:
        return False
    return not (_widened_by_pytorch(device) or _widened_by_the_cpu_backend(device, operands, logits))


def _widened_by_the_cpu_backend(device: torch.device, operands: torch.dtype, result: torch.dtype) -> bool:
    wanted = operands == torch.bfloat16 and result == torch.float32
    return wanted and device.type == "cpu" and _cpu_multiplies()


def _cpu_multiplies() -> bool:
    return bool(cpu_wide_product())


def _write_by_tiles(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    tile = torch.empty(min(TILE_ROWS, len(weight)), weight.shape[1], dtype=out.dtype, device=out.device)
    for start in range(0, len(weight), TILE_ROWS):
        columns = slice(start, start + TILE_ROWS)
        part = tile[: len(weight[columns])].copy_(weight[columns])
        if bias is None:
            torch.mm(rows, part.t(), out=out[:, columns])
        else:
            torch.addmm(bias[columns].to(out.dtype), rows, part.t(), out=out[:, columns])


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """`total += left @ right`, or `total = left @ right` for the `first`: in the dtype of `total`, which is the
    operands' or float32. Where no product has a wider result than its operands, each one is rounded once."""
    if _widened_by_the_cpu_backend(left.device, left.dtype, total.dtype):
        torch.ops.erc_cpu.wide_product_(right.t(), left, None, not first, total.t())
        return
    if total.dtype != left.dtype and not _widened_by_pytorch(left.device):
        product = left @ right
        total.copy_(product) if first else total.add_(product)
        return
    wide: dict[str, Any] = {} if total.dtype == left.dtype else {"out_dtype": total.dtype}
    if first:
        torch.mm(left, right, out=total, **wide)
    else:
        torch.addmm(total, left, right, out=total, **wide)


def _widened_by_pytorch(device: torch.device) -> bool:
    """Whether PyTorch multiplies 16-bit operands into float32."""
    if device.type != "cuda":
        return device.type == "meta"
    if device not in _answers:
        if not results_are_readable(device):
            return torch.version.hip is None
        _answers[device] = _multiplies(device)
    return _answers[device]


# What torch.compiler.assume_constant_result sets; the decorator itself imports the whole compiler.
_widened_by_pytorch._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cpu_multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]

_answers: dict[torch.device, bool] = {}


def _multiplies(device: torch.device) -> bool:
    """Found out by small products whose sums no 16-bit number holds."""
    try:
        for dtype in (torch.bfloat16, torch.float16):
            left = torch.full((16, 16), 1 + 2.0**-6, dtype=dtype, device=device)
            total = torch.full((16, 16), 2.0**-10, device=device)
            torch.addmm(total, left, left.t(), out_dtype=torch.float32, out=total)
            with synchronisation_allowed(device):
                if not bool((total == 16 * (1 + 2.0**-6) ** 2 + 2.0**-10).all()):
                    return False
    except (RuntimeError, TypeError):
        return False
    return True
