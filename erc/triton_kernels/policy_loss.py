"""The fused token loss: statistics sweep, per-token loss and gradient sweep of a row in one program.

The second sweep finds the row in the L2 cache (the first one marks it evict_last, the second evict_first), so forward
and backward together cost one DRAM read and one DRAM write. With fewer rows than programs the segments of a row are
swept and differentiated by programs of their own (`launch.shared_lanes`, `stats_backward_kernel`); the bits are the
same.
"""

import torch
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch, shared_lanes
from .params import LOSS, Rows, kernel, layout_of, read_scaling, rows_of, stats_dtype
from .row_algebra import (
    label_column,
    load_label,
    real,
    row_entropy,
    row_logprob,
    row_pointer,
    row_state,
    write_gradient,
    write_zeros,
)
from .stats import launch_backward
from .token_loss import scaled_logprob, token_loss


@kernel
def policy_loss_kernel(
    logits, out, labels, temperature, lanes,
    weight, advantages, old_logprob, old_entropy, ref_logprob, policy_weight, entropy_weight, logprob_weight,
    loss, token_value, logprob, entropy, flags, saved, grad_logprob, grad_entropy,
    N: tl.int64, programs: tl.int64, V: tl.int32, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    out_stride_outer: tl.int64, out_stride_inner: tl.int64, ignore_index: tl.int64, scale: tl.float64, cap: tl.float64,
    cap_scale: tl.float64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, beta_low: tl.float64, beta_high: tl.float64,
    gate_eps: tl.float64,
    kl_coef: tl.float64, kl_clamp: tl.float64, RULE: tl.constexpr, KL: tl.constexpr, GATE: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """A program works through every `programs`-th row. `out` None: no gradient here; `saved` given: what a later
    `stats_backward_kernel` needs of a shared row. A per-token input that is absent is no argument."""
    first_row = tl.program_id(0).to(tl.int64)
    for turn in range(tl.cdiv(N - first_row, programs)):
        row = first_row + turn * programs
        label = tl.load(labels + row)
        column, inside = label_column(label, V)
        zero = real(0.0, L)
        if label == ignore_index:
            tl.store(loss + row, zero)
            tl.store(token_value + row, zero)
            tl.store(logprob + row, zero)
            tl.store(entropy + row, zero)
            tl.store(flags + row, 0)
            if out is not None:
                write_zeros(row_pointer(out, row, inner, out_stride_outer, out_stride_inner, L), 0, V, L)
        else:
            start = row_pointer(logits, row, inner, stride_outer, stride_inner, L)
            POLICY: tl.constexpr = "evict_first" if out is None else "evict_last"
            row_max, rest, weighted, s = row_state(
                lanes, start, row, V, inside == 0, temperature, scale, cap, cap_scale, False, POLICY, L
            )
            label_value, _ = load_label(start, column, inside, cap, cap_scale, L)
            lp = row_logprob(row_max, rest, label_value, s)
            h = row_entropy(rest, weighted)

            lp_old, h_old, lp_ref, w_policy, w_entropy, w_logprob = lp, h, lp, zero + 1.0, zero, zero
            if old_logprob is not None:
                lp_old = tl.load(old_logprob + row)
            if old_entropy is not None:
                h_old = tl.load(old_entropy + row)
            if ref_logprob is not None:
                lp_ref = tl.load(ref_logprob + row)
            if policy_weight is not None:
                w_policy = tl.load(policy_weight + row)
            if entropy_weight is not None:
                w_entropy = tl.load(entropy_weight + row)
            if logprob_weight is not None:
                w_logprob = tl.load(logprob_weight + row)
            w = tl.load(weight + row)
            value, g_logprob, flag = token_loss(
                RULE, KL, GATE, real(p0, L), real(p1, L), real(p2, L), real(p3, L), real(beta_low, L), real(beta_high,
                L),
                real(gate_eps, L), real(kl_coef, L), real(kl_clamp, L),
                lp, h, w, tl.load(advantages + row), lp_old, h_old, lp_ref, w_policy, w_logprob,
            )  # fmt: skip
            share = w * value + scaled_logprob(w_logprob, lp)
            if entropy_weight is not None:
                share += tl.where(w_entropy == 0.0, 0.0, w_entropy * h)
            tl.store(loss + row, share)
            tl.store(token_value + row, value)
            tl.store(logprob + row, lp)
            tl.store(entropy + row, h)
            tl.store(flags + row, flag)
            if saved is not None:
                tl.store(saved + row, row_max)
                tl.store(saved + N + row, rest)
                tl.store(saved + 2 * N + row, weighted)
                tl.store(grad_logprob + row, g_logprob)
                if entropy_weight is not None:
                    tl.store(grad_entropy + row, w_entropy)
            if out is not None:
                target = row_pointer(out, row, inner, out_stride_outer, out_stride_inner, L)
                if (g_logprob == 0.0) & (w_entropy == 0.0):
                    write_zeros(target, 0, V, L)  # a dropped or clipped token: no second read
                else:
                    write_gradient(
                        start, target, 0, V, V, column, inside, row_max, rest, weighted, g_logprob, w_entropy, zero,
                        row, temperature, scale, cap, cap_scale, entropy_weight is not None, L,
                    )  # fmt: skip


def _policy_loss(
    source: Rows, target: Rows | None, labels: Tensor, temperature: Tensor | None, params: Tensor, ignore_index: int,
    weight: Tensor, advantages: Tensor, old_logprob: Tensor | None, old_entropy: Tensor | None,
    ref_logprob: Tensor | None, policy_weight: Tensor | None, entropy_weight: Tensor | None,
    logprob_weight: Tensor | None, rule: int, kl: int, gate: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = layout_of(params, temperature, *((source,) if target is None else (source, target)))
    scaling = read_scaling(params)
    device = tuning.device_of(source.data)
    lanes = shared_lanes(source, labels, temperature, scaling, ignore_index, layout)
    dtype = stats_dtype(source.data.dtype)

    def per_row(*leading: int) -> Tensor:
        return torch.empty((*leading, source.count), dtype=dtype, device=source.data.device)

    outputs = (*(per_row() for _ in range(4)), torch.empty(source.count, dtype=torch.int32, device=source.data.device))
    shared_gradient = lanes is not None and target is not None
    saved = grad_logprob = grad_entropy = None
    if shared_gradient:
        saved, grad_logprob = per_row(3), per_row()
        grad_entropy = None if entropy_weight is None else per_row()
    out = None if shared_gradient or target is None else target
    programs = tuning.programs_for_loss(device, source.row_bytes(), source.count)
    launch(
        policy_loss_kernel, programs, source.data, source.data, None if out is None else out.data, labels, temperature,
        lanes, weight, advantages, old_logprob, old_entropy, ref_logprob, policy_weight, entropy_weight, logprob_weight,
        *outputs, saved, grad_logprob, grad_entropy, source.count, programs, source.V, *source.address(),
        *((0, 0) if out is None else (out.stride_outer, out.stride_inner)), ignore_index, *scaling,
        *params[LOSS].tolist(), RULE=rule, KL=kl, GATE=gate, L=layout,
    )  # fmt: skip
    if shared_gradient:
        launch_backward(
            source, target, labels, temperature, params, ignore_index, saved, grad_logprob, grad_entropy, None
        )
    return outputs


def policy_loss(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, token_loss, logprob, entropy, flags) [N] and grad_logits, contiguous; [0, 0, 0] unless `need_grad`."""
    *inputs, need_grad = args
    grad = torch.empty(logits.shape if need_grad else (0, 0, 0), dtype=logits.dtype, device=logits.device)
    return (*_policy_loss(rows_of(logits), rows_of(grad) if need_grad else None, *inputs), grad)


def policy_loss_(logits: Tensor, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `policy_loss`, with the gradient written over the logits."""
    rows = rows_of(logits)
    return _policy_loss(rows, rows, *inputs)
