"""In-Context RLVR in a trainer that repeats one prompt for every rollout of a group: which rollout sees what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from erc.rlvr.demonstrations import (
    Demonstration,
    DemonstrationPool,
    InContextWording,
    Message,
    group_prompts,
)


@dataclass(frozen=True)
class InContextRollouts:
    """Demonstrated and plain rollouts of every group, by their place in it (arXiv 2603.09803).

    The demonstrations of a generation batch follow from `seed` and the number of the batch alone, so every process of a
    run, and a run that was resumed, shows the same ones without communication.

    Attributes:
        pool: where demonstrations are drawn from, once for each generation batch, for all of its prompts.
        demonstrated: how many rollouts of a group see demonstrations, the first ones; 6 of 8 in the paper.
        per_rollout: how many each of them sees.
        template: "in-context" or "multi-round", as `erc.rlvr.with_demonstrations`.
        wording: the words of "in-context".
        tokenizer, max_tokens: a budget for the whole prompt, as `erc.rlvr.with_demonstrations`.
        seed: of the draws.

    >>> pool = DemonstrationPool((Demonstration("1+1?", "2", "2"), Demonstration("2+3?", "5", "5")))
    >>> shown = InContextRollouts(pool, demonstrated=1, template="multi-round")
    >>> [len(shown.prompt([{"role": "user", "content": "2+2?"}], rollout, group_size=2, batch=0)) for rollout in (0, 1)]
    [3, 1]
    """

    pool: DemonstrationPool
    demonstrated: int = 6
    per_rollout: int = 1
    template: str = "in-context"
    wording: InContextWording | None = None
    tokenizer: Any = None
    max_tokens: int | None = None
    seed: int = 0

    def demonstrations(self, batch: int) -> list[Demonstration]:
        """The `demonstrated * per_rollout` demonstrations of generation batch `batch`.

        Raises:
            ValueError: where the pool holds fewer.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch)
        return self.pool.sample(self.demonstrated * self.per_rollout, generator)

    def prompt(self, messages: Sequence[Message], rollout: int, group_size: int, batch: int) -> list[Message]:
        """What rollout `rollout` of a group of `group_size` is asked instead of `messages`.

        Raises:
            ValueError: for `demonstrated` above `group_size`, a rollout outside the group, or messages that
                `erc.rlvr.with_demonstrations` refuses.
        """
        if not 0 <= rollout < group_size:
            raise ValueError(f"rollout must be in [0, group_size={group_size}), got {rollout}")
        prompts = group_prompts(
            messages,
            self.demonstrations(batch),
            group_size,
            self.demonstrated,
            per_rollout=self.per_rollout,
            template=self.template,
            wording=self.wording,
            tokenizer=self.tokenizer,
            max_tokens=self.max_tokens,
        )
        return prompts.rollout[rollout]
