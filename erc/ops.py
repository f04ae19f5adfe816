"""Layer 1: the operators every backend implements, one schema for all, one namespace a backend.

`erc_cpu::stats_forward`, `erc_triton::stats_forward` and `erc_cuda::stats_forward` are the same operator on different
machinery; `erc.backends` picks the namespace, and nothing else in the package knows which one runs.
Fake implementations and autograd formulas are registered here, once for all backends.

Conventions (DESIGN: rows, row algebra):

* `logits` is `[outer, inner, V]` with a last stride of 1; row `i` starts at `(i // inner) * stride(0) + (i % inner) *
  stride(1)`, so that `logits[:, :-1]` of a `[B, T, V]` tensor costs no copy. `N = outer * inner`.
* Everything per row is contiguous `[N]`: labels int64, floats in the statistics dtype (float64 for float64 logits,
  else float32).
* `params` is a small CPU float64 tensor that the launcher reads on the host: whatever a user may change from step to
  step travels there, so nothing recompiles and nothing synchronises. `ParamIndex` is its layout.
* A label equal to `ignore_index` marks a row that is not read; any other label outside `[0, V)` makes the row NaN
  (callers have checked labels where they can without a sync). `partial_stats` takes labels of the whole vocabulary, and
  the backward that follows it `ABSENT_LABEL` where another shard holds the labelled column.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from erc.derivatives import refuse_double_backward

ABSENT_LABEL = -(2**63)
"""The label of a row whose labelled column lies in another vocabulary shard."""


class ParamIndex(IntEnum):
    """Positions in the `params` tensor. Mirrored by `csrc/common/params.h` and `erc/triton_kernels/params.py`."""

    TEMPERATURE = 0
    SOFTCAP = 1  # 0 means none
    LOGIT_SCALE = 2
    RULE = 3  # four numbers whose meaning the ratio rule defines
    BETA_LOW = 7
    BETA_HIGH = 8
    GATE_EPS = 9
    KL_COEF = 10
    KL_CLAMP = 11


NUM_SCALING_PARAMS = 3
NUM_PARAMS = 12


class TokenFlag(IntEnum):
    """Bits of the `flags` output of `policy_loss`: what happened to a token. The last one is of filters that run
    two-phase; no kernel sets it."""

    CLIP_LOW = 1
    CLIP_HIGH = 2
    ERC_LOW = 4
    ERC_HIGH = 8
    ERC_DROPPED = 16
    FILTERED = 32


PAIRED_OUTPUTS = ("ratio", "entropy", "old_entropy", "kl_new_old", "kl_old_new", "total_variation")

_STATS_INPUTS = "Tensor logits, Tensor? labels, Tensor? temperature, Tensor params, int ignore_index"
_GRADIENTS = "Tensor saved, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_logsumexp"
_LOSS_INPUTS = (
    "Tensor labels, Tensor? temperature, Tensor params, int ignore_index, Tensor weight, Tensor advantages, "
    "Tensor? old_logprob, Tensor? old_entropy, Tensor? ref_logprob, Tensor? policy_weight, Tensor? entropy_weight, "
    "Tensor? logprob_weight, int rule, int kl, int gate"
)
_PAIRED_INPUTS = "Tensor logits, Tensor old_logits, Tensor? temperature, Tensor params"
_LOSS_OUTPUTS = "Tensor loss, Tensor token_loss, Tensor logprob, Tensor entropy, Tensor flags"

SCHEMAS = {
    # Row statistics. saved = [3, N] (row_max, sum_rest, weighted_sum); logprob is [0] without labels.
    "stats_forward": f"({_STATS_INPUTS}) -> (Tensor logprob, Tensor entropy, Tensor logsumexp, Tensor saved)",
    "stats_backward": f"({_STATS_INPUTS}, {_GRADIENTS}) -> Tensor",
    "stats_backward_": f"({_STATS_INPUTS.replace('Tensor logits', 'Tensor(a!) logits')}, {_GRADIENTS}) -> ()",
    # The whole token loss and its gradient from one read. loss = weight * token_loss + entropy_weight * entropy
    # + logprob_weight * logprob; grad_logits is [0, 0, 0] unless need_grad.
    "policy_loss": f"(Tensor logits, {_LOSS_INPUTS}, bool need_grad) -> ({_LOSS_OUTPUTS}, Tensor grad_logits)",
    "policy_loss_": f"(Tensor(a!) logits, {_LOSS_INPUTS}) -> ({_LOSS_OUTPUTS})",
    # Multiply row i by scale[i]; a row whose scale is 1 is not touched.
    "scale_rows": "(Tensor grad, Tensor scale) -> Tensor",
    "scale_rows_": "(Tensor(a!) grad, Tensor scale) -> ()",
    # State of a vocabulary shard that starts at column `start`: [4, N] (row_max, sum_rest, weighted_sum, label value).
    "partial_stats": f"({_STATS_INPUTS}, int start) -> Tensor",
    # [6, N] in the order of PAIRED_OUTPUTS, and what the backward needs.
    "paired_forward": f"({_PAIRED_INPUTS}) -> (Tensor stats, Tensor saved)",
    "paired_backward": f"({_PAIRED_INPUTS}, Tensor saved, Tensor grads) -> Tensor",
}

PAIRED_SAVED = 8
"""Rows of `paired_forward`'s saved tensor: (row_max, sum_rest, weighted_sum) of new and of old, KL(new||old),
E_p[sign(p - q)]."""


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics computed from logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(namespace: str) -> torch.library.Library:
    """Define every operator in `namespace`, with fakes and autograd; returns the library handle, to be kept alive."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    torch.library.register_autograd(
        f"{namespace}::stats_forward", _stats_backward(namespace), setup_context=_stats_context, lib=library
    )
    torch.library.register_autograd(
        f"{namespace}::policy_loss", _loss_backward(namespace), setup_context=_loss_context, lib=library
    )
    torch.library.register_autograd(
        f"{namespace}::paired_forward", _paired_backward(namespace), setup_context=_paired_context, lib=library
    )
    return library


# ---- fakes: shapes and dtypes only ---------------------------------------------------------------------------------


def _rows(logits: Tensor, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
    count = logits.shape[0] * logits.shape[1]
    return logits.new_empty((*leading, count), dtype=dtype or stats_dtype(logits.dtype))


def _fake_stats_forward(logits, labels, temperature, params, ignore_index):
    logprob = _rows(logits) if labels is not None else logits.new_empty((0,), dtype=stats_dtype(logits.dtype))
    return logprob, _rows(logits), _rows(logits), _rows(logits, 3)


def _fake_stats_backward(logits, *_):
    return logits.new_empty(logits.shape)


def _fake_policy_loss_(logits, *_):
    return _rows(logits), _rows(logits), _rows(logits), _rows(logits), _rows(logits, dtype=torch.int32)


def _fake_policy_loss(logits, *args):
    need_grad = args[-1]
    return (*_fake_policy_loss_(logits), logits.new_empty(logits.shape if need_grad else (0, 0, 0)))


def _fake_nothing(*_):
    return None


_FAKES = {
    "stats_forward": _fake_stats_forward,
    "stats_backward": _fake_stats_backward,
    "stats_backward_": _fake_nothing,
    "policy_loss": _fake_policy_loss,
    "policy_loss_": _fake_policy_loss_,
    "scale_rows": lambda grad, scale: grad.new_empty(grad.shape),
    "scale_rows_": _fake_nothing,
    "partial_stats": lambda logits, *_: _rows(logits, 4),
    "paired_forward": lambda logits, *_: (_rows(logits, len(PAIRED_OUTPUTS)), _rows(logits, PAIRED_SAVED)),
    "paired_backward": _fake_stats_backward,
}


# ---- autograd: the functional forms, which torch.compile traces -----------------------------------------------------


def _contiguous(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.contiguous()


def _stats_context(ctx, inputs, output):
    logits, labels, temperature, params, ignore_index = inputs
    ctx.save_for_backward(logits, labels, temperature, params, output[3])
    ctx.ignore_index = ignore_index
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _stats_backward(namespace: str):
    def backward(ctx, grad_logprob, grad_entropy, grad_logsumexp, _):
        refuse_double_backward()
        if grad_logprob is None and grad_entropy is None and grad_logsumexp is None:
            return None, None, None, None, None
        logits, labels, temperature, params, saved = ctx.saved_tensors
        operator = getattr(torch.ops, namespace).stats_backward
        grads = map(_contiguous, (grad_logprob if labels is not None else None, grad_entropy, grad_logsumexp))
        return operator(logits, labels, temperature, params, ctx.ignore_index, saved, *grads), None, None, None, None

    return backward


_LOSS_ARGUMENTS = 17  # of policy_loss; only logits has a gradient


def _loss_context(ctx, inputs, output):
    ctx.save_for_backward(output[5])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(namespace: str):
    def backward(ctx, grad_loss, *_):
        refuse_double_backward()
        if grad_loss is None:
            return (None,) * _LOSS_ARGUMENTS
        (grad_logits,) = ctx.saved_tensors
        if grad_logits.numel() == 0:
            raise RuntimeError("policy_loss was called with need_grad=False, so it has no gradient")
        scaled = getattr(torch.ops, namespace).scale_rows(grad_logits, grad_loss.contiguous())
        return (scaled,) + (None,) * (_LOSS_ARGUMENTS - 1)

    return backward


def _paired_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _paired_backward(namespace: str):
    def backward(ctx, grads, _):
        refuse_double_backward()
        if grads is None:
            return None, None, None, None
        operator = getattr(torch.ops, namespace).paired_backward
        return operator(*ctx.saved_tensors, grads.contiguous()), None, None, None

    return backward
