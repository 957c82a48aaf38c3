"""Processes that start with torch imported."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.context import BaseContext

# What takes seconds to import.
SLOW = ["pandas.testing", "pytest", "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch_secorder"]
SLOW += ["transformers.models.gpt2.modeling_gpt2"]


def fresh() -> BaseContext:
    """Its processes are forks of one that has imported, of the above, what this one has by the first call, and did nothing else.

    Where there is no such thing, they import all by themselves.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in SLOW if name in sys.modules])
    return context
