"""What goes to numpy while the library has frozen parameters differentiated, of which the user's program knows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

TO_NUMPY: set[Callable[..., Any]] = {Tensor.numpy, Tensor.__array__}


class NumpyOfFrozen(TorchFunctionMode):
    """Inside, a tensor whose gradient only frozen parameters ask for goes to numpy as it does while they have none.

    Autograd ends there in any case: what numpy computes is a constant.

    Args:
        leaves: the frozen parameters, or what stands for them in the graph.
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
        """An operation has taken these arguments and given a result."""

    def _is_constant(self, x: Tensor) -> bool:
        """Whether all that a tensor's graph ends in are these leaves."""
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
