"""The operators every backend implements, one schema for all, one namespace per backend.

`erc_cpu::stats_forward`, `erc_triton::stats_forward` and `erc_cuda::stats_forward` are the same operator on different
machinery; `erc.backend` picks the namespace, and nothing else in the package knows which one runs.
Fake implementations and autograd formulas are registered here, once for all backends.

Conventions:

* `logits` is `[outer, inner, V]` with a last stride of 1; row `i` starts at `(i // inner) * stride(0) + (i % inner) *
  stride(1)`, so that `logits[:, :-1]` of a `[B, T, V]` tensor costs no copy. There are `outer * inner` rows.
* Everything per token is contiguous, in any shape of `N` elements, and in the statistics dtype (float64 for float64
  logits, else float32); labels are int64. Row `i` is of token `i`; an operator that ends in `_` and takes `row_index`
  works on some of the tokens: row `i` is of token `row_index[i]`, or without it of `first_token + i`. A negative token
  is a row that nobody wants: it is not read and its gradient is 0.
* `token_table` and `policy_loss` take per-token tensors as callers have them, in any dtype.
* `params` is a small CPU float64 tensor that the launcher reads on the host: whatever a user may change from step to
  step travels there, so nothing recompiles and nothing synchronises. `erc.constants.Param` is its layout.
* A label equal to `ignore_index` marks a row that is not read; any other label outside `[0, V)` is an error on the CPU
  and makes the row NaN on a GPU. `partial_stats_` takes labels of the whole vocabulary, and the backward that follows
  it `ABSENT_LABEL` where another shard holds the labelled column; `stats_backward` also takes `CUT_LABEL`.
* A gradient's memory is the logits' own, or other memory of their dtype, or, of float32 logits, of a 16-bit dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from erc.constants import PAIRED_OUTPUTS, PAIRED_SAVED, Column, Metric, header

_ROWS = "Tensor logits, Tensor? labels, Tensor? temperature, Tensor params, int ignore_index"
_SOME = "Tensor? row_index, int first_token"
_GRADIENTS = "Tensor saved, Tensor? grad_logprob, Tensor? grad_entropy, Tensor? grad_logsumexp"
_TOKENS = (
    "Tensor labels, Tensor advantages, Tensor? mask, Tensor? old_logprob, Tensor? old_entropy, Tensor? ref_logprob, "
    "Tensor? policy_weight, Tensor? nll_mask, Tensor? cu_seqlens, Tensor? normalizer, Tensor? entropy_normalizer, "
    "Tensor? nll_normalizer, Tensor? grad_scale, Tensor params, int ignore_index"
)
_PAIR = "Tensor logits, Tensor old_logits, Tensor? temperature, Tensor params"
_LOSS = f"Tensor? temperature, {_TOKENS}, Tensor? token_ids, Tensor? offsets, bool per_row, bool need_grad"
_LOSS_OUTPUTS = "Tensor loss, Tensor per_token, Tensor flags, Tensor metrics, Tensor tokens, Tensor grad_logits"

SCHEMAS = {
    # Row statistics. saved = [3, N] (row_max, sum_rest, weighted_sum); logprob is [0] without labels.
    "stats_forward": f"({_ROWS}) -> (Tensor logprob, Tensor entropy, Tensor logsumexp, Tensor saved)",
    # stats = [6, N]: logprob, entropy, logsumexp, saved.
    "stats_forward_": f"({_ROWS}, {_SOME}, Tensor(a!) stats) -> ()",
    "stats_backward": f"({_ROWS}, {_GRADIENTS}) -> Tensor",
    "stats_backward_": f"({_ROWS}, {_SOME}, {_GRADIENTS}, Tensor(a!) grad_logits) -> ()",
    # State of a vocabulary shard that starts at column `start`: [4, N] (row_max, sum_rest, weighted_sum, label value).
    "partial_stats_": f"({_ROWS}, {_SOME}, int start, Tensor(a!) state) -> ()",
    # What a sampler kept of each token: `token_ids` [K] of the whole vocabulary, token t's from offsets[t] on, rising
    # strictly after padding of -1. The rows' statistics become NaN where they break that or lack the label (an error on
    # the CPU). `values` [K] are the kept logits, which `gathered` says are there already; state [3, N]; `dense_labels`
    # are the labels for the backward of the full vocabulary, `CUT_LABEL` where `support_backward_` does the rest.
    # Without the statistics of the full vocabulary the log-prob of a token that was not cut is inf, as `loss_rows_`
    # takes it.
    "support_forward_": f"({_ROWS.replace('Tensor? labels', 'Tensor labels')}, {_SOME}, int start, int vocab_size, "
    "Tensor token_ids, Tensor offsets, bool gathered, Tensor(a!) values, Tensor(b!)? logprob_full, "
    "Tensor(c!)? entropy, Tensor(d!)? logsumexp, Tensor(e!)? saved, Tensor(f!) logprob, Tensor(g!) state, "
    "Tensor(h!) dense_labels) -> ()",
    # Overwrites the kept columns of cut rows in what `stats_backward` left.
    "support_backward_": f"(Tensor labels, Tensor? temperature, Tensor params, {_SOME}, int start, Tensor token_ids, "
    "Tensor offsets, Tensor values, Tensor saved, Tensor logprob_full, Tensor state, Tensor dense_labels, "
    "Tensor grad_logprob, Tensor? grad_logprob_full, Tensor? grad_entropy, Tensor? grad_logsumexp, "
    "Tensor(a!) grad_logits) -> ()",
    # All that is known of a token before its logits are read: [N, 8] (`erc.constants.Column`), the labels that remain,
    # and what the summary of the same tokens counts with.
    "token_table": f"({_TOKENS}, int vocab_size, bool wide) -> (Tensor table, Tensor labels, Tensor counter)",
    # The fused loss of some rows. per_token = [4, N]: share of the loss, token loss, log-prob, entropy. `over_support`
    # is [7, N]: the log-prob that `support_forward_` left, and what `support_backward_` takes: saved, and derivatives
    # by log-prob, log-prob over the full vocabulary and entropy; per_token has then a fifth row, that log-prob.
    "loss_rows_": f"({_ROWS.replace('Tensor? labels', 'Tensor labels')}, {_SOME}, Tensor table, Tensor(a!) per_token, "
    "Tensor(b!) flags, Tensor(c!)? over_support, Tensor(d!)? grad_logits) -> ()",
    # The loss of tokens whose statistics exist, by the params' rule, or with a policy term that was computed elsewhere
    # (its value, derivative by the log-prob, and what it clipped); filtered tokens lose theirs. per_token as above;
    # [2, N]: derivatives of the share by log-prob and entropy.
    "token_losses": "(Tensor logprob, Tensor entropy, Tensor table, Tensor labels, Tensor params, int ignore_index, "
    "Tensor? policy, Tensor? d_policy, Tensor? clip_low, Tensor? clip_high, Tensor? filtered) -> "
    "(Tensor per_token, Tensor derivatives, Tensor flags)",
    # The scalar loss, the metrics (`erc.constants.Metric`, float64) and the number of active tokens (int64).
    # `logprob_full` is given where the log-probs are over a support.
    "token_summary": "(Tensor per_token, Tensor? logprob_full, Tensor flags, Tensor table, Tensor labels, "
    "Tensor(a!) counter, Tensor params, int ignore_index) -> (Tensor loss, Tensor metrics, Tensor tokens)",
    # Table, rows and summary in one: what the fused token-level loss calls. loss is a scalar, or [N] with per_row;
    # per_token = [3, N]: token loss, log-prob, entropy, and with a support the log-prob over the full vocabulary;
    # grad_logits is [0, 0, 0] unless need_grad, and where it is written over the logits.
    "policy_loss": f"(Tensor logits, {_LOSS}) -> ({_LOSS_OUTPUTS})",
    "policy_loss_": f"(Tensor(a!) logits, {_LOSS}) -> ({_LOSS_OUTPUTS})",
    # Multiply row i by scale[i], or every row by a 0-d scale; in place, a row whose scale is 1 is not touched.
    "scale_rows": "(Tensor grad, Tensor scale) -> Tensor",
    "scale_rows_": "(Tensor(a!) grad, Tensor scale) -> ()",
    # [6, N] in the order of PAIRED_OUTPUTS, and what the backward needs: [8, N] (both rows' states, KL(new || old),
    # E[sign]). With `states` [6, N] these are a vocabulary shard's columns of rows of those states, and divergences and
    # E[sign] are the sums over these columns.
    "paired_forward": f"({_PAIR}, Tensor? states=None) -> (Tensor stats, Tensor saved)",
    "paired_backward": f"({_PAIR}, Tensor saved, Tensor grads) -> Tensor",
}


def stamp() -> str:
    """A digest of all that the package and a compiled library must agree on: schemas and constants.

    `python -m erc.ops` prints `csrc/common/stamp.h`, and a test holds the file to it. A library with another stamp is
    refused when it is loaded.
    """
    return hashlib.sha256(f"{SCHEMAS}{header()}".encode()).hexdigest()[:16]


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics computed from logits of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def define(namespace: str) -> torch.library.Library:
    """Define every operator in `namespace`, with fakes and autograd; returns the library handle, to be kept alive."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES.get(name, _fake_nothing), lib=library)
    for name, (backward, setup_context) in _AUTOGRAD.items():
        torch.library.register_autograd(
            f"{namespace}::{name}", backward(namespace), setup_context=setup_context, lib=library
        )
    return library


# ---- fakes: shapes and dtypes only ---------------------------------------------------------------------------------


def _tokens(logits: Tensor, *leading: int, dtype: torch.dtype | None = None) -> Tensor:
    count = logits.shape[0] * logits.shape[1]
    return logits.new_empty((*leading, count), dtype=dtype or stats_dtype(logits.dtype))


def _fake_stats_forward(logits: Tensor, labels: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    logprob = _tokens(logits) if labels is not None else logits.new_empty((0,), dtype=stats_dtype(logits.dtype))
    return logprob, _tokens(logits), _tokens(logits), _tokens(logits, 3)


def _like(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_token_table(labels: Tensor, *args: Any) -> tuple[Tensor, ...]:
    real = torch.float64 if args[-1] else torch.float32
    count = labels.numel()
    table = labels.new_empty((count, len(Column)), dtype=real)
    return table, labels.new_empty((count,), dtype=torch.int64), labels.new_empty((1,), dtype=torch.int32)


def _fake_token_losses(logprob: Tensor, *_: Any) -> tuple[Tensor, ...]:
    count = logprob.numel()
    return (
        logprob.new_empty((4, count)),
        logprob.new_empty((2, count)),
        logprob.new_empty((count,), dtype=torch.int32),
    )


def _fake_token_summary(per_token: Tensor, *_: Any) -> tuple[Tensor, ...]:
    metrics = per_token.new_empty((len(Metric),), dtype=torch.float64)
    return per_token.new_empty(()), metrics, per_token.new_empty((), dtype=torch.int64)


def _fake_policy_loss(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *_, token_ids, _, per_row, need_grad = args
    loss = _tokens(logits) if per_row else logits.new_empty((), dtype=stats_dtype(logits.dtype))
    per_token = _tokens(logits, 3 if token_ids is None else 4)
    _, metrics, tokens = _fake_token_summary(per_token)
    grad_logits = logits.new_empty(logits.shape if need_grad else (0, 0, 0))
    return loss, per_token, _tokens(logits, dtype=torch.int32), metrics, tokens, grad_logits


def _fake_nothing(*_: Any) -> None:
    return None


_FAKES: dict[str, Callable[..., Any]] = {
    "stats_forward": _fake_stats_forward,
    "stats_backward": _like,
    "token_table": _fake_token_table,
    "token_losses": _fake_token_losses,
    "token_summary": _fake_token_summary,
    "policy_loss": _fake_policy_loss,
    "policy_loss_": lambda logits, *args: _fake_policy_loss(logits, *args[:-1], False),
    "scale_rows": _like,
    "paired_forward": lambda logits, *_: (_tokens(logits, len(PAIRED_OUTPUTS)), _tokens(logits, PAIRED_SAVED)),
    "paired_backward": _like,
}


# ---- autograd: the functional forms, which torch.compile traces -----------------------------------------------------

_Backward = Callable[..., tuple[Any, ...]]


def contiguous(grad: Tensor | None) -> Tensor | None:
    """What autograd hands a backward may be expanded."""
    return None if grad is None else grad.contiguous()


def no_graph() -> AbstractContextManager[Any]:
    """Around an eager operator call that makes no graph: its kernel is called at once, not by way of the autograd
    formula that is registered for it, which costs more than a short row. Compiled code traces the formula, and
    forward-mode tangents, which the operators in PyTorch carry, live where autograd does."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def refuse_double_backward(function: str) -> None:
    """Raise inside a backward that somebody builds a graph of: its own gradient would be dropped silently."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function} has no second derivative, which would be dropped silently: call backward without create_graph"
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise before an operator that would drop a forward-mode tangent of one of them silently."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            'erc\'s kernels have no forward-mode derivative: use reverse mode, or backend="torch" for token_stats and '
            "entropy_ratio"
        )


def _stats_context(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, temperature, params, ignore_index = inputs
    ctx.save_for_backward(logits, labels, temperature, params, output[3])
    ctx.ignore_index = ignore_index
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _stats_backward(namespace: str) -> _Backward:
    def backward(ctx: Any, grad_logprob: Any, grad_entropy: Any, grad_logsumexp: Any, _: Any) -> tuple[Any, ...]:
        refuse_double_backward("token_stats")
        if grad_logprob is None and grad_entropy is None and grad_logsumexp is None:
            return None, None, None, None, None
        logits, labels, temperature, params, saved = ctx.saved_tensors
        operator = getattr(torch.ops, namespace).stats_backward
        grads = map(contiguous, (grad_logprob if labels is not None else None, grad_entropy, grad_logsumexp))
        return operator(logits, labels, temperature, params, ctx.ignore_index, saved, *grads), None, None, None, None

    return backward


def _loss_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[-1])
    ctx.num_inputs, ctx.need_grad = len(inputs), inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_backward(namespace: str) -> _Backward:
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward("policy_loss")
        nothing = (None,) * (ctx.num_inputs - 1)
        if grad_loss is None:
            return None, *nothing
        (grad_logits,) = ctx.saved_tensors
        if not ctx.need_grad:
            raise RuntimeError("policy_loss was called with need_grad=False, so it has no gradient")
        return getattr(torch.ops, namespace).scale_rows(grad_logits, grad_loss.contiguous()), *nothing

    return backward


def _paired_context(ctx: Any, inputs: Any, output: Any) -> None:
    *pair, states = inputs
    ctx.save_for_backward(*pair, output[1])
    ctx.whole = states is None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _paired_backward(namespace: str) -> _Backward:
    def backward(ctx: Any, grads: Tensor | None, _: Any) -> tuple[Any, ...]:
        refuse_double_backward("entropy_ratio")
        if grads is None:
            return None, None, None, None, None
        if not ctx.whole:
            raise RuntimeError("paired_forward of a shard's columns has no gradient of its own")
        operator = getattr(torch.ops, namespace).paired_backward
        return operator(*ctx.saved_tensors, grads.contiguous()), None, None, None, None

    return backward


_AUTOGRAD: dict[str, tuple[Callable[[str], _Backward], Callable[..., None]]] = {
    "stats_forward": (_stats_backward, _stats_context),
    "policy_loss": (_loss_backward, _loss_context),
    "paired_forward": (_paired_backward, _paired_context),
}


if __name__ == "__main__":
    print("// Generated by `python -m erc.ops`.", "#pragma once", f'#define ERC_STAMP "{stamp()}"', sep="\n")
