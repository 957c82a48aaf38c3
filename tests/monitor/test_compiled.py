"""Compiled models: watched steps run as written and are exact, all others run compiled, and the stance is the user's again."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from model_state import hooks
from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report, hessian_trace
from torch_secorder.batch_axis.knowledge import is_due
from torch_secorder.errors import CoverageError, LifecycleError, UnsupportedError
from torch_secorder.pruning import ChannelGates
from traps.exactness import numbers

pytestmark = [  # what torch's compiler says while it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python"),
]

N = 5
WAYS = ["wrapper", "in place", "layer", "function", "step"]


class Backend:
    """A backend that compiles nothing and counts what it is asked for; on request the backward pass is compiled too."""

    def __init__(self, traces_backward: bool) -> None:
        self.compiled = self.runs = 0
        self.compile = aot_autograd(fw_compiler=self._boxed) if traces_backward else self._plain

    def _plain(self, graph: Any, inputs: object) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run

    def _boxed(self, graph: Any, inputs: object) -> Callable[..., Any]:
        return make_boxed_func(self._plain(graph, inputs))

    def counts(self) -> tuple[int, int]:
        return self.compiled, self.runs


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.weight = Block(), nn.Parameter(torch.randn(3, 6))
        self.function: Any = nn.functional.linear

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.block(x), self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


class Program:
    """A model, the way in which it is compiled, and the steps of a training loop."""

    def __init__(self, how: str, traces_backward: bool = True) -> None:
        torch.manual_seed(0)
        self.how, self.backend = how, Backend(traces_backward)
        self.model = Model().double()
        self.call: Callable[[Tensor], Any] = self.model
        self.batches = [(torch.randn(N, 4).double(), torch.randn(N, 3).double()) for _ in range(12)]
        self.plain = copy.deepcopy(self.model)
        self.plain.function = product

    def compile(self) -> None:
        if self.how == "wrapper":
            self.call = torch.compile(self.model, backend=self.backend.compile)
        elif self.how == "in place":
            self.model.compile(backend=self.backend.compile)
        elif self.how == "layer":
            self.model.block.compile(backend=self.backend.compile)
        elif self.how == "function":
            self.model.function = torch.compile(product, backend=self.backend.compile)
        self.loss = torch.compile(self._loss, backend=self.backend.compile) if self.how == "step" else self._loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        return numbers(self.call(x), y)

    def step(self, number: int) -> None:
        self.model.zero_grad()
        self.loss(*self.batches[number]).backward()

    def evaluate(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.call(self.batches[-1][0])
        self.model.train()

    def expected(self, numbers_of_steps: list[int]) -> dict[str, Tensor]:
        found = [per_sample_squared_norms(self.plain, numbers, *self.batches[number]) for number in numbers_of_steps]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def require_exact(self, monitor: FisherMonitor, numbers_of_steps: list[int]) -> None:
        expected = self.expected(numbers_of_steps)
        assert monitor.n_samples == N * len(numbers_of_steps)
        for name, t in expected.items():
            actual = torch.tensor(monitor.report().loc[name, "fisher_trace"], dtype=torch.float64)
            assert_equal(actual, t.mean(), monitor.trace)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    assert eval_frame._stance.stance == "default"
    yield
    assert eval_frame._stance == eval_frame.DynamoStance(), "the stance afterwards is the user's"
    torch._dynamo.reset()


@pytest.mark.parametrize("traces_backward", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_every_step_is_watched(how: str, traces_backward: bool) -> None:
    program = Program(how, traces_backward)
    program.compile()
    program.step(0)
    before = program.backend.counts()
    assert min(before) > 0
    with FisherMonitor(program.model) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
    assert program.backend.counts() == before, "nothing ran compiled inside"
    program.step(0)
    assert program.backend.compiled == before[0], "the block made nothing compile anew"
    assert program.backend.runs == 2 * before[1]
    program.require_exact(monitor, [0, 1, 2])
    assert not any(hooks(program.model).values())


@pytest.mark.parametrize("traces_backward", [False, True])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_one_step_in_three_is_watched_and_the_others_are_compiled(how: str, warm: bool, traces_backward: bool) -> None:
    program = Program(how, traces_backward)
    program.compile()
    if warm:
        program.step(0)
    per_step = []
    with FisherMonitor(program.model, every=3) as monitor:
        for number in range(7):
            before = program.backend.runs
            program.step(number)
            per_step.append(program.backend.runs - before)
    compiled = program.backend.compiled
    program.step(0)
    assert program.backend.compiled == compiled, "nothing compiles anew outside"
    runs = per_step[1]
    assert runs > 0
    assert per_step == [0, runs, runs, 0, runs, runs, 0]
    program.require_exact(monitor, [0, 3, 6])
    assert not any(hooks(program.model).values())


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("how", WAYS)
def test_compiled_inside_the_block(how: str, every: int) -> None:
    program = Program(how)
    with FisherMonitor(program.model, every=every) as monitor:
        program.compile()
        for number in range(4):
            program.step(number)
    inside = program.backend.counts()
    assert (min(inside) > 0) == (every == 3)
    program.step(0)
    program.step(1)
    assert program.backend.runs > inside[1]
    assert every == 1 or program.backend.compiled == inside[0]
    program.require_exact(monitor, [0, 1, 2, 3] if every == 1 else [0, 3])


@pytest.mark.parametrize("how", WAYS)
def test_accumulation_and_evaluations_in_between(how: str) -> None:
    """Passes are counted, so that an evaluation moves nothing; it runs as the step after it."""
    program = Program(how)
    program.compile()
    program.evaluate()
    program.step(0)
    per_step = []
    with FisherMonitor(program.model, every=3, loss_scale=0.5) as monitor:
        for number in range(8):
            if number % 2 == 0:
                program.model.zero_grad()
            program.evaluate()
            before = program.backend.runs
            (program.loss(*program.batches[number]) / 2).backward()
            per_step.append(program.backend.runs - before)
            program.evaluate()
    runs = max(per_step)
    assert per_step == [0, runs, runs, 0, runs, runs, 0, runs]
    program.require_exact(monitor, [0, 3, 6])


@pytest.mark.parametrize("how", WAYS)
def test_a_watched_step_is_the_eager_step_bit_for_bit(how: str) -> None:
    program, eager = Program(how), Program(how)
    program.compile()
    program.step(0)
    eager.loss = eager._loss
    if how == "function":
        eager.model.function = product
    seen: dict[str, list[Tensor]] = {"compiled": [], "eager": []}
    for name, one in (("compiled", program), ("eager", eager)):
        one.model.block.register_forward_hook(
            lambda module, args, output, name=name: seen[name].append(output.detach())
        )
        one.model.weight.register_hook(lambda grad, name=name: seen[name].append(grad.clone()))
    with FisherMonitor(program.model, every=2) as monitor:
        program.step(1)
    eager.step(1)
    for p, q in zip(program.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
    assert len(seen["compiled"]) == len(seen["eager"]) == 2
    assert all(map(torch.equal, seen["compiled"], seen["eager"]))
    program.require_exact(monitor, [1])


@pytest.mark.parametrize("how", WAYS)
def test_steps_that_are_not_watched_are_those_without_a_monitor_bit_for_bit(how: str) -> None:
    program, alone = Program(how), Program(how)
    for one in (program, alone):
        one.compile()
        one.step(0)
    with FisherMonitor(program.model, every=2):
        program.step(1)
        program.step(2)
    alone.step(2)
    for p, q in zip(program.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", WAYS)
def test_the_functions_run_the_model_as_written(how: str) -> None:
    program = Program(how)
    program.compile()
    program.step(0)
    before, (x, y) = program.backend.counts(), program.batches[0]
    expected = program.expected([0])
    model: Any = program.call if how == "wrapper" else program.model
    everything = sum(t.mean() for t in expected.values())
    assert_equal(empirical_fisher_trace(model, numbers, x, y), everything, everything)
    table = fisher_report(model, numbers, (x, y), progress=False)
    for name, t in expected.items():
        assert_equal(torch.tensor(table.loc[name, "fisher_trace"]), t.mean(), everything)
    hessian_trace(model, numbers, x, y, num_samples=2)
    assert program.backend.counts() == before


def test_functions_inside_of_a_block_do_not_have_its_passes_counted() -> None:
    """Compiled code that the library calls says nothing about the user's, whose calls go on being counted."""
    program, other = Program("none"), Program("layer")
    for one in (program, other):
        one.compile()
        one.step(0)
    with FisherMonitor(program.model, every=2) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
            fisher_report(other.model, numbers, other.batches[0], progress=False)
    program.require_exact(monitor, [0, 1, 2])


def test_gates_run_the_model_as_written() -> None:
    program = Program("layer")
    program.compile()
    program.step(0)
    before = program.backend.counts()
    with ChannelGates(program.model, modules=(nn.Linear,)) as gates:
        program.step(1)
    assert program.backend.counts() == before
    assert gates.n_samples == N


def test_a_model_that_is_not_compiled_counts_calls_whatever_else_was_compiled() -> None:
    torch.compile(product, backend="eager")(torch.ones(1, 1), torch.ones(1, 1))
    program = Program("none")
    program.compile()
    with FisherMonitor(program.model, every=2) as monitor:
        for number in range(3):
            program.step(number)
            program.evaluate()
    program.require_exact(monitor, [0, 1, 2])


# ------------------------------------------------------------------------------------------------ the stance


def stance() -> str:
    return eval_frame._stance.stance


@pytest.mark.parametrize("users", ["default", "fail_on_recompile", "eager_on_recompile"])
def test_a_stance_of_the_users_is_there_between_watched_steps_and_afterwards(users: str) -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    inside = []
    with torch.compiler.set_stance(users):
        before = eval_frame._stance
        with FisherMonitor(program.model, every=2) as monitor:
            for number in range(3):
                inside.append(stance())
                program.step(number)
        assert eval_frame._stance is before
    assert inside == ["force_eager", users, "force_eager"]
    program.require_exact(monitor, [0, 2])


def test_an_exception_and_a_break_give_the_stance_back() -> None:
    program = Program("wrapper")
    program.compile()
    with pytest.raises(ValueError, match="own"), FisherMonitor(program.model):
        assert stance() == "force_eager"
        raise ValueError("own")
    assert stance() == "default"
    for _ in range(2):
        with FisherMonitor(program.model):
            program.step(0)
            break
    assert stance() == "default"


def test_a_monitor_is_entered_again() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    monitor = FisherMonitor(program.model, every=2)
    for start in (0, 3):
        with monitor:
            for number in range(start, start + 3):
                program.step(number)
        assert stance() == "default"
    program.require_exact(monitor, [0, 2, 3, 5])


def test_two_monitors_at_once_hold_the_stance_in_turn() -> None:
    first, second = Program("wrapper"), Program("in place")
    monitors = [FisherMonitor(first.model, every=2), FisherMonitor(second.model, every=3)]
    for program in (first, second):
        program.compile()
        program.step(0)
    for monitor in monitors:  # The one that is entered first is left first.
        monitor.__enter__()
    for number in range(4):
        first.step(number)
        second.step(number)
    monitors[0].__exit__()
    second.step(4)
    monitors[1].__exit__()
    assert stance() == "default"
    first.require_exact(monitors[0], [0, 2])
    second.require_exact(monitors[1], [0, 3])


def test_a_stance_set_inside_the_block_is_the_users_and_is_refused_where_it_hides_the_model() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    with FisherMonitor(program.model) as monitor:
        with torch.compiler.set_stance("default"), pytest.raises(UnsupportedError, match="a compiled function"):
            program.step(1)
        assert stance() == "force_eager"
        program.step(2)
        torch.compiler.set_stance("eager_on_recompile")
    assert stance() == "eager_on_recompile", "what was set inside stays"
    torch.compiler.set_stance("default")
    program.require_exact(monitor, [2])


def test_a_stance_set_for_a_while_that_ends_after_the_block_is_not_ours_forever() -> None:
    program = Program("wrapper")
    program.compile()
    program.step(0)
    users = None
    with FisherMonitor(program.model):
        users = torch.compiler.set_stance("default")
    users.__exit__(None, None, None)  # It puts back what it found: ours.
    assert stance() == "default"
    before = program.backend.runs
    program.step(0)
    assert program.backend.runs > before
    torch.compiler.set_stance("default")


def test_a_monitor_that_is_dropped_inside_its_block_gives_the_stance_back() -> None:
    import gc

    monitor = FisherMonitor(nn.Linear(2, 2))
    monitor.__enter__()
    assert stance() == "force_eager"
    del monitor
    gc.collect()
    assert stance() == "default"


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_block_inside_of_a_compiled_function_is_refused() -> None:
    model = nn.Linear(2, 2)

    @torch.compile(backend="eager")
    def train(x: Tensor) -> Tensor:
        y = x + 1
        with FisherMonitor(model):
            return model(y).sum()

    with pytest.raises(LifecycleError, match="move the block"):
        train(torch.ones(1, 2))
    assert not any(hooks(model).values())


# ------------------------------------------------------------------------------------------------ what could go wrong


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
        assert not is_due(monitor.results.statistics.passes + 1), "the schedule of checks would find it anyway"
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
"""


def test_a_compiler_that_is_loaded_inside_the_block() -> None:
    """No hook of ours is compiled, though torch's compiler came into the process after the hooks."""
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("8 1 2", 0), done.stderr
