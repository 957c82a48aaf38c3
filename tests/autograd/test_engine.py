"""What the engine says of a backward pass from inside of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from torch_secorder.autograd import engine
from torch_secorder.autograd.engine import (
    accumulates_gradient_of,
    any_vmapped,
    computes_gradient_of,
    is_executed,
    leaf_of,
)


class Scene:
    """A graph of a parameter and an input, and what is said in a hook in its middle."""

    def __init__(self) -> None:
        layer, self.x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=True)
        self.w, self.hidden = layer.weight, torch.tanh(layer(self.x))
        self.out = self.hidden.sum(1)
        self.said: list[object] = []
        self.leaves = [get_gradient_edge(leaf).node for leaf in (self.w, self.x)]
        self.hidden.grad_fn.register_prehook(self.hook)

    def hook(self, grads: tuple[Tensor, ...]) -> None:
        computed = [computes_gradient_of(leaf) for leaf in self.leaves]
        accumulated = [accumulates_gradient_of(leaf) for leaf in self.leaves]
        self.said = [computed, accumulated, is_executed(self.hidden.grad_fn), any_vmapped(grads)]


PASSES: dict[str, tuple[Callable[[Scene], object], list[object]]] = {
    "backward": (lambda s: s.out.sum().backward(), [[True, True], [True, True], True, False]),
    "backward(inputs=)": (lambda s: s.out.sum().backward(inputs=[s.x]), [[False, True], [False, True], True, False]),
    "grad of the input": (lambda s: torch.autograd.grad(s.out.sum(), s.x), [[False, True], [False, None], True, False]),
    "grad of both": (lambda s: torch.autograd.grad(s.out.sum(), [s.x, s.w]), [[True, True], [None, None], True, False]),
    "create_graph": (
        lambda s: torch.autograd.grad(s.out.sum(), s.w, create_graph=True),
        [[True, False], [None, False], True, False],
    ),
    "is_grads_batched": (
        lambda s: torch.autograd.grad(s.out, s.w, torch.eye(4), is_grads_batched=True),
        [[True, False], [None, False], True, True],
    ),
    "torch.func.vmap": (
        lambda s: torch.func.vmap(lambda v: torch.autograd.grad(s.out, s.w, v)[0])(torch.eye(4)),
        [[True, False], [None, False], True, True],
    ),
}


@pytest.mark.parametrize("kind", PASSES)
def test_what_the_engine_says_of_a_pass(kind: str) -> None:
    scene, (run, expected) = Scene(), PASSES[kind]
    run(scene)
    assert scene.said == expected


def test_a_leaf_is_known_by_its_node() -> None:
    scene = Scene()
    assert leaf_of(scene.leaves[0]) is scene.w
    assert leaf_of(scene.hidden.grad_fn) is None


class _Interrupted(dict[int, int]):
    """Library passes of which none can be noted, as where Ctrl-C comes just before."""

    def __setitem__(self, task: int, thread: int) -> None:
        raise KeyboardInterrupt


def test_an_interrupt_before_a_library_pass_is_noted_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIBRARY_PASSES", _Interrupted())
    with pytest.raises(KeyboardInterrupt), engine.library_pass([Scene().out.sum()]) as (root,):
        root.backward()
