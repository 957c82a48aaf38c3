"""What a program is beside its code: what a monitor must say of it, as data."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch

from oracles import assert_equal, total, trace
from user_program.observed import Run, observed


@dataclass(frozen=True, eq=False)
class Program:
    """A program and its outcome: exact for the squared norms that it expects, or refused in these words.

    Attributes:
        refused: an expression for what each refused pass is told; "" if the monitor's numbers must be right.
        n_samples: how many samples count beside those of refused passes.
        dtype: in whose tolerance the numbers are right: float64 unless the program computes in less.
        rtol: instead of that, where `why` says so.
    """

    name: str
    run: Callable[[Run], None]
    refused: str = ""
    n_samples: int = 0
    dtype: torch.dtype = torch.float64
    rtol: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        assert bool(self.why) == (self.rtol is not None), "a tolerance has a reason"

    @cached_property
    def plain(self) -> Run:
        return observed(self.run, watched=False)

    @cached_property
    def watched(self) -> Run:
        return observed(self.run, watched=True)

    def forget(self) -> None:
        """Let go of both runs, which hold a model, a monitor and all that was noted."""
        self.__dict__.pop("plain", None)
        self.__dict__.pop("watched", None)

    def assert_outcome(self) -> None:
        """The monitor found what the loop over samples found, or refused what can't be found."""
        if self.refused:
            assert self.watched.refusals, f"nothing was refused; n_samples is {self.counted}"
            for text in self.watched.refusals:
                assert re.search(self.refused, text), text
            assert self.counted == self.n_samples, f"what is refused is left out; n_samples is {self.counted}"
        else:
            assert not self.watched.refusals, self.watched.refusals
            self._assert_exact()

    @property
    def counted(self) -> int:
        return self.watched.monitor.n_samples if self.watched.monitor else 0

    def _assert_exact(self) -> None:
        steps = self.plain.expected
        assert steps, "the program says what is expected of each of its steps"
        pooled = {name: torch.cat([step[name] for step in steps]) for name in steps[0]}
        n = len(next(iter(pooled.values())))
        assert self.counted == n, f"{self.counted} samples were counted for {n}"
        assert self.watched.monitor is not None
        found = self.watched.monitor.report()["fisher_trace"]
        assert list(found.index) == list(pooled), f"{list(found.index)} for {list(pooled)}"
        expected = trace(pooled)
        for name, value in expected.items():
            if self.rtol is None:
                assert_equal(torch.tensor(found[name]), value, total(expected), self.dtype)
            else:
                assert found[name] == pytest.approx(float(value), rel=self.rtol), name


class Programs(list[Program]):
    """Collects programs that are written as functions, under their names."""

    def add(self, **outcome: Any) -> Callable[[Callable[[Run], None]], Callable[[Run], None]]:
        def added(run: Callable[[Run], None]) -> Callable[[Run], None]:
            self.append(Program(run.__name__.replace("_", " "), run, **outcome))
            return run

        return added
