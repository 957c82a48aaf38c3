"""Everything a visitor could leave behind on a model: values, gradients, flags, attributes and hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Hooks = dict[str, int]


def hooks(model: nn.Module) -> Hooks:
    """How many hooks there are, by place: on every module, parameter and buffer, and the global ones."""
    found: Hooks = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, value in vars(module).items():
            if "hook" in attribute and isinstance(value, dict):
                found[f"{name}.{attribute}"] = len(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for attribute in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found[f"{name}.{attribute}"] = len(getattr(tensor, attribute, None) or ())
    for attribute, value in vars(nn.modules.module).items():
        if attribute.startswith("_global") and isinstance(value, dict):
            found[attribute] = len(value)
    return found


def state(model: nn.Module) -> dict[str, Any]:
    """A copy of all that a library must leave as it found it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "values": {name: p.detach().clone() for name, p in parameters.items()},
        "gradients": {name: None if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "identities": {name: id(p) for name, p in parameters.items()},
        "buffers": {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "parameter_attributes": {name: sorted(vars(p)) for name, p in parameters.items()},
        "hooks": hooks(model),
    }


def assert_unchanged(before: dict[str, Any], model: nn.Module) -> None:
    after = state(model)
    for kind, values in before.items():
        assert values.keys() == after[kind].keys(), kind
        for name, value in values.items():
            now = after[kind][name]
            same = (
                identical(value, now)
                if isinstance(value, Tensor) and isinstance(now, Tensor)
                else value is now or value == now
            )
            assert same, f"{kind} of {name!r} changed: {value} -> {now}"


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, dense or sparse; NaN equals NaN."""
    a, b = a.detach().to_dense(), b.detach().to_dense()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(1234.5), b.nan_to_num(1234.5))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.detach().clone() for name, p in model.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        mine = actual[name]
        if gradient is None or mine is None:
            assert mine is gradient, name
        else:
            assert identical(mine, gradient), name
