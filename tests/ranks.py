"""Work on the ranks of a gloo group, in processes that the test starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(work: Callable[..., Any], world: int, path: Path) -> list[Any]:
    """What ``work(rank, world)`` returns on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (work, world, port, path), nprocs=world)
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[..., Any], world: int, port: int, path: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world), path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
