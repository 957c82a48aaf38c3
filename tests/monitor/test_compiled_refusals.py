"""Compiled models: what passes are, which are refused, and that the compiler never sees a hook of ours."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from monitor.compiled_programs import Backend, N, Program, nothing_compiled, stance
from torch_secorder import FisherMonitor
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.errors import CoverageError, LifecycleError
from traps.exactness import numbers

pytestmark = [
    pytest.mark.usefixtures(nothing_compiled.__name__),
    # torch's compiler says these while it compiles.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python"),
]


def test_a_backward_pass_inside_of_a_compiled_function() -> None:
    program = Program("none")
    program.compile()
    backend = Backend(traces_backward=True)

    @torch.compile(backend=backend.compile)
    def step(x: Tensor, y: Tensor) -> None:
        numbers(program.model(x), y).backward()

    step(*program.batches[0])
    looked_at = counters["frames"]["total"]
    with FisherMonitor(program.model, every=3) as monitor:
        for number in range(7):
            step(*program.batches[number])
    step(*program.batches[0])
    assert counters["frames"]["total"] == looked_at, "the compiler has looked at functions of the library's"
    program.require_exact(monitor, [0, 3, 6])


def test_a_pass_that_mixes_watched_and_compiled_calls_is_refused() -> None:
    program = Program("wrapper")
    program.compile()
    with FisherMonitor(program.model, every=2) as monitor:
        for number in range(5):
            program.step(number)
        kept = program.loss(*program.batches[5])  # compiled, and not differentiated yet
        program.step(6)
        assert not is_due(4), "the schedule of checks would find it anyway"
        with pytest.raises(CoverageError, match="not the sum"):
            (kept + program.loss(*program.batches[7])).backward()
    program.require_exact(monitor, [0, 2, 4])


def test_samples_that_were_counted_are_not_left_unsaid_in_a_pass_that_is_not_watched() -> None:
    program = Program("wrapper")
    program.compile()
    with FisherMonitor(program.model, every=3) as monitor:
        loss = program.loss(*program.batches[0])
        loss.backward(retain_graph=True)
        first = [p.grad.clone() for p in program.model.parameters()]  # type: ignore[union-attr]
        with pytest.raises(LifecycleError, match="second backward pass"):
            loss.backward()
        assert all(torch.equal(p.grad, 2 * g) for p, g in zip(program.model.parameters(), first, strict=True))  # type: ignore[arg-type]
    program.require_exact(monitor, [0])


def test_a_pass_that_is_refused_is_counted() -> None:
    program = Program("wrapper")
    program.compile()
    with FisherMonitor(program.model, every=2) as monitor:
        loss = program.loss(*program.batches[0]) + program.model.weight.square().sum()
        with pytest.raises(CoverageError, match="weight penalty"):
            loss.backward()
        assert stance() == "default"
        program.step(1)
        program.step(2)
    program.require_exact(monitor, [2])


def test_frozen_parameters_alone_show_no_pass_so_that_all_runs_as_written() -> None:
    program = Program("layer")
    program.compile()
    program.step(0)
    before = program.backend.counts()
    program.model.requires_grad_(False)
    with FisherMonitor(program.model.block, parameters="all", every=2) as monitor:
        for number in range(3):
            x, y = program.batches[number][0].requires_grad_(True), program.batches[number][1]
            program.model.block(x)[:, :3].sub(y).square().sum(1).mean().backward()
    assert program.backend.counts() == before
    assert monitor.n_samples == 2 * N
    program.model.requires_grad_(True)


def test_a_backward_pass_that_is_broken_off_is_not_counted() -> None:
    program = Program("wrapper")
    program.compile()

    def broken(grad: Tensor) -> None:
        raise ValueError("own")

    with FisherMonitor(program.model, every=2) as monitor:
        for number in (0, 2):
            handle = program.model.block.linear.weight.register_hook(broken)
            before = stance()
            with pytest.raises(ValueError, match="own"):
                program.step(number)
            assert stance() == before
            handle.remove()
            program.step(number)
    program.require_exact(monitor, [0])


def test_two_forwards_before_their_backward_passes() -> None:
    """The second pass is one that is not watched, although its forward ran as written."""
    program = Program("wrapper")
    program.compile()
    with FisherMonitor(program.model, every=2) as monitor:
        losses = [program.loss(*program.batches[number]) for number in range(2)]
        for loss in losses:
            loss.backward()
        program.step(2)
    program.require_exact(monitor, [0, 2])


def test_passes_inside_of_a_pass_are_not_counted() -> None:
    """Re-entrant checkpoints start a backward pass for each of their segments."""
    program = Program("function")
    program.compile()
    block = program.model.block.forward

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=True)

    program.model.block.forward = checkpointed  # type: ignore[method-assign]
    for batch in program.batches:
        batch[0].requires_grad_(True)
    seen = []
    with FisherMonitor(program.model, every=2, batch_axis=0) as monitor:
        for number in range(4):
            seen.append(stance())
            program.step(number)
    program.require_exact(monitor, [0, 2])
    assert seen == ["force_eager", "default"] * 2


LATE = """
import sys, torch
from torch import nn
from torch_secorder import FisherMonitor
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
    def forward(self, x):
        return torch.tanh(self.linear(x))
model, graphs, runs = Model(), [], []
def backend(graph, inputs):
    graphs.append(graph)
    return lambda *args: (runs.append(1), graph(*args))[1]
assert "torch._dynamo" not in sys.modules
before = list(sys.meta_path)
with FisherMonitor(model):
    pass
assert sys.meta_path == before and "torch._dynamo" not in sys.modules
with FisherMonitor(model, every=2) as monitor:
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(torch.randn(4, 2)).sum().backward()
compiled(torch.randn(4, 2)).sum().backward()
assert sys.meta_path == before
print(monitor.n_samples, len(graphs), len(runs))
monitor.__enter__()
compiled(torch.randn(4, 2)).sum().backward()
"""


@pytest.mark.slow
def test_a_compiler_that_is_loaded_inside_the_block() -> None:
    """No hook of ours is compiled, though torch's compiler came into the process after the hooks.

    In the end the program is inside of a block, with the compiler imported, and ends quietly.
    """
    # The compiler of torch 2.15 says of Python 3.13.0 that a later one is faster.
    quiet = ["-W", "ignore:Guards may run slower on Python"]
    done = subprocess.run([sys.executable, *quiet, "-c", LATE], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("8 1 2", "", 0)
