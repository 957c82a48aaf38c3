"""Programs that differentiate with respect to inputs, and ones that differentiate such gradients again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from problems._base import Forward
from traps.exactness import numbers
from user_program.hooks import module_forward_hooks, parameter_hooks, tensor_hooks
from user_program.observed import Run
from user_program.program import Program, Programs
from user_program.subjects import MLP, REORDERED, ROUTER, STEPS_FIRST, WINDOWS, Subject

INPUTS = Programs()
SAME_FORWARD = r"a second backward pass went through the same forward"
OF_A_GRADIENT = r"the backward pass goes through the graph of a gradient"


def saliency(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(model(x).flatten(1).amax(1).sum(), x)[0]


def with_saliency(subject: Subject, after: bool) -> Callable[[Run], None]:
    """A map of what the outputs depend on, for the logs, before or after each step."""

    def program(run: Run) -> None:
        model = subject.model()
        tensor_hooks(run, model)
        with run.block(model):
            for x, y in subject.batches(2):
                if not after:
                    run.note("saliency", saliency(model, x))
                subject.step(run, model, x, y)
                if after:
                    run.note("saliency", saliency(model, x))

    return program


for subject in (MLP, STEPS_FIRST, WINDOWS, ROUTER, REORDERED):
    for after in (False, True):
        name = f"saliency {'after' if after else 'before'} the step, {subject.name}"
        INPUTS.append(Program(name, with_saliency(subject, after)))


@INPUTS.add()
def saliency_alone_in_the_first_forward_of_the_block(run: Run) -> None:
    model = MLP.model()
    with run.block(model):
        for _ in range(3):
            run.note("saliency", saliency(model, MLP.batch()[0]))
        for x, y in MLP.batches(2):
            MLP.step(run, model, x, y)


@INPUTS.add()
def adversarial_training(run: Run) -> None:
    """The fast gradient sign method, and a step on what it gives."""
    model = MLP.model()
    module_forward_hooks(run, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with run.block(model):
        for x, y in MLP.batches(3):
            x.requires_grad_()
            (slope,) = torch.autograd.grad(numbers(model(x), y), x)
            adverse = (x + 0.1 * slope.sign()).detach()
            optimizer.zero_grad()
            MLP.step(run, model, adverse, y)
            optimizer.step()


@INPUTS.add()
def adversarial_training_by_full_backward_passes(run: Run) -> None:
    """The pass for the inputs computes the parameters' gradients too, and so counts."""
    model = MLP.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with run.block(model):
        for x, y in MLP.batches(2):
            x.requires_grad_()
            MLP.step(run, model, x, y)
            assert x.grad is not None
            optimizer.zero_grad()
            MLP.step(run, model, (x + 0.1 * run.keep("the inputs", x).grad.sign()).detach(), y)  # type: ignore[union-attr]
            optimizer.step()


@INPUTS.add()
def gradients_of_inputs_beside_those_of_parameters(run: Run) -> None:
    model = MLP.model()
    with run.block(model):
        for x, y in MLP.batches(2):
            run.keep("the inputs", x.requires_grad_())
            MLP.step(run, model, x, y)


@INPUTS.add()
def gradients_taken_by_autograd_grad(run: Run) -> None:
    """With respect to inputs and parameters at once, and .grad stays what it was."""
    model = MLP.model()
    with run.block(model):
        for x, y in MLP.batches(2):
            MLP.expect(run, model, x, y)
            x.requires_grad_()
            with run.step():
                run.note("gradients", torch.autograd.grad(numbers(model(x), y), (x, *model.parameters())))


@INPUTS.add()
def saliency_beside_frozen_parameters(run: Run) -> None:
    """Frozen ones are analyzed too: a pass that trains the others is theirs as well, one for inputs alone is not."""
    model = MLP.model()
    model[0].requires_grad_(False)
    parameter_hooks(run, model)  # Outputs of frozen layers require a gradient inside the block, as the docs say.
    with run.block(model, parameters="all"):
        for x, y in MLP.batches(2):
            run.note("saliency", saliency(model, x))
            MLP.expect(run, model, x, y, parameters="all")
            with run.step():
                numbers(model(x), y).backward()


class Potential(nn.Module):
    """Energies and forces, the second of which are the slopes of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            energies = self.net(x)
            (slopes,) = torch.autograd.grad(energies.sum(), x, create_graph=True)
        return torch.cat([energies, -slopes], 1)


POTENTIAL = Subject("potential", Potential, (6, 4))


@INPUTS.add(refused=OF_A_GRADIENT)
def energies_and_forces(run: Run) -> None:
    model = POTENTIAL.model()
    tensor_hooks(run, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with run.block(model):
        for x, y in POTENTIAL.batches(3):
            optimizer.zero_grad()
            POTENTIAL.step(run, model, x, y)
            optimizer.step()


@INPUTS.add()
def forces_that_are_only_looked_at(run: Run) -> None:
    """An evaluation of forces inside of a block in which the energies are trained."""
    model = MLP.model()
    with run.block(model):
        for x, y in MLP.batches(2):
            MLP.step(run, model, x, y)
            moved = x.detach().requires_grad_()
            (slopes,) = torch.autograd.grad(model(moved).sum(), moved, create_graph=True)
            run.note("forces", slopes)


def penalty(outputs: Tensor, x: Tensor) -> Tensor:
    (slopes,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()


def with_penalty(subject: Subject, calls: int) -> Callable[[Run], None]:
    """A gradient penalty, as R1 and Wasserstein critics have, of the outputs of the loss or of another call."""

    def program(run: Run) -> None:
        model = subject.model()
        tensor_hooks(run, model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with run.block(model):
            for x, y in subject.batches(3):
                x.requires_grad_()
                optimizer.zero_grad()
                with run.step():
                    outputs = model(x)
                    again = outputs if calls == 1 else model(x)
                    (numbers(outputs, y) + 0.1 * penalty(again, x)).backward()
                optimizer.step()

    return program


for subject in (MLP, WINDOWS):
    one, two = (with_penalty(subject, calls) for calls in (1, 2))
    INPUTS.append(Program(f"a gradient penalty, {subject.name}", one, refused=OF_A_GRADIENT))
    INPUTS.append(Program(f"a gradient penalty of another call, {subject.name}", two, refused=OF_A_GRADIENT))


@INPUTS.add(refused=SAME_FORWARD, n_samples=6)
def a_hessian_times_a_vector(run: Run) -> None:
    """The first pass counts, and the second is one more through the same forward."""
    model = MLP.model()
    with run.block(model):
        x, y = MLP.batch()
        with run.step():
            slopes = torch.autograd.grad(numbers(model(x), y), list(model.parameters()), create_graph=True)
        run.note("slopes", slopes)
        with run.step():
            torch.stack([(slope * slope.detach()).sum() for slope in slopes]).sum().backward()


@INPUTS.add(refused=SAME_FORWARD, n_samples=6)
def two_heads_one_after_the_other(run: Run) -> None:
    """Two passes through one forward that reach different layers."""
    model = Forward(lambda m, x: (m.one(x), m.two(x)), one=nn.Linear(4, 3), two=nn.Linear(4, 3)).double()
    x, y = MLP.batch()
    with run.block(model):
        one, two = model(x)
        with run.step():
            numbers(one, y).backward()
        with run.step():
            numbers(two, y).backward()


@INPUTS.add(refused=r"vmap|batched")
def a_vmapped_backward_pass(run: Run) -> None:
    """The gradient of each sample's loss, all in one pass."""
    model = MLP.model()
    tensor_hooks(run, model)
    x, y = MLP.batch()
    eye: Any = torch.eye(len(x), dtype=x.dtype)
    with run.block(model):
        losses = (model(x) - y).square().sum(1)
        with run.step():
            torch.autograd.grad(losses, list(model.parameters()), eye, is_grads_batched=True)


@INPUTS.add()
def a_vmapped_jacobian_of_inputs(run: Run) -> None:
    model = MLP.model()
    with run.block(model):
        for x, y in MLP.batches(2):
            MLP.step(run, model, x, y)
            moved = x.detach().requires_grad_()
            out = model(moved).sum(0)
            run.note("jacobian", torch.autograd.grad(out, moved, torch.eye(3, dtype=x.dtype), is_grads_batched=True))
