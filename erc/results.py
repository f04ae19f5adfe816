"""Layer 2: what the public functions return, and the last two stations of a loss, which make it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from erc.call import LossCall, TokenArguments, loss_call
from erc.inputs import EXACT_DTYPES, resolve_objective, row_tensor
from erc.rows import UNSCALED
from erc.surrogate.metrics import metrics_by_name
from erc.surrogate.objective import Objective
from erc.surrogate.token_loss import TokenBatch, TokenLosses, token_losses


class TokenStats(NamedTuple):
    """Per-token statistics `[*]` in nats: float32, or float64 for float64 logits. `logprob` is None without labels."""

    logprob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor


class EntropyRatio(NamedTuple):
    """What one pass over new and old logits tells of the step between them; each `[*]`, divergences in nats.

    `ratio = (entropy + 1e-8) / (old_entropy + 1e-8)`, the quantity that `EntropyRatioClip` gates.
    """

    ratio: Tensor
    entropy: Tensor
    old_entropy: Tensor
    kl_new_old: Tensor
    kl_old_new: Tensor
    total_variation: Tensor


class PolicyLoss(NamedTuple):
    """The result of a policy loss. `loss` carries the gradient; everything else is detached.

    `loss` is a scalar, or `[*]` for reduction "none". `per_token_loss` `[*]` is unweighted and 0 where masked.
    `metrics` is a dict of 0-d tensors that were never synchronised (`erc.surrogate.metrics.metrics_by_name`).
    """

    loss: Tensor
    per_token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class TokenCall(NamedTuple):
    """The stations of a two-phase loss up to its tokens: what the operator `token_table` returned, and the statistics
    `[N]`, 0 where a token is not active."""

    call: LossCall
    operators: Any
    table: tuple[Tensor, Tensor, Tensor]
    logprob: Tensor
    entropy: Tensor

    def judged(self) -> tuple[TokenBatch, TokenLosses]:
        """The batch, and what the objective makes of each token."""
        batch = self.call.batch(*self.table[:2])
        return batch, token_losses(self.call.objective, batch, self.logprob, self.entropy)


def two_phase_result(tokens: TokenCall) -> PolicyLoss:
    """The loss by plain PyTorch and autograd."""
    call, (table, labels, counter) = tokens.call, tokens.table
    batch, losses = tokens.judged()
    loss, given = losses.loss, call.tokens
    per_token = torch.stack((loss.detach(), losses.token_loss, tokens.logprob.detach(), tokens.entropy.detach()))
    _, metrics, count = tokens.operators.token_summary(
        per_token, losses.flags, table, labels, counter, given.grad_scale, given.params, given.ignore_index
    )
    if call.objective.reduction != "none":
        loss = loss.sum()
    return add_exact_kl(call, loss_result(call, loss, per_token[1:], metrics, count), tokens.operators, batch)


def loss_result(call: LossCall, loss: Tensor, per_token: Tensor, metrics: Tensor, count: Tensor) -> PolicyLoss:
    """What the stations left, `per_token` being [3, N] token loss, log-prob and entropy, as the caller's rows."""
    token_loss, logprob, entropy = per_token.view(3, *call.leading).unbind()
    if loss.dim():
        loss = loss.view(call.leading)
    return PolicyLoss(loss, token_loss, logprob, entropy, metrics_by_name(metrics, count))


def add_exact_kl(call: LossCall, out: PolicyLoss, operators: Any, batch: TokenBatch | None = None) -> PolicyLoss:
    """`KLPenalty("full")` needs nothing of the sampled token: it is added to what any route computes."""
    kl = call.objective.kl
    if kl is None or kl.kind != "full":
        return out
    batch = batch or call.batch(*call.token_table(operators)[:2])
    exact = torch.where(batch.mask != 0, batch.ref_kl, 0.0)
    weighted = batch.weight * kl.coef * exact / call.scale
    metrics = {**out.metrics, "kl": exact.detach().double().sum() / out.metrics["tokens"].clamp(min=1)}
    return out._replace(
        loss=out.loss + (weighted.view(call.leading) if out.loss.dim() else weighted.sum()),
        per_token_loss=out.per_token_loss + kl.coef * exact.detach().view(call.leading),
        metrics=metrics,
    )


def tokens_of(
    operators: Any, logprob: Tensor, entropy: Tensor, objective: str | Objective, arguments: TokenArguments
) -> TokenCall:
    """The stations without the rows, from log-probs and entropies that exist already."""
    for name, tensor in (("logprob", logprob), ("entropy", entropy)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in EXACT_DTYPES:
            raise TypeError(f"{name} must be a float32 or float64 tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    leading = logprob.shape
    row_tensor("entropy", entropy, leading, logprob.device)
    labels = torch.zeros(leading, dtype=torch.int64, device=logprob.device)  # of a vocabulary of one token
    like = logprob.detach()[..., None]
    call = loss_call(resolve_objective(objective), arguments, labels, -100, like, UNSCALED, 1, fused=False)
    table = call.token_table(operators)
    active = table[1] == 0
    rows = (torch.where(active, values.reshape(-1), 0.0) for values in (logprob, entropy.to(logprob.dtype)))
    return TokenCall(call, operators, table, *rows)
