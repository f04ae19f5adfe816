"""Losses of sequences that are split over ranks, for `test_sequence_group`: what each rank computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import erc

B, T, VOCAB, WIDTH = 4, 12, 19, 5
BOUNDARIES = {1: (0, 12), 2: (0, 5, 12), 3: (0, 4, 9, 12), 4: (0, 3, 3, 8, 12)}
"""The columns of `[B, T]` rows that each rank holds: uneven parts, one of them empty."""
LENGTHS = (12, 7, 2, 0)
"""The third sequence lies on the first rank alone, the last one has no active token."""


@dataclass(frozen=True)
class MeanRatio(erc.RatioRule):
    """A rule whose value for a token has a gradient in every token of the sequence, and so crosses ranks."""

    needs_sequences = True

    def terms(self, inputs: erc.RatioInputs) -> erc.RatioTerms:
        mean = inputs.sequences.mean(inputs.logprob - inputs.old_logprob, inputs.mask)
        loss = -inputs.advantage * inputs.sequences.expand(mean).exp()
        nowhere = torch.zeros_like(loss, dtype=torch.bool)
        return erc.RatioTerms(loss, nowhere, nowhere)


def _corrected(**bounds: Any) -> erc.Objective:
    return erc.Objective(erc.NoClip(), rollout_correction=erc.RolloutCorrection(**bounds))


OBJECTIVES = {
    **{name: erc.objective(name) for name in ("erc-gspo", "luspo", "erc-gmpo", "vespo", "grpo", "erc-dapo")},
    "dr-grpo": erc.objective("dr-grpo", max_length=T),
    "entropy bonus": erc.objective("erc-gspo", ratio=erc.GSPO(0.05, 0.05), entropy_coef=0.1),
    "off-policy mask": erc.Objective(erc.NoClip(), off_policy_mask=erc.OffPolicySequenceMask(0.02)),
    "sequence weight": _corrected(level="sequence", high=1.1),
    "geometric mask": _corrected(kind="mask", level="geometric", low=0.95, high=1.1),
    "rule of one's own": erc.Objective(MeanRatio(), reduction="seq-mean-token-mean"),
}


def problem() -> dict[str, Tensor]:
    """Whole sequences, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, VOCAB, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (B, T), generator=generator)
    stats = erc.reference.token_stats(logits, labels)
    noise = [0.2 * torch.randn(B, T, generator=generator, dtype=torch.float64) for _ in range(3)]
    return {
        "logits": logits,
        "labels": labels,
        "old_logprob": stats.logprob + noise[0],
        "rollout_logprob": stats.logprob + noise[0] + noise[1],
        "old_entropy": stats.entropy * (1 + 0.3 * noise[2]),
        "advantages": torch.tensor([1.5, -1.0, 0.7, 1.0], dtype=torch.float64),
        "mask": (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double(),
    }


def part(tensor: Tensor, rank: int, world: int) -> Tensor:
    """A rank's columns of `[B, T, ...]` rows."""
    return tensor[:, slice(*BOUNDARIES[world][rank : rank + 2])]


def packed(tensor: Tensor, mask: Tensor) -> Tensor:
    return tensor[mask != 0]


def offsets(mask: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).long().cumsum(0)])


def arguments(rank: int, world: int, form: str) -> dict[str, Tensor]:
    """What a rank passes: its columns, packed without padding in the packed form."""
    given = problem()
    advantages = given.pop("advantages")
    given = {name: part(tensor, rank, world) for name, tensor in given.items()}
    if form == "packed":
        mask = given.pop("mask")
        given = {name: packed(tensor, mask) for name, tensor in given.items()} | {"cu_seqlens": offsets(mask)}
    return given | {"advantages": advantages[:, None]}  # of a rank whose tokens are as many as sequences too


def loss_and_gradient(objective: erc.Objective, given: dict[str, Tensor], **more: Any) -> tuple[float, Tensor]:
    given = dict(given)
    logits, labels = given.pop("logits").clone().requires_grad_(), given.pop("labels")
    out = erc.policy_loss(logits, labels, objective=objective, **given, **more)
    out.loss.backward()
    return out.loss.item(), logits.grad


def split_losses(rank: int, world: int) -> dict[str, Any]:
    """Loss and gradient of every objective in every form, and what a call without the group makes of it."""
    results = {}
    for form in ("padded", "packed"):
        given = arguments(rank, world, form)
        for name, objective in OBJECTIVES.items():
            results[form, name] = loss_and_gradient(objective, given, sequence_group=dist.group.WORLD)
            if form == "padded" and name not in ("erc-dapo",):
                results["alone", name] = loss_and_gradient(objective, given)
    results["linear"] = _linear(rank, world)
    results["objective_loss"] = _objective_loss(rank, world)
    results["errors"] = _errors(rank, world)
    return results


def head() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, WIDTH, generator=generator, dtype=torch.float64)
    return hidden, torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)


def _linear(rank: int, world: int) -> tuple[float, Tensor, Tensor]:
    given = arguments(rank, world, "padded")
    del given["logits"]
    hidden, weight = head()
    hidden, weight = part(hidden, rank, world).clone().requires_grad_(), weight.requires_grad_()
    out = erc.linear_policy_loss(
        hidden, weight, objective=OBJECTIVES["erc-gspo"], sequence_group=dist.group.WORLD, **given
    )
    out.loss.backward()
    return out.loss.item(), hidden.grad, weight.grad


def _objective_loss(rank: int, world: int) -> float:
    given = arguments(rank, world, "packed")
    stats = erc.token_stats(given.pop("logits"), given.pop("labels"))
    objective = OBJECTIVES["erc-gmpo"]
    out = erc.objective_loss(
        stats.logprob, stats.entropy, objective=objective, sequence_group=dist.group.WORLD, **given
    )
    return out.loss.item()


def _errors(rank: int, world: int) -> list[str]:
    group = dist.group.WORLD
    given = arguments(rank, world, "padded")
    flat = {name: tensor.flatten(0, 1) for name, tensor in given.items() if name != "advantages"}
    flat["advantages"] = torch.ones(len(flat["mask"]), dtype=torch.float64)
    calls = [
        lambda: loss_and_gradient(OBJECTIVES["erc-dapo"], flat, sequence_group=group),
        lambda: loss_and_gradient(erc.objective("dr-grpo"), given, sequence_group=group),
        lambda: loss_and_gradient(erc.objective("kl-cov"), given, sequence_group=group),
        lambda: loss_and_gradient(
            replace(OBJECTIVES["grpo"], high_entropy=erc.HighEntropyMask(0.2)), given, sequence_group=group
        ),
    ]
    messages = []
    for call in calls:
        try:
            call()
            messages.append("no error")
        except ValueError as error:
            messages.append(str(error))
    return messages
