"""Programs that train in another way than one step after the other: accumulated, scaled, fused, functional."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from torch_secorder import FisherMonitor
from traps.exactness import numbers
from traps.test_precision import language_model
from user_program.hooks import all_hooks, module_forward_hooks, parameter_hooks, tensor_hooks
from user_program.observed import Run
from user_program.program import Program, Programs
from user_program.subjects import MLP, SQUARE, Subject

STEPS = Programs()


@STEPS.add()
def accumulation(run: Run) -> None:
    model = SQUARE.model()
    all_hooks(run, model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    with run.block(model, loss_scale=0.5):
        for _ in range(2):
            optimizer.zero_grad()
            for x, y in SQUARE.batches(2):
                SQUARE.expect(run, model, x, y)
                with run.step():
                    (numbers(model(x), y) / 2).backward()
            optimizer.step()


@STEPS.add()
def gradients_set_to_zero_and_clipped(run: Run) -> None:
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with run.block(model):
        for x, y in MLP.batches(3):
            optimizer.zero_grad(set_to_none=False)
            MLP.step(run, model, x, y)
            run.note("the norm", nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            optimizer.step()


@STEPS.add()
def a_second_forward_that_is_only_an_evaluation(run: Run) -> None:
    model = SQUARE.model()
    tensor_hooks(run, model)
    with run.block(model):
        for x, y in SQUARE.batches(2):
            SQUARE.step(run, model, x, y)
            run.note("a loss without a backward pass", numbers(model(x), y))
            with torch.no_grad():
                run.note("an evaluation", model.eval()(x))
            model.train()


@STEPS.add()
def a_loss_scale_that_is_read_once_a_pass(run: Run) -> None:
    """Each call gives the next scale, of which a schedule has one for each step."""
    model, scales = MLP.model(), [2.0, 0.5, 8.0]
    read = iter(scales)
    with run.block(model, loss_scale=lambda: next(read)):
        for scale, (x, y) in zip(scales, MLP.batches(3), strict=True):
            MLP.expect(run, model, x, y)
            with run.step():
                (numbers(model(x), y) * scale).backward()


@STEPS.add()
def steps_that_are_passed_over(run: Run) -> None:
    model = SQUARE.model()
    all_hooks(run, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with run.block(model, every=2):
        for number, (x, y) in enumerate(SQUARE.batches(4)):
            optimizer.zero_grad()
            if number % 2 == 0:
                SQUARE.expect(run, model, x, y)
            with run.step():
                numbers(model(x), y).backward()
            optimizer.step()


@STEPS.add()
def two_monitors_at_once(run: Run) -> None:
    """One around the model and one around a part of it."""
    model = MLP.model()
    tensor_hooks(run, model)
    with FisherMonitor(model[2]) if run.watched else nullcontext(), run.block(model):
        for x, y in MLP.batches(3):
            MLP.step(run, model, x, y)


@STEPS.add()
def steps_before_and_after_the_block(run: Run) -> None:
    model = SQUARE.model()
    tensor_hooks(run, model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        numbers(model(x), y).backward()
        optimizer.step()

    step(*SQUARE.batch())
    with run.block(model):
        SQUARE.step(run, model, *SQUARE.batch())
        started = numbers(model(SQUARE.batch()[0]), SQUARE.batch()[1])
    started.backward()
    step(*SQUARE.batch())
    run.note("the weights", *model.parameters())


# Half precision


@STEPS.add(dtype=torch.float32)
def a_grad_scaler(run: Run) -> None:
    """In float32, and with a second step whose gradients overflow, of which the scaler takes note."""
    model = MLP.model().float()
    all_hooks(run, model)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), 0.01), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with run.block(model, loss_scale=scaler.get_scale):
        for x, y in MLP.batches(3):
            optimizer.zero_grad()
            MLP.expect(run, model, x.float(), y.float())
            with run.step():
                scaler.scale(numbers(model(x.float()), y.float())).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            run.note("the scale", scaler.get_scale())


def in_autocast(module: Callable[[], nn.Module], hooked: Any) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        model = module()
        hooked(run, model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ids, y = torch.randint(11, (5, 6)), torch.randint(11, (5, 6))

        def loss(model: nn.Module, rows: slice) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(ids[rows])
            return nn.functional.cross_entropy(outputs.float().mT, y[rows])

        def squared_norms() -> dict[str, Tensor]:
            twin = module()
            twin.load_state_dict(model.state_dict())
            parameters = list(twin.parameters())
            rows = [torch.autograd.grad(loss(twin, slice(n, n + 1)), parameters) for n in range(5)]
            squares = [torch.stack([g.double().square().sum() for g in column]) for column in zip(*rows, strict=True)]
            return dict(zip((name for name, _ in twin.named_parameters()), squares, strict=True))

        with run.block(model):
            for _ in range(2):
                optimizer.zero_grad()
                run.expect(squared_norms)
                with run.step():
                    loss(model, slice(None)).backward()
                optimizer.step()

    return program


BFLOAT16 = {"rtol": 1e-2, "why": "one sample's gradient is rounded to the 8 bits of bfloat16 before it is squared"}
STEPS.append(Program("autocast", in_autocast(language_model, lambda run, model: None), **BFLOAT16))  # type: ignore[arg-type]
STEPS.append(Program("autocast, all hooks", in_autocast(language_model, all_hooks), **BFLOAT16))  # type: ignore[arg-type]

# An optimizer in the backward pass


def fused(subject: Subject) -> Callable[[Run], None]:
    """Each parameter is trained as soon as its gradient is there, and the gradient is let go."""

    def program(run: Run) -> None:
        model = subject.model()
        parameter_hooks(run, model)
        optimizers = {p: torch.optim.AdamW([p], 0.01) for p in model.parameters()}

        def train(p: Tensor) -> None:
            run.note("the step of a parameter", p.grad)
            optimizers[p].step()  # type: ignore[index]
            optimizers[p].zero_grad()  # type: ignore[index]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(train)
        with run.block(model):
            for x, y in subject.batches(3):
                subject.step(run, model, x, y)

    return program


STEPS.append(Program("an optimizer in post-accumulate hooks", fused(MLP)))
STEPS.append(Program("an optimizer in post-accumulate hooks, searched", fused(SQUARE)))

# torch.func


def functional(first: bool) -> Callable[[Run], None]:
    """Each sample's gradient and the outputs' jacobian by torch.func, beside training."""

    def program(run: Run) -> None:
        model = MLP.model()
        module_forward_hooks(run, model)

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return numbers(functional_call(model, values, (x[None],)), y[None])

        def look(x: Tensor, y: Tensor) -> None:
            values = {name: p.detach() for name, p in model.named_parameters()}
            run.note("gradients", vmap(grad(loss), in_dims=(None, 0, 0))(values, x, y))
            run.note("jacobian", vmap(jacrev(model))(x))

        with run.block(model):
            for x, y in MLP.batches(2):
                if first:
                    look(x, y)
                MLP.step(run, model, x, y)
                if not first:
                    look(x, y)

    return program


STEPS.append(Program("torch.func before the step", functional(first=True)))
STEPS.append(Program("torch.func after the step", functional(first=False)))


@STEPS.add()
def a_functional_call_in_training(run: Run) -> None:
    """The loss of a functional call with the parameters themselves, differentiated as usual."""
    model = MLP.model()
    tensor_hooks(run, model)
    with run.block(model):
        for x, y in MLP.batches(2):
            MLP.expect(run, model, x, y)
            with run.step():
                numbers(functional_call(model, dict(model.named_parameters()), (x,)), y).backward()
