"""Layer 4: importing this module is `erc.integrations.verl.install()`, for settings that name a module:
`actor_rollout_ref.model.external_lib`, or `VERL_USE_EXTERNAL_MODULES` in the environment.
"""

from erc.integrations.verl import install

install()
