"""Checks of the gradients that arrive at a use of a parameter outside of its module's call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch_secorder.errors import ShapeError, UnsupportedError
from torch_secorder.graph.uses import ParameterUse
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import is_dtensor


def require_whole(use: ParameterUse, grads: Sequence[Tensor | None], table: Table) -> None:
    """Raise if several ranks compute parts of a use.

    Raises:
        UnsupportedError: naming the parameters.
    """
    leaves = [table.leaves[target] for target in use.targets if isinstance(target, int)]
    if any(map(is_dtensor, (*grads, *leaves))):
        raise UnsupportedError(
            f"{_names(use, table)}: used outside of its module's own forward, where ranks compute parts of it: leave this "
            "parameter out of parallelize_module, or use it in its module's forward only"
        )


def gradient_with_samples(use: ParameterUse, grads: Sequence[Tensor | None], n: int, table: Table) -> Tensor:
    """The gradient of the output that has the n samples, among those that arrived at a use's node.

    Raises:
        ShapeError: if the samples are not on the expected axis.
    """
    found = grads[use.output]
    if found is None and n == 1:
        found = next(grad for grad in grads if grad is not None)  # The whole gradient belongs to the one sample.
    elif found is None or not (n == 1 or use.placement.fits(found.shape, n)):
        shape = None if found is None else tuple(found.shape)
        raise ShapeError(f"{_names(use, table)}: the {n} samples are not in a gradient of shape {shape}")
    return found


def _names(use: ParameterUse, table: Table) -> str:
    return ", ".join(table.rows[t].name if isinstance(t, int) else str(t.site) for t in use.targets)
