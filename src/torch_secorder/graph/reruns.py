"""Re-entrant checkpoints: whether what they run again in a backward pass keeps its samples in order.

Such a checkpoint hides its graph until the backward pass reaches it. In the model's graph it is supposed to leave the samples
where they are, and the layers inside are supposed to have them where their shapes say. When it runs its part of the model again,
that part has a graph, whose labels show whether both is so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torch_secorder.autograd.engine import active_modes, without_modes
from torch_secorder.autograd.nodes import output_shapes, unseen_hooks
from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import SILENT
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.walk import Walk
from torch_secorder.model.containers import tensors

# Where in the graph something is, the shape to see it in, and where its samples have to be.
Expected = tuple[GradientEdge, Sequence[int], Placement]


class Reruns:
    """Has each part of a model that a re-entrant checkpoint runs again looked through.

    Args:
        forwards: the runs of the model.
        knowledge: what is known about the model already.
        leaves: node that accumulates an analyzed parameter's gradient -> the parameter's position.
    """

    def __init__(self, forwards: ForwardTracker, knowledge: ModelKnowledge, leaves: dict[Node, int]):
        self._forwards, self._knowledge, self.leaves = forwards, knowledge, leaves

    def watch(self, checkpoints: Iterable[Any], n: int) -> None:
        """Have the functions of these checkpoints' nodes call back when a backward pass runs them again, for n samples."""
        for node in checkpoints:
            node.run_function = _Watched(node.run_function, self, n)

    def run(self, function: Callable[..., Any], args: Sequence[Any], n: int) -> Any:
        """Run a checkpoint's function again, and refuse the pass under way if samples are not kept in order."""
        with self._forwards.noting_calls() as calls:
            outputs = function(*args)
        try:
            with without_modes() if active_modes() else nullcontext():
                self._require_order(tensors([outputs]), tensors([list(args)]), calls, n)
        except Exception as error:  # The backward pass goes on.
            self._forwards.refuse(error)
        return outputs

    def is_recording(self) -> bool:
        """Whether the calls of a pass that runs now are recorded."""
        return self._forwards.records_calls() and not self._forwards.is_skipped()

    def _require_order(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], calls: Sequence[tuple[Record, GradientEdge]], n: int
    ) -> None:
        roots = [x for x in outputs if x.requires_grad]
        walk = Walk(roots, Forward(n), self.leaves)
        self.watch(walk.checkpoints, n)
        if walk.fingerprint in self._knowledge.reruns_in_order:
            return
        expected: list[Expected] = [
            (edge, one.shape, one.placement) for one, edge in calls if one.placement is not None
        ]
        expected += [
            (get_gradient_edge(x), tuple(x.shape), FIRST) for x in inputs if x.requires_grad and x.shape[:1] == (n,)
        ]
        for node in walk.checkpoints:
            expected += [(GradientEdge(node, nr), shape, FIRST) for nr, shape in enumerate(output_shapes([node]))]
        placed = [(x, FIRST if x.shape[:1] == (n,) else None) for x in roots]
        ends = (*walk.leaves, *walk.other_leaves, *(edge.node for edge, _, _ in expected))
        packs = any(record.forward.has_packed_inputs for record, _ in calls)
        derivation = Derivation(placed, n, ends, packs=packs)
        if not _are_in_order(derivation, expected, n):
            raise _out_of_order(calls)
        if derivation.has_unasked_functions:
            raise _unasked(calls)
        if not derivation.movers:
            self._knowledge.learn_rerun(walk.fingerprint)


class _Watched:
    """A checkpoint's function, which calls back when a backward pass runs it again; it does not keep anybody alive for that."""

    def __init__(self, function: Callable[..., Any], reruns: Reruns, n: int):
        self._function, self._reruns, self._n = function, weakref.ref(reruns), n

    def __call__(self, *args: Any) -> Any:
        reruns = self._reruns()
        if reruns is None or not reruns.is_recording():
            return self._function(*args)
        return reruns.run(self._function, args, self._n)


def _are_in_order(derivation: Derivation, expected: Sequence[Expected], n: int) -> bool:
    found = derivation.suppositions([(edge, shape) for edge, shape, _ in expected])
    return found is not None and all(
        one.evidence in SILENT or (isinstance(one.evidence, Placement) and placement.agrees(one.evidence, shape, n))
        for (_, shape, placement), one in zip(expected, found, strict=True)
    )


def _names(calls: Sequence[tuple[Record, GradientEdge]]) -> str:
    return ", ".join(dict.fromkeys(str(record.site) for record, _ in calls)) or "a part of the model"


def _unasked(calls: Sequence[tuple[Record, GradientEdge]]) -> UnsupportedError:
    return UnsupportedError(
        f"{_names(calls)}: a torch.autograd.Function inside of re-entrant activation checkpointing may put samples into another "
        f"order, and can't be called to know, since hooks may keep what it saved (use torch.utils.checkpoint with "
        f"use_reentrant=False{unseen_hooks()}); this batch is left out"
    )


def _out_of_order(calls: Sequence[tuple[Record, GradientEdge]]) -> UnsupportedError:
    return UnsupportedError(
        f"{_names(calls)}: samples are put into another order, or an operation does not show that it keeps them apart, and where "
        "they are is hidden by re-entrant activation checkpointing (use torch.utils.checkpoint with use_reentrant=False); this "
        "batch is left out"
    )
