"""For `external_lib`: the recipes' objectives among verl's losses, `erc-dapo-paper` as `erc_dapo_paper`."""

from __future__ import annotations

from verl.trainer.ppo.core_algos import register_policy_loss

from erc.integrations.verl import install, policy_loss_function
from examples.recipes.paper import objective

install()
for name in ("erc-dapo-paper", "erc-gppo-paper", "ic-dapo-paper"):
    register_policy_loss(name.replace("-", "_"))(policy_loss_function(objective(name)))
