"""Functions whose backward writes to what outlives it, as far as their code shows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_secorder.autograd.function_code import writes_elsewhere

total = 0
calls: Counter[str] = Counter()
seen: list[Tensor] = []
table = torch.ones(3)
FACTOR = 2.0
SHAPE = (1, 2)


class Base(torch.autograd.Function):
    count = 0
    log: list[int] = []  # noqa: RUF012  # what is tested

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()


def noted(grad: Tensor) -> Tensor:
    seen.append(grad)
    return grad


def halved(grad: Tensor) -> Tensor:
    return grad / FACTOR


def counting() -> Any:
    count = 0

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return grad

    return backward


def closed_over(note: Any) -> Any:
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        note["calls"] = 1
        return grad

    return backward


def to_a_global(ctx: Any, grad: Tensor) -> Tensor:
    global total
    total += 1
    return grad


def to_a_class(ctx: Any, grad: Tensor) -> Tensor:
    Base.count += 1
    return grad


def to_ctx(ctx: Any, grad: Tensor) -> Tensor:
    ctx.calls = 1
    return grad


def to_a_mapping(ctx: Any, grad: Tensor) -> Tensor:
    calls["backward"] += 1
    return grad


def to_a_list(ctx: Any, grad: Tensor) -> Tensor:
    seen.append(grad)
    return grad


def to_a_list_of_a_class(ctx: Any, grad: Tensor) -> Tensor:
    Base.log.append(1)
    return grad


def to_a_tensor(ctx: Any, grad: Tensor) -> Tensor:
    table.add_(1)
    return grad


def by_a_function(ctx: Any, grad: Tensor) -> Tensor:
    return noted(grad)


def in_an_inner_function(ctx: Any, grad: Tensor) -> Tensor:
    return (lambda g: noted(g))(grad)


def to_the_screen(ctx: Any, grad: Tensor) -> Tensor:
    print("backward")
    return grad


@pytest.mark.parametrize(
    "backward",
    [
        to_a_global,
        to_a_class,
        to_ctx,
        to_a_mapping,
        to_a_list,
        to_a_list_of_a_class,
        to_a_tensor,
        by_a_function,
        in_an_inner_function,
        to_the_screen,
        counting(),
        closed_over({}),
        once_differentiable(to_a_list),
    ],
)
def test_it_writes(backward: Any) -> None:
    assert writes_elsewhere(type("Writes", (Base,), {"backward": staticmethod(backward)}))


def of_its_own(ctx: Any, grad: Tensor) -> Tensor:
    result = grad.clone()
    result[grad < 0] = 0
    parts = [result, grad]
    parts.append(result)
    return sum(map(halved, parts), torch.zeros(SHAPE)) * math.pi


def plain(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return FACTOR * halved(grad) * x.cos().to(torch.float32)


@pytest.mark.parametrize(
    "backward", [of_its_own, plain, once_differentiable(plain), lambda ctx, grad: (lambda g: halved(g))(grad)]
)
def test_it_writes_to_its_own_only(backward: Any) -> None:
    assert not writes_elsewhere(type("Plain", (Base,), {"backward": staticmethod(backward)}))


def test_what_a_method_changes_is_not_seen() -> None:
    """No code of Python's shows it."""
    note = seen.append

    def backward(ctx: Any, grad: Tensor) -> Tensor:
        note(grad)
        return grad

    assert not writes_elsewhere(type("Unseen", (Base,), {"backward": staticmethod(backward)}))
