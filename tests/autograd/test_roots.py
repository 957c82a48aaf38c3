"""Where the backward pass under way began is seen from inside of it, and from no place else."""

from __future__ import annotations

from threading import Thread

import torch
from torch import Tensor

from torch_secorder.autograd.roots import kind_of_loss, roots_of_pass, sequence_number


def test_the_roots_are_seen_from_a_hook_and_from_no_other_thread() -> None:
    x = torch.ones(3, requires_grad=True)
    seen = []

    def look(grad: Tensor) -> None:
        seen.append(roots_of_pass())
        other = Thread(target=lambda: seen.append(roots_of_pass()))
        other.start()
        other.join()

    x.register_hook(look)
    loss, other = x.sum(), (2 * x).sum()
    torch.autograd.backward([loss, other])
    assert seen == [[loss.grad_fn, other.grad_fn], []]
    assert roots_of_pass() == []


def test_the_roots_of_a_pass_inside_of_another_are_its_own() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    inner, seen = y.sum(), []
    y.register_hook(lambda grad: seen.append(roots_of_pass()))
    x.register_hook(lambda grad: torch.autograd.grad(inner, y) and None)
    x.register_hook(lambda grad: seen.append(roots_of_pass()))
    outer = x.sum()
    outer.backward()
    assert seen == [[inner.grad_fn], [outer.grad_fn]]


def test_the_roots_are_seen_until_the_pass_is_over() -> None:
    x, seen = torch.ones(3, requires_grad=True), []
    after = torch.autograd.Variable._execution_engine.queue_callback
    x.register_hook(lambda grad: after(lambda: seen.append(roots_of_pass())))
    loss = x.sum()
    loss.backward(inputs=[x])
    assert seen == [[loss.grad_fn]]


def test_losses_of_one_kind_have_the_same_operations_outputs_and_parameters() -> None:
    weight = torch.ones(3, requires_grad=True)
    model = [torch.ones(3, requires_grad=True).exp() for _ in range(2)]
    numbers = {sequence_number(x.grad_fn): index for index, x in enumerate(model)}
    leaves = {torch.autograd.graph.get_gradient_edge(weight).node: 0}

    def kind(loss: Tensor) -> int:
        found: list[int] = []
        loss.register_hook(lambda grad: found.append(kind_of_loss(numbers, leaves)))
        loss.backward(retain_graph=True)
        return found[0]

    first, second = model
    alike = [
        first.square().sum() + first.square().sum(),
        sum((first.square().sum() for _ in range(4)), first.square().sum()),
    ]
    assert len({kind(loss) for loss in alike}) == 1
    unlike = [
        first.sum(),
        second.sum(),
        first.sum() + second.sum(),
        first.square().sum(),
        first.sum() + weight.sum(),
        weight.sum(),
    ]
    assert len({kind(loss) for loss in unlike}) == len(unlike)
