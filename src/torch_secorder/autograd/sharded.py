"""The weights of modules that FSDP2 shards, gathered while a graph is looked through, as FSDP2's own hooks do for the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd.graph import Node

# FSDP2 puts this node behind each module's inputs that require a gradient. Its backward reduces the gradients of the parameters
# and frees the weights; what it passes on is what arrives.
_MODULE_ENDS = "RegisterPostBackwardFunctionBackward"


def passes_on(node: Any) -> bool:
    """Whether the node is one of FSDP2's, whose backward only has side effects."""
    return bool(node.name() == _MODULE_ENDS)


class GatheredWeights:
    """Gathers weights for a pass through a graph, and frees them again.

    Nodes have saved weights whose memory FSDP2 has freed since. All ranks have to make the same passes.

    Args:
        outputs: modules that FSDP2 shards, each with the node that made its output. Its weights are there from this node on
            until the pass has left the module.
        throughout: modules whose weights are there during all of each pass.
    """

    def __init__(self, outputs: Sequence[tuple[nn.Module, Node]] = (), throughout: Sequence[nn.Module] = ()):
        self._starting: dict[Node, list[nn.Module]] = defaultdict(list)
        for module, node in outputs:
            self._starting[node].append(module)
        self._throughout = throughout
        self._held: list[nn.Module] = []

    @contextmanager
    def during_pass(self) -> Iterator[None]:
        """A pass."""
        try:
            for module in self._throughout:
                self._gather(module)
            yield
        finally:
            for module in self._held:
                module.reshard()  # type: ignore[operator]  # a method that FSDP2's class adds
            self._held = []

    def before(self, node: Any) -> None:
        """The pass comes to a node."""
        for module in self._starting.get(node, ()):
            self._gather(module)
        if self._held and passes_on(node):
            for module in [held for held in self._held if node.param_group in _groups(held)]:
                if module not in self._throughout:
                    module.reshard()  # type: ignore[operator]  # another one
                    self._held.remove(module)

    def _gather(self, module: nn.Module) -> None:
        module.unshard()  # type: ignore[operator]  # another one
        self._held.append(module)


def _groups(module: Any) -> list[Any]:
    """What FSDP2 keeps of a module's weights; nothing where this torch does not show it."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [getattr(state, "_fsdp_param_group", None)]
