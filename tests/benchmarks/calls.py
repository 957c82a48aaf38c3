"""How often the library's own functions call each other in one step, and how often that leads into another file.

``PYTHONPATH=tests python -m benchmarks.calls`` prints a table for a Linear, a ReLU and a Linear with five
samples. A call counts wherever Python enters a function of the package, comprehensions and resumed generators included; a change
of file counts where the function entered is in another file than the one entered before.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import torch_secorder
from torch_secorder import FisherMonitor, empirical_fisher_trace, generalized_fisher_trace

PACKAGE = str(Path(torch_secorder.__file__).parent)


@dataclass
class Calls:
    """The calls of one step.

    Attributes:
        functions: function -> how often it was entered.
        files: the file of each call, in order.
    """

    functions: Counter[CodeType] = field(default_factory=Counter)
    files: list[str] = field(default_factory=list)

    @property
    def changes(self) -> int:
        """How often a call led into another file than the call before it."""
        return sum(before != after for before, after in zip(self.files, self.files[1:], strict=False))

    def row(self) -> str:
        """The numbers as a line of a table."""
        numbers = (len(self.files), len(self.functions), len(set(self.files)), self.changes)
        return " | ".join(f"{number:>9}" for number in numbers)

    def listing(self) -> str:
        """Every function with its number of calls, the most called first."""
        return "\n".join(
            f"{count:>5}  {Path(code.co_filename).relative_to(PACKAGE)}:{code.co_firstlineno} {code.co_name}"
            for code, count in self.functions.most_common()
        )


@contextmanager
def counted() -> Iterator[Calls]:
    """The calls of the package's functions that are made inside, without those that a collection of earlier garbage makes."""
    calls, collects = Calls(), gc.isenabled()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls.functions[frame.f_code] += 1
            calls.files.append(frame.f_code.co_filename)

    gc.disable()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()


def model_and_batch() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The model, inputs and targets that are counted with."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(5, 8), torch.randint(3, (5,))


def steps() -> dict[str, Callable[[], Calls]]:
    """What is counted, by name."""

    def monitor(number: int) -> Calls:
        model, x, y = model_and_batch()
        with FisherMonitor(model):
            for _ in range(number - 1):
                F.cross_entropy(model(x), y).backward()
            with counted() as calls:
                F.cross_entropy(model(x), y).backward()
        return calls

    def function(number: int, call: Callable[..., object]) -> Calls:
        model, x, y = model_and_batch()
        for _ in range(number - 1):
            call(model, x, y)
        with counted() as calls:
            call(model, x, y)
        return calls

    loss = nn.CrossEntropyLoss()
    empirical = lambda model, x, y: empirical_fisher_trace(model, loss, x, y)  # noqa: E731  # the same loss each time
    generalized = lambda model, x, y: generalized_fisher_trace(model, model(x), y)  # noqa: E731
    return {
        "monitor, step 1 (searches for samples)": lambda: monitor(1),
        "monitor, step 5 (checked)": lambda: monitor(5),
        "monitor, step 8 (steady)": lambda: monitor(8),
        "empirical_fisher_trace, call 1": lambda: function(1, empirical),
        "empirical_fisher_trace, call 4 (unchecked)": lambda: function(4, empirical),
        "generalized_fisher_trace, call 1": lambda: function(1, generalized),
        "generalized_fisher_trace, call 4": lambda: function(4, generalized),
    }


def main() -> None:
    """Print the table, and with a step's name as argument every function that the step calls."""
    if wanted := " ".join(sys.argv[1:]):
        print(next(count for name, count in steps().items() if wanted in name)().listing())
        return
    print(f"{'':45} | {'calls':>9} | {'functions':>9} | {'files':>9} | {'changes of file':>9}")
    for name, count in steps().items():
        print(f"{name:45} | {count().row()}")


if __name__ == "__main__":
    main()
