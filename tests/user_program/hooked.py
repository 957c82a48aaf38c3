"""Programs with hooks: activation statistics, Grad-CAM, neuron importance, offloading of what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from oracles import per_sample_squared_norms
from traps.exactness import numbers
from user_program.hooks import HOOKS, Hooked, all_hooks, module_forward_hooks, on_outputs, packed
from user_program.observed import Run
from user_program.program import Program
from user_program.subjects import MLP, ROUTER, SEARCHED, SQUARE, WINDOWS, Subject


def training(subject: Subject, hooked: Hooked, steps: int = 3, inside: bool = False) -> Callable[[Run], None]:
    """Some steps of a model with such hooks, put on before the block or inside of it."""

    def program(run: Run) -> None:
        model = subject.model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if not inside:
            hooked(run, model)
        with run.block(model):
            if inside:
                hooked(run, model)
            for x, y in subject.batches(steps):
                optimizer.zero_grad()
                subject.step(run, model, x, y)
                optimizer.step()

    return program


def saved_tensors(subject: Subject) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        model = subject.model()
        module_forward_hooks(run, model)
        with run.block(model):
            for x, y in subject.batches(3):
                subject.expect(run, model, x, y)
                with run.step():
                    with packed(run):
                        loss = numbers(model(x), y)
                    loss.backward()

    return program


def doubled(model: nn.Module) -> nn.Module:
    """Hooks that change gradients: each sample's is what it would be alone."""
    on_outputs(model, lambda name, h: h.register_hook(lambda grad: 2 * grad))
    return model


def changed_gradients(subject: Subject) -> Callable[[Run], None]:
    def program(run: Run) -> None:
        model = doubled(subject.model())

        def squared_norms(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return per_sample_squared_norms(model, numbers, x, y)  # its hooks note nothing

        with run.block(model):
            for x, y in subject.batches(3):
                run.expect(lambda x=x, y=y: squared_norms(x, y))  # type: ignore[misc]
                with run.step():
                    numbers(model(x), y).backward()

    return program


def statistics_of_a_layer(run: Run) -> None:
    """Hooks that a person puts on in each step, and takes off again."""
    model = MLP.model()
    with run.block(model):
        for x, y in MLP.batches(3):

            def after_forward(module: nn.Module, args: Any, output: Tensor) -> None:
                output.register_hook(lambda grad: run.note("the hook on the hidden values", grad.norm()))
                run.keep("the hidden values", output).retain_grad()

            handle = model[1].register_forward_hook(after_forward)
            MLP.step(run, model, x, y)
            handle.remove()


def anomaly_mode(run: Run) -> None:
    model = MLP.model()
    all_hooks(run, model)
    with torch.autograd.set_detect_anomaly(True, check_nan=True), run.block(model):
        for x, y in MLP.batches(2):
            MLP.step(run, model, x, y)


HOOKED: list[Program] = [
    *(
        Program(f"{kind}, {subject.name}", training(subject, hooked))
        for kind, hooked in HOOKS.items()
        for subject in (MLP, *SEARCHED)
    ),
    *(Program(f"all hooks, {subject.name}", training(subject, all_hooks)) for subject in (MLP, *SEARCHED)),
    *(Program(f"{kind} put on inside, mlp", training(MLP, hooked, inside=True)) for kind, hooked in HOOKS.items()),
    # A forward whose parameters are used outside of layers is refused at once under such hooks.
    Program("pack hooks, mlp", saved_tensors(MLP)),
    # What shows where samples are lies behind tensors that the hooks would have to unpack for us.
    *(
        Program(
            f"pack hooks, {subject.name}", saved_tensors(subject), refused="leave open where .* what shows it is hidden"
        )
        for subject in (WINDOWS, ROUTER)
    ),
    Program("doubled gradients, mlp", changed_gradients(MLP)),
    Program(
        "doubled gradients, square", changed_gradients(SQUARE), refused="is not the sum of what the model's samples"
    ),
    Program("statistics of a layer", statistics_of_a_layer),
    Program("anomaly mode", anomaly_mode),
]
