"""Uses of frozen parameters, which leave nothing in the autograd graph, so that they are watched while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torch_secorder.model.containers import tensors
from torch_secorder.model.numpy_of_frozen import NumpyOfFrozen


class FrozenUses(NumpyOfFrozen):
    """Counts, inside, the operations that take one of these parameters and give a tensor.

    Args:
        positions: the id of each frozen parameter -> its position in the parameter table.

    Attributes:
        counts: position -> how many operations have taken it.
    """

    def __init__(self, positions: Mapping[int, int]):
        super().__init__()
        self._positions = positions
        self.counts: Counter[int] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and count what it took."""
        result = super().__torch_function__(func, types, args, kwargs)
        # Attributes of a tensor are read by such functions, too.
        if getattr(func, "__name__", "") != "__get__" and isinstance(result, (Tensor, tuple, list)):
            for x in tensors((*args, *(kwargs or {}).values())):
                if (position := self._positions.get(id(x))) is not None:
                    self.counts[position] += 1
        return result
