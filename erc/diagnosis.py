"""Which tokens the ratio rule clipped and which the entropy-ratio gate dropped, as a table and a plot.

The paper's analysis (arXiv 2512.05591): PPO's clip catches about 0.02 % of the tokens, the gate about 20 %, most of
them tokens of low entropy, and the two barely overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from erc.call import TokenArguments
from erc.constants import TokenFlag
from erc.inputs import resolve_objective
from erc.reference import OPERATORS
from erc.results import PolicyLoss, TokenStats, tokens_of
from erc.surrogate.entropy_ratio import EntropyRatioClip, entropy_ratio_of
from erc.surrogate.objective import Objective
from erc.surrogate.ratio_rules import importance_ratio

SUSPICIOUS_SHARE = 0.5
"""Updates drop a fifth of the tokens (the paper); where most tokens go on one side, the old statistics are suspect."""

_CLIPPED = int(TokenFlag.CLIP_LOW | TokenFlag.CLIP_HIGH)


@dataclass(frozen=True)
class TokenGroup:
    """Some tokens: how many, their share of the active ones, and means over them (NaN of none). Entropies in nats."""

    tokens: int
    share: float
    entropy: float
    median_entropy: float
    ratio: float
    entropy_ratio: float
    advantage: float


@dataclass(frozen=True)
class Diagnosis:
    """What happened to the active tokens of a batch; prints as a table.

    `groups` parts them: "kept", "clipped" (by the ratio rule alone), "dropped" (by the gate alone), "both"; "all" is
    everything. `histogram` `[bins, bins]` counts tokens by log ratio (rows) and log entropy ratio (columns), between
    `edges` `[2, bins + 1]` of either; what lies beyond the edges is in the outermost bins. `causes` are sentences on
    what probably went wrong; a healthy update has none.
    """

    objective: Objective
    groups: dict[str, TokenGroup]
    histogram: Tensor
    edges: Tensor
    causes: tuple[str, ...] = ()

    @property
    def overlap(self) -> float:
        """The share of tokens caught by both among those caught by either; 0 where nothing was."""
        caught = sum(self.groups[name].tokens for name in ("clipped", "dropped", "both"))
        return self.groups["both"].tokens / caught if caught else 0.0

    def __str__(self) -> str:
        names = [field.name for field in fields(TokenGroup)]
        rows = [["", *(name.replace("_", " ") for name in names)]]
        for name, group in self.groups.items():
            rows.append([name, str(group.tokens), *(f"{getattr(group, column):.4g}" for column in names[1:])])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append(f"caught by both: {self.overlap:.2%} of the tokens caught by either")
        return "\n".join([*lines, *self.causes])

    def plot(self, path: str | None = None) -> Any:
        """The joint histogram of both ratios, with the gate's band and, where the rule has one, the ratio rule's; the
        shares of the four groups of tokens are written in. A matplotlib figure; saved as PNG where `path` is given.

        The rule's bounds do not depend on the sign of the advantage here: a token beyond one is clipped only where its
        advantage points further out, so the share that was clipped is smaller than the area suggests.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
            from matplotlib.patches import Patch
            from matplotlib.ticker import FuncFormatter, NullLocator
        except ImportError as error:
            raise ImportError("Diagnosis.plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(7.5, 6), layout="constrained")
        axes = figure.add_subplot()
        counts, (ratio_edges, entropy_edges) = self.histogram.double().numpy(), self.edges.exp().numpy()
        gate = self.objective.entropy_ratio or EntropyRatioClip()
        bands = {
            "entropy-ratio gate": ("x", (1 - gate.beta_low, 1 + gate.beta_high), "#D55E00"),
            f"{type(self.objective.ratio).__name__}'s bounds": ("y", _ratio_bounds(self.objective), "#0072B2"),
        }
        handles = []
        for name, (direction, bounds, color) in bands.items():
            drawn = [bound for bound in bounds if bound is not None]
            for bound in drawn:
                line = axes.axvline if direction == "x" else axes.axhline
                line(bound, color=color, linewidth=1.2, linestyle="--")
            if drawn:
                handles.append(Patch(color=color, label=f"{name}: {', '.join(f'{bound:.4g}' for bound in drawn)}"))
        norm = LogNorm(vmin=1, vmax=max(2.0, float(counts.max())))
        counts[counts == 0] = float("nan")
        mesh = axes.pcolormesh(entropy_edges, ratio_edges, counts, norm=norm, cmap="viridis")
        axes.set(xscale="log", yscale="log")
        for axis, edges in ((axes.xaxis, entropy_edges), (axes.yaxis, ratio_edges)):
            axis.set_ticks(_ticks(float(edges[0]), float(edges[-1])))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.set(
            xlabel="entropy ratio, new over old", ylabel="importance ratio, new over old", title=self._shares_in_words()
        )
        axes.title.set_fontsize(10)
        if handles:
            axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False)
        figure.colorbar(mesh, label="tokens", format=FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _shares_in_words(self) -> str:
        words = {"kept": "kept", "clipped": "clipped alone", "dropped": "dropped alone", "both": "both"}
        shares = [f"{words[name]} {self.groups[name].share:.1%}" for name in words]
        return f"{self.groups['all'].tokens:,} tokens: {', '.join(shares)}"


def _ratio_bounds(objective: Objective) -> tuple[float | None, ...]:
    """Where the ratio rule's trust region ends, for rules that have one in the token's importance ratio."""
    if objective.ratio.needs_sequences:
        return (None, None)
    low, high = (getattr(objective.ratio, name, None) for name in ("eps_low", "eps_high"))
    return (None if low is None else 1 - low, None if high is None else 1 + high)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, and no more than fit beside each other."""
    if high / low > 3:
        numbers = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 30 else (1.0, 3.0)
        candidates = [digit * 10.0**power for power in range(-9, 9) for digit in numbers]
        return [number for number in candidates if low <= number <= high]
    step = next(step for step in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / step <= 9)
    return [round(step * number, 6) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


@torch.no_grad()
def diagnose(
    stats: TokenStats | PolicyLoss,
    *,
    old_logprob: Tensor,
    old_entropy: Tensor,
    advantages: Tensor,
    objective: str | Objective = "erc-dapo",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    generator: torch.Generator | None = None,
    bins: int = 60,
    span: float | None = None,
) -> Diagnosis:
    """Which tokens of an update the ratio rule clips and which the entropy-ratio gate drops, and what they look like.

    Args:
        stats: what `token_stats` or `policy_loss` returned for the new policy; its `logprob` and `entropy` `[*]` are
            read.
        old_logprob, old_entropy, advantages, mask, cu_seqlens, sequence_group, generator: as `policy_loss`.
        objective: its ratio rule and gate are applied; without a gate the default `EntropyRatioClip()` is, to show
            what it would drop.
        bins, span: the histogram's bins per side, and the largest |log ratio| on both of its axes; by default each axis
            ends where all but a thousandth of the tokens and the bounds of gate or ratio rule are inside.

    Returns:
        Diagnosis. Nothing is differentiable; counts are read by the host, which synchronises.

    Raises:
        ValueError, TypeError: naming the argument.

    >>> import torch, erc
    >>> stats = erc.TokenStats(torch.full((4,), -1.0), torch.tensor([1.0, 1.0, 1.3, 1.3]), torch.zeros(4))
    >>> found = erc.diagnose(
    ...     stats,
    ...     old_logprob=torch.tensor([-1.0, -2.0, -1.0, -2.0]),
    ...     old_entropy=torch.ones(4),
    ...     advantages=torch.ones(4),
    ... )
    >>> {name: group.tokens for name, group in found.groups.items()}
    {'kept': 1, 'clipped': 1, 'dropped': 1, 'both': 1, 'all': 4}
    """
    objective = resolve_objective(objective)
    if objective.entropy_ratio is None:
        objective = _gated(objective)
    if not isinstance(stats, (TokenStats, PolicyLoss)) or stats.logprob is None:
        raise TypeError(f"stats must be a TokenStats with log-probs or a PolicyLoss, got {type(stats).__name__}")
    if not isinstance(bins, int) or bins < 1 or not (span is None or span > 0):
        raise ValueError(f"bins must be a positive int and span positive or None, got {bins!r} and {span!r}")
    bare = Objective(objective.ratio, objective.entropy_ratio, reduction="none")
    arguments = TokenArguments(
        old_logprob, advantages, mask, old_entropy,
        cu_seqlens=cu_seqlens, generator=generator, sequence_group=sequence_group,
    )  # fmt: skip
    tokens = tokens_of(OPERATORS, stats.logprob, stats.entropy, bare, arguments)
    batch, losses = tokens.judged()
    logprob, entropy, flags = tokens.logprob, tokens.entropy, losses.flags
    active = batch.mask != 0
    assert batch.old_logprob is not None and batch.old_entropy is not None and bare.entropy_ratio is not None
    columns = {
        "entropy": entropy,
        "ratio": importance_ratio(logprob, batch.old_logprob),
        "entropy_ratio": entropy_ratio_of(entropy, batch.old_entropy, bare.entropy_ratio.eps),
        "advantage": batch.advantages,
    }
    clipped, dropped = (flags & _CLIPPED) != 0, (flags & int(TokenFlag.ERC_DROPPED)) != 0
    chosen = {
        "kept": ~clipped & ~dropped,
        "clipped": clipped & ~dropped,
        "dropped": dropped & ~clipped,
        "both": clipped & dropped,
        "all": torch.ones_like(active),
    }
    total = int(active.sum())
    groups = {name: _group(tokens & active, columns, total) for name, tokens in chosen.items()}
    gate = bare.entropy_ratio or EntropyRatioClip()
    bounds = {"ratio": _ratio_bounds(bare), "entropy_ratio": (1 - gate.beta_low, 1 + gate.beta_high)}
    logs = {name: columns[name][active].double().log() for name in bounds}
    spans = [span if span is not None else _span(logs[name], bounds[name]) for name in bounds]
    edges = torch.stack([torch.linspace(-span, span, bins + 1, dtype=torch.float64) for span in spans])
    histogram = _histogram(logs["ratio"], logs["entropy_ratio"], edges)
    return Diagnosis(bare, groups, histogram, edges, tuple(_causes(flags, active)))


def _span(logs: Tensor, bounds: tuple[float | None, ...]) -> float:
    """The largest |log ratio| worth showing: all but a thousandth of the tokens, and the bounds with some room."""
    marks = [1.3 * abs(math.log(bound)) for bound in bounds if bound is not None and bound > 0]
    finite = logs[logs.isfinite()].abs()
    if finite.numel():
        marks.append(1.05 * finite.sort().values[int(0.999 * (finite.numel() - 1))].item())
    return min(max([*marks, 0.01]), 20.0)


def _causes(flags: Tensor, active: Tensor) -> Iterator[str]:
    """What most of the active tokens have in common, where that points at the caller's side."""
    total = max(int(active.sum()), 1)
    shares = {
        side: int((((flags & int(flag)) != 0) & active).sum()) / total
        for side, flag in (("fell", TokenFlag.ERC_LOW), ("rose", TokenFlag.ERC_HIGH))
    }
    side = max(shares, key=shares.__getitem__)
    if shares[side] > SUSPICIOUS_SHARE and shares[side] > 0.95 * sum(shares.values()):
        yield (
            f"The gate drops {shares[side]:.1%} of the tokens because their entropy {side}, so hardly any policy "
            "gradient is left. Entropies that all move one way mostly come from old statistics at another temperature "
            "(or softcap or logit_scale) than the loss: compute old_logprob and old_entropy by erc.token_stats with "
            "the same arguments, in the same mode of the model (no dropout)."
        )


def _gated(objective: Objective) -> Objective:
    return Objective(
        objective.ratio, EntropyRatioClip(), reduction=objective.reduction, max_length=objective.max_length
    )


def _group(tokens: Tensor, columns: dict[str, Tensor], total: int) -> TokenGroup:
    of_group = {name: values[tokens].double() for name, values in columns.items()}
    entropy = of_group["entropy"]
    return TokenGroup(
        tokens=len(entropy),
        share=len(entropy) / max(total, 1),
        median_entropy=float(entropy.median()) if len(entropy) else float("nan"),
        **{name: float(values.mean()) for name, values in of_group.items()},
    )


def _histogram(log_ratio: Tensor, log_entropy_ratio: Tensor, edges: Tensor) -> Tensor:
    bins = edges.shape[1] - 1
    inner = edges[:, 1:-1].contiguous().to(log_ratio.device)
    row, column = (
        torch.bucketize(values, between, right=True)
        for values, between in zip((log_ratio, log_entropy_ratio), inner, strict=True)
    )
    return torch.bincount(row * bins + column, minlength=bins * bins).view(bins, bins).cpu()
