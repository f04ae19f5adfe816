"""What the two papers' scripts set, in one place for both trainers, and the same training at the size of a laptop. The
losses are presets: `erc-dapo-paper`, `erc-gppo-paper`, `ic-dapo-paper`.

Sources: `recipe/dapo/1_5B_perf_run_dapo_ours_math_szp_ae_dapo_erc_1_05.sh` of github.com/Kwai-Klear/ERC (arXiv
2512.05591) and `verl/recipe/dapo/run/run_icdapo_r1_1.5b.sh` of github.com/Mithas-114/IC-DAPO (arXiv 2603.09803).
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

import erc

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


@dataclass(frozen=True)
class Scale:
    """Sizes of a training. Groups with equal rewards are left out of the `generated` prompts of a batch until `trained`
    are left; a batch makes `trained / per_update` updates, so all but the first start from another policy than the
    rollout's."""

    generated: int = 256
    trained: int = 128
    per_update: int = 16
    rollouts: int = 8
    prompt_tokens: int = 4096
    response_tokens: int = 16384
    learning_rate: float = 1e-6
    warmup_steps: int = 10
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    temperature: float = 1.0
    batches: int = 1000

    @property
    def updates(self) -> int:
        """Of one batch."""
        return self.trained // self.per_update


ERC = Scale()
IN_CONTEXT = Scale(prompt_tokens=8192)  # a demonstration stands in front of the question
SMOKE = Scale(
    generated=16,
    trained=8,
    per_update=4,
    prompt_tokens=1024,  # of characters
    response_tokens=4,
    learning_rate=1e-2,
    warmup_steps=2,
    batches=8,
)


def check(recipe: str) -> None:
    """Refuses a name that is no objective before anything is loaded, in one line."""
    try:
        erc.objective(recipe)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


DEMONSTRATED, DEMONSTRATIONS_EACH, TEMPLATE = 6, 1, "in-context"
"""In-Context RLVR: how many of the 8 rollouts see demonstrations, how many each, and how."""
