"""The fused policy loss: log-prob, entropy, ratio rule, gate, KL and entropy terms, and the gradient of all of it.

A program sweeps a row, knows the token's loss, and writes the gradient while the row is still in cache: one DRAM read
and one DRAM write for forward and backward together, as long as the rows in flight fit into the L2 cache, which
`tuning.programs_for_loss` sees to. Rows that several programs share are swept, finished and differentiated by three
launches instead.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from erc.constants import Column, Param, Present

from . import tuning
from .elementary import real
from .gradient import StatGrads, write_gradient, write_zeros
from .launch import launch, shared_lanes
from .params import RowInputs, Rows, gradient_rows, kernel, read_scaling, row_inputs, rows_of
from .rows import label_of, load_label, row_pointer, row_scaling, token_of
from .stats import launch_backward
from .support import support_backward_, support_forward_
from .sweep import RowState, row_entropy, row_logprob, row_state
from .token_loss import (
    GATE_NONE,
    IMPORTANCE_WEIGHTED,
    KL_NONE,
    LossParams,
    TokenInputs,
    importance_ratio,
    kl_estimate,
    scaled_logprob,
    token_loss,
)
from .tokens import summary, token_table

COLUMNS = tl.constexpr(len(Column))
OLD_LOGPROB = tl.constexpr(int(Column.OLD_LOGPROB))
OLD_ENTROPY = tl.constexpr(int(Column.OLD_ENTROPY))
REF_LOGPROB = tl.constexpr(int(Column.REF_LOGPROB))
POLICY_WEIGHT = tl.constexpr(int(Column.POLICY_WEIGHT))
ENTROPY_WEIGHT = tl.constexpr(int(Column.ENTROPY_WEIGHT))
LOGPROB_WEIGHT = tl.constexpr(int(Column.LOGPROB_WEIGHT))


@kernel
def policy_loss_kernel(
    logits_ptr, labels_ptr, temperature_ptr, row_index_ptr, lanes_ptr, table_ptr, out_ptr,
    loss_ptr, token_loss_ptr, logprob_ptr, entropy_ptr, flags_ptr, saved_ptr, grad_logprob_ptr, grad_entropy_ptr,
    over_support_ptr, logprob_full_ptr, grad_over_support_ptr,
    V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, first_token: tl.int64,
    ignore_index: tl.int64, out_stride_outer: tl.int64, out_stride_inner: tl.int64, N: tl.int64, num_rows: tl.int64,
    programs: tl.int64, scale: tl.float64, cap: tl.float64, cap_scale: tl.float64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, beta_low: tl.float64, beta_high: tl.float64,
    gate_eps: tl.float64, kl_coef: tl.float64, kl_clamp: tl.float64, RULE: tl.constexpr, KL: tl.constexpr,
    GATE: tl.constexpr, OFF_POLICY: tl.constexpr, CORRECTED: tl.constexpr, ENTROPY: tl.constexpr, NLL: tl.constexpr,
    KL_OVER_FULL: tl.constexpr, NLL_OVER_FULL: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A program works through every `programs`-th row. `out_ptr` None: no gradient here; `saved_ptr` given: what a
    later `stats_backward_kernel` needs of a shared row, or a `support_backward_kernel` of one that a sampler cut. Of
    the token table only the columns that count are read. `over_support_ptr`: what `support_forward_kernel` left, inf
    for a token that was not cut; where one was, the gradient here is that of the terms over the full vocabulary."""
    first_row = tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(num_rows - first_row, programs)):
        row = first_row + turn * programs
        token = token_of(row, row_index_ptr, first_token)
        label = label_of(labels_ptr, token, ignore_index, V)
        zero = real(0.0, L)
        if label.ignored:
            if token >= 0:
                tl.store(loss_ptr + token, zero)
                tl.store(token_loss_ptr + token, zero)
                tl.store(logprob_ptr + token, zero)
                tl.store(entropy_ptr + token, zero)
                tl.store(flags_ptr + token, 0)
                if logprob_full_ptr is not None:
                    tl.store(logprob_full_ptr + token, zero)
            if out_ptr is not None:
                write_zeros(row_pointer(out_ptr, row, inner, out_stride_outer, out_stride_inner, L), 0, V, L)
        else:
            start = row_pointer(logits_ptr, row, inner, stride_outer, stride_inner, L)
            scaling = row_scaling(scale, cap, cap_scale, temperature_ptr, token, L)
            # With a gradient the row is read twice: it stays in the cache because what is written leaves it first. Held
            # by "evict_last", the rows of dropped tokens, which nobody reads again, would fill the cache.
            POLICY: tl.constexpr = "evict_first" if out_ptr is None else ""
            state = row_state(lanes_ptr, start, row, V, label.error, scaling, False, POLICY, L)
            label_value, _ = load_label(start, label.column, label.inside, scaling, L)
            lp = row_logprob(state, label_value, scaling.scale)
            h = row_entropy(state)
            lp_full, cut = lp, h != h
            if over_support_ptr is not None:
                over_support = tl.load(over_support_ptr + token)
                # NaN: no distribution over the support, and then the row has none.
                row_max = tl.where(over_support == over_support, state.row_max, over_support)
                state = RowState(row_max, state.sum_rest, state.weighted_sum)
                h = tl.where(over_support == over_support, h, over_support)
                lp_full = tl.where(over_support == over_support, lp, over_support)
                cut = (over_support < float("inf")) & (h == h)
                lp = tl.where(cut, over_support, lp_full)

            known = table_ptr + token * COLUMNS
            lp_old, h_old, lp_ref, w_policy, w_entropy, w_logprob = lp, h, lp, zero + 1.0, zero, zero
            if OFF_POLICY:
                lp_old = tl.load(known + OLD_LOGPROB)
            if GATE != GATE_NONE:
                h_old = tl.load(known + OLD_ENTROPY)
            if KL != KL_NONE:
                lp_ref = tl.load(known + REF_LOGPROB)
            if CORRECTED:
                w_policy = tl.load(known + POLICY_WEIGHT)
            if ENTROPY:
                w_entropy = tl.load(known + ENTROPY_WEIGHT)
            if NLL:
                w_logprob = tl.load(known + LOGPROB_WEIGHT)
            weight, advantage = tl.load(known), tl.load(known + 1)
            # What a cut token's terms over the full vocabulary weigh is taken out of the others.
            c_kl, c_kl_full, w_logprob_full = real(kl_coef, L), zero, zero
            if KL_OVER_FULL:
                c_kl, c_kl_full = tl.where(cut, zero, c_kl), tl.where(cut, c_kl, zero)
            if NLL_OVER_FULL:
                w_logprob, w_logprob_full = tl.where(cut, zero, w_logprob), tl.where(cut, w_logprob, zero)
            inputs = TokenInputs(weight, advantage, lp_old, h_old, lp_ref, w_policy, w_entropy, w_logprob)
            params = LossParams(
                real(p0, L), real(p1, L), real(p2, L), real(p3, L), real(beta_low, L), real(beta_high, L),
                real(gate_eps, L), c_kl, real(kl_clamp, L),
            )  # fmt: skip
            value, g_logprob, flag = token_loss(RULE, KL, GATE, params, inputs, lp, h)
            g_dense = g_logprob
            if over_support_ptr is not None:
                g_full = w_logprob_full
                if KL_OVER_FULL:
                    estimate, d_estimate = kl_estimate(KL, params.kl_clamp, lp_full, lp_ref)
                    factor, d_factor = zero + 1.0, zero
                    if KL >= IMPORTANCE_WEIGHTED:
                        factor, d_factor = importance_ratio(lp, lp_old)
                    value = tl.where(cut, value + scaled_logprob(c_kl_full, estimate * factor), value)
                    more = weight * scaled_logprob(c_kl_full, estimate * d_factor)
                    g_logprob = tl.where(cut, g_logprob + more, g_logprob)
                    g_full += weight * scaled_logprob(c_kl_full, d_estimate * factor)
                g_dense = tl.where(cut, g_full, g_logprob)
            share = weight * value + scaled_logprob(w_logprob, lp)
            if NLL_OVER_FULL:
                share = tl.where(cut, share + scaled_logprob(w_logprob_full, lp_full), share)
            if ENTROPY:
                share += tl.where(w_entropy == 0.0, 0.0, w_entropy * h)
            tl.store(loss_ptr + token, share)
            tl.store(token_loss_ptr + token, value)
            tl.store(logprob_ptr + token, lp)
            tl.store(entropy_ptr + token, h)
            tl.store(flags_ptr + token, flag)
            if saved_ptr is not None:
                tl.store(saved_ptr + token, state.row_max)
                tl.store(saved_ptr + N + token, state.sum_rest)
                tl.store(saved_ptr + 2 * N + token, state.weighted_sum)
                tl.store(grad_logprob_ptr + token, g_dense)
                if ENTROPY:
                    tl.store(grad_entropy_ptr + token, w_entropy)
            if over_support_ptr is not None:
                tl.store(logprob_full_ptr + token, lp_full)
                tl.store(grad_over_support_ptr + token, g_logprob)
            if out_ptr is not None:
                target = row_pointer(out_ptr, row, inner, out_stride_outer, out_stride_inner, L)
                if (g_dense == 0.0) & (w_entropy == 0.0):
                    write_zeros(target, 0, V, L)  # a dropped or clipped token: no second read
                else:
                    grads = StatGrads(g_dense, w_entropy, zero)
                    write_gradient(start, target, 0, V, V, label, state, grads, scaling, ENTROPY, L)


def _launch_rows(
    call: RowInputs, table: Tensor, per_token: tuple[Tensor, ...], flags: Tensor, over_support: Tensor | None,
    target: Rows | None,
) -> None:  # fmt: skip
    """`per_token`: where the share of the loss, the token loss, the log-prob and the entropy go, `[N]` each, and with
    `over_support` the log-prob over the full vocabulary."""
    source, count = call.rows, len(flags)
    layout = call.layout(*(() if target is None else (target,)))
    numbers = call.params.tolist()
    lanes = shared_lanes(call, layout)
    present, has_entropy_term = int(numbers[Param.PRESENT]), numbers[Param.ENTROPY_COEF] != 0
    shared_gradient = lanes is not None and target is not None
    saved = grad_logprob = grad_entropy = logprob = logprob_full = grad_over_support = None
    outputs = per_token[:4]
    if over_support is not None:
        logprob, saved, logprob_full = over_support[0], over_support[1:4], per_token[4]
        grad_over_support, grad_logprob, grad_entropy = over_support[4:].unbind()
    elif shared_gradient:
        kept = per_token[0].new_empty((5, count))
        saved, grad_logprob, grad_entropy = kept[:3], kept[3], kept[4]
    out = None if shared_gradient else target
    device = tuning.device_of(source.data)
    resident = tuning.resident_programs(device.architecture, source.data.dtype, layout)
    programs = tuning.programs_for_loss(device, source.row_bytes(), source.count, resident)
    launch(
        policy_loss_kernel, programs, source.data, *call.pointers(), lanes, table, None if out is None else out.data,
        *outputs, flags, saved, grad_logprob, grad_entropy, logprob, logprob_full, grad_over_support, *call.numbers(),
        *((0, 0) if out is None else out.strides()), count, source.count, programs, *read_scaling(call.params),
        *numbers[Param.RULE : Param.RULE_ID], RULE=int(numbers[Param.RULE_ID]), KL=int(numbers[Param.KL_ID]),
        GATE=int(numbers[Param.GATE_ID]), OFF_POLICY=bool(present & Present.OLD_LOGPROB),
        CORRECTED=bool(present & Present.POLICY_WEIGHT), ENTROPY=has_entropy_term,
        NLL=numbers[Param.NLL_COEF] != 0, KL_OVER_FULL=logprob is not None and bool(present & Present.KL_OVER_FULL),
        NLL_OVER_FULL=logprob is not None and bool(present & Present.NLL_OVER_FULL), L=layout,
    )  # fmt: skip
    if shared_gradient:
        assert target is not None and saved is not None
        launch_backward(call, target, saved, grad_logprob, grad_entropy if has_entropy_term else None, None)


def loss_rows_(*inputs_and_outputs: Any) -> None:
    """The fused loss of some tokens; see `erc.ops`."""
    *inputs, table, per_token, flags, over_support, grad_logits = inputs_and_outputs
    call = row_inputs(*inputs)
    target = None if grad_logits is None else gradient_rows(call.rows, grad_logits)
    _launch_rows(call, table, per_token.unbind(), flags, over_support, target)


def _policy_loss(logits: Tensor, target: Tensor | None, temperature: Tensor | None, *tokens: Any) -> tuple[Tensor, ...]:
    *given, token_ids, offsets, per_row = tokens
    *_, params, ignore_index = given
    given += [logits.shape[-1], logits.dtype == torch.float64]
    table, labels, counter = token_table(*given)
    call = row_inputs(logits, labels, temperature, params, ignore_index)
    shares, per_token = call.rows.per_token(), call.rows.per_token(3 if token_ids is None else 4)
    flags = shares.new_empty(call.rows.count, dtype=torch.int32)
    over_support = None
    if token_ids is not None:
        over_support, state = call.rows.per_token(7), call.rows.per_token(3)
        values, dense_labels = shares.new_empty(token_ids.shape), torch.empty_like(labels)
        support_forward_(
            logits, labels, temperature, params, ignore_index, None, 0, 0, logits.shape[-1], token_ids, offsets, False,
            values, None, None, None, None, over_support[0], state, dense_labels,
        )  # fmt: skip
    rows = None if target is None else rows_of(target)
    _launch_rows(call, table, (shares, *per_token.unbind()), flags, over_support, rows)
    if over_support is not None and target is not None:
        grad_over_support, grad_logprob, grad_entropy = over_support[4:]
        support_backward_(
            labels, temperature, params, None, 0, 0, token_ids, offsets, values, over_support[1:4], per_token[3], state,
            dense_labels, grad_over_support, grad_logprob, grad_entropy if params[Param.ENTROPY_COEF] else None, None,
            target,
        )  # fmt: skip
    statistics = (shares, per_token[1], per_token[2], None if token_ids is None else per_token[3])
    total, metrics, count = summary(statistics, flags, table, labels, counter, params, ignore_index)
    return shares if per_row else total, per_token, flags, metrics, count


def policy_loss(logits: Tensor, temperature: Tensor | None, *tokens: Any) -> tuple[Tensor, ...]:
    """Table, rows and summary; see `erc.ops`."""
    *given, need_grad = tokens
    grad = torch.empty(logits.shape if need_grad else (0, 0, 0), dtype=logits.dtype, device=logits.device)
    return (*_policy_loss(logits, grad if need_grad else None, temperature, *given), grad)


def policy_loss_(logits: Tensor, temperature: Tensor | None, *tokens: Any) -> tuple[Tensor, ...]:
    """As `policy_loss`, with the gradient written over the logits."""
    *given, _ = tokens
    return (*_policy_loss(logits, logits, temperature, *given), logits.new_empty((0, 0, 0)))
