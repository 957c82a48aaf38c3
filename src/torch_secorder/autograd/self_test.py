"""The self-test: which of the attributes that torch keeps private are there, and are what they are taken for.

When the library first meets a node of some kind, one such node is made of tiny tensors, once per process, and each
attribute that the library reads of such nodes is compared with what it has to be. What is missing or different counts as
unknown, and is never read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from torch_secorder.autograd.node_examples import EXAMPLES, numbers


def confirmed(kind: str, attributes: Mapping[str, str]) -> frozenset[str]:
    """Those of our names whose attribute of torch's is there, in nodes of this kind, and has the right value."""
    if kind not in EXAMPLES:  # Such nodes are made on other devices only, but their class is there.
        node_class = getattr(torch._C._functions, kind, None)
        return frozenset(name for name, attribute in attributes.items() if hasattr(node_class, attribute))
    try:
        with _undisturbed():
            output, expected = EXAMPLES[kind]()
            node = _first(kind, output.grad_fn)
            return frozenset(
                name for name, attribute in attributes.items() if _is(getattr(node, attribute, None), expected[name])
            )
    except Exception:  # This build of torch can't make such a node here.
        return frozenset()


@cache
def hooks_are_seen() -> bool:
    """Whether a node shows that hooks keep its tensors elsewhere: a node of torch's own, and one of a Python function."""
    with _undisturbed():
        x = numbers(2)
        outputs: list[Tensor] = [x * x, _Doubled.apply(x)]  # type: ignore[no-untyped-call]  # torch does not type it
        saved = [raw_tensors(output.grad_fn) for output in outputs]
        return all(saved) and all(getattr(one, "unpack_hook", None) is not None for several in saved for one in several)


def raw_tensors(node: Any) -> list[Any]:
    """The tensors that a node saved, as hooks left them; not to be looked at any more when the node is gone."""
    kind: Any = type(node)
    values = [getattr(node, name) for name in raw_names(kind)]
    return [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]


@cache
def raw_names(kind: type) -> tuple[str, ...]:
    """The attributes of nodes of one class that hold saved tensors as hooks left them."""
    return attribute_names(kind, "_raw_saved_")


@cache
def attribute_names(kind: type, prefix: str) -> tuple[str, ...]:
    """The attributes of nodes of one class whose names start so."""
    return tuple(sorted(name for name in dir(kind) if name.startswith(prefix)))


def _first(kind: str, node: Any) -> Any:
    """The first node of a kind on the way from one to its first input, to that one's first input and so on."""
    while node is not None and node.name() != kind:
        node = next((child for child, _ in node.next_functions if child is not None), None)
    return node


def _is(found: Any, expected: Any) -> bool:
    """Whether an attribute has the value that it must have, whatever its axes of size 1."""
    if expected is None:
        return isinstance(found, Tensor)
    if isinstance(expected, Tensor):
        alike = isinstance(found, Tensor) and found.numel() == expected.numel()
        return alike and torch.allclose(found.flatten(), expected.flatten().to(found.dtype))
    if isinstance(expected, (list, tuple)):
        return isinstance(found, (list, tuple)) and len(found) == len(expected) and all(map(_is, found, expected))
    return bool(found == expected)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever surrounds the first use (no_grad, autocast, a checkpoint, a transform, a mode) has no part in the test."""

    def as_it_is(x: Tensor) -> Tensor:
        return x

    with ExitStack() as stack:
        if (transforms := sys.modules.get("torch._functorch.pyfunctorch")) is not None:
            stack.enter_context(transforms.temporarily_clear_interpreter_stack())
        private = torch._C._autograd
        if (message := private._saved_tensors_hooks_get_disabled_error_message()) is not None:
            private._saved_tensors_hooks_enable()
            stack.callback(private._saved_tensors_hooks_disable, message)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch._C._DisableTorchDispatch())
        stack.enter_context(saved_tensors_hooks(as_it_is, as_it_is))
        yield


class _Doubled(torch.autograd.Function):
    """A Python function that saves a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad
