"""verl on CPUs, through verl's own registries only: its Ray trainers, its FSDP2 engine, and rollouts by transformers.

`VERL_USE_EXTERNAL_MODULES=examples.verl_cpu.plugin` makes every process that imports verl load the platform, the engine
and the rollout; `actor_rollout_ref.model.external_lib=[examples.verl_cpu.process_group,erc.integrations.verl_plugin]`
the rest. For tests and small trials: the recipes' `--smoke` forms run on it.
"""
