"""The whole library in plain PyTorch, any floating dtype: the oracle, the `torch` backend, and the place to start
reading.

Statistics are computed in float64 whatever the dtype of the logits, and rounded once to the statistics dtype.
Same signatures as `erc.token_stats`, `erc.entropy_ratio`, `erc.policy_loss` and `erc.objective_loss`; gradients by
autograd. Memory is that of eager PyTorch: several tensors as large as the logits.
"""

from __future__ import annotations

from math import nan
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from erc.call import TokenArguments, labels_explained, loss_call
from erc.constants import INVALID_VALUE, RATIO_EPS, Param
from erc.inputs import check_constant, check_logits, label_rows, resolve_objective
from erc.ops import stats_dtype
from erc.results import EntropyRatio, PolicyLoss, TokenCall, TokenStats, tokens_of, two_phase_result
from erc.rows import RowScaling, as_rows, row_scaling, scaling_params
from erc.support import SamplingSupport, check_support
from erc.surrogate.entropy_ratio import entropy_ratio_of
from erc.surrogate.metrics import token_summary
from erc.surrogate.objective import Objective
from erc.surrogate.token_table import token_table
from erc.surrogate.validation import values_are_readable

if TYPE_CHECKING:
    from erc.results import LabelledStats


class Row:
    """Softmax rows `[N, V]`, centred at their maximum and with that maximum kept apart.

    With `u = x - max x` and R the sum of `exp(u)` over everything but one maximum: `logsumexp = max x + log1p(R)` and
    `entropy = log1p(R) - sum(exp(u) u) / (1 + R)`, two terms >= 0. A plain `1 + R` would round R away on peaked rows,
    where the entropy is all in R. A -inf logit is a forbidden token; a row that is all -inf or holds NaN or +inf is
    NaN.
    """

    def __init__(self, x: Tensor) -> None:
        row_max, argmax = x.detach().max(-1, keepdim=True)
        row_max = torch.where(row_max.isinf(), nan, row_max)
        x = x * torch.where(row_max.isnan(), nan, 1.0)  # no distribution: NaN in every entry and its gradient
        self.forbidden = torch.isneginf(x)
        self.row_max = row_max.squeeze(-1)
        self.u = torch.where(self.forbidden, 0.0, x) - row_max
        self.exp_u = torch.where(self.forbidden, 0.0, self.u.exp())
        u_max = self.u.gather(-1, argmax).squeeze(-1)  # value 0; it carries the gradient of the maximum
        rest = self._sum_without(argmax) + torch.expm1(u_max)
        self.log_sum = torch.log1p(rest)
        self.logsumexp = self.row_max + self.log_sum
        weighed = torch.where(self.exp_u == 0, 0.0, self.u)  # 0 * u may have a gradient of 0 * inf
        self.entropy = self.log_sum - (self.exp_u * weighed).sum(-1) / (1 + rest)

    def _sum_without(self, column: Tensor) -> Tensor:
        return self.exp_u.scatter(-1, column, 0.0).sum(-1)

    def logprob(self, labels: Tensor) -> Tensor:
        column = labels[:, None]
        u = self.u.gather(-1, column).squeeze(-1)
        # Of a maximum: -log1p(sum_j exp(x_j - x_y)), whose gradient R / S needs no 1 - p. The where keeps exp(-u)
        # finite.
        is_max = u.detach() == 0
        of_max = -torch.log1p(self._sum_without(column) * torch.exp(-torch.where(is_max, u, 0.0)))
        logprob = torch.where(is_max, of_max, u - self.log_sum)
        forbidden = self.forbidden.gather(-1, column).squeeze(-1)
        # x - x + -inf would be NaN: a forbidden label keeps only the gradient of the other columns.
        return torch.where(forbidden, -torch.inf - self.log_sum, logprob)

    def logprobs(self) -> Tensor:
        """`[N, V]`, -inf where forbidden."""
        return torch.where(self.forbidden, -torch.inf, self.u - self.log_sum[:, None])

    def probabilities(self) -> Tensor:
        return self.exp_u / (1 + torch.expm1(self.log_sum))[:, None]


# ---- the operators of the torch backend ------------------------------------------------------------------------------


class OPERATORS:
    """What `erc.ops` declares, as far as PyTorch's autograd does not make it superfluous: the same arguments, results
    and meaning, differentiable in the logits as often as one likes."""

    token_table = staticmethod(token_table)
    token_summary = staticmethod(token_summary)
    token_losses = None  # erc.surrogate.token_loss is their definition, and carries its graph

    @staticmethod
    def stats_forward(
        logits: Tensor, labels: Tensor | None, temperature: Tensor | None, params: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Log-prob, entropy and logsumexp `[N]`; nothing to save."""
        dtype, scaling = stats_dtype(logits.dtype), _scaling(params, temperature)
        x = _widened(logits)
        if labels is None:
            row = Row(scaling.apply(x))
            return row.entropy.new_empty(0, dtype=dtype), row.entropy.to(dtype), row.logsumexp.to(dtype), None
        labels = labels.reshape(-1)
        active = labels != ignore_index
        in_range = (labels >= 0) & (labels < logits.shape[-1])
        if values_are_readable(labels) and bool((active & ~in_range).any()):
            raise RuntimeError(INVALID_VALUE)
        x = torch.where(active[:, None], x, 0.0)  # an ignored row is not read, whatever it holds
        x = x * torch.where(in_range | ~active, 1.0, nan)[:, None]  # NaN, and so is its gradient
        row = Row(scaling.apply(x))
        logprob = row.logprob(torch.where(in_range, labels, 0))
        found = (logprob, row.entropy, row.logsumexp)
        logprob, entropy, logsumexp = (torch.where(active, stat, 0.0).to(dtype) for stat in found)
        return logprob, entropy, logsumexp, None

    @staticmethod
    def paired_forward(
        logits: Tensor, old_logits: Tensor, temperature: Tensor | None, params: Tensor
    ) -> tuple[list[Tensor], None]:
        """Six `[N]` in the order of `erc.constants.PAIRED_OUTPUTS`, not stacked: a zero gradient of an infinite
        divergence would be NaN, and reach the others. Nothing to save."""
        scaling = _scaling(params, temperature)
        new, old = (Row(scaling.apply(_widened(z))) for z in (logits, old_logits))
        p, q, log_p, log_q = new.probabilities(), old.probabilities(), new.logprobs(), old.logprobs()
        stats = (
            entropy_ratio_of(new.entropy, old.entropy, RATIO_EPS),
            new.entropy,
            old.entropy,
            _divergence(p, log_p, log_q, q),
            _divergence(q, log_q, log_p, p),
            (p - q).abs().sum(-1) / 2,
        )
        return [stat.to(stats_dtype(logits.dtype)) for stat in stats], None


def support_statistics(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    params: Tensor,
    ignore_index: int,
    support: SamplingSupport,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob over the kept tokens, entropy, logsumexp and log-prob over the full vocabulary, `[N]` each.

    `d logprob / dx_j = 1[j = y] - p_support(j)` for a kept j and 0 for others; a row that was not cut, or kept all of
    the vocabulary, is computed as without a support, bit for bit. Ignored rows are not read and give 0.

    Raises:
        IndexError: on the CPU, for a label that its row's support does not hold; elsewhere that row is NaN.
    """
    labels, vocab_size = labels.reshape(-1), logits.shape[-1]
    active = labels != ignore_index
    cut, invalid = support.cut_rows(labels, vocab_size, ignore_index)
    invalid = invalid | (active & ((labels < 0) | (labels >= vocab_size)))
    x = torch.where(active[:, None], _widened(logits), 0.0)
    x = _scaling(params, temperature).apply(x * torch.where(invalid, nan, 1.0)[:, None])  # NaN, and so is its gradient
    full = Row(x)
    broken = full.logsumexp.detach().isnan()  # over the full vocabulary: NaN over any part of it, too
    kept = support.to_mask(vocab_size) | ~cut[:, None]
    # A row that was not cut takes its gradient from `full` alone, whose order of summation is that without a support.
    of_cut = torch.where(cut[:, None], x * torch.where(broken, nan, 1.0)[:, None], 0.0)
    part = Row(torch.where(kept, of_cut, -torch.inf))
    column = torch.where(active & ~invalid, labels, 0)
    logprob_full = full.logprob(column)
    logprob = torch.where(cut, part.logprob(column), logprob_full)

    def result(stat: Tensor) -> Tensor:
        return torch.where(active, stat, 0.0).to(stats_dtype(logits.dtype))

    return result(logprob), result(full.entropy), result(full.logsumexp), result(logprob_full)


def _scaling(params: Tensor, temperature: Tensor | None) -> RowScaling:
    return RowScaling(tuple(params[: Param.RULE].tolist()), temperature)


def _widened(logits: Tensor) -> Tensor:
    """Rows `[N, V]` in float64, so that every dtype of logits gets the oracle's answer, rounded once. MPS has no
    float64."""
    return logits.reshape(-1, logits.shape[-1]).to(torch.float32 if logits.device.type == "mps" else torch.float64)


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) as `sum p (delta + expm1(-delta))` with `delta = log p - log q`: every term >= 0, so nothing
    cancels."""
    none = p == 0  # forbidden, or below what the dtype holds: 0 times an infinite difference is 0
    delta = torch.where(none, 0.0, log_p) - torch.where(none, 0.0, log_q)
    terms = torch.where(none, q, p * delta + (q - p))
    small = delta.abs() < 0.5  # further out the two terms no longer cancel, and expm1 would overflow
    delta_small = torch.where(small, delta, 0.0)
    return torch.where(small & ~none, p * (delta_small + torch.expm1(-delta_small)), terms).sum(-1)


# ---- the public functions, by the operators above --------------------------------------------------------------------


@overload
def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    support: SamplingSupport | None = ...,
) -> LabelledStats: ...
@overload
def token_stats(
    logits: Tensor,
    labels: None = ...,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    support: SamplingSupport | None = ...,
) -> TokenStats: ...
def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    support: SamplingSupport | None = None,
) -> TokenStats:
    """Log-prob of the labels, entropy and logsumexp of each row; see `erc.token_stats`."""
    check_logits(logits)
    leading = logits.shape[:-1]
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    if labels is not None:
        labels = label_rows(labels, leading, logits.device, ignore_index)
    check_support(support, leading, logits.device, labels)
    with labels_explained(labels, leading, logits.shape[-1], ignore_index):
        stats = _row_statistics(logits, labels, scaling, scaling_params(scaling), ignore_index, support)
    return TokenStats.of_rows(*stats, leading)


def _row_statistics(
    logits: Tensor,
    labels: Tensor | None,
    scaling: RowScaling,
    params: Tensor,
    ignore_index: int,
    support: SamplingSupport | None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Log-prob, entropy, logsumexp and, with a support, log-prob over the full vocabulary; `[N]` each."""
    rows = as_rows(logits)
    if support is not None and labels is not None:
        return support_statistics(rows, labels, scaling.temperature, params, ignore_index, support)
    logprob, entropy, logsumexp, _ = OPERATORS.stats_forward(rows, labels, scaling.temperature, params, ignore_index)
    return None if labels is None else logprob, entropy, logsumexp, None


def entropy_ratio(
    logits: Tensor,
    old_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> EntropyRatio:
    """Entropies, their ratio and the divergences between new and old rows; see `erc.entropy_ratio`."""
    check_logits(logits)
    check_logits(old_logits, "old_logits")
    check_constant("old_logits", old_logits)
    leading = logits.shape[:-1]
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    rows, old_rows = as_rows(logits), as_rows(old_logits.detach())
    stats, _ = OPERATORS.paired_forward(rows, old_rows, scaling.temperature, scaling_params(scaling))
    return EntropyRatio(*(stat.view(leading) for stat in stats))


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective = "erc-dapo",
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    support: SamplingSupport | None = None,
    **arguments: Any,
) -> PolicyLoss:
    """The policy loss from logits; see `erc.policy_loss`, whose other arguments are these."""
    check_logits(logits)
    check_support(support, logits.shape[:-1], logits.device, labels)
    scaling = row_scaling(temperature, softcap, logit_scale, logits.shape[:-1], logits)
    call = loss_call(
        resolve_objective(objective), TokenArguments(**arguments), labels, ignore_index, logits, scaling,
        logits.shape[-1], fused=False, over_support=support is not None,
    )  # fmt: skip
    table = call.token_table(OPERATORS)
    logprob, entropy, _, logprob_full = _row_statistics(
        logits, table[1], scaling, call.tokens.params, ignore_index, support
    )
    assert logprob is not None
    return two_phase_result(TokenCall(call, OPERATORS, table, logprob, entropy, logprob_full))


def objective_loss(
    logprob: Tensor,
    entropy: Tensor,
    *,
    logprob_full: Tensor | None = None,
    objective: str | Objective = "erc-dapo",
    **arguments: Any,
) -> PolicyLoss:
    """The policy loss from log-probs and entropies; see `erc.objective_loss`, whose other arguments are these."""
    return two_phase_result(
        tokens_of(OPERATORS, logprob, entropy, objective, TokenArguments(**arguments), logprob_full)
    )
