"""Programs whose model is wrapped: spread over ranks, or compiled."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from traps.exactness import numbers
from user_program.hooks import Hooked, post_accumulate_hooks, tensor_hooks
from user_program.observed import Run
from user_program.program import Program
from user_program.subjects import MLP, SQUARE, Subject

WRAPPED: list[Program] = []


@contextmanager
def one_rank() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'rank'}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def data_parallel(subject: Subject, hooked: Hooked, **options: Any) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        with one_rank():
            model = subject.model()
            hooked(run, model)
            wrapped = DistributedDataParallel(model, **options)
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            with run.block(wrapped):
                for x, y in subject.batches(3):
                    optimizer.zero_grad()
                    subject.expect(run, model, x, y)
                    with run.step():
                        numbers(wrapped(x), y).backward()
                    optimizer.step()

    return program


WRAPPED.append(Program("data parallel", data_parallel(MLP, tensor_hooks)))
WRAPPED.append(
    Program(
        "data parallel that looks for unused parameters",
        data_parallel(MLP, post_accumulate_hooks, find_unused_parameters=True),
    )
)
WRAPPED.append(Program("data parallel, searched", data_parallel(SQUARE, tensor_hooks)))


def compiled(how: str, backend: str, warm: bool) -> Callable[[Run], None]:
    """A compiled model; before the block, it may have run already."""

    def program(run: Run) -> None:
        torch._dynamo.reset()
        model = MLP.model()
        called: Any = model
        if how == "wrapped":
            called = torch.compile(model, backend=backend)
        elif how == "in place":
            model.compile(backend=backend)
        else:
            for layer in model:
                layer.compile(backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        if warm:
            x, y = MLP.batch()
            numbers(called(x), y).backward()
        post_accumulate_hooks(run, model)
        with run.block(called, compiled=True):
            for x, y in MLP.batches(3):
                optimizer.zero_grad()
                MLP.expect(run, model, x, y)
                with run.step():
                    numbers(called(x), y).backward()
                optimizer.step()
        torch._dynamo.reset()

    return program


for how, backend, warm in (
    ("wrapped", "eager", False),
    ("wrapped", "aot_eager", True),
    ("in place", "aot_eager", False),
    ("in place", "eager", True),
    ("by layer", "aot_eager", True),
    ("by layer", "eager", False),
):
    name = f"compiled {how} with {backend}{', before the block' if warm else ''}"
    WRAPPED.append(Program(name, compiled(how, backend, warm)))
