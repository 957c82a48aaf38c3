"""An exception, or a Ctrl-C, at any moment: the model is left as it was, and the next run is exact."""

from __future__ import annotations

import contextlib
import gc
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame

import torch_secorder
from faults.subjects import EMPIRICAL, WAYS, assert_exact, batch, loss_fn, model
from model_state import assert_unchanged, hooks, state
from modes import ModeInside
from oracles import assert_equal
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.autograd.engine import LIBRARY_THREADS


class AtOperation(ModeInside):
    """Interrupts the n-th operation of torch, the library's own included."""

    def __init__(self, n: int):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


class AtLine:
    """Interrupts at the n-th line of the library, or call of one of its functions.

    Not at lines where the interpreter itself sees to it that nothing interrupts, between a block and its beginning or end, nor in
    expressions that it may throw away half-way, nor in what goes on when an object goes: what is raised in those is lost in
    Python, or comes up as an error of whatever was being called.
    """

    QUIET = ("with ", "try:", "raise", "return self")

    def __init__(self, n: int):
        self.left, self._root = n, str(Path(torch_secorder.__file__).parent)

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self._root) or code.co_name in ("<genexpr>", "tensors"):
            return None
        if _in_del(frame):
            return None
        line = linecache.getline(code.co_filename, frame.f_lineno).lstrip()
        if event == "call" or (event == "line" and not line.startswith(self.QUIET)):
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def _in_del(frame: FrameType | None) -> bool:
    """Whether a frame runs because an object goes: a few calls deep at most."""
    for _ in range(4):
        if frame is None:
            return False
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def interrupt(way: str, moment: Callable[[int], Any], first: int, step: int) -> int:
    """Interrupt the way at every `step`-th moment; returns how many there were."""
    subject, run = model(), WAYS[way]
    right = run(subject)
    subject.zero_grad()
    before, n = state(subject), first
    while True:
        at = moment(n)
        with contextlib.suppress(KeyboardInterrupt), at:
            run(subject)
        if at.left > 0:
            return n
        subject.zero_grad()
        if any(hooks(subject).values()) or LIBRARY_THREADS or eval_frame._stance.stance != "default":
            gc.collect()  # at the first instruction of an __exit__: then hooks go with whoever held them
        assert_unchanged(before, subject)
        assert not LIBRARY_THREADS
        assert eval_frame._stance.stance == "default"
        if n % 3 == 0:
            assert_equal(run(subject), right, right.abs(), torch.float64)
            subject.zero_grad()
        n += step


@pytest.mark.slow
@pytest.mark.parametrize(("way", "step"), [(way, 7 if "report" in way or "empirical" in way else 29) for way in WAYS])
def test_interrupted_at_any_operation(way: str, step: int) -> None:
    assert interrupt(way, AtOperation, 1, step) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in a __del__, where Python goes on
@pytest.mark.parametrize("way", EMPIRICAL)
def test_interrupted_at_any_line(way: str) -> None:
    # A report takes the longest, and most of its lines are the monitor's too.
    assert interrupt(way, AtLine, 2, 131 if way == "fisher_report" else 53) > 3000


def test_an_interrupted_backward_pass_leaves_nothing_in_an_open_block() -> None:
    """However often: what a pass had collected is gone with it."""
    subject, (x, y) = model(), batch()
    with FisherMonitor(subject) as monitor:
        for n in range(4, 40, 4):
            with contextlib.suppress(KeyboardInterrupt), AtOperation(n):
                loss_fn(subject(x), y).backward()
            assert monitor._recorder is not None
            assert not monitor._recorder._passes.under_way
        loss_fn(subject(x), y).backward()
    assert monitor.n_samples == 4 or monitor.n_samples == 8  # the last interruption may have come too late


# Exceptions of the user's


class Mine(Exception):
    """An exception that nobody else raises."""


def raising(*_: Any) -> Any:
    raise Mine


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise Mine


def in_forward(subject: nn.Module) -> Any:
    return subject.norm.register_forward_hook(raising)


def in_a_prehook(subject: nn.Module) -> Any:
    return subject.head.register_forward_pre_hook(raising)


def in_backward(subject: nn.Module) -> Any:
    return subject.norm.register_forward_hook(lambda module, args, output: Backward.apply(output))


def in_a_hook_on_a_tensor(subject: nn.Module) -> Any:
    return subject.norm.register_forward_hook(lambda module, args, output: output.register_hook(raising) and None)


FAULTS = [in_forward, in_a_prehook, in_backward, in_a_hook_on_a_tensor]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("way", EMPIRICAL)
def test_an_exception_in_the_model(way: str, fault: Callable[[nn.Module], Any]) -> None:
    subject = model()
    before = state(subject)
    handle = fault(subject)
    with pytest.raises(Mine):
        EMPIRICAL[way](subject)
    handle.remove()
    subject.zero_grad()
    assert_unchanged(before, subject)
    assert_exact(way, subject)


def broken_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise Mine


def test_an_exception_in_the_loss() -> None:
    subject, (x, y) = model(), batch()
    before = state(subject)
    for run in (
        lambda: empirical_fisher_trace(subject, broken_loss, x, y),
        lambda: fisher_report(subject, broken_loss, (x, y), progress=False),
    ):
        with pytest.raises(Mine):
            run()
        assert_unchanged(before, subject)


def test_an_exception_in_the_data_loader_keeps_what_was_seen() -> None:
    subject, (x, y) = model(), batch()
    before = state(subject)

    def loader() -> Any:
        yield x, y
        raise Mine

    with pytest.raises(Mine), FisherMonitor(subject) as monitor:
        for inputs, targets in loader():
            loss_fn(subject(inputs), targets).backward()
    assert monitor.n_samples == 4
    subject.zero_grad()
    with pytest.raises(Mine):
        fisher_report(subject, loss_fn, loader(), progress=False)
    assert_unchanged(before, subject)


def test_an_exception_in_a_loss_scale_is_raised_at_the_end_of_the_backward_pass() -> None:
    subject, (x, y) = model(), batch()
    loss_fn(subject(x), y).backward()
    plain = [p.grad.clone() for p in subject.parameters() if p.grad is not None]
    subject.zero_grad()
    with pytest.raises(Mine), FisherMonitor(subject, loss_scale=raising) as monitor:
        loss_fn(subject(x), y).backward()
    assert monitor.n_samples == 0
    assert all(map(torch.equal, plain, [p.grad for p in subject.parameters() if p.grad is not None]))
