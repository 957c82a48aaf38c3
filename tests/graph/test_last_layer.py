"""The matrix that outputs come out of: found where there is one, and nothing is said where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torch_secorder.autograd.self_test import hooks_are_seen
from torch_secorder.graph.last_layer import last_linear_factors


def features() -> Tensor:
    return nn.Linear(3, 4)(torch.randn(5, 3)).relu()


@pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show whether the factors may be read")
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer(bias: bool) -> None:
    layer, h = nn.Linear(4, 6, bias=bias), features()
    found = last_linear_factors(layer(h))
    assert found is not None
    assert torch.equal(found[0], h)
    assert torch.equal(found[1], layer.weight.T)
    assert found[0].requires_grad
    assert not found[1].requires_grad


@pytest.mark.skipif(not hooks_are_seen(), reason="this torch does not show whether the factors may be read")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [(2,), (1,), (2, 3)])
def test_a_linear_layer_at_each_position(positions: tuple[int, ...], bias: bool) -> None:
    layer, h = nn.Linear(4, 6, bias=bias), nn.Linear(3, 4)(torch.randn(5, *positions, 3)).relu()
    found = last_linear_factors(layer(h))
    assert found is not None
    assert torch.equal(found[0], h.flatten(0, -2))
    assert torch.equal(found[1], layer.weight.T)


def changed() -> Tensor:
    h = features()
    outputs = nn.Linear(4, 6)(h)
    h.mul_(2)
    return outputs


def freed() -> Tensor:
    outputs = nn.Linear(4, 6)(features())
    outputs.sum().backward()
    return outputs


NONE: dict[str, Callable[[], Tensor]] = {
    "no graph": lambda: torch.randn(5, 6),
    "scaled": lambda: nn.Linear(4, 6)(features()) / 2,
    "other rows": lambda: nn.Linear(4, 6)(features()).view(10, 3),
    "another axis last": lambda: nn.Linear(4, 6)(features()[:, None].expand(5, 2, 4)).transpose(1, 2),
    "one number": lambda: nn.Linear(4, 1)(features()[0]).view(()),
    "nothing before it": lambda: nn.Linear(4, 6)(torch.randn(5, 4)),
    "frozen": lambda: nn.Linear(4, 6).requires_grad_(False)(features()),
    "checkpointed": lambda: checkpoint(nn.Linear(4, 6), features(), use_reentrant=False),
    "changed since": changed,
    "freed": freed,
}


@pytest.mark.parametrize("name", NONE)
def test_nothing_of_the_kind(name: str) -> None:
    assert last_linear_factors(NONE[name]()) is None
