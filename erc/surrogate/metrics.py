"""Layer 3: what a training log wants to know about a loss, as 0-d tensors that nothing here synchronises."""

from __future__ import annotations

from math import inf, nan

import torch
from torch import Tensor

from erc.ops import TokenFlag
from erc.surrogate.entropy_ratio import EntropyRatioClip, entropy_ratio_of
from erc.surrogate.kl import k3
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import MAX_LOG_RATIO, log_difference
from erc.surrogate.token_loss import TokenBatch

_FLAGGED = {
    TokenFlag.CLIP_LOW: "clip_fraction_low",
    TokenFlag.CLIP_HIGH: "clip_fraction_high",
    TokenFlag.ERC_DROPPED: "erc_fraction",
    TokenFlag.ERC_LOW: "erc_fraction_low",
    TokenFlag.ERC_HIGH: "erc_fraction_high",
    TokenFlag.FILTERED: "filtered_fraction",
}


@torch.no_grad()
def policy_metrics(
    objective: Objective, batch: TokenBatch, logprob: Tensor, entropy: Tensor, flags: Tensor
) -> dict[str, Tensor]:
    """Fractions, means and extremes over the active tokens (`mask != 0`) of this rank; NaN where an input is missing.
    Without an active token, fractions and means are 0 and extremes NaN.

    `approx_kl` is the k3 estimate of KL(old || new), `kl` the objective's own estimate to the reference.
    """
    active = batch.mask != 0
    tokens = active.sum()
    count = tokens.clamp(min=1)
    missing = torch.full((), nan, dtype=logprob.dtype, device=logprob.device)

    def largest(values: Tensor) -> Tensor:
        found = torch.where(active, values, -inf).max() if len(values) else missing
        return torch.where(tokens == 0, missing, found)

    # All flags, and below all means, at once: on a GPU a launch costs more than the work of one of them.
    bits = torch.arange(len(TokenFlag), device=flags.device)
    fractions = ((flags.unsqueeze(-1) >> bits) & 1).sum(0) / count
    clipped = (flags & int(TokenFlag.CLIP_LOW | TokenFlag.CLIP_HIGH)) != 0
    metrics = {"clip_fraction": clipped.sum() / count}
    metrics |= {_FLAGGED[flag]: fraction for flag, fraction in zip(TokenFlag, fractions.unbind(), strict=True)}
    means = {"entropy": entropy}
    for name in ("old_entropy", "entropy_ratio", "entropy_ratio_min", "entropy_ratio_max", "kl"):
        metrics[name] = missing
    if batch.old_entropy is not None:
        eps = (objective.entropy_ratio or EntropyRatioClip()).eps
        ratio = entropy_ratio_of(entropy, batch.old_entropy, eps)
        means |= {"old_entropy": batch.old_entropy, "entropy_ratio": ratio}
        metrics["entropy_ratio_min"] = -largest(-ratio)
        metrics["entropy_ratio_max"] = largest(ratio)
    old_logprob = logprob if batch.old_logprob is None else batch.old_logprob
    difference = log_difference(logprob, old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics["ratio_max"] = largest(difference).exp()
    means["approx_kl"] = k3(difference)
    if objective.kl is not None:
        exact = objective.kl.kind == "full"
        means["kl"] = batch.ref_kl.detach() if exact else objective.kl.estimate(logprob, old_logprob, batch.ref_logprob)
    averaged = torch.where(active, torch.stack(tuple(means.values())), 0.0).sum(-1) / count
    metrics |= dict(zip(means, averaged.unbind(), strict=True))
    metrics["tokens"] = tokens
    return metrics
