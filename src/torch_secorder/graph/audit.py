"""The audit: every use of every parameter is accounted for, or refused."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.batch_axis.knowledge import ModelKnowledge, PlacementCache
from torch_secorder.batch_axis.placement import Layout, Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import ShapeError, UnsupportedError
from torch_secorder.graph.frontier import Frontier, ParameterUse
from torch_secorder.graph.walk import Walk
from torch_secorder.model.containers import tensors
from torch_secorder.model.parameters import Table
from torch_secorder.rules.node_rules import runs_after_node

LOOK_AHEAD = 3  # how far a chain from a parameter to the data is expected to be, so that one look sees all of it


class Audit:
    """Accounts for every use of every parameter in the graph of one model's outputs.

    Args:
        table: the analysed parameters.
        on_use: called with a use and the gradients that arrived at its node, inside the backward pass.
        batch_axis: where the model's outputs have the batch axis.
        knowledge: what is known about the model already.
        locate_on_three_samples: adds to the knowledge from a smaller batch, called when evidence is needed.
        trust_shapes: believe shapes that allow one reading only, for callers that check a sample afterwards.

    Attributes:
        fingerprint: of the latest graph.
        other_leaves: what that graph leads to besides the analysed parameters.
        hooks: on the nodes of the latest graph, which may outlive the audit.
    """

    def __init__(
        self,
        table: Table,
        on_use: Callable[[ParameterUse, tuple[Tensor | None, ...]], None],
        batch_axis: int = 0,
        knowledge: ModelKnowledge | None = None,
        locate_on_three_samples: Callable[[], None] | None = None,
        *,
        trust_shapes: bool = False,
    ):
        self._table, self._on_use, self._axis = table, on_use, batch_axis
        self._leaves = {
            torch.autograd.graph.get_gradient_edge(p).node: position
            for position, p in enumerate(table.leaves)
            if p.requires_grad
        }
        self._knowledge, self._locate_on_three_samples, self._trust_shapes = (
            knowledge or ModelKnowledge(),
            locate_on_three_samples,
            trust_shapes,
        )
        self.fingerprint = 0
        self.other_leaves: list[GradientEdge] = []
        self.hooks = ExitStack()

    def uses(self, forward: Forward, outputs: Any) -> list[tuple[ParameterUse, Node]]:
        """Place every record of a forward, and hook every use that no record accounts for.

        Raises:
            ShapeError: if a call's samples can't be found.
            CoverageError: if a parameter's use can't be taken apart by samples.
        """
        self.hooks.pop_all()  # earlier graphs keep theirs
        with self._table.ranks.fail_together():
            return self._uses(forward, outputs)

    def _uses(self, forward: Forward, outputs: Any) -> list[tuple[ParameterUse, Node]]:
        ranks = self._table.ranks
        roots = [x for x in tensors(outputs) if x.requires_grad]
        walk = Walk(roots, forward, self._leaves)
        self.fingerprint, self.other_leaves = walk.fingerprint(forward.n), walk.other_leaves
        n = forward.n
        if n is None:
            return []
        one_sample = ranks.max_over_ranks(n) == 1
        reorders_samples = bool(ranks.max_over_ranks(n > 1 and walk.reorders(n)))
        placements, locate_on_three_samples = PlacementCache(), None
        if not reorders_samples:
            placements, locate_on_three_samples = (
                self._knowledge.placements(self.fingerprint),
                self._locate_on_three_samples,
            )
        reached = [item for item in forward.records if item[0].site.rule is not None and item[1].node in walk.children]
        ambiguous_shapes = (
            reorders_samples or walk.has_ambiguous_axis(n) or any(record.placement is None for record, _ in reached)
        )
        ambiguous_shapes = bool(ranks.max_over_ranks(ambiguous_shapes))
        seen = [x for x in roots if x.dim() > self._axis]
        search = SampleSearch(placements, seen, self._axis, n, locate_on_three_samples, ambiguous_shapes, ranks)
        if (
            walk.uses or ambiguous_shapes
        ) and not ranks.distributed:  # graphs of one sample have others on the way than those of more
            unclear = (edge.node for record, edge in reached if record.placement is None)
            starts = itertools.chain((node for edges in walk.uses.values() for node, _ in edges), unclear)
            search.look_ahead = lambda: walk.above(starts, LOOK_AHEAD)
        shared = self._placed(walk, reached, search, n, ambiguous_shapes, one_sample)
        if not ranks.max_over_ranks(bool(walk.uses or shared)):
            return []
        uses = Frontier(walk, shared, search, n, self._table, one_sample).uses(forward)
        for use, node in uses:
            if why := use.unreadable_because(node):
                raise UnsupportedError(
                    f"{', '.join(self._names(use))}: used by {why} inside of activation checkpointing (or other hooks on saved "
                    "tensors), where the autograd graph can't be read: teach the library the layer with "
                    "torch_secorder.register_rule, or run it without checkpointing"
                )
            for target, _ in (target for value in use.values for target in value.targets):
                forward.calls.update([target] if isinstance(target, int) else target.site.parameters.values())
            hook = partial(self._on_use, use)
            handle = (
                node.register_hook(partial(_behind, hook)) if runs_after_node(node) else node.register_prehook(hook)
            )
            self.hooks.callback(handle.remove)
        for record in shared:
            record.placement = None
        return uses

    def _names(self, use: ParameterUse) -> list[str]:
        targets = (target for value in use.values for target, _ in value.targets)
        return [self._table.names[t] if isinstance(t, int) else str(t.site) for t in targets]

    def _placed(
        self,
        walk: Walk,
        reached: Sequence[tuple[Record, GradientEdge]],
        search: SampleSearch,
        n: int,
        ambiguous_shapes: bool,
        one_sample: bool,
    ) -> list[Record]:
        """Give each record its placement; returns those without a batch axis."""
        for record, _ in reached:
            record.in_output_graph = True
        hidden = walk.has_reentrant_checkpoint() and not ambiguous_shapes
        if (self._trust_shapes and not ambiguous_shapes) or hidden or one_sample:
            for record, _ in reached:
                if record.placement is None:
                    record.placement = Placement(0, Layout.BLOCKS)
            return []
        found = search([(("call", r.site.name, len(r.shape), i), edge, r.shape) for i, (r, edge) in _numbered(reached)])
        shared = []
        for (record, _), what in zip(reached, found, strict=True):
            if what is Unplaced.SHARED_BY_SAMPLES:
                shared.append(record)
            elif isinstance(what, Placement):
                record.placement = what
            elif record.placement is None:
                raise ShapeError(
                    f"{record.site}: its output has shape {tuple(record.shape)}, and where the {n} samples are in it can't be "
                    f"found out, since the model's outputs don't depend on it; pass batch_axis={{'{record.site.name}': axis}}"
                )
        return shared


def _behind(hook: Callable[..., None], _: object, grads: tuple[Tensor | None, ...]) -> None:
    """What a node calls after it has run is told the gradients that it gives, too."""
    hook(grads)


def _numbered(items: Sequence[tuple[Record, GradientEdge]]) -> list[tuple[int, tuple[Record, GradientEdge]]]:
    """Each item with how many of the same site came before it."""
    counts: dict[str, int] = defaultdict(int)
    numbered = []
    for item in items:
        numbered.append((counts[item[0].site.name], item))
        counts[item[0].site.name] += 1
    return numbered
