"""Functions on several gloo processes of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """`body(rank, *args)` of each rank; `body` is a function of a module."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_run_rank, args=(world, port, results, body, args), nprocs=world)
        return [results[rank] for rank in range(world)]


def _run_rank(rank: int, world: int, port: int, results: dict, body: Callable[..., Any], args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        results[rank] = body(rank, *args)
    finally:
        dist.destroy_process_group()
