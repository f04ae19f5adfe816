"""Layer 3: which tokens the ratio rule clipped and which the entropy-ratio gate dropped, as a table and a plot.

The paper's analysis (arXiv 2512.05591): PPO's clip catches about 0.02 % of the tokens, the gate about 20 %, most of
them tokens of low entropy, and the two barely overlap.
"""

from __future__ import annotations

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
    `edges` `[bins + 1]`; what lies beyond the edges is in the outermost bins. `causes` are sentences on what probably
    went wrong; a healthy update has none.
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
        """The joint histogram with the bounds of the gate, as a matplotlib figure; saved where `path` is given.

        Raises:
            ImportError: without matplotlib.
        """
        try:
            from matplotlib.colors import LogNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Diagnosis.plot needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.add_subplot()
        edges = self.edges.exp().numpy()
        counts = self.histogram.double().numpy()
        mesh = axes.pcolormesh(
            edges, edges, counts, norm=LogNorm(vmin=0.9, vmax=max(1.0, counts.max())), cmap="viridis"
        )
        gate = self.objective.entropy_ratio or EntropyRatioClip()
        for bound in (1 - gate.beta_low, 1 + gate.beta_high):
            axes.axvline(bound, color="tab:red", linewidth=1, linestyle="--")
        axes.set(xscale="log", yscale="log", xlabel="entropy ratio, new over old", ylabel="importance ratio")
        figure.colorbar(mesh, label="tokens")
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


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
    span: float = 1.5,
) -> Diagnosis:
    """Which tokens of an update the ratio rule clips and which the entropy-ratio gate drops, and what they look like.

    Args:
        stats: what `token_stats` or `policy_loss` returned for the new policy; its `logprob` and `entropy` `[*]` are
            read.
        old_logprob, old_entropy, advantages, mask, cu_seqlens, sequence_group, generator: as `policy_loss`.
        objective: its ratio rule and gate are applied; without a gate the default `EntropyRatioClip()` is, to show
            what it would drop.
        bins, span: the histogram's bins a side, and the largest |log ratio| on its axes.

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
    if not isinstance(bins, int) or bins < 1 or not span > 0:
        raise ValueError(f"bins must be a positive int and span positive, got {bins!r} and {span!r}")
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
    edges = torch.linspace(-span, span, bins + 1, dtype=torch.float64)
    return Diagnosis(bare, groups, _histogram(columns, active, edges), edges, tuple(_causes(flags, active)))


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


def _histogram(columns: dict[str, Tensor], active: Tensor, edges: Tensor) -> Tensor:
    bins = len(edges) - 1
    inner = edges[1:-1].to(active.device)
    row, column = (
        torch.bucketize(columns[name][active].double().log(), inner, right=True) for name in ("ratio", "entropy_ratio")
    )
    return torch.bincount(row * bins + column, minlength=bins * bins).view(bins, bins).cpu()
