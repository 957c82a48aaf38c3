"""Where backward passes under way began is seen from inside of them, and from no place else."""

from __future__ import annotations

from threading import Thread

import torch

from torch_secorder.autograd.roots import roots_under_way


def test_the_roots_are_seen_from_a_hook_and_from_a_device_thread_of_the_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    seen = []

    def look(grad: torch.Tensor) -> None:
        seen.append(roots_under_way())
        device = Thread(target=lambda: seen.append(roots_under_way()))
        device.start()
        device.join()

    x.register_hook(look)
    loss, other = x.sum(), (2 * x).sum()
    torch.autograd.backward([loss, other])
    assert seen == [[loss.grad_fn, other.grad_fn]] * 2
    assert roots_under_way() == []


def test_the_roots_of_a_pass_inside_of_another_are_seen_with_those_of_the_outer_one() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    inner, seen = y.sum(), []
    y.register_hook(lambda grad: seen.append(roots_under_way()))
    x.register_hook(lambda grad: torch.autograd.grad(inner, y) and None)
    outer = x.sum()
    outer.backward()
    assert seen == [[inner.grad_fn, outer.grad_fn]]
