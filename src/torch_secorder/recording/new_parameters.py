"""Parameters that are put into a model while it is watched, or become others there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import leaf_of
from torch_secorder.autograd.leaf_nodes import accumulators
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import CoverageError
from torch_secorder.model.parameters import named_modules
from torch_secorder.model.ranks import is_dtensor
from torch_secorder.recording.backward_pass import replaced


class NewParameters:
    """Refuses passes through a forward that used a parameter which was put into the model inside of the block.

    A parameter that gets another dtype or device (``model.double()``) stays the same object, and torch gives it a new node. A
    pass that reaches such a node is one of the samples, so that it is refused and not ignored.

    Args:
        model: the model; None for a recorder without one, which sees no forward.
        modules: its modules on entry, under their plain names.
        leaves: the nodes on entry that accumulate the analyzed parameters' gradients -> the parameters' positions.
        names: the names of all analyzed parameters.

    Attributes:
        refused: the leaves of parameters for which forwards were refused, each with what keeps it for torch.
    """

    def __init__(
        self,
        model: nn.Module | None,
        modules: Sequence[tuple[str, nn.Module]],
        leaves: Mapping[Node, int],
        names: Sequence[str],
    ):
        self._model = model
        self._watched = {id(leaf_of(node)): names[position] for node, position in leaves.items()}
        self._on_entry = _owned(modules)
        self._known: dict[Node, object] = {}  # the same for the leaves of tensors that are not analyzed, and not new
        self.refused: dict[Node, object] = {}

    def refuse_in(self, forward: Forward, leaves: Iterable[Node]) -> None:
        """Refuse the forward if one of its graph's leaves that are not analyzed is a new parameter of the model."""
        for node in leaves:
            if node not in self._known and isinstance(variable := leaf_of(node), nn.Parameter):
                self._require_known(forward, node, variable)

    def _require_known(self, forward: Forward, node: Node, variable: nn.Parameter) -> None:
        assert self._model is not None
        now, before = _by_name(_owned(named_modules(self._model))), _by_name(self._on_entry)
        others = {name: p for name, p in now.items() if before.get(name) is not p}
        others = {name: p for name, p in others.items() if not is_dtensor(before.get(name))}
        if any(p is variable for p in others.values()):
            forward.refusal = replaced(list(others))
        elif (name := self._watched.get(id(variable))) is not None:
            forward.refusal = _converted(name, variable)
        owner = accumulators([variable])[1] if variable.requires_grad else None
        (self._known if forward.refusal is None else self.refused)[node] = owner

    def clear(self) -> None:
        """Keep no node alive."""
        self._known.clear()
        self.refused.clear()


def _converted(name: str, parameter: nn.Parameter) -> CoverageError:
    """The refusal of a pass through a parameter that has another dtype or is on another device than on entry."""
    return CoverageError(
        f"{name} was moved or converted inside of the block, and is in {parameter.dtype} on {parameter.device} now; the batch is "
        "left out: leave the block, and enter it again after model.to(...), or convert the model before"
    )


Owned = list[tuple[str, Mapping[str, nn.Parameter | None]]]


def _owned(modules: Iterable[tuple[str, nn.Module]]) -> Owned:
    """The parameters that each module owns now, beside the module's name."""
    return [(name, dict(module._parameters)) for name, module in modules if module._parameters]


def _by_name(owned: Owned) -> dict[str, nn.Parameter]:
    """The parameters by name; a shared one appears under each of its names."""
    return {
        f"{name}.{local}" if name else local: p
        for name, parameters in owned
        for local, p in parameters.items()
        if p is not None
    }
