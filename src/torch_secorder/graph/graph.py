"""One graph of a model's outputs, with what was recorded of it and what its nodes tell of the samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter, itemgetter

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.autograd.kept_values import numbers_of_function
from torch_secorder.autograd.nodes import is_python_function, output_shapes
from torch_secorder.autograd.opaque import is_opaque
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import SILENT
from torch_secorder.batch_axis.order import Order
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.batch_axis.search_pass import Viewed
from torch_secorder.capture.model_run import Forward
from torch_secorder.graph.walk import Walk


@dataclass(eq=False)
class Graph:
    """One graph, with what was recorded of it.

    Attributes:
        walk: through the graph.
        placed: the model's outputs that require a gradient, and where each has its samples.
        forward: the run of the model.
        is_new: whether nothing is known yet of what decides where samples are in graphs of its kind.
    """

    walk: Walk
    placed: list[tuple[Tensor, Placement | None]]
    forward: Forward
    is_new: bool = False
    _derivations: dict[tuple[frozenset[int], bool], Derivation] = field(default_factory=dict)
    _as_shapes_say: dict[frozenset[int], bool] = field(default_factory=dict)

    def derivation(self, comparing: Iterable[int] = (), *, calls_functions: bool = False) -> Derivation:
        """What the nodes tell of the samples, without the outputs of these numbers; Python functions tell if they are called."""
        left_out = frozenset(comparing)
        if calls_functions and not (without := self.derivation(left_out)).has_functions:
            return without
        key = left_out, calls_functions
        if key not in self._derivations:
            placed = [one for number, one in enumerate(self.placed) if number not in left_out]
            self._derivations[key] = self._derived(placed, calls_functions=calls_functions)
        return self._derivations[key]

    def placed_along(self, axis: int) -> list[tuple[Tensor, Placement | None]]:
        """The outputs, if they had the samples on another axis."""
        n, where = self.forward.n, Placement(axis)
        return [(x, where if x.dim() > axis and x.shape[axis] == n else None) for x, _ in self.placed]

    def derivation_along(self, axis: int) -> Derivation:
        """What the nodes would tell if the samples were on another axis of the outputs."""
        return self._derived(self.placed_along(axis), calls_functions=True)

    def _derived(
        self, placed: Sequence[tuple[Tensor, Placement | None]], *, calls_functions: bool = False
    ) -> Derivation:
        # What is taken apart may lead to none of the leaves: the gates on a layer's output are in no graph.
        edges = (
            *map(itemgetter(1), self.walk.calls),
            *map(attrgetter("edge"), self.forward.own_axes),
            *map(attrgetter("edge"), self.walk.carried_axes),
        )
        ends = (*self.walk.leaves, *self.walk.other_leaves, *map(attrgetter("node"), edges))
        packs = self.forward.has_packed_inputs
        return Derivation(placed, self.forward.n or 0, ends, calls_functions=calls_functions, packs=packs)

    @property
    def behind_shared_rows(self) -> set[Node]:
        """The nodes that outputs lead to which have no samples, although they have as many rows, and so may these nodes' own."""
        n, children = self.forward.n, self.walk.children
        roots = [x.grad_fn for x, where in self.placed if where is None and x.shape[:1] == (n,)]
        stack = [node for node in roots if node is not None]
        found = set(stack)
        while stack:
            new = {child for child, _ in children.get(stack.pop(), ()) if child is not None} - found
            found |= new
            stack.extend(new)
        return found

    @cached_property
    def _suggested(self) -> list[tuple[Viewed, Placement]]:
        """The calls with the places that their shapes suggest, as long as nothing else was found."""
        calls = self.walk.calls
        return [((edge, one.shape), one.placement) for one, edge in calls if one.placement is not None]

    def keeps_order(self, order: Order) -> bool:
        """Whether this graph has its samples where shapes say, although others of its kind may have them in another order.

        A call that runs again inside of a re-entrant checkpoint is in a graph of its own, which begins with the order in which
        the checkpoint's outputs have the samples.
        """
        if self.walk.has_ambiguous_axis or self.forward.count.is_odd or not order.is_derived:
            return False
        opaque = [node for node in self.walk.nodes if is_python_function(node) and is_opaque(node)]
        if any(numbers_of_function(node, self.forward.n or 0) for node in opaque):
            return False  # It may put samples where these numbers say, and nobody can ask it.
        outputs = [(GradientEdge(node, nr), shape) for node in opaque for nr, shape in enumerate(output_shapes([node]))]
        found = self.derivation().suppositions(outputs)
        in_order = found is not None and all(one.evidence in (FIRST, *SILENT) for one in found)
        return in_order and self.is_as_shapes_say()

    def is_as_shapes_say(self, comparing: Iterable[int] = ()) -> bool:
        """Whether all calls have their samples where their shapes suggest; asked for the first time before they are placed."""
        left_out = frozenset(comparing)
        if left_out not in self._as_shapes_say:
            self._as_shapes_say[left_out] = self._agrees_with_shapes(self.derivation(left_out))
        return self._as_shapes_say[left_out]

    def _agrees_with_shapes(self, derivation: Derivation) -> bool:
        suggested, n = self._suggested, self.forward.n or 0
        found = derivation.suppositions([viewed for viewed, _ in suggested])
        return found is not None and all(
            one.evidence in SILENT or (isinstance(one.evidence, Placement) and placement.agrees(one.evidence, shape, n))
            for ((_, shape), placement), one in zip(suggested, found, strict=True)
        )
