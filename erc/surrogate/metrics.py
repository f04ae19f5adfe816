"""The summary of a batch in plain PyTorch: the scalar loss and what a training log wants to know about it.

The readable definition of the operator `token_summary` (csrc/common/token_summary.h, erc/triton_kernels/tokens.py), and
what the `torch` backend runs. Nothing here is synchronised: the metrics stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import torch
from torch import Tensor

from erc.constants import MAX_LOG_RATIO, Column, Metric, Param, Present, TokenFlag
from erc.surrogate.entropy_ratio import entropy_ratio_of
from erc.surrogate.kl import KLPenalty, k3
from erc.surrogate.ratio_rules import log_difference

_FLAGGED = {
    Metric.CLIP_FRACTION: TokenFlag.CLIP_LOW | TokenFlag.CLIP_HIGH,
    Metric.CLIP_FRACTION_LOW: TokenFlag.CLIP_LOW,
    Metric.CLIP_FRACTION_HIGH: TokenFlag.CLIP_HIGH,
    Metric.ERC_FRACTION: TokenFlag.ERC_DROPPED,
    Metric.ERC_FRACTION_LOW: TokenFlag.ERC_LOW,
    Metric.ERC_FRACTION_HIGH: TokenFlag.ERC_HIGH,
    Metric.FILTERED_FRACTION: TokenFlag.FILTERED,
}

_NAMES = tuple(metric.name.lower() for metric in Metric)  # Dynamo of PyTorch 2.10 and 2.11 cannot iterate over an enum


def metrics_by_name(metrics: Tensor, tokens: Tensor, over_support: bool = False) -> dict[str, Tensor]:
    """The metrics of a summary as 0-d tensors, float64 but for the int64 `tokens`; views, nothing is computed.

    Fractions and means are over the active tokens (`mask != 0`) of this rank, 0 where there are none; means and
    extremes are NaN where an input is missing, extremes also without active tokens. `approx_kl` is the k3 estimate of
    KL(old || new), `kl` the objective's own estimate to the reference, `nan_inputs` the number of tokens with a NaN
    among their rollout statistics, which on a GPU nothing else reports. `kept_mass`, of log-probs over a sampling
    support, is the mean probability of the kept tokens under the full distribution, 1 without rows.
    """
    named = dict(zip(_NAMES, metrics.unbind(), strict=True))
    del named["loss"]
    if not over_support:
        del named["kept_mass"]
    named["tokens"] = tokens
    return named


@torch.no_grad()
def token_summary(
    per_token: Tensor,
    logprob_full: Tensor | None,
    flags: Tensor,
    table: Tensor,
    labels: Tensor,
    counter: Tensor,
    params: Tensor,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, its metrics (float64, at the positions of `Metric`) and the number of active tokens."""
    numbers = params.tolist()
    active = labels != ignore_index
    loss, _, logprob, entropy = per_token.double().unbind()
    full = logprob if logprob_full is None else logprob_full.double()
    table = table.double()
    tokens = active.sum()
    present = int(numbers[Param.PRESENT])
    old_logprob = table[:, Column.OLD_LOGPROB] if present & Present.OLD_LOGPROB else logprob
    old_entropy = table[:, Column.OLD_ENTROPY]
    missing = torch.full((), nan, dtype=torch.float64, device=loss.device)
    nothing = missing if not len(active) else torch.where(tokens == 0, missing, 0.0)

    def mean(values: Tensor) -> Tensor:
        return torch.where(active, values.double(), 0.0).sum() / tokens.clamp(min=1)

    metrics = {metric: mean((flags & int(bits)) != 0) for metric, bits in _FLAGGED.items()}
    metrics[Metric.ENTROPY] = mean(entropy)
    for metric in (
        Metric.OLD_ENTROPY,
        Metric.ENTROPY_RATIO,
        Metric.ENTROPY_RATIO_MIN,
        Metric.ENTROPY_RATIO_MAX,
        Metric.KL,
    ):
        metrics[metric] = missing
    metrics[Metric.KEPT_MASS] = torch.ones_like(missing)
    if logprob_full is not None and len(active):
        metrics[Metric.KEPT_MASS] = mean((full - logprob).exp())
    if present & Present.OLD_ENTROPY:
        ratio = entropy_ratio_of(entropy, old_entropy, numbers[Param.GATE_EPS])
        metrics[Metric.OLD_ENTROPY], metrics[Metric.ENTROPY_RATIO] = mean(old_entropy), mean(ratio)
        metrics[Metric.ENTROPY_RATIO_MIN] = _extreme(torch.where(active, ratio, inf), torch.min) + nothing
        metrics[Metric.ENTROPY_RATIO_MAX] = _extreme(torch.where(active, ratio, -inf), torch.max) + nothing
    difference = log_difference(logprob, old_logprob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics[Metric.APPROX_KL] = mean(k3(difference))
    metrics[Metric.RATIO_MAX] = _extreme(torch.where(active, difference, -inf), torch.max).exp() + nothing
    penalty = KLPenalty.of_kernel(int(numbers[Param.KL_ID]), numbers[Param.KL_CLAMP])
    if penalty is not None:
        compared = full if present & Present.KL_OVER_FULL else logprob
        metrics[Metric.KL] = mean(penalty.estimate(logprob, old_logprob, table[:, Column.REF_LOGPROB], compared))
    broken = table[:, Column.WEIGHT].isnan() | old_entropy.isnan()
    metrics[Metric.NAN_INPUTS] = (active & broken).sum().double()
    metrics[Metric.LOSS] = torch.where(active, loss, 0.0).sum()
    summary = torch.stack([metrics[metric] for metric in Metric])
    return summary[Metric.LOSS].to(per_token.dtype), summary, tokens


def _extreme(values: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    return of(values) if len(values) else torch.zeros((), dtype=values.dtype, device=values.device)
