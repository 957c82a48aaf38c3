"""A training step of every problem and of the traps' models, with every kind of hook, runs under a monitor as without it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from oracles import mapped
from problems import AWKWARD, PROBLEMS, Problem, of_problems, repeats
from problems._base import Forward, randomized
from traps.exactness import Square, numbers
from traps.test_checkpoints import Blocks, Recomputed
from traps.test_outputs_and_losses import Adversarial
from traps.test_randomness import EXPERTS, Noisy, Routed, Scaled
from traps.test_uses import Gated, Length, Product, Rounded, ThreeWays
from user_program.hooks import all_hooks, full_backward_hooks
from user_program.observed import Run, assert_unnoticed, observed


def of_problem(problem: Problem, hooked: bool) -> Callable[[Run], None]:
    """A step whose inputs want gradients too; where it has hooks of its own, the monitor keeps everything else as well."""

    def program(run: Run) -> None:
        setting = problem.setting(torch.float32)
        setting.inputs = mapped(setting.inputs, partial(wanted, run))
        optimizer = torch.optim.SGD(setting.model.parameters(), 0.01, momentum=0.9)
        if hooked:
            all_hooks(run, setting.model)
        with run.block(setting.model, diagonal=hooked, per_sample=hooked, activations=hooked):
            with run.step():
                run.keep("the loss", setting.loss()).backward()
            optimizer.step()

    return program


def wanted(run: Run, x: torch.Tensor) -> torch.Tensor:
    """An input that requires grad if it can."""
    return run.keep(f"the input of shape {tuple(x.shape)}", x.requires_grad_(x.is_floating_point()))


USED = [problem for problem in [*PROBLEMS, *AWKWARD] if not repeats(problem)]


@of_problems(USED)
def test_a_step_of_a_problem(problem: Problem) -> None:
    require_unnoticed(of_problem(problem, hooked=True))


@of_problems(
    p for p in USED if p in AWKWARD or p.name.partition("-")[0] in ("tied", "reused", "inplace", "frozen", "use")
)
def test_a_step_of_a_problem_without_hooks(problem: Problem) -> None:
    """Hooks only add to what is looked at, but the graph differs: of the problems that are about it, and not about a layer."""
    require_unnoticed(of_problem(problem, hooked=False))


def require_unnoticed(program: Callable[[Run], None]) -> None:
    watched = observed(program, watched=True)
    assert_unnoticed(watched, observed(program, watched=False))
    assert not watched.refusals
    assert watched.monitor is not None
    assert watched.monitor.n_samples > 0


def parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Gated())
    return model


def with_a_function(way: Callable[..., torch.Tensor]) -> nn.Module:
    model = Forward(lambda m, x: way(m.layer(x).tanh(), m.weight), layer=nn.Linear(4, 4))
    model.weight = nn.Parameter(torch.zeros(3, 4))
    return model


def rounded(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(h, Rounded.apply(weight))


TRAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1 tied weights": (ThreeWays, (4, 6)),
    "3 a chain with several ways": (parametrized, (5, 4)),
    "3 a function in a chain": (partial(with_a_function, rounded), (5, 2, 4)),
    "3 a function of samples and weights": (partial(with_a_function, Product.apply), (5, 2, 4)),
    "3 an operation without a rule": (Length, (5, 4)),
    "4 and 5 all sizes equal": (partial(Square, 4), (4, 4)),
    "4 and 5 a batch of one": (partial(Square, 4), (1, 4)),
    "6 gradients written in place": (Adversarial, (4, 6)),
    "9 checkpoints": (partial(Blocks, 3, False), (5, 3, 4)),
    "9 re-entrant checkpoints": (partial(Blocks, 3, True), (5, 3, 4)),
    "9 re-entrant checkpoints in a row": (Recomputed, (3, 4, 8)),
    "16 random draws": (Noisy, (5, 6, 8)),
    "16 a router": (partial(Routed, EXPERTS["layer norm"], "experts"), (4, 6, 6)),
    "16 a call for each sample": (partial(Routed, EXPERTS["convolution"], "sample"), (4, 6, 6)),
    "16 a call for each row": (partial(Routed, EXPERTS["slopes"], "row"), (4, 6, 6)),
    "16 a layer that draws": (lambda: nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(4, 3)), (5, 4)),
}


def of_trap(name: str, hooked: bool, steps: int) -> Callable[[Run], None]:
    """Some steps, accumulated and of new random numbers, as in training."""
    module, shape = TRAPS[name]

    def program(run: Run) -> None:
        model = randomized(module())
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        if hooked:
            all_hooks(run, model)
        with run.block(model, loss_scale=0.5, diagonal=True):
            for _ in range(steps):
                optimizer.zero_grad()
                for _ in range(2):
                    x = torch.randn(shape)
                    with run.step():
                        outputs = model(x)
                        (numbers(outputs, torch.zeros_like(outputs)) / 2).backward()
                optimizer.step()

    return program


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("name", TRAPS)
def test_trap_15_steps_of_a_model_that_is_a_trap(name: str, hooked: bool) -> None:
    program = of_trap(name, hooked, steps=2)
    watched = observed(program, watched=True)
    assert_unnoticed(watched, observed(program, watched=False))
    assert not watched.refusals
    assert watched.monitor is not None
    assert watched.monitor.n_samples == 4 * TRAPS[name][1][0]


def test_trap_15_what_is_refused_was_a_whole_step_all_the_same() -> None:
    """A weight penalty, which is refused at the end of the pass."""

    def program(run: Run) -> None:
        model = randomized(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
        full_backward_hooks(run, model)
        with run.block(model):
            for _ in range(2):
                with run.step():
                    (model(torch.randn(5, 4)).square().sum() + model[0].weight.square().sum()).backward()

    watched = observed(program, watched=True)
    assert_unnoticed(watched, observed(program, watched=False))
    assert len(watched.refusals) == 2
    assert all("is not the sum of what the model's samples contribute" in said for said in watched.refusals)
