"""The nodes of the autograd graph: what they saved, what shapes they take, and how one is called by itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.engine import keeps_graph, without_modes
from torch_secorder.autograd.function_code import writes_elsewhere
from torch_secorder.autograd.guard import in_python_function
from torch_secorder.autograd.self_test import hooks_are_seen, raw_names, raw_tensors
from torch_secorder.errors import UnsupportedError

Edge = tuple[Node, int]

# The kinds of values that nothing can change.
PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)


def value_shape(node: Node, nr: int) -> tuple[int, ...]:
    """The shape of a node's output, or of the parameter whose gradient the node accumulates."""
    variable = getattr(node, "variable", None)
    return tuple(variable.shape) if variable is not None else _shape_of(outputs_of(node)[nr])


def _shape_of(output: Any) -> tuple[int, ...]:
    """The shape of a node's output as its metadata has it; a nested tensor of strided layout, which has none, gets (0,)."""
    return (0,) if output.is_nested_tensor else tuple(output.shape)


def output_shapes(nodes: Collection[Node]) -> tuple[tuple[int, ...], ...]:
    """The shapes of all outputs of these nodes, in turn."""
    try:
        # A steady step asks for those of its whole graph.
        return tuple([tuple(output.shape) for node in nodes for output in node._input_metadata])
    except RuntimeError:
        return tuple([_shape_of(output) for node in nodes for output in node._input_metadata])
    except AttributeError:
        raise _without_shapes() from None


def output_count(node: Node) -> int:
    """How many outputs a node has, which is how many gradients it takes."""
    return len(outputs_of(node))


def edges_of(node: Node) -> list[GradientEdge]:
    """Where the gradients of a node's outputs arrive."""
    return [GradientEdge(node, nr) for nr in range(output_count(node))]


def output_dtype(node: Node, nr: int) -> torch.dtype:
    """The dtype of a node's output."""
    dtype: torch.dtype = outputs_of(node)[nr].dtype
    return dtype


def is_plain(node: Node) -> bool:
    """Whether all outputs of a node are real, and none is nested."""
    return not any(output.dtype.is_complex or output.is_nested_tensor for output in outputs_of(node))


def outputs_of(node: Any) -> Any:
    """What torch says of each output of a node: its shape, dtype and device."""
    try:
        return node._input_metadata
    except AttributeError:
        raise _without_shapes() from None


def _without_shapes() -> UnsupportedError:
    return UnsupportedError(
        f"torch {torch.__version__} does not show the shapes in its autograd graph, without which no use of a parameter outside "
        "of layers with rules can be found: use one of the versions of torch that this library was tested with"
    )


def has_packed_tensors(node: Any) -> bool | None:
    """Whether hooks keep the tensors that a node has saved, as activation checkpointing's do; None if torch does not show it.

    Up to torch 2.9 it does not.
    """
    return _any_packed((node,)) if hooks_are_seen() else None


def any_may_be_packed(nodes: Iterable[Any]) -> bool:
    """Whether hooks keep tensors that some of these nodes have saved, or torch does not show it."""
    return not hooks_are_seen() or _any_packed(nodes)


def _any_packed(nodes: Iterable[Any]) -> bool:
    # A steady step may ask this of its whole graph, so that no function is called for each node.
    for node in nodes:
        kind: Any = type(node)
        for name in raw_names(kind):
            raw = getattr(node, name)
            for one in raw if isinstance(raw, (list, tuple)) else (raw,):
                if getattr(one, "unpack_hook", None) is not None:
                    return True
    return False


def may_have_packed_tensors(node: Any, supposed: bool) -> bool:
    """Whether hooks keep the tensors that a node has saved; where torch does not show it, what is supposed."""
    packed = has_packed_tensors(node)
    return supposed if packed is None else packed


def unseen_hooks() -> str:
    """What a refusal says where torch does not show which saved tensors hooks keep; nothing where it does."""
    if hooks_are_seen():
        return ""
    return f"; torch {torch.__version__} does not show which saved tensors have hooks, so that any may: use torch 2.10 or newer"


def is_python_function(node: Any) -> bool:
    """Whether a node is that of a :class:`torch.autograd.Function`."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_checkpoint(node: Any) -> bool:
    """Whether a node is that of a re-entrant checkpoint which keeps the function that it runs again, as torch's do."""
    return node.name() == "CheckpointFunctionBackward" and callable(getattr(node, "run_function", None))


def is_others_function(node: Any) -> bool:
    """Whether a node is that of a :class:`torch.autograd.Function` that does not come with torch."""
    return is_python_function(node) and not node._forward_cls.__module__.startswith("torch.")


def has_others_function(x: Tensor) -> bool:
    """Whether the graph behind a tensor has a node of a :class:`torch.autograd.Function` that does not come with torch."""
    stack: list[Any] = [] if x.grad_fn is None else [x.grad_fn]
    seen = set(stack)
    # Each sample that is checked alone has its graph looked through, so that no function is called for each node.
    of_python = torch.autograd.function.BackwardCFunction
    while stack:
        node = stack.pop()
        if isinstance(node, of_python) and is_others_function(node):
            return True
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return False


def keeps_state(node: Any) -> bool:
    """Whether a function that does not come with torch keeps more for its backward than it saved, and constants.

    What it keeps may change when the backward runs: a buffer that is written to, a counter, a gradient added up elsewhere.
    """
    if not is_others_function(node):
        return False
    if writes_elsewhere(node._forward_cls):
        return True
    return not all(map(is_constant, vars(node).values())) or bool(tensors_of_weights(node))


def tensors_of_weights(node: Any) -> list[str]:
    """The names of the tensors that the weights which a function takes have as attributes, ``main_grad`` for one.

    A function that fuses the computation of a weight's gradient with its accumulation adds to such a tensor.
    """
    plainly_saved = node.saved_tensors if has_packed_tensors(node) is False else ()
    variables = (getattr(child, "variable", None) for child, _ in node.next_functions)
    weights = [x for x in (*plainly_saved, *variables) if isinstance(x, nn.Parameter)]
    return [name for x in weights for name, value in vars(x).items() if isinstance(value, Tensor)]


def is_constant(value: Any) -> bool:
    """Whether a value is plain, or a list of plain ones."""
    if isinstance(value, (tuple, list)):
        return all(map(is_constant, value))
    return value is None or isinstance(value, PLAIN)


def has_others_hooks(node: Any) -> bool:
    """Whether hooks that are neither a plain checkpoint's nor torch's own keep what a node has saved."""
    if has_packed_tensors(node) is not True:
        return False
    hooks = (getattr(one, "unpack_hook", None) for one in raw_tensors(node))
    return any(hook is not None and not _runs_a_forward_again(hook) for hook in hooks)


def _runs_a_forward_again(hook: Any) -> bool:
    """Whether a hook is torch's own, and no checkpoint's that keeps some results for one more run only."""
    if not str(getattr(hook, "__module__", "")).startswith("torch."):
        return False
    again = getattr(_held(hook, "frame"), "recompute_fn", None)
    return again is None or isinstance(_held(again, "recompute_context"), nullcontext)


def _held(function: Any, name: str) -> Any:
    """What a function holds of the one around it under a name; None if it holds nothing of that name."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        return cells[name].cell_contents
    except (KeyError, ValueError):  # ValueError: the cell is empty
        return None


def node_vjp(node: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a node's inputs, in the order of its ``next_functions``, given those of its outputs."""
    if node.name() == "CompiledFunctionBackward" and not keeps_graph():
        raise UnsupportedError(
            "a compiled function can't be asked for single samples: compute the outputs inside of a FisherMonitor's block, or "
            'under torch.compiler.set_stance("force_eager"), where compiled code runs as it was written'
        )
    if not is_python_function(node):
        results = node(*grads)
        return list(results) if isinstance(results, tuple) else [results]
    # A function of Python's answers for every argument, tensor or not; those with an edge are the ones that need a gradient.
    with in_python_function():
        results = node.apply(*map(partial(_or_zeros, node), range(len(grads)), grads))
    answers = results if isinstance(results, tuple) else (results,)
    wanted = iter([answer for answer, needs in zip(answers, node.needs_input_grad, strict=True) if needs])
    return [None if child is None else next(wanted) for child, _ in node.next_functions]


def _or_zeros(node: Node, nr: int, grad: Tensor | None) -> Tensor | None:
    """The gradient of an output, or the zeros that the engine gives a Python function for one that was not used."""
    if grad is not None:
        return grad
    output = outputs_of(node)[nr]
    if output.is_nested_tensor:
        return None
    return torch.zeros(output.shape, dtype=output.dtype, device=output.device)


def fitted(grad: Tensor, output: Any, *, keeps_dtype: bool = False) -> Tensor:
    """A gradient as the engine hands it to a node: of its output's shape and dtype, and real if that is real.

    Args:
        grad: the gradient.
        output: what torch says of the output, as :func:`outputs_of` has it.
        keeps_dtype: leave the gradient's dtype as it is.
    """
    strided = grad.is_nested and grad.layout is torch.strided  # Such a tensor has no sizes.
    if not strided and tuple(grad.shape) != tuple(output.shape):
        grad = grad.sum_to_size(tuple(output.shape))
    if grad.is_complex() and not output.dtype.is_complex:
        grad = grad.real
    return grad if keeps_dtype else grad.to(output.dtype)


def made_by(x: Tensor) -> Node:
    """The node that made a tensor; for a leaf, the one that takes its gradient."""
    if x.grad_fn is not None:
        return x.grad_fn
    with without_modes():  # torch makes a view to find it
        return get_gradient_edge(x).node
