"""The user's hooks on parameters: theirs for the user's passes, silent in the library's, also at the same time."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from torch_secorder.autograd.engine import library_pass
from torch_secorder.autograd.tensor_hooks import silenced_in_library_passes


def hooked() -> tuple[nn.Linear, list[Tensor]]:
    model, seen = nn.Linear(3, 2), []

    def doubled(grad: Tensor) -> Tensor:
        seen.append(grad)
        return 2 * grad

    model.weight.register_hook(doubled)
    return model, seen


def test_a_librarys_pass_runs_no_hook_of_the_users() -> None:
    model, seen = hooked()
    loss = model(torch.ones(1, 3)).sum()
    with silenced_in_library_passes([model.weight, model.bias]), library_pass([loss]) as (root,):
        (grad,) = torch.autograd.grad(root, [model.weight], retain_graph=True)
    assert torch.equal(grad, torch.ones(2, 3))
    assert not seen
    loss.backward()
    assert len(seen) == 1
    assert torch.equal(model.weight.grad, torch.full((2, 3), 2.0))


def test_a_users_pass_in_another_thread_runs_them_meanwhile() -> None:
    model, seen = hooked()
    loss = model(torch.ones(1, 3)).sum()
    with silenced_in_library_passes([model.weight]):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert len(seen) == 1
    assert torch.equal(model.weight.grad, torch.full((2, 3), 2.0))


def test_hooks_are_as_they_were_afterwards_whatever_happens() -> None:
    model, _ = hooked()
    before = dict(model.weight._backward_hooks)
    with pytest.raises(KeyboardInterrupt), silenced_in_library_passes([model.weight]):
        assert dict(model.weight._backward_hooks) != before
        raise KeyboardInterrupt
    assert dict(model.weight._backward_hooks) == before
