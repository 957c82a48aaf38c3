"""Peak memory for a transformer of about 100 million parameters, in one piece: `python -m benchmarks.large`.

Each row is measured in a process of its own: the most that it holds above what it holds with the model loaded and the code
warmed up on another batch of four tokens. Freed memory goes back to the system at once, so that the peak is of what is in use.
"""

from __future__ import annotations

import argparse
import ctypes
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.memory import MIB, Peak, in_a_process
from benchmarks.results import save
from torch_secorder import FisherMonitor, fisher_report

SAMPLES, LENGTH, WORDS = 4, 128, 16384


class Language(nn.Module):
    """GPT-2 of the usual size, with a smaller vocabulary: a hundred million parameters."""

    def __init__(self, layers: int):
        super().__init__()
        self.lm = GPT2LMHeadModel(GPT2Config(n_layer=layers, vocab_size=WORDS, use_cache=False, **OFF)).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm(ids).logits


OFF = {"bos_token_id": 0, "eos_token_id": 0}
Batch = tuple[Tensor, Tensor]


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def forward(model: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        loss_fn(model(batch[0]), batch[1])


def training_step(model: nn.Module, batch: Batch) -> None:
    loss_fn(model(batch[0]), batch[1]).backward()


def monitored_step(model: nn.Module, batch: Batch) -> None:
    with FisherMonitor(model):
        training_step(model, batch)


def report(model: nn.Module, batch: Batch, **options: Any) -> None:
    fisher_report(model, loss_fn, batch, parameters="all", progress=False, **options)


@dataclass(frozen=True)
class Row:
    """What is run, on how large a model and batch, and whether its parameters require gradients."""

    label: str
    run: Callable[[nn.Module, Batch], None]
    trains: bool = False
    layers: int = 12
    samples: int = SAMPLES


ROWS = {
    "forward": Row("forward alone, no graph", forward),
    "plain": Row("training step: gradients of all parameters", training_step, trains=True),
    "monitor": Row("the same in a FisherMonitor", monitored_step, trains=True),
    "report": Row("fisher_report, all frozen", report),
    "report, 4 MiB": Row("fisher_report, max_memory=4 MiB", partial(report, max_memory=4 * MIB)),
    "plain, 1 sample": Row("training step, one sample", training_step, trains=True, samples=1),
    "report, 1 sample": Row("fisher_report, one sample", report, samples=1),
    "plain, 4 layers": Row("training step, 4 layers", training_step, trains=True, layers=4),
    "report, 4 layers": Row("fisher_report, 4 layers", report, layers=4),
    "plain, 8 layers": Row("training step, 8 layers", training_step, trains=True, layers=8),
    "report, 8 layers": Row("fisher_report, 8 layers", report, layers=8),
}


def measured(name: str) -> dict[str, Any]:
    """One row, in this process, which should be a fresh one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    give_back_at_once()
    row = ROWS[name]
    model = Language(row.layers).requires_grad_(row.trains)
    row.run(model, batch(2, 2))
    model.zero_grad(set_to_none=True)
    data = batch(row.samples, LENGTH)
    with Peak() as peak:
        start = time.perf_counter()
        row.run(model, data)
        seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {"label": row.label, "mib": peak.bytes / MIB, "seconds": seconds, "parameters": parameters}


def give_back_at_once() -> None:
    """Have glibc map every large piece of memory for itself, whatever was freed before."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        assert libc.mallopt(option, 2**18)


def batch(n: int, length: int) -> Batch:
    ids = torch.randint(WORDS, (n, length))
    return ids, ids


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.large", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3, help="processes for each row (%(default)s)")
    parser.add_argument("--save", action="store_true", help="write the results")
    options = parser.parse_args(arguments)
    rows = {}
    for name in options.rows:
        several = [in_a_process(measured, name) for _ in range(options.repeats)]
        rows[name] = found = sorted(several, key=lambda row: row.get("mib", 0.0))[options.repeats // 2]
        told = f"{found['mib']:8.0f} MiB {found['seconds']:6.1f} s" if "mib" in found else found["verdict"]
        print(f"{ROWS[name].label:46}{told}", flush=True)
    if options.save:
        save("large", rows)


if __name__ == "__main__":
    main()
