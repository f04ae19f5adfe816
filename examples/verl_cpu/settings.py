"""The settings under which verl's `main_ppo` trains on the CPUs of one machine, with a Ray of its own."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROCESS_GROUP = "examples.verl_cpu.process_group"


def environment(ray_folder: str) -> dict[str, str]:
    """Of the process that runs `main_ppo`; Ray hands it to the others. `ray_folder` is for Ray's sockets, whose names
    have at most 107 characters."""
    return with_this_repository() | {
        "VERL_USE_EXTERNAL_MODULES": "examples.verl_cpu.plugin",
        "RAY_TMPDIR": ray_folder,
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }


def with_this_repository() -> dict[str, str]:
    """This process's environment, with this repository where the workers look for modules."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def overrides(workers: int, *external_libs: str) -> list[str]:
    """Of verl's settings, for `workers` actor processes; they come after a recipe's own."""
    libs = ",".join([PROCESS_GROUP, *external_libs])
    return [
        "ray_kwargs.ray_init.num_cpus=16",  # logical ones
        f"+ray_kwargs.ray_init.num_gpus={workers}",
        "+ray_kwargs.ray_init.object_store_memory=200000000",
        "+ray_kwargs.ray_init.include_dashboard=False",
        "data.dataloader_num_workers=0",
        f"actor_rollout_ref.model.external_lib=[{libs}]",
        "+actor_rollout_ref.model.override_config.attn_implementation=eager",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "actor_rollout_ref.actor.strategy=fsdp2",  # FSDP1 asks for an accelerator
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",
        "actor_rollout_ref.rollout.name=generate",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
        "actor_rollout_ref.rollout.agent.num_workers=1",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"trainer.n_gpus_per_node={workers}",
        "trainer.nnodes=1",
        "trainer.device=cpu",
    ]
