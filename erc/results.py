"""What the public functions return, and the last two stations of a loss, which make it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from erc.call import LossCall, TokenArguments, loss_call
from erc.inputs import EXACT_DTYPES, resolve_objective, row_tensor
from erc.rows import UNSCALED
from erc.surrogate.metrics import metrics_by_name
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import MAX_LOG_RATIO, log_difference
from erc.surrogate.token_loss import TokenBatch, TokenLosses, filtered_tokens, token_losses, with_derivatives


class TokenStats(NamedTuple):
    """Per-token statistics `[*]` in nats: float32, or float64 for float64 logits. Log-probs are None without labels.

    With a sampling support `logprob` is over the kept tokens and `logprob_full` over the full vocabulary, whose
    difference is the log of the kept mass; without one they are the same tensor. Entropy and logsumexp are always of
    the full vocabulary.
    """

    logprob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    logprob_full: Tensor | None = None

    @classmethod
    def of_rows(
        cls,
        logprob: Tensor | None,
        entropy: Tensor,
        logsumexp: Tensor,
        logprob_full: Tensor | None,
        leading: tuple[int, ...],
    ) -> TokenStats:
        """Statistics `[N]` in the shape of the caller's rows; `logprob_full` is None without a support."""
        logprob, logprob_full = (None if stat is None else stat.view(leading) for stat in (logprob, logprob_full))
        full = logprob if logprob_full is None else logprob_full
        return cls(logprob, entropy.view(leading), logsumexp.view(leading), full)


if TYPE_CHECKING:

    class LabelledStats(TokenStats):
        """What comes back where labels were given: log-probs that are no None. For type checkers alone."""

        @property
        def logprob(self) -> Tensor: ...

        @property
        def logprob_full(self) -> Tensor: ...


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
    `metrics` is a dict of 0-d tensors that were never synchronised (`erc.surrogate.metrics.metrics_by_name`). With a
    sampling support `logprob` is over the kept tokens and `logprob_full` over the full vocabulary; without one they are
    the same tensor.
    """

    loss: Tensor
    per_token_loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]
    logprob_full: Tensor | None = None


class TokenCall(NamedTuple):
    """The stations of a two-phase loss up to its tokens: what the operator `token_table` returned, and the statistics
    `[N]`, 0 where a token is not active. `logprob_full` is None unless `logprob` is over a sampling support."""

    call: LossCall
    operators: Any
    table: tuple[Tensor, Tensor, Tensor]
    logprob: Tensor
    entropy: Tensor
    logprob_full: Tensor | None = None

    def judged(self) -> tuple[TokenBatch, TokenLosses]:
        """The batch, and what the objective makes of each token."""
        batch = self.call.batch(*self.table[:2])
        return batch, token_losses(self.call.objective, batch, self.logprob, self.entropy, self.logprob_full)


def two_phase_result(tokens: TokenCall) -> PolicyLoss:
    """The loss of statistics that exist: by one operator, or by PyTorch and its autograd for a rule that has only them,
    and on the `torch` backend."""
    call, objective, (table, labels, counter) = tokens.call, tokens.call.objective, tokens.table
    given, batch, terms, filtered = call.tokens, None, None, None
    if objective.ratio.kernel_id is None or objective.filters:
        batch = call.batch(table, labels)
        inputs = batch.ratio_inputs(tokens.logprob, tokens.entropy)
        filtered = filtered_tokens(objective, inputs)
        terms = objective.ratio.terms(inputs) if objective.ratio.kernel_id is None else None
    by_autograd = terms is not None and terms.derivative is None
    reads_full = tokens.logprob_full is not None and (objective.kl_over_full or objective.nll_over_full)
    by_torch = by_autograd or tokens.operators.token_losses is None or reads_full
    if by_torch:
        batch, losses = tokens.judged()
        loss, flags = losses.loss, losses.flags
        per_token = torch.stack((loss.detach(), losses.token_loss, tokens.logprob.detach(), tokens.entropy.detach()))
        if objective.reduction != "none":
            loss = loss.sum()
    else:
        policy: tuple[Tensor | None, ...] = (None, None, None, None)
        if terms is not None:
            policy = (terms.loss, terms.derivative, terms.clip_low, terms.clip_high)
        per_token, derivatives, flags = tokens.operators.token_losses(
            tokens.logprob.detach(), tokens.entropy.detach(), table, labels, given.params, given.ignore_index,
            *policy, filtered,
        )  # fmt: skip
    logprob_full = None if tokens.logprob_full is None else tokens.logprob_full.detach()
    total, metrics, count = tokens.operators.token_summary(
        per_token, logprob_full, flags, table, labels, counter, given.params, given.ignore_index
    )
    if not by_torch:
        loss = per_token[0] if objective.reduction == "none" else total
        d_entropy = derivatives[1] if objective.entropy_coef else None
        loss = with_derivatives(loss, derivatives[0], d_entropy, tokens.logprob, tokens.entropy)
    out = loss_result(call, loss, per_token[1:], metrics, count, logprob_full)
    return add_exact_kl(call, out, tokens.operators, batch)


def loss_result(
    call: LossCall,
    loss: Tensor,
    per_token: Tensor,
    metrics: Tensor,
    count: Tensor,
    logprob_full: Tensor | None = None,
) -> PolicyLoss:
    """What the stations left, `per_token` being [3, N] token loss, log-prob and entropy, and over a support
    `logprob_full` `[N]`, as the caller's rows."""
    token_loss, logprob, entropy = per_token.view(3, *call.leading).unbind()
    if loss.dim():
        loss = loss.view(call.leading)
    if call.scale is not None:
        loss = loss / call.scale  # the weights of the tokens hold it, and so do their gradients
    named = metrics_by_name(metrics, count, over_support=logprob_full is not None)
    if logprob_full is None:
        return PolicyLoss(loss, token_loss, logprob, entropy, named, logprob)
    if call.arguments.rollout_logprob is not None:
        named["mismatch_kl"] = _mismatch(call, logprob, count)
    return PolicyLoss(loss, token_loss, logprob, entropy, named, logprob_full.view(call.leading))


@torch.no_grad()
def _mismatch(call: LossCall, logprob: Tensor, count: Tensor) -> Tensor:
    """How far the engine's log-probs are from those of the old policy, both over a support: k3 of their KL."""
    given, tokens = call.arguments, call.tokens
    assert given.rollout_logprob is not None
    old_logprob = logprob if given.old_logprob is None else given.old_logprob.to(call.dtype)
    log_ratio = log_difference(old_logprob, given.rollout_logprob.to(call.dtype)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    active = tokens.labels != tokens.ignore_index
    if tokens.mask is not None:
        active = active & (tokens.mask != 0)
    return torch.where(active, log_ratio.expm1() - log_ratio, 0.0).double().sum() / count.clamp(min=1)


def add_exact_kl(call: LossCall, out: PolicyLoss, operators: Any, batch: TokenBatch | None = None) -> PolicyLoss:
    """`KLPenalty("full")` needs nothing of the sampled token: it is added to what any route computes."""
    kl = call.objective.kl
    if kl is None or kl.kind != "full":
        return out
    batch = batch or call.batch(*call.token_table(operators)[:2])
    assert batch.ref_kl is not None
    exact = torch.where(batch.mask != 0, batch.ref_kl, 0.0)
    weighted = batch.weight * kl.coef * exact / (1.0 if call.scale is None else call.scale)
    metrics = {**out.metrics, "kl": exact.detach().double().sum() / out.metrics["tokens"].clamp(min=1)}
    return out._replace(
        loss=out.loss + (weighted.view(call.leading) if out.loss.dim() else weighted.sum()),
        per_token_loss=out.per_token_loss + kl.coef * exact.detach().view(call.leading),
        metrics=metrics,
    )


def tokens_of(
    operators: Any,
    logprob: Tensor,
    entropy: Tensor,
    objective: str | Objective,
    arguments: TokenArguments,
    logprob_full: Tensor | None = None,
) -> TokenCall:
    """The stations without the rows, from log-probs and entropies that exist already."""
    statistics = {"logprob": logprob, "entropy": entropy}
    if logprob_full is not None:
        statistics["logprob_full"] = logprob_full
    for name, tensor in statistics.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in EXACT_DTYPES:
            raise TypeError(f"{name} must be a float32 or float64 tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    leading = logprob.shape
    for name, tensor in statistics.items():
        row_tensor(name, tensor, leading, logprob.device)
    labels = torch.zeros(leading, dtype=torch.int64, device=logprob.device)  # of a vocabulary of one token
    like = logprob.detach()[..., None]
    call = loss_call(
        resolve_objective(objective), arguments, labels, -100, like, UNSCALED, 1,
        fused=False, over_support=logprob_full is not None,
    )  # fmt: skip
    table = call.token_table(operators)
    ignored = table[1] != 0
    logprob, entropy = (values.reshape(-1).masked_fill(ignored, 0.0) for values in (logprob, entropy.to(logprob.dtype)))
    entropy = entropy.masked_fill(logprob.isnan(), torch.nan)  # a row without a distribution has neither
    if logprob_full is not None:
        logprob_full = logprob_full.to(logprob.dtype).reshape(-1).masked_fill(ignored, 0.0)
    return TokenCall(call, operators, table, logprob, entropy, logprob_full)
