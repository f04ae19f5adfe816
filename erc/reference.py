"""The whole library in plain PyTorch, any floating dtype: the oracle, the `torch` backend, and the place to start
reading.

Statistics are computed in float64 whatever the dtype of the logits, and rounded once to the statistics dtype.
Same signatures as `erc.token_stats`, `erc.entropy_ratio`, `erc.policy_loss` and `erc.objective_loss`; gradients by
autograd. Memory is that of eager PyTorch: several tensors as large as the logits.
"""

from __future__ import annotations

from math import nan

import torch
from torch import Tensor

from erc.inputs import (
    RowScaling,
    TokenArguments,
    check_constant,
    check_labels,
    check_logits,
    labelled_batch,
    resolve_objective,
    row_scaling,
    token_batch,
)
from erc.ops import stats_dtype
from erc.results import EntropyRatio, PolicyLoss, TokenStats, policy_loss_result
from erc.surrogate.entropy_ratio import entropy_ratio_of
from erc.surrogate.objective import Objective


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


def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> TokenStats:
    """Log-prob of the labels, entropy and logsumexp of each row; see `erc.token_stats`."""
    check_logits(logits)
    leading = tuple(logits.shape[:-1])
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    if labels is not None:
        labels = check_labels(labels, leading, logits.device, logits.shape[-1], ignore_index)
    return TokenStats(
        *(None if s is None else s.view(leading) for s in row_stats(logits, labels, scaling, ignore_index))
    )


def row_stats(
    logits: Tensor, labels: Tensor | None, scaling: RowScaling, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Log-prob, entropy and logsumexp of checked arguments, each `[N]` in the statistics dtype."""
    vocab_size, dtype = logits.shape[-1], stats_dtype(logits.dtype)
    x = _widened(logits)
    if labels is None:
        row = Row(scaling.apply(x))
        return None, row.entropy.to(dtype), row.logsumexp.to(dtype)
    active = labels != ignore_index
    in_range = (labels >= 0) & (labels < vocab_size)
    x = torch.where(active[:, None], x, 0.0)  # an ignored row is not read, whatever it holds
    x = x * torch.where(in_range | ~active, 1.0, nan)[:, None]  # NaN, and so is its gradient
    row = Row(scaling.apply(x))
    logprob = row.logprob(torch.where(in_range, labels, 0))
    return tuple(torch.where(active, stat, 0.0).to(dtype) for stat in (logprob, row.entropy, row.logsumexp))


def _widened(logits: Tensor) -> Tensor:
    """Rows `[N, V]` in float64, so that every dtype of logits gets the oracle's answer, rounded once. MPS has no
    float64."""
    return logits.reshape(-1, logits.shape[-1]).to(torch.float32 if logits.device.type == "mps" else torch.float64)


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
    leading = tuple(logits.shape[:-1])
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    new, old = (Row(scaling.apply(_widened(z))) for z in (logits, old_logits.detach()))
    p, q, log_p, log_q = new.probabilities(), old.probabilities(), new.logprobs(), old.logprobs()
    stats = (
        entropy_ratio_of(new.entropy, old.entropy, 1e-8),
        new.entropy,
        old.entropy,
        _divergence(p, log_p, log_q, q),
        _divergence(q, log_q, log_p, p),
        (p - q).abs().sum(-1) / 2,
    )
    return EntropyRatio(*(stat.to(stats_dtype(logits.dtype)).view(leading) for stat in stats))


def _divergence(p: Tensor, log_p: Tensor, log_q: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) as `sum p (delta + expm1(-delta))` with `delta = log p - log q`: every term >= 0, so nothing
    cancels."""
    delta = torch.where(torch.isneginf(log_p), 0.0, log_p) - torch.where(torch.isneginf(log_p), 0.0, log_q)
    terms = torch.where(torch.isneginf(log_p), q, p * delta + (q - p))
    small = delta.abs() < 0.5  # further out the two terms no longer cancel, and expm1 would overflow
    delta_small = torch.where(small, delta, 0.0)
    return torch.where(small & ~torch.isneginf(log_p), p * (delta_small + torch.expm1(-delta_small)), terms).sum(-1)


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    old_logprob: Tensor | None,
    advantages: Tensor,
    objective: str | Objective = "erc-dapo",
    mask: Tensor | None = None,
    old_entropy: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    nll_mask: Tensor | None = None,
    old_divergence: Tensor | None = None,
    ref_kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> PolicyLoss:
    """The policy loss from logits; see `erc.policy_loss`."""
    check_logits(logits)
    objective = resolve_objective(objective)
    leading = tuple(logits.shape[:-1])
    arguments = TokenArguments(
        old_logprob,
        advantages,
        mask,
        old_entropy,
        ref_logprob,
        rollout_logprob,
        nll_mask,
        old_divergence,
        ref_kl,
        cu_seqlens,
        normalizer,
        entropy_normalizer,
        nll_normalizer,
        generator,
    )
    scaling = row_scaling(temperature, softcap, logit_scale, leading, logits)
    labels, batch = labelled_batch(objective, arguments, logits, labels, ignore_index)
    logprob, entropy, _ = row_stats(logits, labels, scaling, ignore_index)
    return policy_loss_result(objective, batch, logprob, entropy, leading)


def objective_loss(
    logprob: Tensor,
    entropy: Tensor,
    *,
    old_logprob: Tensor | None,
    advantages: Tensor,
    objective: str | Objective = "erc-dapo",
    mask: Tensor | None = None,
    old_entropy: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    nll_mask: Tensor | None = None,
    old_divergence: Tensor | None = None,
    ref_kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    entropy_normalizer: float | Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> PolicyLoss:
    """The policy loss from log-probs and entropies that a trainer holds already: no vocabulary work.

    Differentiable in `logprob` `[*]` (nats, float32 or float64), and in `entropy` `[*]` if and only if the objective
    has an entropy term; the entropy-ratio gate reads the entropy's value only. Everything else as `erc.policy_loss`.

    >>> import torch
    >>> logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> entropy = torch.tensor([1.0, 1.2])
    >>> rollout = {"old_logprob": logprob.detach(), "old_entropy": torch.ones(2), "advantages": torch.ones(2)}
    >>> out = objective_loss(logprob, entropy, objective="erc-dapo", **rollout)
    >>> out.loss.backward()
    >>> logprob.grad  # the second token's entropy rose by 20 %: its gradient is dropped
    tensor([-0.5000, -0.0000])
    """
    objective = resolve_objective(objective)
    for name, tensor in (("logprob", logprob), ("entropy", entropy)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be a float32 or float64 tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    leading = tuple(logprob.shape)
    if tuple(entropy.shape) != leading or entropy.device != logprob.device:
        raise ValueError(f"entropy must have the shape and device of logprob, {leading}, got {tuple(entropy.shape)}")
    arguments = TokenArguments(
        old_logprob,
        advantages,
        mask,
        old_entropy,
        ref_logprob,
        rollout_logprob,
        nll_mask,
        old_divergence,
        ref_kl,
        cu_seqlens,
        normalizer,
        entropy_normalizer,
        nll_normalizer,
        generator,
    )
    batch = token_batch(objective, arguments, leading, logprob.device, logprob.dtype)
    return policy_loss_result(objective, batch, logprob.reshape(-1), entropy.reshape(-1), leading)
