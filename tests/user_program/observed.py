"""A program run once, plainly or under a monitor, and everything of it that its author can observe.

A program is a function of a `Run`. It makes its model, opens `run.block(model)` where its author would open a monitor, puts
each backward pass into `run.step()`, and tells in `run.note(...)` what its own hooks get. In a plain run the block does nothing.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torch_secorder
from model_state import state
from torch_secorder import FisherMonitor
from torch_secorder.errors import CurvatureError
from user_program.snapshots import Bits, difference, shown, snapshot

SquaredNorms = Mapping[str, Tensor]  # t_{n,p} of one step, by parameter


class Run:
    """One run of a program: what it is given to say what happens, and what was observed.

    Attributes:
        calls: what the program's own hooks noted, in order.
        packed: what its hooks for saved tensors were given to keep.
        facts: everything else, by a name that says when it was looked at and what it is.
        warnings: category and text of each warning.
        refusals: the texts of the library's errors.
        monitor: the program's, in a watched run.
        expected: in a plain run, the squared norms that a monitor has to find in each step.
    """

    def __init__(self, watched: bool):
        self.watched = watched
        self.calls: list[tuple[str, Any]] = []
        self.packed: list[Any] = []
        self.facts: dict[str, Any] = {}
        self.warnings: list[tuple[type[Warning], str]] = []
        self.refusals: list[str] = []
        self.monitor: FisherMonitor | None = None
        self.expected: list[SquaredNorms] = []
        self._model: nn.Module | None = None
        self._kept: dict[str, Tensor] = {}
        self._steps = 0
        self._settings = settings()

    @contextmanager
    def block(self, model: nn.Module, compiled: bool = False, **options: Any) -> Iterator[None]:
        """Where the author would write `with FisherMonitor(model, **options)`; a refusal at its end or start is kept.

        A watched step of `compiled` code runs as it was written, and so it does here where nothing watches.
        """
        self.look_at(model)
        parts = {**dict(model.named_modules()), **dict(model.named_parameters())}
        if self.watched:
            with self._refusals():
                self.monitor = FisherMonitor(model, **options)
                with self.monitor:
                    yield
        else:
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        same = {**dict(model.named_modules()), **dict(model.named_parameters())}
        self._fact("after the block: the same objects", {name: same.get(name) is part for name, part in parts.items()})

    def look_at(self, model: nn.Module) -> None:
        """Observe this model from now on, as a block does."""
        self._model = model

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except CurvatureError as error:
            self.refusals.append(str(error))

    @contextmanager
    def step(self) -> Iterator[None]:
        """A backward pass: a refusal at its end is kept, and all that it wrote is looked at."""
        with self._refusals():
            yield
        self._steps += 1
        self._look(f"after backward pass {self._steps}")

    def note(self, hook: str, *values: Any) -> None:
        """A hook of the program was called, with these values."""
        self.calls.append((hook, snapshot(values)))

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """Look at this tensor after each pass from now on: its gradient, its version, its numbers."""
        self._kept[name] = tensor
        return tensor

    def expect(self, squared_norms: Callable[[], SquaredNorms]) -> None:
        """What the next counted pass has to give; asked for in a plain run, where nothing can have gone wrong before."""
        if not self.watched:
            with torch.random.fork_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.expected.append(squared_norms())

    def finish(self) -> None:
        """Look at everything that is left."""
        self._look("at the end")
        if self._model is not None:
            for kind, values in state(self._model).items():
                if kind not in ("identities", "gradients"):  # two runs have two models; .grad is looked at above
                    self._fact(f"at the end: {kind}", values)

    def _look(self, when: str) -> None:
        model = self._model if self._model is not None else nn.Module()
        named = [*model.named_parameters(), *model.named_buffers()]
        self._fact(f"{when}: .grad", {name: tensor.grad for name, tensor in named})
        self._fact(f"{when}: version", {name: tensor._version for name, tensor in named})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            self._fact(f"{when}: .grad", {name: kept.grad for name, kept in self._kept.items()})
        self._fact(f"{when}: version", {name: kept._version for name, kept in self._kept.items()})
        self._fact(f"{when}: value", self._kept)
        self._fact(when, random_states())
        changed = {name: now if now != self._settings[name] else "unchanged" for name, now in settings().items()}
        self._fact(f"{when}: setting", changed)

    def _fact(self, when: str, values: Mapping[str, Any]) -> None:
        self.facts.update({f"{when} of {name!r}": snapshot(value) for name, value in values.items()})


def random_states() -> dict[str, Any]:
    kind, numbers, *position = np.random.get_state()
    return {
        "torch's random state": torch.get_rng_state(),
        "python's random state": random.getstate(),
        "numpy's random state": (kind, numbers.tobytes(), *position),
    }


def settings() -> dict[str, Any]:
    """What a library might set for a while and forget."""
    return {
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "hooks for saved tensors": torch._C._autograd._top_saved_tensors_default_hooks(True) is not None,
        "dispatch modes": len(torch.utils._python_dispatch._get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
        "anomaly mode": torch.is_anomaly_enabled(),
    }


def observed(program: Callable[[Run], None], watched: bool) -> Run:
    """A run of the program from the same random states, with every warning."""
    run, always = Run(watched), torch.is_warn_always_enabled()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    torch.set_warn_always(True)  # else the first of two runs would have a warning, and the second not
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            program(run)
            run.finish()
    finally:
        torch.set_warn_always(always)
    run.warnings = [(warning.category, str(warning.message)) for warning in seen]
    return run


# Two runs beside each other


def differences(watched: Run, plain: Run) -> list[str]:
    """One line for each thing that the author would see differ under the monitor."""
    found = [*of_calls(watched, plain), *of_packed(watched, plain), *of_warnings(watched, plain)]
    for fact in {**plain.facts, **watched.facts}:
        if fact not in watched.facts or fact not in plain.facts:
            found.append(f"{fact}: {'missing' if fact in plain.facts else 'only'} under the monitor")
        elif words := difference(watched.facts[fact], plain.facts[fact]):
            found.append(f"{fact}: {words}")
    return found


def of_calls(watched: Run, plain: Run) -> Iterator[str]:
    counts, expected = (Counter(name for name, _ in run.calls) for run in (watched, plain))
    for name in expected | counts:
        if counts[name] != expected[name]:
            yield f"{name} was called {counts[name]} times for {expected[name]}"
    for number, (mine, theirs) in enumerate(zip_longest(watched.calls, plain.calls), 1):
        if mine is None or theirs is None or mine[0] != theirs[0]:
            names = [call[0] if call else "nothing" for call in (mine, theirs)]
            yield f"call {number} of a hook: {names[0]} for {names[1]}"
            return
        if words := difference(mine[1], theirs[1]):
            yield f"call {number} of a hook, {mine[0]}: {words}"
            return


def of_packed(watched: Run, plain: Run) -> Iterator[str]:
    """All that is kept for backward is packed as it was; the library may have values that the program holds kept once more."""
    rest = iter(watched.packed)
    for number, tensor in enumerate(plain.packed, 1):
        if tensor not in rest:  # which takes all before it too
            yield f"saved tensor {number} isn't packed in its turn: {shown(tensor)}"
            return
    own = set(numbers_in([*plain.calls, *plain.packed]))
    for tensor in watched.packed:
        if tensor.numbers not in own:
            yield f"a tensor is packed that isn't the program's: {shown(tensor)}"


def numbers_in(value: Any) -> Iterator[bytes]:
    if isinstance(value, Bits):
        yield value.numbers
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from numbers_in(part)


def of_warnings(watched: Run, plain: Run) -> Iterator[str]:
    """The user's own warnings are the same; the library may add some of its own categories."""
    ours = {value for value in vars(torch_secorder.errors).values() if isinstance(value, type)}
    mine = [warning for warning in watched.warnings if warning[0] not in ours]
    for extra in (Counter(mine) - Counter(plain.warnings)).elements():
        yield f"a warning under the monitor only: {shown(extra)}"
    for lost in (Counter(plain.warnings) - Counter(mine)).elements():
        yield f"a warning is missing under the monitor: {shown(lost)}"


def assert_unnoticed(watched: Run, plain: Run) -> None:
    """Fail with everything that differs, the first lines of it in full."""
    found = differences(watched, plain)
    said = f" (the library said: {'; '.join(watched.refusals)[:300]})" if watched.refusals else ""
    more = f"\n... and {len(found) - 12} more" if len(found) > 12 else ""
    assert not found, f"the program runs otherwise under the monitor{said}:\n" + "\n".join(found[:12]) + more
