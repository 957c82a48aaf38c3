"""Every rank watches its own share of the data, and one prints the table of all of it.

Run it with ``torchrun --nproc-per-node 2 examples/distributed.py``; without torchrun it is a single rank. With ``--shard``
each rank holds a part of every parameter (FSDP2), else all of them (DistributedDataParallel); the table is the same.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from torch_secorder import FisherMonitor

ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1"}


def main() -> None:
    """One rank's part."""
    os.environ.update({name: value for name, value in ALONE.items() if name not in os.environ})
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    images, labels = torch.randn(200, 20), torch.randint(3, (200,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    model = fully_shard(model) if "--shard" in sys.argv else DistributedDataParallel(model)
    data = TensorDataset(images, labels)
    loader = DataLoader(data, batch_size=25, sampler=DistributedSampler(data, shuffle=False))
    loss_fn = nn.CrossEntropyLoss()
    with FisherMonitor(model) as monitor:
        for x, y in loader:
            loss_fn(model(x), y).backward()
    own = monitor.n_samples
    report = monitor.report(sync=True)  # all ranks have to ask
    if dist.get_rank() == 0:
        print(f"{own} samples on this rank, {report.attrs['n_samples']} on all of {dist.get_world_size()}")
        print(report[["fisher_trace", "fisher_trace_stderr"]].to_string(float_format="{:.5f}".format))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
