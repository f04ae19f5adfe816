"""Importing this module is `erc.integrations.verl.install()`, for settings that name a module: verl's
`actor_rollout_ref.model.external_lib`.
"""

from erc.integrations.verl import install

install()
