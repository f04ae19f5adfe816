"""The CPU as one of verl's platforms, the FSDP2 engine on it, and the name "generate" for a rollout."""

from __future__ import annotations

import os
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from verl.plugin.platform import PlatformBase, set_platform


def cpu_platform() -> PlatformBase:
    """What verl asks of a platform, answered for a CPU. Ray counts its workers as GPUs, because verl's resource pools
    know only GPUs and NPUs: they are logical ones, `ray_kwargs.ray_init.num_gpus`."""
    device = SimpleNamespace(**vars(torch.cpu), mem_get_info=lambda *_: (0, 1), get_device_name=lambda: "CPU")
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved", "empty_cache"):
        setattr(device, name, lambda *_: 0)
    answers = {"device_name": "cpu", "vendor_name": "cpu", "device_module": device}
    methods = {name: lambda *_: None for name in PlatformBase.__abstractmethods__ - answers.keys()}
    methods |= {
        "is_available": lambda *_: True,
        "current_device": lambda *_: "cpu",
        "device_count": lambda *_: 1,
        "nvtx_range": lambda *_: nullcontext(),
        "ray_resource_name": lambda *_: "GPU",
        "ray_noset_envvars": lambda *_: [],
        "visible_devices_envvar": lambda *_: "CUDA_VISIBLE_DEVICES",
        "communication_backend_name": lambda *_: "gloo",
        "is_ipc_supported": lambda *_: False,
        "get_device_capability": lambda *_: (None, None),
    }
    return type("CpuPlatform", (PlatformBase,), answers | methods)()


set_platform(cpu_platform())
# verl chooses an engine by device: FSDPEngineWithLMHead, registered for "cuda", takes its device from the platform.
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

from verl.workers.rollout import base  # noqa: E402
from verl.workers.rollout.replica import RolloutReplicaRegistry  # noqa: E402


def generate_replica() -> type:
    from examples.verl_cpu.rollout import GenerateReplica

    return GenerateReplica


base._ROLLOUT_REGISTRY["generate", "async"] = "examples.verl_cpu.rollout.GenerateRollout"
RolloutReplicaRegistry.register("generate", generate_replica)
