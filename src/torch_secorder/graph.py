"""The autograd graph as the second way in: every use of every parameter, in or outside of its module's forward.

Walking back from the model's outputs finds each node that consumes a parameter. Uses inside the call of a hooked module are
that call's business. For all others, the parameter travels through a batch-free chain (a transpose, a chunk, a weight norm;
often nothing) to the frontier, the first node whose output has samples, and a hook there receives the gradient while it still
has them. The same walk shows which modules were called without a batch axis at all, such as position embeddings: their output is
one more batch-free value on its way to a frontier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.capture import PROBES, Forward, Record, current_backward, tensors
from torch_secorder.errors import CoverageError, ShapeError
from torch_secorder.parameters import ParameterTable
from torch_secorder.per_sample import Carried, Outer, PerSampleGradient
from torch_secorder.placement import Evidence, Placement, Unplaced, evidence, weights
from torch_secorder.rules.nodes import Place, has_rule

# Nodes that only move entries, so that they change no norm.
LAYOUT = {
    f"{name}Backward0"
    for name in (
        *(
            "T",
            "Transpose",
            "Permute",
            "View",
            "UnsafeView",
            "ReshapeAlias",
            "Unsqueeze",
            "Squeeze",
            "Alias",
            "Clone",
            "ToCopy",
        ),
        *("Select", "Slice", "Split", "SplitWithSizes", "UnsafeSplit", "Chunk", "Unbind", "Narrow"),
    )
}
TRANSPOSES = {"TBackward0", "TransposeBackward0", "PermuteBackward0"}

Edge = tuple[Node, int]


@dataclass(eq=False)
class Use:
    """A place where a batch-free value meets the data, outside of any hooked module's call.

    Attributes:
        index: which input of the frontier node it is.
        shape: the value's shape.
        placement: where the node's output has its samples.
        targets: what the value was computed from, with what carries its gradient there: the position of a parameter, or
            the record of a module that was called without a batch axis.
        starts_graph: whether nothing before the node is differentiated but batch-free values.
        calls_nodes: whether its gradients take calls of nodes, which have no answer inside of a backward pass that was asked
            for other gradients only.
    """

    forward: Forward
    index: int
    shape: tuple[int, ...]
    placement: Placement
    targets: list[tuple[int | Record, Carrier]]
    starts_graph: bool
    calls_nodes: bool = False
    fired_in: int | None = None

    def place(self, node: Node) -> Place:
        """The place, for its rule."""
        assert self.forward.n is not None
        return Place(node, self.index, self.shape, tuple(node._input_metadata[0].shape), self.placement, self.forward.n)


class Audit:
    """Accounts for every use of every parameter in the graph of one model's outputs.

    Args:
        table: the analysed parameters.
        on_use: called with a use and the gradients that arrived at its node, inside the backward pass.
        batch_axis: where the model's outputs have the batch axis.
    """

    def __init__(
        self,
        table: ParameterTable,
        on_use: Callable[[Use, tuple[Tensor | None, ...]], None],
        batch_axis: int = 0,
    ):
        self._table, self._on_use, self._axis = table, on_use, batch_axis
        self._leaves = {
            torch.autograd.graph.get_gradient_edge(p).node: position
            for position, p in enumerate(table.tensors)
            if p.requires_grad
        }
        self._known: dict[object, Evidence] = {}

    def uses(self, forward: Forward, outputs: Any) -> list[tuple[Use, GradientEdge]]:
        """Place every record of a forward, and hook every use that no record accounts for.

        Raises:
            ShapeError: if a call's samples can't be found.
            CoverageError: if a parameter's use can't be taken apart by samples.
        """
        roots = [x for x in tensors(outputs) if x.requires_grad]
        walk = _Walk(roots, forward, self._leaves)
        n = forward.n
        if n is None:
            return []
        look = _Look(self._known, [x for x in roots if x.dim() > self._axis], self._axis, n)
        shared = self._placed(walk, forward, look, n)
        if not walk.uses and not shared:
            return []
        uses = _Frontier(walk, shared, look, n, self._table).uses(forward)
        for use, edge in uses:
            for target, _ in use.targets:
                forward.calls.update([target] if isinstance(target, int) else target.site.parameters.values())
            edge.node.register_prehook(partial(self._on_use, use))
        for record in shared:
            record.placement = None
        return uses

    def _placed(self, walk: _Walk, forward: Forward, look: _Look, n: int) -> list[Record]:
        """Give each record its placement; returns those without a batch axis."""
        rules = (item for item in forward.records if item[0].site.rule is not None)
        reached = [(record, edge) for record, edge in rules if edge.node in walk.records]
        doubtful = walk.coincidences(n) or any(record.placement is None for record, _ in reached)
        if not doubtful or n == 1:
            for record, _ in reached:
                if record.placement is None:
                    record.placement = Placement(0, "outer")
            return []
        found = look([(("call", r.site.name, len(r.shape), i), edge, r.shape) for i, (r, edge) in _numbered(reached)])
        shared = []
        for (record, _), what in zip(reached, found, strict=True):
            if what is Unplaced.SHARED:
                shared.append(record)
            elif isinstance(what, Placement):
                record.placement = what
            elif record.placement is None:
                raise ShapeError(
                    f"{record.site}: its output has shape {tuple(record.shape)}, and where the {n} samples are in it can't be "
                    f"found out, since the model's outputs don't depend on it; pass batch_axis={{'{record.site.name}': axis}}"
                )
        return shared


def used_by_loss(loss: Tensor, outputs: Any, table: ParameterTable) -> list[str]:
    """The parameters that a loss uses by another way than through the model's outputs: weight penalties, for one."""
    stop = {x.grad_fn for x in tensors(outputs) if x.grad_fn is not None}
    found: dict[str, None] = {}
    stack: list[Node | None] = [loss.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or node in stop:
            continue
        if (position := table.position(getattr(node, "variable", None))) is not None:
            found[table.names[position]] = None
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return list(found)


class _Walk:
    """One traversal of the graph.

    Attributes:
        children: node -> its inputs, for the nodes outside of hooked modules' calls.
        records: nodes at which such a call ends.
        uses: position -> edges (consumer, index of its input) that no call accounts for.
        leaves: where the gradients of parameters are accumulated -> position.
    """

    def __init__(self, roots: Sequence[Tensor], forward: Forward, leaves: dict[Node, int]):
        self.children: dict[Node, Any] = {}
        self.records: dict[Node, list[Record]] = defaultdict(list)
        self.uses: dict[int, list[Edge]] = defaultdict(list)
        ends: dict[Node, list[Record]] = defaultdict(list)
        for record, edge in forward.records:
            if record.site.rule is not None:
                ends[edge.node].append(record)
        self.leaves = leaves
        stack = [x.grad_fn for x in roots if x.grad_fn is not None]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node in ends:
                self.records[node] = ends[node]
                inside = self._inside(node, ends[node])
                self.children[node] = inside
                following: Iterable[Node] = [child for child, _ in inside]
            else:
                inputs = node.next_functions
                self.children[node] = inputs
                following = self._followed(node, inputs)
            for child in following:
                if child not in seen:
                    seen.add(child)
                    stack.append(child)

    def _followed(self, node: Node, inputs: Any) -> list[Node]:
        following = []
        for index, (child, _) in enumerate(inputs):
            if child is None:
                continue
            position = self.leaves.get(child)
            if position is not None:
                self.uses[position].append((node, index))
            else:
                following.append(child)
        return following

    def _inside(self, node: Node, records: list[Record]) -> list[Edge]:
        """What a hooked module's call consumed from outside of it, and the uses of others' parameters inside of it."""
        owned = {position for record in records for position in record.site.parameters.values()}
        boundary = {edge for record in records for edge in record.boundary}
        outside: list[Edge] = []
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            for index, (child, nr) in enumerate(current.next_functions):
                if child is None:
                    continue
                if child in boundary:
                    outside.append((child, nr))
                elif (position := self.leaves.get(child)) is not None:
                    if position not in owned:
                        self.uses[position].append((current, index))
                elif child not in seen:
                    seen.add(child)
                    stack.append(child)
        return outside

    def coincidences(self, n: int) -> bool:
        """Whether any tensor in the graph has n indices on another axis than the first, so that shapes prove nothing."""
        return any(n in meta.shape[1:] for node in self.children for meta in node._input_metadata)


class _Look:
    """Evidence for nodes of one graph, remembered for later graphs of the same model.

    Args:
        known: what was found out before.
        roots: the model's outputs.
        axis: where those have their samples; others tell nothing.
        n: how many samples.
    """

    def __init__(self, known: dict[object, Evidence], roots: list[Tensor], axis: int, n: int):
        self._known, self._n, self._axis = known, n, axis
        self._roots = [x for x in roots if x.shape[axis] == n]

    def __call__(self, wanted: list[tuple[object, GradientEdge, Sequence[int]]]) -> list[Evidence]:
        """Evidence for each (key, edge, shape); what was found for a key before holds while it fits the shape."""
        new = [(key, edge, shape) for key, edge, shape in wanted if not self._holds(key, shape)]
        if new:
            plain, weighted = self._gradients([edge for _, edge, _ in new])
            w = weights(self._n)
            for (key, _, shape), *found in zip(new, plain, weighted, strict=True):
                a, b = (None if g is None else g.reshape(tuple(shape)) for g in found)
                self._known[key] = evidence(a, b, w)
        return [self._known[key] for key, _, _ in wanted]

    def _holds(self, key: object, shape: Sequence[int]) -> bool:
        known = self._known.get(key)
        if isinstance(known, Placement):
            return known.fits(shape, self._n)
        return known is Unplaced.SHARED

    def _gradients(self, edges: list[GradientEdge]) -> list[Sequence[Tensor | None]]:
        if not self._roots:
            raise ShapeError(
                f"where this model has its {self._n} samples can't be found out: it returns no differentiable tensor with as "
                f"many indices on axis {self._axis}; return the outputs along with the loss, or pass batch_axis="
            )
        found: list[Sequence[Tensor | None]] = []
        generator = torch.Generator().manual_seed(0)
        seeds = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in self._roots]
        with torch.enable_grad():
            # Nodes of our own run before all others, so that no monitor of this model takes this pass for the user's.
            roots = [x.view_as(x) for x in self._roots]
            for root in roots:
                root.grad_fn.register_prehook(_probe)  # type: ignore[union-attr]
            for factor in (torch.ones(self._n), weights(self._n)):
                scaled = [s * factor.to(s).view(-1, *[1] * (s.dim() - 1 - self._axis)) for s in seeds]
                found.append(torch.autograd.grad(roots, edges, scaled, retain_graph=True, allow_unused=True))
            PROBES.clear()
        return found


class _Frontier:
    """From unaccounted uses and shared calls up to the nodes where they meet the data."""

    def __init__(self, walk: _Walk, shared: list[Record], look: _Look, n: int, table: ParameterTable):
        self._walk, self._look, self._n, self._table = walk, look, n, table
        self._shared = {node: r for node, records in walk.records.items() for r in records if r in shared}
        self._parents: dict[Node, list[Edge]] = defaultdict(list)
        for node, inputs in walk.children.items():
            for index, (child, _) in enumerate(inputs):
                if child is not None and (node not in walk.records):
                    self._parents[child].append((node, index))

    def uses(self, forward: Forward) -> list[tuple[Use, GradientEdge]]:
        """Every frontier use."""
        starts = [
            (*edge, f"{self._table.names[position]}/") for position, edges in self._walk.uses.items() for edge in edges
        ]
        for node, record in self._shared.items():
            starts += [(*edge, f"{record.site.name}()/") for edge in self._parents[node]]
        found: list[tuple[Node, int, Placement]] = []
        done: set[Edge] = set()
        level = starts
        while level:
            level = list({item[:2]: item for item in level if item[:2] not in done}.values())
            done |= {item[:2] for item in level}
            what = self._evidence(level)
            following: list[tuple[Node, int, str]] = []
            for (node, index, path), seen in zip(level, what, strict=True):
                if isinstance(seen, Placement):
                    found.append((node, index, seen))
                elif seen is Unplaced.SHARED:
                    following += [(*edge, f"{path}{node.name()}/") for edge in self._parents[node]]
            level = following
        frontier = {node for node, _, _ in found}
        return [self._use(forward, *item, frontier) for item in found]

    def _evidence(self, level: list[tuple[Node, int, str]]) -> list[Evidence]:
        if self._n == 1:
            return [Placement(0, "outer")] * len(level)
        wanted: list[tuple[object, GradientEdge, Sequence[int]]] = []
        counts: dict[object, int] = defaultdict(int)
        for node, index, path in level:
            what = f"{path}{node.name()}:{index}"
            wanted.append((("use", what, counts[what]), GradientEdge(node, 0), node._input_metadata[0].shape))
            counts[what] += 1
        return self._look(wanted)

    def _use(
        self, forward: Forward, node: Node, index: int, placement: Placement, frontier: set[Node]
    ) -> tuple[Use, GradientEdge]:
        child, nr = node.next_functions[index]
        assert child is not None
        shape = _shape(child, nr)
        others = [c for i, (c, _) in enumerate(node.next_functions) if i != index and c is not None]
        starts = all(self._is_free(c, frontier) for c in others)
        use = Use(forward, index, shape, placement, self._targets(child, nr), starts)
        use.calls_nodes = not has_rule(use.place(node)) or any(carrier.layout is None for _, carrier in use.targets)
        return use, GradientEdge(node, 0)

    def _is_free(self, node: Node, frontier: set[Node]) -> bool:
        """Whether a node's value was computed from parameters alone."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current in self._walk.leaves or current in self._shared:
                continue
            if current in self._walk.records or current in frontier or not current.next_functions:
                return False
            for child, _ in current.next_functions:
                if child is not None and child not in seen:
                    seen.add(child)
                    stack.append(child)
        return True

    def _targets(self, value: Node, nr: int) -> list[tuple[int | Record, Carrier]]:
        """Everything that a batch-free value was computed from."""
        leaves = self._walk.leaves
        ends: dict[Node, int | Record] = {}
        stack, seen = [value], {value}
        while stack:
            node = stack.pop()
            if node in leaves:
                ends[node] = leaves[node]
            elif node in self._shared:
                ends[node] = self._shared[node]
            else:
                for child, _ in node.next_functions:
                    if child is not None and child not in seen:
                        seen.add(child)
                        stack.append(child)
        return [(target, _carrier((value, nr), node, self._shape_of(target))) for node, target in ends.items()]

    def _shape_of(self, target: int | Record) -> tuple[int, ...]:
        return self._table.rows[target].shape if isinstance(target, int) else tuple(target.shape)


@dataclass(frozen=True)
class Carrier:
    """The way from a parameter, or a call without a batch axis, through a batch-free chain to a value.

    Attributes:
        value: the node that made the value, and which of its outputs it is.
        start: the node of the parameter, or of the call's output.
        shape: of what is at the start.
        layout: what distinguishes the chain, if it only moves entries; else None.
    """

    value: Edge
    start: Node
    shape: tuple[int, ...]
    layout: tuple[object, ...] | None

    def __call__(self, form: PerSampleGradient) -> PerSampleGradient:
        """The gradient of the start, given that of the value."""
        if self.layout == ():
            return form
        if isinstance(form, Outer) and form.a.shape[1] == 1 and self._transposes(form):
            return Outer(form.g, form.a, self.shape)
        return Carried(form, partial(_vjp, self.value, self.start, self.shape), self.shape, self.layout)

    def _transposes(self, form: Outer) -> bool:
        single = self.value[0].name() in TRANSPOSES and self.layout is not None and len(self.layout) == 1
        return single and len(self.shape) == 2 and form.shape == self.shape[::-1]


def _carrier(value: Edge, start: Node, shape: tuple[int, ...]) -> Carrier:
    chain = _line(value, start)
    layout = None
    if chain is not None and all(node.name() in LAYOUT for node, _ in chain):
        layout = tuple((node.name(), nr, _settings(node)) for node, nr in chain)
    return Carrier(value, start, shape, layout)


def _line(value: Edge, start: Node) -> list[Edge] | None:
    """The nodes from a value down to its start, if they are a single line; else None."""
    chain, (node, nr) = [], value
    while node != start:
        inputs = [(child, child_nr) for child, child_nr in node.next_functions if child is not None]
        if len(inputs) != 1:
            return None
        chain.append((node, nr))
        node, nr = inputs[0]
    return chain


def _settings(node: Node) -> tuple[object, ...]:
    """What distinguishes two nodes of one kind: the sizes, axes and offsets that they saved."""
    names = sorted(name for name in dir(node) if name.startswith("_saved_"))
    values = [(name, getattr(node, name)) for name in names]
    return tuple((name, str(value)) for name, value in values if not isinstance(value, Tensor))


def _vjp(value: Edge, start: Node, shape: tuple[int, ...], grads: Tensor) -> Tensor:
    """``[n, *value shape]`` -> ``[n, *shape]`` through the batch-free chain between the two.

    The nodes are called one after the other, not through the engine, which would call hooks on the parameters.
    """
    order = _between(value[0], start)
    found = []
    for grad in grads:
        pending: dict[Edge, Tensor] = {value: grad}
        for node in order:
            arrived = [pending.pop((node, nr), None) for nr in range(len(node._input_metadata))]
            if all(g is None for g in arrived):
                continue
            results = node(*arrived)  # type: ignore[operator]  # nodes are callable
            results = results if isinstance(results, tuple) else (results,)
            for (child, nr), result in zip(node.next_functions, results, strict=True):
                if child is not None and (child == start or child in order):
                    if result is None:
                        raise CoverageError(
                            f"{node.name()} gives no gradient for what a parameter went into: the backward pass under way was "
                            "asked for some gradients only (inputs=); call backward() without"
                        )
                    part = result.sum_to_size(_shape(child, nr))
                    before = pending.get((child, nr))
                    pending[child, nr] = part if before is None else before + part
        total = pending.get((start, 0))
        found.append(grads.new_zeros(shape) if total is None else total.reshape(shape).to(grads.dtype))
    return torch.stack(found) if found else grads.new_zeros(0, *shape)


def _between(first: Node, last: Node) -> list[Node]:
    """The nodes from ``first`` down to before ``last``, each after all of its consumers."""
    order: list[Node] = []
    seen = {first, last}
    stack: list[tuple[Node, bool]] = [(first, False)] if first != last else []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
            continue
        stack.append((node, True))
        for child, _ in node.next_functions:
            if child is not None and child not in seen and child.next_functions:
                seen.add(child)
                stack.append((child, False))
    return order[::-1]


def _probe(grads: object) -> None:
    PROBES.add(current_backward())


def _shape(node: Node, nr: int) -> tuple[int, ...]:
    variable = getattr(node, "variable", None)
    return tuple(variable.shape if variable is not None else node._input_metadata[nr].shape)


def _numbered(items: Sequence[tuple[Record, GradientEdge]]) -> list[tuple[int, tuple[Record, GradientEdge]]]:
    """Each item with how many of the same site came before it."""
    counts: dict[str, int] = defaultdict(int)
    numbered = []
    for item in items:
        numbered.append((counts[item[0].site.name], item))
        counts[item[0].site.name] += 1
    return numbered
