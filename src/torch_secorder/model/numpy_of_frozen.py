"""Conversions to numpy while the library differentiates frozen parameters, which the user's program does not expect."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

TO_NUMPY: set[Callable[..., Any]] = {Tensor.numpy, Tensor.__array__}


class NumpyOfFrozen(TorchFunctionMode):
    """A mode in which a tensor that requires a gradient only because of frozen parameters converts to numpy as usual.

    Autograd ends there in any case, since the results of numpy are constants.

    Args:
        leaves: the frozen parameters, or the tensors that stand for them in the graph.
    """

    def __init__(self, leaves: Iterable[Tensor] = ()):
        super().__init__()
        self.leaves = list(leaves)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation."""
        if func in TO_NUMPY and self._is_constant(args[0]):
            args = (args[0].detach(), *args[1:])
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._ran(func, (*args, *kwargs.values()), result)
        return result

    def _ran(self, func: Callable[..., Any], arguments: Sequence[Any], result: Any) -> None:
        """Called after an operation, with its arguments and its result."""

    def _is_constant(self, x: Tensor) -> bool:
        """Whether a tensor's graph ends only in these leaves."""
        known = set(map(id, self.leaves))
        stack: list[Node | None] = [x.grad_fn]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node is None or (hasattr(node, "variable") and id(node.variable) not in known):
                return False
            children = [child for child, _ in node.next_functions if child is not None and child not in seen]
            seen.update(children)
            stack += children
        return True
