"""For `external_lib`: the process group of a worker, made before verl asks PyTorch for "cpu:gloo,cpu:gloo", which it
refuses."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch.distributed as dist

if os.environ.get("WG_BACKEND") == "ray" and "RANK" in os.environ and not dist.is_initialized():
    dist.init_process_group("cpu:gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))

if find_spec("trl") is not None:  # verl looks there for a name that TRL 1.x no longer has
    import trl

    if not hasattr(trl, "AutoModelForCausalLMWithValueHead"):
        trl.AutoModelForCausalLMWithValueHead = type("AutoModelForCausalLMWithValueHead", (), {})
