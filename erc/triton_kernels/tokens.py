"""What is done per token and not per logit: the token table and the summary of a batch. The definitions to read first
are `erc/surrogate/token_table.py` and `erc/surrogate/metrics.py`.

Sums are taken in float64 over groups of tokens (the sequences, or runs of `COUNT_RUN`) and over runs of `RUN` tokens,
and those sums in their order, so the batch alone decides their bits. Nothing waits for another program: a table's
programs each add up the few group sums for themselves, and of a summary's programs the last one to finish adds up what
all left.
"""

# ruff: noqa: SIM109 (Triton has no `in`)

import torch
import triton
import triton.language as tl
from torch import Tensor

from erc.constants import COUNT_RUN, Column, Metric, Param, Present, Reduction, TokenFlag
from erc.surrogate.reductions import SEQUENCE_REDUCTIONS

from .elementary import expm1
from .launch import launch_tokens
from .params import kernel
from .token_loss import (
    CLIP_HIGH,
    CLIP_LOW,
    ERC_DROPPED,
    ERC_HIGH,
    ERC_LOW,
    IMPORTANCE_WEIGHTED,
    KL_NONE,
    MAX_LOG_RATIO,
    LossParams,
    TokenInputs,
    clamp,
    importance_ratio,
    kl_estimate,
    kl_penalty,
    log_difference,
    ratio_term,
    scaled_logprob,
    token_loss_of,
)

BLOCK = 256  # tokens of a program of the table
RUN = 1024  # tokens of a program of the summary

COLUMNS = tl.constexpr(len(Column))
POLICY_WEIGHT = tl.constexpr(int(Column.POLICY_WEIGHT))
TOKEN_MEAN = tl.constexpr(int(Reduction.TOKEN_MEAN))
TOKEN_SUM = tl.constexpr(int(Reduction.TOKEN_SUM))
SEQ_MEAN_TOKEN_MEAN = tl.constexpr(int(Reduction.SEQ_MEAN_TOKEN_MEAN))
SEQ_MEAN_TOKEN_SUM_NORM = tl.constexpr(int(Reduction.SEQ_MEAN_TOKEN_SUM_NORM))
NO_REDUCTION = tl.constexpr(int(Reduction.NONE))

FILTERED = tl.constexpr(int(TokenFlag.FILTERED))

# What a run leaves: a sum at the position of each metric that is a mean, then extremes and the number of tokens.
METRICS = tl.constexpr(len(Metric))
LOSS = tl.constexpr(int(Metric.LOSS))
ENTROPY = tl.constexpr(int(Metric.ENTROPY))
OLD_ENTROPY = tl.constexpr(int(Metric.OLD_ENTROPY))
ENTROPY_RATIO = tl.constexpr(int(Metric.ENTROPY_RATIO))
APPROX_KL = tl.constexpr(int(Metric.APPROX_KL))
KL_TO_REFERENCE = tl.constexpr(int(Metric.KL))
ENTROPY_RATIO_MIN = tl.constexpr(int(Metric.ENTROPY_RATIO_MIN))
ENTROPY_RATIO_MAX = tl.constexpr(int(Metric.ENTROPY_RATIO_MAX))
RATIO_MAX = tl.constexpr(int(Metric.RATIO_MAX))
NAN_INPUTS = tl.constexpr(int(Metric.NAN_INPUTS))
KEPT_MASS = tl.constexpr(int(Metric.KEPT_MASS))
TOKENS = tl.constexpr(len(Metric))
PARTIALS = tl.constexpr(len(Metric) + 1)


# ---- the table -------------------------------------------------------------------------------------------------------


@triton.jit
def _mask_of(labels_ptr, mask_ptr, token, inside, ignore_index, REAL: tl.constexpr):
    """The weight that the caller gave a token, 0 where its label says that it is not read."""
    label = tl.load(labels_ptr + token, mask=inside, other=0).to(tl.int64)
    mask = tl.zeros_like(label).to(REAL) + 1.0
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + token, mask=inside, other=0).to(REAL)
    return label, tl.where(inside & (label != ignore_index), mask, 0.0)


@kernel
def count_kernel(
    labels_ptr, mask_ptr, nll_mask_ptr, offsets_ptr, sums_ptr, N: tl.int64, length: tl.int64, ignore_index: tl.int64,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a group; `sums_ptr` [groups, 2]: the mask's sum, and that of the tokens which the NLL covers."""
    group = tl.program_id(0).to(tl.int64)
    if offsets_ptr is not None:
        begin = tl.load(offsets_ptr + group).to(tl.int64)
        end = tl.load(offsets_ptr + group + 1).to(tl.int64)
    else:
        begin = group * length
        end = tl.minimum(begin + length, N)
    masks, covered = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < end
        _, mask = _mask_of(labels_ptr, mask_ptr, token, inside, ignore_index, REAL)
        masks += mask.to(tl.float64)
        if nll_mask_ptr is not None:
            nll = tl.load(nll_mask_ptr + token, mask=inside, other=0).to(REAL)
            covered += tl.where(mask == 0.0, 0.0, mask * nll).to(tl.float64)
    tl.store(sums_ptr + 2 * group, tl.sum(masks, 0))
    tl.store(sums_ptr + 2 * group + 1, tl.sum(covered, 0))


@triton.jit
def _totals(sums_ptr, groups, BLOCK: tl.constexpr):
    """(sum of the masks, of those that the NLL covers, number of groups with an active token)."""
    masks, covered, active = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(0, groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        mask = tl.load(sums_ptr + 2 * group, mask=group < groups, other=0.0)
        masks += mask
        covered += tl.load(sums_ptr + 2 * group + 1, mask=group < groups, other=0.0)
        active += tl.where(mask != 0.0, 1.0, 0.0)
    return tl.sum(masks, 0), tl.sum(covered, 0), tl.sum(active, 0)


@triton.jit
def _quotient(a, b):
    """a / b, rounded to nearest as on a CPU: float64 always is, float32 by an operation that float64 has not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _over(weight, number, tensor_ptr, count, COUNTED: tl.constexpr):
    """weight / normalizer: a tensor, what was counted, or a number. Rounded to nearest, as on a CPU."""
    if tensor_ptr is not None:
        divisor = tl.load(tensor_ptr).to(weight.dtype)
    elif COUNTED:
        divisor = tl.where(count == 0.0, 1.0, count).to(weight.dtype)
    else:
        divisor = tl.full((), number, weight.dtype)
    return tl.where(weight == 0.0, 0.0, _quotient(weight, divisor + tl.zeros_like(weight)))


@triton.jit
def _column(pointer, token, inside, otherwise: tl.constexpr, REAL: tl.constexpr):
    if pointer is not None:
        return tl.load(pointer + token, mask=inside, other=0).to(REAL)
    else:
        return tl.zeros_like(token).to(REAL) + otherwise


@triton.jit
def _packed_sequence(offsets_ptr, token, sequences, steps):
    """The packed sequence that holds a token: the last one that begins at or before it."""
    low, high = token * 0, token * 0 + sequences
    for _ in range(steps):
        middle = low + (high - low) // 2
        before = tl.load(offsets_ptr + middle).to(tl.int64) <= token
        unfinished = high - low > 1
        low = tl.where(unfinished & before, middle, low)
        high = tl.where(unfinished & (before == 0), middle, high)
    return low


@kernel
def table_kernel(
    labels_ptr, advantages_ptr, mask_ptr, old_logprob_ptr, old_entropy_ptr, ref_logprob_ptr, policy_weight_ptr,
    nll_mask_ptr, offsets_ptr, normalizer_ptr, entropy_normalizer_ptr, nll_normalizer_ptr, grad_scale_ptr,
    sums_ptr, table_ptr, final_labels_ptr, counter_ptr,
    N: tl.int64, groups: tl.int64, sequences: tl.int64, steps: tl.int32, length: tl.int64, advantage_length: tl.int64,
    ignore_index: tl.int64, max_length: tl.float64, entropy_coef: tl.float64, nll_coef: tl.float64,
    normalizer: tl.float64, entropy_normalizer: tl.float64, nll_normalizer: tl.float64, grad_scale: tl.float64,
    REDUCTION: tl.constexpr, ENTROPY_TERM: tl.constexpr, SHARES: tl.constexpr, NLL_TERM: tl.constexpr,
    PACKED_ADVANTAGES: tl.constexpr, COUNTED: tl.constexpr, ENTROPY_COUNTED: tl.constexpr, NLL_COUNTED: tl.constexpr,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK tokens."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < N
    label, mask = _mask_of(labels_ptr, mask_ptr, token, inside, ignore_index, REAL)
    tokens, covered_tokens, active_groups = (
        tl.full((), 0.0, tl.float64),
        tl.full((), 0.0, tl.float64),
        tl.full((), 0.0, tl.float64),
    )
    if sums_ptr is not None:
        tokens, covered_tokens, active_groups = _totals(sums_ptr, groups, BLOCK)

    sequence = token * 0
    if offsets_ptr is not None:
        if PACKED_ADVANTAGES or REDUCTION == SEQ_MEAN_TOKEN_MEAN:
            sequence = _packed_sequence(offsets_ptr, token, sequences, steps)
    elif REDUCTION == SEQ_MEAN_TOKEN_MEAN:
        sequence = token // length
    owner = sequence if PACKED_ADVANTAGES else token // advantage_length
    advantage = tl.load(advantages_ptr + owner, mask=inside, other=0).to(REAL)

    weight = mask
    if REDUCTION == SEQ_MEAN_TOKEN_MEAN:
        count = tl.load(sums_ptr + 2 * sequence, mask=inside, other=0.0).to(REAL)
        weight = _quotient(weight, tl.where(count == 0.0, 1.0, count))
    elif REDUCTION == SEQ_MEAN_TOKEN_SUM_NORM:
        weight = _quotient(weight, tl.zeros_like(weight) + tl.full((), max_length, REAL))
    if REDUCTION == TOKEN_MEAN:
        weight = _over(weight, normalizer, normalizer_ptr, tokens, COUNTED)
    elif REDUCTION == TOKEN_SUM or REDUCTION == NO_REDUCTION:
        weight = _over(weight, normalizer, normalizer_ptr, tokens * 0.0 + 1.0, COUNTED)
    else:
        weight = _over(weight, normalizer, normalizer_ptr, active_groups, COUNTED)
    scale = tl.full((), grad_scale, REAL)
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(REAL)
    entropy_weight = tl.zeros_like(weight)
    if ENTROPY_TERM:
        share = weight
        if not SHARES:
            share = _over(mask, entropy_normalizer, entropy_normalizer_ptr, tokens, ENTROPY_COUNTED)
        entropy_weight = -tl.full((), entropy_coef, REAL) * share * scale
    logprob_weight = tl.zeros_like(weight)
    if NLL_TERM:
        covered = tl.where(mask == 0.0, 0.0, mask * _column(nll_mask_ptr, token, inside, 0.0, REAL))
        share = _over(covered, nll_normalizer, nll_normalizer_ptr, covered_tokens, NLL_COUNTED)
        logprob_weight = -tl.full((), nll_coef, REAL) * share * scale
    old_logprob = _column(old_logprob_ptr, token, inside, 0.0, REAL)
    old_entropy = _column(old_entropy_ptr, token, inside, 0.0, REAL)
    ref_logprob = _column(ref_logprob_ptr, token, inside, 0.0, REAL)
    policy_weight = _column(policy_weight_ptr, token, inside, 1.0, REAL)
    # A NaN input makes its token's loss and gradient NaN, also where a clip or the gate would hide it.
    broken = (advantage != advantage) | (old_logprob != old_logprob) | (ref_logprob != ref_logprob)
    broken = broken | (policy_weight != policy_weight)
    weight = tl.where(broken, float("nan"), weight * scale)
    active = mask != 0.0
    values = (
        weight, advantage, old_logprob, old_entropy, ref_logprob, policy_weight, entropy_weight, logprob_weight
    )  # fmt: skip
    for i in tl.static_range(COLUMNS):
        unread = 1.0 if i == POLICY_WEIGHT else 0.0
        tl.store(table_ptr + token * COLUMNS + i, tl.where(active, values[i], unread), mask=inside)
    tl.store(final_labels_ptr + token, tl.where(active, label, ignore_index), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(counter_ptr, 0)


def token_table(
    labels: Tensor, advantages: Tensor, mask: Tensor | None, old_logprob: Tensor | None, old_entropy: Tensor | None,
    ref_logprob: Tensor | None, policy_weight: Tensor | None, nll_mask: Tensor | None, cu_seqlens: Tensor | None,
    normalizer: Tensor | None, entropy_normalizer: Tensor | None, nll_normalizer: Tensor | None,
    grad_scale: Tensor | None, params: Tensor, ignore_index: int, vocab_size: int, wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Table `[N, 8]`, labels `[N]` and the summary's counter; see `erc.ops`."""
    count, device, numbers = labels.numel(), labels.device, params.tolist()
    table = torch.empty((count, len(Column)), dtype=torch.float64 if wide else torch.float32, device=device)
    final_labels = torch.empty(count, dtype=torch.int64, device=device)
    counter = torch.empty(1, dtype=torch.int32, device=device)
    real = tl.float64 if wide else tl.float32
    reduction = Reduction(int(numbers[Param.REDUCTION]))
    length, sequences = int(numbers[Param.SEQUENCE_LENGTH]), 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    by_sequence = reduction in SEQUENCE_REDUCTIONS
    if not by_sequence:
        groups, group_length = triton.cdiv(count, COUNT_RUN), COUNT_RUN
    else:
        groups, group_length = (sequences, 1) if cu_seqlens is not None else (count // max(length, 1), length)
    entropy_term, nll_term = numbers[Param.ENTROPY_COEF] != 0, numbers[Param.NLL_COEF] != 0
    shares = numbers[Param.ENTROPY_SHARES] != 0
    counted, entropy_counted, nll_counted = (
        numbers[position] < 0 and tensor is None
        for position, tensor in (
            (Param.NORMALIZER, normalizer), (Param.ENTROPY_NORMALIZER, entropy_normalizer),
            (Param.NLL_NORMALIZER, nll_normalizer),
        )
    )  # fmt: skip
    counts = (
        reduction == Reduction.SEQ_MEAN_TOKEN_MEAN
        or (counted and (by_sequence or reduction == Reduction.TOKEN_MEAN))
        or (entropy_term and not shares and entropy_counted)
        or (nll_term and nll_counted)
    )
    sums = None
    if counts:
        sums = torch.empty((groups, 2), dtype=torch.float64, device=device)
        offsets = cu_seqlens if by_sequence else None
        launch_tokens(
            count_kernel, groups, labels, labels, mask, nll_mask if nll_term else None, offsets, sums, count,
            group_length, ignore_index, REAL=real, BLOCK=BLOCK,
        )  # fmt: skip
    advantage_length = int(numbers[Param.ADVANTAGE_LENGTH])
    launch_tokens(
        table_kernel, max(1, triton.cdiv(count, BLOCK)), labels, labels, advantages, mask, old_logprob, old_entropy,
        ref_logprob, policy_weight, nll_mask if nll_term else None, cu_seqlens, normalizer, entropy_normalizer,
        nll_normalizer, grad_scale, sums, table, final_labels, counter, count, groups, sequences,
        sequences.bit_length(), max(length, 1), max(advantage_length, 1), ignore_index, numbers[Param.MAX_LENGTH],
        numbers[Param.ENTROPY_COEF], numbers[Param.NLL_COEF], numbers[Param.NORMALIZER],
        numbers[Param.ENTROPY_NORMALIZER], numbers[Param.NLL_NORMALIZER], numbers[Param.GRAD_SCALE],
        REDUCTION=int(reduction), ENTROPY_TERM=entropy_term, SHARES=shares, NLL_TERM=nll_term,
        PACKED_ADVANTAGES=advantage_length == 0, COUNTED=counted, ENTROPY_COUNTED=entropy_counted,
        NLL_COUNTED=nll_counted, REAL=real, BLOCK=BLOCK,
    )  # fmt: skip
    return table, final_labels, counter


# ---- losses of tokens whose statistics exist -------------------------------------------------------------------------


@triton.jit
def _flag(pointer, token, inside, bit: tl.constexpr):
    if pointer is not None:
        return tl.where(tl.load(pointer + token, mask=inside, other=0) != 0, bit, 0)
    else:
        return tl.where(inside, 0, 0)


@kernel
def losses_kernel(
    logprob_ptr, entropy_ptr, table_ptr, labels_ptr, policy_ptr, d_policy_ptr, clip_low_ptr, clip_high_ptr,
    filtered_ptr, per_token_ptr, derivatives_ptr, flags_ptr, N: tl.int64, ignore_index: tl.int64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64, beta_low: tl.float64, beta_high: tl.float64,
    gate_eps: tl.float64, kl_coef: tl.float64, kl_clamp: tl.float64, RULE: tl.constexpr, KL: tl.constexpr,
    GATE: tl.constexpr, OFF_POLICY: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK tokens, in float64 and rounded once."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = token < N
    active = inside & (tl.load(labels_ptr + token, mask=inside, other=0) != ignore_index)
    logprob = tl.load(logprob_ptr + token, mask=active, other=0.0).to(tl.float64)
    entropy = tl.load(entropy_ptr + token, mask=active, other=0.0).to(tl.float64)
    known = table_ptr + token * COLUMNS
    weight = tl.load(known, mask=active, other=0.0).to(tl.float64)
    advantage = tl.load(known + 1, mask=active, other=0.0).to(tl.float64)
    old_logprob = logprob
    if OFF_POLICY:
        old_logprob = tl.load(known + 2, mask=active, other=0.0).to(tl.float64)
    old_entropy = tl.load(known + 3, mask=active, other=0.0).to(tl.float64)
    ref_logprob = tl.load(known + 4, mask=active, other=0.0).to(tl.float64)
    policy_weight = tl.load(known + 5, mask=active, other=1.0).to(tl.float64)
    entropy_weight = tl.load(known + 6, mask=active, other=0.0).to(tl.float64)
    logprob_weight = tl.load(known + 7, mask=active, other=0.0).to(tl.float64)
    inputs = TokenInputs(
        weight, advantage, old_logprob, old_entropy, ref_logprob, policy_weight, entropy_weight, logprob_weight
    )  # fmt: skip
    params = LossParams(p0, p1, p2, p3, beta_low, beta_high, gate_eps, kl_coef, kl_clamp)
    if policy_ptr is not None:
        value = tl.load(policy_ptr + token, mask=active, other=0.0).to(tl.float64)
        d_policy = tl.load(d_policy_ptr + token, mask=active, other=0.0).to(tl.float64)
        flags = _flag(clip_low_ptr, token, inside, CLIP_LOW) | _flag(clip_high_ptr, token, inside, CLIP_HIGH)
    else:
        value, d_policy, flags = ratio_term(RULE, params, logprob, old_logprob, advantage)
    filtered = _flag(filtered_ptr, token, inside, FILTERED)
    value, d_policy = tl.where(filtered != 0, 0.0, value), tl.where(filtered != 0, 0.0, d_policy)
    value, d_logprob, flags = token_loss_of(
        KL, GATE, params, inputs, value, d_policy, flags | filtered, logprob, entropy
    )
    share = weight * value + scaled_logprob(logprob_weight, logprob)
    share += tl.where(entropy_weight == 0.0, 0.0, entropy_weight * entropy)
    out = per_token_ptr + token
    tl.store(out, tl.where(active, share, 0.0).to(REAL), mask=inside)
    tl.store(out + N, tl.where(active, value, 0.0).to(REAL), mask=inside)
    tl.store(out + 2 * N, logprob.to(REAL), mask=inside)
    tl.store(out + 3 * N, entropy.to(REAL), mask=inside)
    tl.store(derivatives_ptr + token, tl.where(active, d_logprob, 0.0).to(REAL), mask=inside)
    tl.store(derivatives_ptr + N + token, tl.where(active, entropy_weight, 0.0).to(REAL), mask=inside)
    tl.store(flags_ptr + token, tl.where(active, flags, 0), mask=inside)


def token_losses(
    logprob: Tensor, entropy: Tensor, table: Tensor, labels: Tensor, params: Tensor, ignore_index: int,
    policy: Tensor | None, d_policy: Tensor | None, clip_low: Tensor | None, clip_high: Tensor | None,
    filtered: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(per_token [4, N], derivatives [2, N], flags [N]); see `erc.ops`."""
    count, numbers = len(labels), params.tolist()
    per_token, derivatives = table.new_empty((4, count)), table.new_empty((2, count))
    flags = table.new_empty(count, dtype=torch.int32)
    launch_tokens(
        losses_kernel, triton.cdiv(count, BLOCK), table, logprob, entropy, table, labels, policy, d_policy, clip_low,
        clip_high, filtered, per_token, derivatives, flags, count, ignore_index, *numbers[Param.RULE : Param.RULE_ID],
        RULE=int(numbers[Param.RULE_ID]), KL=int(numbers[Param.KL_ID]), GATE=int(numbers[Param.GATE_ID]),
        OFF_POLICY=bool(int(numbers[Param.PRESENT]) & Present.OLD_LOGPROB),
        REAL=tl.float64 if table.dtype == torch.float64 else tl.float32, BLOCK=BLOCK,
    )  # fmt: skip
    return per_token, derivatives, flags


# ---- the summary -----------------------------------------------------------------------------------------------------


@triton.jit
def _put(partials_ptr, position: tl.constexpr, values, active):
    """A run's sum of `values` over its active tokens."""
    tl.store(partials_ptr + position, tl.sum(tl.where(active, values.to(tl.float64), 0.0), 0))


@triton.jit
def _larger(a, b):
    """NaN wins, as in torch.max."""
    return tl.where((a != a) | (a > b), a, b)


@triton.jit
def _smaller(a, b):
    return tl.where((a != a) | (a < b), a, b)


@kernel
def summary_kernel(
    loss_ptr, logprob_ptr, entropy_ptr, logprob_full_ptr, flags_ptr, table_ptr, labels_ptr, counter_ptr, partials_ptr,
    total_ptr, metrics_ptr, tokens_ptr, N: tl.int64, programs: tl.int32, ignore_index: tl.int64, gate_eps: tl.float64,
    kl_clamp: tl.float64, KL: tl.constexpr, KL_OVER_FULL: tl.constexpr, OFF_POLICY: tl.constexpr,
    COMPARES: tl.constexpr, RUN: tl.constexpr, REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program RUN tokens; the last one to finish adds up the runs in their order. `logprob_full_ptr` None: no
    support."""
    token = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    inside = token < N
    active = inside & (tl.load(labels_ptr + token, mask=inside, other=0) != ignore_index)
    known = table_ptr + token * COLUMNS
    logprob = tl.load(logprob_ptr + token, mask=active, other=0.0).to(tl.float64)
    entropy = tl.load(entropy_ptr + token, mask=active, other=0.0).to(tl.float64)
    flags = tl.load(flags_ptr + token, mask=active, other=0)
    weight = tl.load(known, mask=active, other=0.0)
    old_entropy = tl.load(known + 3, mask=active, other=0.0).to(tl.float64)
    old_logprob = logprob
    if OFF_POLICY:
        old_logprob = tl.load(known + 2, mask=active, other=0.0).to(tl.float64)
    part = partials_ptr + tl.program_id(0).to(tl.int64) * PARTIALS
    _put(part, LOSS, tl.load(loss_ptr + token, mask=active, other=0.0), active)
    _put(part, 1, (flags & (CLIP_LOW | CLIP_HIGH)) != 0, active)
    _put(part, 2, (flags & CLIP_LOW) != 0, active)
    _put(part, 3, (flags & CLIP_HIGH) != 0, active)
    _put(part, 4, (flags & ERC_LOW) != 0, active)
    _put(part, 5, (flags & ERC_HIGH) != 0, active)
    _put(part, 6, (flags & ERC_DROPPED) != 0, active)
    _put(part, 7, (flags & FILTERED) != 0, active)
    _put(part, ENTROPY, entropy, active)
    ratio = (entropy + gate_eps) / (old_entropy + gate_eps)
    _put(part, OLD_ENTROPY, old_entropy, active)
    _put(part, ENTROPY_RATIO, ratio, active)
    difference = clamp(log_difference(logprob, old_logprob), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    _put(part, APPROX_KL, expm1(difference) - difference, active)
    if KL != KL_NONE:
        ref_logprob = tl.load(known + 4, mask=active, other=0.0).to(tl.float64)
        if KL_OVER_FULL:
            full = tl.load(logprob_full_ptr + token, mask=active, other=0.0).to(tl.float64)
            penalty, _ = kl_estimate(KL, kl_clamp, full, ref_logprob)
            if KL >= IMPORTANCE_WEIGHTED:
                ratio_to_old, _slope = importance_ratio(logprob, old_logprob)
                penalty = penalty * ratio_to_old
        else:
            penalty, _ = kl_penalty(KL, kl_clamp, logprob, old_logprob, ref_logprob)
        _put(part, KL_TO_REFERENCE, penalty, active)
    else:
        _put(part, KL_TO_REFERENCE, ratio * 0.0, active)
    if logprob_full_ptr is not None:
        kept = tl.load(logprob_full_ptr + token, mask=active, other=0.0).to(tl.float64) - logprob
        _put(part, KEPT_MASS, tl.exp(kept), active)
    infinity = float("inf")
    tl.store(part + ENTROPY_RATIO_MIN, tl.reduce(tl.where(active, ratio, infinity), 0, _smaller))
    tl.store(part + ENTROPY_RATIO_MAX, tl.reduce(tl.where(active, ratio, -infinity), 0, _larger))
    tl.store(part + RATIO_MAX, tl.reduce(tl.where(active, difference, -infinity), 0, _larger))
    _put(part, NAN_INPUTS, (weight != weight) | (old_entropy != old_entropy), active)
    _put(part, TOKENS, tl.where(active, 1.0, 0.0), active)
    # Several threads have stored: all of them before the one that says so.
    tl.debug_barrier()
    finished = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if finished == programs - 1:
        tokens = _sum_of(partials_ptr, TOKENS, programs, BLOCK)
        count = tl.where(tokens == 0.0, 1.0, tokens)
        nan = tl.full((), float("nan"), tl.float64)
        loss = _sum_of(partials_ptr, LOSS, programs, BLOCK)
        tl.store(metrics_ptr + LOSS, loss)
        tl.store(total_ptr, loss.to(REAL))
        for metric in tl.static_range(1, KL_TO_REFERENCE + 1):
            mean = _sum_of(partials_ptr, metric, programs, BLOCK) / count
            if (metric == OLD_ENTROPY or metric == ENTROPY_RATIO) and not COMPARES:
                mean = nan
            if metric == KL_TO_REFERENCE and KL == KL_NONE:
                mean = nan
            tl.store(metrics_ptr + metric, mean)
        low, high, most = nan, nan, nan
        if tokens != 0.0:
            most = tl.exp(-_least_of(partials_ptr, RATIO_MAX, programs, -1.0, BLOCK))
            if COMPARES:
                low = _least_of(partials_ptr, ENTROPY_RATIO_MIN, programs, 1.0, BLOCK)
                high = -_least_of(partials_ptr, ENTROPY_RATIO_MAX, programs, -1.0, BLOCK)
        tl.store(metrics_ptr + ENTROPY_RATIO_MIN, low)
        tl.store(metrics_ptr + ENTROPY_RATIO_MAX, high)
        tl.store(metrics_ptr + RATIO_MAX, most)
        mass = tl.full((), 1.0, tl.float64)
        if logprob_full_ptr is not None:
            mass = _sum_of(partials_ptr, KEPT_MASS, programs, BLOCK) / count
        tl.store(metrics_ptr + KEPT_MASS, mass)
        tl.store(metrics_ptr + NAN_INPUTS, _sum_of(partials_ptr, NAN_INPUTS, programs, BLOCK))
        tl.store(tokens_ptr, tokens.to(tl.int64))


@triton.jit
def _sum_of(partials_ptr, position: tl.constexpr, programs, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, programs, BLOCK):
        run = first + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + run.to(tl.int64) * PARTIALS + position, mask=run < programs, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _least_of(partials_ptr, position: tl.constexpr, programs, factor: tl.constexpr, BLOCK: tl.constexpr):
    """The least of factor times what the runs left."""
    least = tl.zeros([BLOCK], tl.float64) + float("inf")
    for first in range(0, programs, BLOCK):
        run = first + tl.arange(0, BLOCK)
        at = partials_ptr + run.to(tl.int64) * PARTIALS + position
        least = _smaller(tl.load(at, mask=run < programs, other=float("inf") * factor) * factor, least)
    return tl.reduce(least, 0, _smaller)


def summary(
    statistics: tuple[Tensor | None, ...], flags: Tensor, table: Tensor, labels: Tensor, counter: Tensor,
    params: Tensor, ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`token_summary` of `[N]` each: the tokens' shares of the loss, log-probs and entropies, and log-probs over the
    full vocabulary where the others are over a support, else None."""
    count, numbers = len(labels), params.tolist()
    statistics = statistics if count else (*statistics[:3], None)
    programs = max(1, triton.cdiv(count, RUN))
    partials = table.new_empty((programs, len(Metric) + 1), dtype=torch.float64)
    total, metrics = table.new_empty(()), table.new_empty(len(Metric), dtype=torch.float64)
    tokens = table.new_empty((), dtype=torch.int64)
    present = int(numbers[Param.PRESENT])
    launch_tokens(
        summary_kernel, programs, table, *statistics, flags, table, labels, counter, partials, total,
        metrics, tokens, count, programs, ignore_index, numbers[Param.GATE_EPS], numbers[Param.KL_CLAMP],
        KL=int(numbers[Param.KL_ID]), KL_OVER_FULL=statistics[3] is not None and bool(present & Present.KL_OVER_FULL),
        OFF_POLICY=bool(present & Present.OLD_LOGPROB),
        COMPARES=bool(present & Present.OLD_ENTROPY), RUN=RUN,
        REAL=tl.float64 if table.dtype == torch.float64 else tl.float32, BLOCK=BLOCK,
    )  # fmt: skip
    return total, metrics, tokens


def token_summary(per_token: Tensor, logprob_full: Tensor | None, *others) -> tuple[Tensor, Tensor, Tensor]:
    """The scalar loss, the metrics and the number of active tokens; see `erc.ops`."""
    loss, _, logprob, entropy = per_token.unbind()
    return summary((loss, logprob, entropy, logprob_full), *others)
