"""The bias of an importance ratio that compares a cut distribution with a full one: the figure of
docs/sampling_support.md.

Rows are synthetic: logits of a heavy-tailed next-token distribution whose peakedness varies as a language model's does,
from almost certain to a few nats. Tokens are drawn with top-p or top-k, and the policy that scores them is the one that
drew them: the right ratio is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import torch
import typer
from torch import Tensor

import erc

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOP_P = (0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
CLIP = (0.8, 1.28)


def rows(count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Logits `[count, vocab_size]`: Zipf's law to a random power, in random order, with noise."""
    ranks = torch.arange(1, vocab_size + 1).log()
    power = 0.8 + 2.2 * torch.rand(count, 1, generator=generator)
    logits = -power * ranks + 0.5 * torch.randn(count, vocab_size, generator=generator)
    return logits.gather(1, torch.rand(count, vocab_size, generator=generator).argsort(1))


def kept_tokens(logits: Tensor, top_p: float = 1.0, top_k: int | None = None) -> Tensor:
    """bool `[N, V]`: the fewest tokens whose mass reaches `top_p`, and no more than `top_k`."""
    p, order = logits.softmax(-1).sort(-1, descending=True)
    kept = p.cumsum(-1) - p < top_p
    if top_k is not None:
        kept[:, top_k:] = False
    return torch.zeros_like(kept).scatter(1, order, kept)


def ratios(logits: Tensor, kept: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Of tokens drawn from the kept ones by this very policy: the ratio over the full vocabulary, the ratio over the
    support, and the kept mass, `[N]` each."""
    cut = logits.masked_fill(~kept, -torch.inf)
    tokens = torch.multinomial(cut.softmax(-1), 1, generator=generator).squeeze(-1)
    rollout_logprob = cut.log_softmax(-1).gather(1, tokens[:, None]).squeeze(-1)
    stats = erc.token_stats(logits, tokens, support=erc.SamplingSupport.from_mask(kept))
    mass = (stats.logprob_full - stats.logprob).exp()
    return (stats.logprob_full - rollout_logprob).exp(), (stats.logprob - rollout_logprob).exp(), mass


def draw(path: Path, count: int = 4000, vocab_size: int = 4000, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = rows(count, vocab_size, generator)
    figure, (means, tokens) = plt.subplots(1, 2, figsize=(11, 3.6))
    by_p = [ratios(logits, kept_tokens(logits, top_p), generator) for top_p in TOP_P]
    for index, label, colour in ((0, "full vocabulary", "tab:red"), (1, "over the support", "tab:blue")):
        means.plot(TOP_P, [float(result[index].mean()) for result in by_p], "o-", color=colour, label=label)
    means.set(xlabel="top-p", ylabel="mean ratio of an unchanged policy", title="should be 1")
    for label, kept, colour in (
        ("top-p 0.95", kept_tokens(logits, 0.95), "tab:red"),
        ("top-p 0.7", kept_tokens(logits, 0.7), "tab:orange"),
        ("top-k 50", kept_tokens(logits, top_k=50), "tab:purple"),
    ):
        full = ratios(logits, kept, generator)[0].sort().values
        below = float((full < CLIP[0]).double().mean())
        tokens.plot(torch.linspace(0, 1, count), full, color=colour, label=f"{label}: {below:.0%} below {CLIP[0]}")
    tokens.axhline(CLIP[0], color="grey", linestyle=":")
    tokens.set(xlabel="share of tokens", ylabel="ratio over the full vocabulary", title="token by token")
    for axes in (means, tokens):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    out: Annotated[Path, typer.Option(help="Where the figure goes.")] = Path("docs/images/sampling_support.png"),
) -> None:
    draw(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
