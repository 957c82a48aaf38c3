"""Parameters that are put into a model while it is watched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import leaf_of
from torch_secorder.capture.model_run import Forward
from torch_secorder.model.parameters import named_modules, parameters_by_name
from torch_secorder.model.ranks import is_dtensor
from torch_secorder.recording.backward_pass import replaced


class NewParameters:
    """Refuses passes through a forward that used a parameter which was put into the model inside of the block.

    Args:
        model: the model; None for a recorder without one, which sees no forward.
        modules: its modules on entry, under their plain names.
    """

    def __init__(self, model: nn.Module | None, modules: Sequence[tuple[str, nn.Module]]):
        self._model, self._on_entry = model, parameters_by_name(modules)
        self._known: set[Node] = set()  # the leaves of tensors that are not analyzed, and not new

    def refuse_in(self, forward: Forward, leaves: Iterable[Node]) -> None:
        """Refuse the forward if one of its graph's leaves that are not analyzed is a new parameter of the model."""
        for node in leaves:
            if node not in self._known and isinstance(variable := leaf_of(node), nn.Parameter):
                self._require_known(forward, node, variable)

    def _require_known(self, forward: Forward, node: Node, variable: nn.Parameter) -> None:
        assert self._model is not None
        now = parameters_by_name(named_modules(self._model))
        others = {name: p for name, p in now.items() if self._on_entry.get(name) is not p}
        others = {name: p for name, p in others.items() if not is_dtensor(self._on_entry.get(name))}
        if any(p is variable for p in others.values()):
            forward.refusal = replaced(list(others))
            return
        self._known.add(node)

    def clear(self) -> None:
        """Keep no node alive."""
        self._known.clear()
