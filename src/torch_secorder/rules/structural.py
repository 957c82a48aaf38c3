"""Layers that are known by what they compute and not by their class: the many RMSNorms and Conv1Ds of model libraries.

A candidate is a module without submodules whose own parameters have the right shapes. It is tried on random numbers: only a
module that behaves as the rule says, in the parameters and over the positions, gets the rule.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.capture.records import Call
from torch_secorder.errors import UnsupportedError
from torch_secorder.per_sample import Outer
from torch_secorder.rules.registry import Gradients, Rule


def structural_rule(module: nn.Module) -> Rule | None:
    """The rule for a module that no class tells of, if it behaves as one of these."""
    if next(module.children(), None) is not None or "forward" in vars(module):
        return None
    # What takes another input, a gate for one, may use it in ways that no trial with one input shows.
    takes_one = len(inspect.signature(module.forward).parameters) == 1
    if not takes_one or any(isinstance(value, Tensor) for value in vars(module).values()):
        return None
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    for candidate in (_scale, _affine):
        rule = candidate(module, shapes)
        if rule is not None:
            return rule
    return None


def scale(module: nn.Module, call: Call) -> Gradients:
    """``y = weight * n(x) + m(x)`` over the last axis; ``n(x)`` is the output for a weight of one less that for zero."""
    x, g = next(iter((*call.inputs, *call.kwargs.values()))), call.grad_output
    before = torch.get_rng_state()
    n = _with(module, x, weight=torch.ones_like) - _with(module, x, weight=torch.zeros_like)
    if not torch.equal(before, torch.get_rng_state()):
        torch.set_rng_state(before)
        raise UnsupportedError(
            "it draws random numbers now, which can't be drawn again: use eval mode, or register_rule"
        )
    return {"weight": (g * n).reshape(len(g), -1, g.shape[-1]).sum(1)}


def affine(module: nn.Module, call: Call) -> Gradients:
    """``y = x weight + bias`` over the last axis."""
    x, g = next(iter((*call.inputs, *call.kwargs.values()))), call.grad_output
    x, g = (value.reshape(len(value), 1, -1, value.shape[-1]) for value in (x, g))
    weight = Outer(g, x, (x.shape[-1], g.shape[-1]))
    return {"weight": weight, "bias": g.sum((1, 2))} if "bias" in module._parameters else {"weight": weight}


def _scale(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Rule | None:
    if set(shapes) != {"weight"} or len(shapes["weight"]) != 1:
        return None
    w = torch.linspace(0.5, 2.0, shapes["weight"][0])

    def behaves(x: Tensor, f: Callable[..., Tensor]) -> bool:
        zero, one, other = (
            f(x, weight=lambda p, v=v: v.to(p).expand_as(p)) for v in (torch.tensor(0.0), torch.tensor(1.0), w)
        )
        alone = f(x[:1, 1:2], weight=lambda p: w.to(p))
        return _close(other, zero + w.to(one) * (one - zero)) and _close(alone, other[:1, 1:2])

    return Rule("scale", scale, type(module)) if _behaves(module, shapes["weight"][0], behaves) else None


def _affine(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> Rule | None:
    if set(shapes) != {"weight", "bias"} or len(shapes["weight"]) != 2 or shapes["bias"] != shapes["weight"][1:]:
        return None

    def behaves(x: Tensor, f: Callable[..., Tensor]) -> bool:
        found = dict(module.named_parameters(recurse=False))
        return _close(f(x), x @ found["weight"] + found["bias"])

    return Rule("affine", affine, type(module)) if _behaves(module, shapes["weight"][0], behaves) else None


def _behaves(module: nn.Module, width: int, test: Callable[[Tensor, Callable[..., Tensor]], bool]) -> bool:
    p = next(iter(module._parameters.values()))
    assert p is not None
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
    state = torch.get_rng_state()
    try:
        with torch.no_grad():
            return test(x, lambda x, **changes: _with(module, x, **changes))
    except Exception:  # a module that can't even be called with one tensor is none of these
        return False
    finally:
        torch.set_rng_state(state)


def _with(module: nn.Module, x: Tensor, **changes: Callable[[Tensor], Tensor]) -> Tensor:
    """The module's forward with other parameters, called on a copy so that no hook runs and nothing of the user's changes."""
    twin: Any = copy.copy(module)
    twin.__dict__ = dict(vars(module))
    own = {name: p if p is None else p.detach() for name, p in module._parameters.items()}
    for name, change in changes.items():
        own[name] = change(dict(module.named_parameters(recurse=False))[name].detach())
    twin.__dict__["_parameters"] = own
    twin.__dict__["_buffers"] = {name: b.clone() if b is not None else None for name, b in module._buffers.items()}
    found: Tensor = twin.forward(x)
    return found


def _close(a: Tensor, b: Tensor) -> bool:
    half = a.dtype in (torch.float16, torch.bfloat16)
    return a.shape == b.shape and torch.allclose(a, b, rtol=5e-2 if half else 1e-4, atol=1e-2 if half else 1e-5)
