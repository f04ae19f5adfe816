"""Log-probs over the tokens that a sampler kept, and their gradient: the counterpart of `csrc/common/support.h`, one
program a row, in float64. The sweeps over the vocabulary stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from erc.constants import CUT_LABEL as _CUT_LABEL
from erc.constants import Param

from .elementary import expm1, log1p, tanh_and_slope
from .launch import launch_tokens
from .params import kernel, rows_of
from .rows import token_of

CUT_LABEL = tl.constexpr(_CUT_LABEL)
BLOCK = 128
"""Entries of a row that a program looks at together."""


@triton.jit
def _slope_of(slope, temperature_ptr, token):
    """dx/dz of a row without a softcap."""
    if temperature_ptr is not None:
        return slope / tl.load(temperature_ptr + token).to(tl.float64)
    else:
        return tl.full((), slope, tl.float64)


@triton.jit
def _scaled(z, slope, inner, SOFTCAP: tl.constexpr):
    """(x, dx/dz) of logits; an infinite one stays infinite under a softcap."""
    if SOFTCAP:
        tanh, rest = tanh_and_slope(z * inner)
        return tl.where(tl.abs(z) == float("inf"), z, tanh / inner * slope), slope * rest
    else:
        return z * slope, tl.zeros_like(z) + slope


@triton.jit
def _entries(offsets_ptr, token, num_ids):
    """Where a token's entries begin and end; offsets that nobody checked leave no place in the ids."""
    begin = tl.load(offsets_ptr + token)
    end = tl.load(offsets_ptr + token + 1)
    return tl.minimum(tl.maximum(begin, 0), num_ids), tl.minimum(tl.maximum(end, 0), num_ids)


@kernel
def support_forward_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, ids_ptr, offsets_ptr, values_ptr, logprob_full_ptr,
    entropy_ptr, logsumexp_ptr, saved_ptr, logprob_ptr, state_ptr, dense_labels_ptr,
    V: tl.int64, inner_rows: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, N: tl.int64, num_ids: tl.int64, first_column: tl.int64, vocab_size: tl.int64,
    slope: tl.float64, inner: tl.float64,
    GATHERED: tl.constexpr, SOFTCAP: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = token_of(row, row_index_ptr, first_token)
    if token >= 0:
        label = tl.load(labels_ptr + token)
        dense_label = label
        if label == ignore_index:
            tl.store(logprob_ptr + token, tl.full((), 0.0, REAL))
        else:
            start = logits_ptr + ((row // inner_rows) * stride_outer + (row % inner_rows) * stride_inner)
            begin, end = _entries(offsets_ptr, token, num_ids)
            kept = tl.zeros([BLOCK], tl.int64)
            broken = tl.zeros([BLOCK], tl.int32)
            found = tl.zeros([BLOCK], tl.int32)
            nans = tl.zeros([BLOCK], tl.int32)
            top = tl.full([BLOCK], float("-inf"), REAL)
            for first in range(begin, end, BLOCK):
                at = first + tl.arange(0, BLOCK)
                mask = at < end
                ids = tl.load(ids_ptr + at, mask=mask, other=-1)
                before = tl.load(ids_ptr + at - 1, mask=mask & (at > begin), other=-1)
                if GATHERED:
                    z = tl.load(values_ptr + at, mask=mask, other=float("-inf"))
                else:
                    column = ids - first_column
                    here = mask & (ids >= 0) & (column >= 0) & (column < V)
                    z = tl.load(start + column, mask=here, other=float("-inf")).to(REAL)
                    tl.store(values_ptr + at, z, mask=mask)
                real = mask & (ids != -1)
                wrong = real & ((ids < 0) | (ids >= vocab_size) | (before >= ids))
                wrong = wrong | (mask & (ids == -1) & (before != -1))  # padding stands before the ids
                broken += wrong.to(tl.int32)
                kept += real.to(tl.int64)
                found += (real & (ids == label)).to(tl.int32)
                nans += (real & (z != z)).to(tl.int32)
                top = tl.maximum(top, tl.where(real & (z == z), z, float("-inf")))
            num_kept = tl.sum(kept, 0)
            is_broken = (tl.sum(broken, 0) != 0) | ((num_kept != 0) & (tl.sum(found, 0) == 0))
            logsumexp = tl.full((), 0.0, REAL)
            uncut = tl.full((), float("inf"), REAL)  # as the loss of the rows takes it
            if logsumexp_ptr is not None:
                logsumexp = tl.load(logsumexp_ptr + token)
                uncut = tl.load(logprob_full_ptr + token)
            if is_broken:
                nan = tl.full((), float("nan"), REAL)
                tl.store(logprob_ptr + token, nan)
                if logsumexp_ptr is not None:
                    tl.store(logprob_full_ptr + token, nan)
                    tl.store(entropy_ptr + token, nan)
                    tl.store(logsumexp_ptr + token, nan)
                    for k in tl.static_range(3):
                        tl.store(saved_ptr + k * N + token, nan)
            elif (num_kept == 0) | (num_kept == vocab_size) | (logsumexp != logsumexp):
                # Not cut; or without a distribution over the full vocabulary, and so over no part of it.
                tl.store(logprob_ptr + token, uncut)
            else:
                tl.debug_barrier()  # another thread may have stored the value that this one loads
                highest = tl.where(tl.sum(nans, 0) != 0, float("nan"), tl.max(top, 0))
                row_slope = _slope_of(slope, temperature_ptr, token)
                center, _ = _scaled(highest.to(tl.float64), row_slope, inner, SOFTCAP)
                rest = tl.zeros([BLOCK], tl.float64)
                shift = tl.zeros([BLOCK], tl.float64)
                for first in range(begin, end, BLOCK):
                    at = first + tl.arange(0, BLOCK)
                    ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
                    z = tl.load(values_ptr + at, mask=at < end, other=float("-inf")).to(tl.float64)
                    x, _slopes = _scaled(z, row_slope, inner, SOFTCAP)  # `_` is the scalar above
                    u = x - center
                    rest += tl.where((ids >= 0) & (ids != label), tl.exp(u), 0.0)
                    shift += tl.where(ids == label, u, 0.0)
                others, label_shift = tl.sum(rest, 0), tl.sum(shift, 0)
                total = others + tl.exp(label_shift)
                logprob = tl.where(label_shift == 0.0, -log1p(others), label_shift - tl.log(total))
                tl.store(logprob_ptr + token, logprob.to(REAL))
                tl.store(state_ptr + token, highest.to(REAL))
                tl.store(state_ptr + N + token, others.to(REAL))
                tl.store(state_ptr + 2 * N + token, total.to(REAL))
                dense_label = tl.zeros_like(label) + CUT_LABEL
        tl.store(dense_labels_ptr + token, dense_label)


@kernel
def support_backward_kernel(
    out_ptr, labels_ptr, temperature_ptr, row_index_ptr, ids_ptr, offsets_ptr, values_ptr, saved_ptr, logprob_full_ptr,
    state_ptr, dense_labels_ptr, grad_logprob_ptr, grad_logprob_full_ptr, grad_entropy_ptr, grad_logsumexp_ptr,
    V: tl.int64, inner_rows: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    N: tl.int64, num_ids: tl.int64, first_column: tl.int64, slope: tl.float64, inner: tl.float64, carrier: tl.float64,
    SOFTCAP: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`carrier`: what a row's slope is multiplied by to scale the value that the sweep centres."""
    row = tl.program_id(0).to(tl.int64)
    token = token_of(row, row_index_ptr, first_token)
    is_cut = token >= 0
    if is_cut:
        is_cut = tl.load(dense_labels_ptr + token) == CUT_LABEL
    if is_cut:
        target = out_ptr + ((row // inner_rows) * stride_outer + (row % inner_rows) * stride_inner)
        begin, end = _entries(offsets_ptr, token, num_ids)
        label = tl.load(labels_ptr + token)
        row_slope = _slope_of(slope, temperature_ptr, token)
        center, _ = _scaled(tl.load(state_ptr + token).to(tl.float64), row_slope, inner, SOFTCAP)
        rest = tl.load(state_ptr + N + token).to(tl.float64)
        total = tl.load(state_ptr + 2 * N + token).to(tl.float64)
        g = tl.load(grad_logprob_ptr + token).to(tl.float64)
        g_full, g_entropy, g_logsumexp = g * 0.0, g * 0.0, g * 0.0
        if grad_logprob_full_ptr is not None:
            g_full = tl.load(grad_logprob_full_ptr + token).to(tl.float64)
        if grad_entropy_ptr is not None:
            g_entropy = tl.load(grad_entropy_ptr + token).to(tl.float64)
        if grad_logsumexp_ptr is not None:
            g_logsumexp = tl.load(grad_logsumexp_ptr + token).to(tl.float64)
        dense = (g_full != 0.0) | (g_entropy != 0.0) | (g_logsumexp != 0.0)
        row_max = tl.load(saved_ptr + token).to(tl.float64) * (row_slope * carrier)
        sum_exp = 1.0 + tl.load(saved_ptr + N + token).to(tl.float64)
        mean = tl.load(saved_ptr + 2 * N + token).to(tl.float64) / sum_exp
        others = -expm1(tl.maximum(tl.load(logprob_full_ptr + token).to(tl.float64), -80.0))
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mask = at < end
            ids = tl.load(ids_ptr + at, mask=mask, other=-1)
            column = ids - first_column
            here = mask & (ids >= 0) & (column >= 0) & (column < V)
            z = tl.load(values_ptr + at, mask=mask, other=float("-inf")).to(tl.float64)
            x, chain = _scaled(z, row_slope, inner, SOFTCAP)
            is_label = ids == label
            derivative = g * tl.where(is_label, rest / total, -tl.exp(x - center) / total)
            if dense:
                u = x - row_max
                p = tl.exp(u) / sum_exp
                derivative += g_full * tl.where(is_label, others, -p)
                derivative += tl.where(p == 0.0, 0.0, p * (g_logsumexp + g_entropy * (mean - u)))
            derivative = tl.where(z == float("-inf"), total * 0.0, derivative)  # forbidden: 0, or NaN with the row
            gradient = (derivative * chain).to(REAL).to(out_ptr.dtype.element_ty)
            tl.store(target + column, gradient, mask=here)


def _numbers(params: Tensor) -> tuple[float, float, float]:
    """(slope, inner, carrier): x = z * slope, or tanh(z * inner) / inner * slope under a softcap, whose carrier is the
    softcapped logit."""
    temperature, softcap, logit_scale = params[: Param.RULE].tolist()
    slope = logit_scale / temperature
    return (slope, logit_scale / softcap, 1.0 / logit_scale) if softcap else (slope, 1.0, 1.0)


def support_forward_(
    logits: Tensor, labels: Tensor, temperature: Tensor | None, params: Tensor, ignore_index: int,
    row_index: Tensor | None, first_token: int, start: int, vocab_size: int, token_ids: Tensor, offsets: Tensor,
    gathered: bool, values: Tensor, *outputs: Tensor | None,
) -> None:  # fmt: skip
    """Statistics over a support; see `erc.ops`."""
    rows = rows_of(logits)
    slope, inner, _ = _numbers(params)
    launch_tokens(
        support_forward_kernel, rows.count, rows.data, rows.data, labels, temperature, row_index, token_ids,
        offsets, values, *outputs, rows.V, *rows.address(), first_token, ignore_index, labels.numel(),
        token_ids.numel(), start, vocab_size, slope, inner, GATHERED=gathered, **_constants(rows.data, params),
    )  # fmt: skip


def support_backward_(
    labels: Tensor, temperature: Tensor | None, params: Tensor, row_index: Tensor | None, first_token: int, start: int,
    token_ids: Tensor, offsets: Tensor, *values_and_grads: Any,
) -> None:  # fmt: skip
    """The kept columns of cut rows in a gradient; see `erc.ops`."""
    *inputs, grad_logits = values_and_grads
    rows = rows_of(grad_logits)
    launch_tokens(
        support_backward_kernel, rows.count, rows.data, rows.data, labels, temperature, row_index, token_ids, offsets,
        *inputs, rows.V, *rows.address(), first_token, labels.numel(), token_ids.numel(), start, *_numbers(params),
        **_constants(rows.data, params),
    )  # fmt: skip


def _constants(data: Tensor, params: Tensor) -> dict[str, object]:
    real = tl.float64 if data.dtype == torch.float64 else tl.float32
    return {"SOFTCAP": float(params[Param.SOFTCAP]) != 0, "REAL": real, "BLOCK": BLOCK}
