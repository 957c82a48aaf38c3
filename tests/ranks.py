"""Work on the ranks of a gloo group, in processes that the test starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from processes import fresh


def on_ranks(work: Callable[..., Any], world: int, path: Path) -> list[Any]:
    """What ``work(rank, world)`` returns on each rank."""
    mp.start_processes(_rank, (work, world, path), nprocs=world, start_method=fresh().get_start_method())
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(rank: int, work: Callable[..., Any], world: int, path: Path) -> None:
    torch.set_num_threads(1)
    # The ranks meet in a file of the test's own: a port that was free may be taken by the time that they meet.
    dist.init_process_group("gloo", init_method=f"file://{path / 'ranks'}", rank=rank, world_size=world)
    try:
        torch.save(work(rank, world), path / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
