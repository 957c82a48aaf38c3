"""Packed weights: parameters that hold codes, possibly several per number, for a weight of another shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch_secorder.errors import ArgumentError
from torch_secorder.model.containers import is_continuous
from torch_secorder.model.ranks import class_as_written

Shapes = Callable[[Any], Mapping[str, Sequence[int]]]

# Layer -> from a module to the shapes of the weights that its codes stand for, by its own parameters' names.
_shapes: dict[type[nn.Module], Shapes] = {}


def declare_shapes(layer: type[nn.Module], shapes: Shapes | None) -> None:
    """Declare that a layer's parameters, also in subclasses, stand for weights of these shapes; None for their own shapes."""
    _shapes.pop(layer, None)
    if shapes is not None:
        _shapes[layer] = shapes


def weight_shape(module: nn.Module, local: str, p: Tensor) -> tuple[int, ...]:
    """The shape of the weight that a parameter is, or that its codes stand for.

    Raises:
        ArgumentError: if another shape is declared for a parameter that holds numbers instead of codes.
    """
    classes = type(module).__mro__
    if _shapes.keys().isdisjoint(classes):
        return tuple(p.shape)
    shapes = next(_shapes[layer] for layer in classes if layer in _shapes)
    found = tuple(int(side) for side in shapes(module).get(local, p.shape))
    if found != tuple(p.shape) and is_continuous(p):
        kind = class_as_written(module)
        raise ArgumentError(
            f"the rule for {kind.__name__} declares that '{local}' of shape {tuple(p.shape)} stands for a weight of shape "
            f"{found}, and it holds numbers ({p.dtype}), whose gradients have its own shape: declare shapes of packed codes only"
        )
    return found
