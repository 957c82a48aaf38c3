"""A backward pass that an exception broke off has counted nothing, and may be made again through the same graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracles import assert_equal, per_sample_squared_norms
from torch_secorder import FisherMonitor
from torch_secorder.errors import LifecycleError
from traps.exactness import numbers

PLACES: dict[str, Callable[[nn.Module, Tensor, Callable[..., Any]], Any]] = {
    "the outputs": lambda model, outputs, hook: outputs.register_hook(hook),
    "the last weight": lambda model, outputs, hook: model[2].weight.register_hook(hook),
    "the first weight": lambda model, outputs, hook: model[0].weight.register_hook(hook),
    "a node": lambda model, outputs, hook: outputs.grad_fn.next_functions[1][0].register_prehook(hook),
    "a weight whose gradient is there": lambda model, outputs, hook: model[0].weight.register_post_accumulate_grad_hook(
        hook
    ),
}


def made(width: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()
    return model, torch.randn(5, 4).double(), torch.randn(5, 3).double()


@pytest.mark.parametrize("width", [4, 2**14])  # layers whose calls wait for others, and layers whose calls do not
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", PLACES)
def test_the_pass_that_follows_is_counted(place: str, kind: type[BaseException], width: int) -> None:
    model, x, y = made(width)
    right = per_sample_squared_norms(model, numbers, x, y)
    broken: list[Tensor] = []

    def break_off(*grads: Any) -> None:
        broken.append(grads[0])
        raise kind

    with FisherMonitor(model) as monitor:
        outputs = model(x)
        loss = numbers(outputs, y)
        handle = PLACES[place](model, outputs, break_off)
        with pytest.raises(kind):  # The exception and its traceback stay alive.
            loss.backward(retain_graph=True)
        handle.remove()
        assert broken
        model.zero_grad()
        loss.backward(retain_graph=True)
        with pytest.raises(LifecycleError, match="counted already"):
            loss.backward()
    assert monitor.n_samples == 5
    found = monitor.report().fisher_trace
    total = torch.stack([t.mean() for t in right.values()]).sum()
    for name, t in right.items():
        assert_equal(torch.tensor(found[name]), t.mean(), total, torch.float64)
