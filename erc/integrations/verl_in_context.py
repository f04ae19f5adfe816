"""In-Context RLVR (arXiv 2603.09803) in verl, as an agent loop: every rollout of a group is asked a prompt of
its own. verl takes the loop from a file of settings, `actor_rollout_ref.rollout.agent.agent_loop_config_path`:

    - name: erc_in_context
      _target_: erc.integrations.verl_in_context.InContextAgentLoop
      pool: demonstrations.jsonl
      demonstrated: 6

and uses it for the rows of the training set whose `agent_name` is `erc_in_context`. Rows for validation name
`single_turn_agent`, or nothing. Needs verl's trainer of today (`trainer.use_v1=True`), which numbers the rollouts of a
prompt. Log-probs and old log-probs are conditioned on the prompt that the rollout saw.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from erc.integrations.versions import require
from erc.rlvr.demonstrations import DemonstrationPool, InContextWording
from erc.rlvr.in_context import InContextRollouts

require("verl", (0, 9), (0, 10))

from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop  # noqa: E402

_pool = cache(DemonstrationPool.from_jsonl)


class InContextAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, after a prompt that `InContextRollouts` decides.

    Args:
        pool: path of a file that `DemonstrationPool.from_jsonl` reads.
        demonstrated, per_rollout, template, seed: as `InContextRollouts`.
        wording: `opening`, `example` and `closing` of `InContextWording`.
        The others: verl's. The budget of a prompt is `rollout.prompt_length`.

    Raises:
        ValueError: for settings or rows that do not make prompts, naming them.
    """

    def __init__(
        self,
        *args: Any,
        pool: str,
        demonstrated: int = 6,
        per_rollout: int = 1,
        template: str = "in-context",
        wording: dict[str, str] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.in_context = InContextRollouts(
            _pool(pool),
            demonstrated,
            per_rollout,
            template,
            None if wording is None else InContextWording(**wording),
            tokenizer=self.tokenizer,
            max_tokens=self.prompt_length,
            seed=seed,
        )

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """One rollout."""
        if "session_id" not in kwargs:
            raise ValueError("erc_in_context needs trainer.use_v1=True: the older trainer does not number rollouts")
        kwargs["raw_prompt"] = self.in_context.prompt(
            list(kwargs["raw_prompt"]), kwargs["session_id"], self.rollout_config.n, int(kwargs["global_steps"])
        )
        return await super().run(sampling_params, **kwargs)
