"""The self-test: which of the attributes that torch keeps private are there, and are what they are taken for.

When the library first meets a node of some kind, one such node is made of tiny tensors, once per process, and each
attribute that the library reads of such nodes is compared with what it has to be. What is missing or different counts as
unknown, and is never read.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

# An output that such a node made, and what the node must have saved, by our names. None stands for any tensor.
Example = tuple[Tensor, dict[str, Any]]
EXAMPLES: dict[str, Callable[[], Example]] = {}


def _example(kind: str) -> Callable[[Callable[[], Example]], Callable[[], Example]]:
    def register(example: Callable[[], Example]) -> Callable[[], Example]:
        EXAMPLES[kind] = example
        return example

    return register


def confirmed(kind: str, attributes: Mapping[str, str]) -> frozenset[str]:
    """Those of our names whose attribute of torch's is there, in nodes of this kind, and has the right value."""
    if kind not in EXAMPLES:  # such nodes are made on other devices only, but their class is there
        node_class = getattr(torch._C._functions, kind, None)
        return frozenset(name for name, attribute in attributes.items() if hasattr(node_class, attribute))
    try:
        with _undisturbed():
            output, expected = EXAMPLES[kind]()
            node = _first(kind, output.grad_fn)
            return frozenset(
                name for name, attribute in attributes.items() if _is(getattr(node, attribute, None), expected[name])
            )
    except Exception:  # this build of torch can't make such a node here
        return frozenset()


@cache
def hooks_are_seen() -> bool:
    """Whether a node shows that hooks keep its tensors elsewhere: a node of torch's own, and one of a Python function."""
    with _undisturbed():
        x = _numbers(2)
        outputs: list[Tensor] = [x * x, _Doubled.apply(x)]  # type: ignore[no-untyped-call]  # torch does not type it
        saved = [raw_tensors(output.grad_fn) for output in outputs]
        return all(saved) and all(getattr(one, "unpack_hook", None) is not None for several in saved for one in several)


def raw_tensors(node: Any) -> list[Any]:
    """The tensors that a node saved, as hooks left them; not to be looked at any more when the node is gone."""
    kind: Any = type(node)
    values = [getattr(node, name) for name in attribute_names(kind, "_raw_saved_")]
    return [one for value in values for one in (value if isinstance(value, (list, tuple)) else (value,))]


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
        return isinstance(found, Tensor) and torch.allclose(found.flatten(), expected.flatten().to(found.dtype))
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


def _numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Different numbers around 0, of a tensor that requires a gradient."""
    count = math.prod(shape)
    x = torch.arange(count, dtype=dtype, device="cpu").sub(count / 2 - 0.25).div(count).reshape(shape)
    return x.requires_grad_()


def _indices(*values: int) -> Tensor:
    return torch.tensor(values, device="cpu")


@_example("AddmmBackward0")
def _addmm() -> Example:
    b, x, w = _numbers(2), _numbers(3, 4), _numbers(4, 2)
    return torch.addmm(b, x, w, beta=2, alpha=3), {"alpha": 3, "beta": 2, "left": x, "right": w}


@_example("MmBackward0")
def _mm() -> Example:
    x, w = _numbers(3, 4), _numbers(4, 2)
    return torch.mm(x, w), {"left": x, "right": w}


@_example("BmmBackward0")
def _bmm() -> Example:
    x, w = _numbers(2, 3, 4), _numbers(2, 4, 5)
    return torch.bmm(x, w), {"left": x}


@_example("ConvolutionBackward0")
def _convolution() -> Example:
    x, w = _numbers(1, 2, 4, 5), _numbers(2, 1, 2, 3)
    sizes = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "output_padding": (0, 0)}
    output = F.conv2d(x, w, None, sizes["stride"], sizes["padding"], sizes["dilation"], groups=2)
    return output, sizes | {"input": x, "groups": 2, "transposed": False}


@_example("EmbeddingBackward0")
def _embedding() -> Example:
    ids = _indices(1, 0, 2)
    output = F.embedding(ids, _numbers(4, 2), padding_idx=3)
    return output, {"ids": ids, "padding_id": 3, "by_frequency": False}


@_example("NativeLayerNormBackward0")
def _layer_norm() -> Example:
    x, w = _numbers(3, 4), _numbers(4)
    scale = (x.var(1, unbiased=False) + 0.1).rsqrt()
    return F.layer_norm(x, (4,), w, w, 0.1), {"input": x, "shape": (4,), "mean": x.mean(1), "scale": scale}


@_example("NativeGroupNormBackward0")
def _group_norm() -> Example:
    x, w = _numbers(3, 4, 2), _numbers(4)
    groups = x.reshape(6, 4)  # two channels of two numbers in each
    scale = (groups.var(1, unbiased=False) + 0.1).rsqrt()
    return F.group_norm(x, 2, w, w, 0.1), {"input": x, "groups": 2, "mean": groups.mean(1), "scale": scale}


@_example("NativeBatchNormBackward0")
def _batch_norm() -> Example:
    x, w = _numbers(3, 4), _numbers(4)
    mean, variance = _numbers(4).detach(), _numbers(4).detach().square()
    expected = {"input": x, "mean": mean, "variance": variance, "eps": 0.125, "training": False}
    return F.batch_norm(x, mean, variance, w, w, eps=0.125), expected


@_example("PreluKernelBackward0")
def _prelu() -> Example:
    x = _numbers(3, 4)
    return F.prelu(x, _numbers(4)), {"input": x}


@_example("TrilinearBackward0")
def _bilinear() -> Example:
    x, y = _numbers(3, 4), _numbers(3, 2)
    axes = {"expand1": (1, 3), "expand2": (0,), "expand3": (1, 2), "summed": (2, 3)}
    return F.bilinear(x, y, _numbers(5, 4, 2)), axes | {"left": x, "right": y}


@_example("RepeatBackward0")
def _repeat() -> Example:
    return _numbers(2).repeat(3, 2), {"times": (3, 2)}


@_example("MulBackward0")
def _mul() -> Example:
    x, w = _numbers(3, 4), _numbers(4)
    return x * w, {"left": x, "right": w}


@_example("AddBackward0")
def _add() -> Example:
    return torch.add(_numbers(3, 4), _numbers(4), alpha=3), {"alpha": 3}


@_example("SubBackward0")
def _sub() -> Example:
    return torch.sub(_numbers(3, 4), _numbers(4), alpha=3), {"alpha": 3}


@_example("MkldnnRnnLayerBackward0")
def _lstm() -> Example:
    shapes = {"input": (2, 3, 4), "h0": (1, 3, 2), "c0": (1, 3, 2), "w_ih": (8, 4), "w_hh": (8, 2), "b_ih": (8,)}
    given = {name: _numbers(*shape, dtype=torch.float32) for name, shape in shapes.items()}
    given["b_hh"] = _numbers(8, dtype=torch.float32) + 1
    x, h0, c0, *weights = given.values()
    output = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, True, False, False)[0]
    settings = {"mode": 2, "reverse": False, "batch_sizes": (), "has_biases": True}
    return output, given | settings | {"output": output, "workspace": None}


@_example("IndexBackward0")
def _index() -> Example:
    rows = _indices(1, 0)
    return _numbers(3, 4)[rows], {"indices": (rows,)}


@_example("IndexSelectBackward0")
def _index_select() -> Example:
    rows = _indices(1, 0)
    return _numbers(3, 4).index_select(1, rows), {"axis": 1, "index": rows}


@_example("FlipBackward0")
def _flip() -> Example:
    return _numbers(3, 4).flip(1), {"axes": (1,)}


@_example("TransposeBackward0")
def _transpose() -> Example:
    return _numbers(2, 3, 4).transpose(0, 2), {"axis": 0, "other": 2}


@_example("PermuteBackward0")
def _permute() -> Example:
    return _numbers(2, 3, 4).permute(2, 0, 1), {"axes": (2, 0, 1)}


@_example("UnsqueezeBackward0")
def _unsqueeze() -> Example:
    return _numbers(3, 4).unsqueeze(1), {"axis": 1}


@_example("UnbindBackward0")
def _unbind() -> Example:
    return _numbers(3, 4).unbind(1)[0], {"axis": 1}


@_example("SelectBackward0")
def _select() -> Example:
    return _numbers(3, 4).select(1, 2), {"axis": 1, "index": 2}


@_example("SliceBackward0")
def _slice() -> Example:
    return _numbers(3, 9)[:, 1:8:2], {"axis": 1, "start": 1, "stop": 8, "step": 2}


@_example("SplitBackward0")
def _split() -> Example:
    return _numbers(3, 4).split(2, 1)[0], {"axis": 1, "size": 2}


@_example("SplitWithSizesBackward0")
def _split_with_sizes() -> Example:
    return _numbers(3, 4).split([1, 3], 1)[0], {"axis": 1, "sizes": (1, 3)}


@_example("UnsafeSplitBackward0")
def _unsafe_split() -> Example:
    return torch.unsafe_split(_numbers(3, 4), 2, 1)[0], {"axis": 1, "size": 2}
