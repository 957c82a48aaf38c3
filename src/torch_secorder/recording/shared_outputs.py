"""Outputs of watched modules that all samples share, such as those of a position embedding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import nullcontext

from torch.autograd.graph import GradientEdge, Node

from torch_secorder.batch_axis.evidence import SILENT, Evidence, Unplaced
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search import SampleSearch
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import UnsupportedError
from torch_secorder.graph.chain import batch_free_vjp
from torch_secorder.graph.uses import BatchFreeValue, Uses
from torch_secorder.model.ranks import Ranks


def place_outputs(uses: Uses, leaves: Mapping[Node, int], forward: Forward, ranks: Ranks) -> None:
    """Have the gradients of watched outputs that all samples share come for each sample.

    Args:
        uses: the uses of parameters in a graph.
        leaves: node that accumulates an analyzed parameter's gradient -> the parameter's position.
        forward: the run of the model.
        ranks: all of them look at the same places.

    Raises:
        UnsupportedError: if nothing brings the gradient of each sample.
    """
    watched = [(record, edge) for record, edge in forward.records if record.site.rule is None]
    with ranks.fail_together() if ranks.distributed else nullcontext():
        evidence: dict[Record, Evidence | None] = {}
        if uses.search is not None and (forward.n != 1 or ranks.distributed):
            evidence = _evidence_of(watched, uses.search)
        _find_shared_outputs(uses, leaves, forward, watched, evidence)
        _require_samples(evidence)


def _find_shared_outputs(
    uses: Uses,
    leaves: Mapping[Node, int],
    forward: Forward,
    records: Sequence[tuple[Record, GradientEdge]],
    evidence: Mapping[Record, Evidence | None],
) -> None:
    """Add the watched outputs behind the frontier to its targets, so that it gives their gradients for each sample.

    The gradient that arrives at such an output itself is already summed over the samples. In every other output, each number
    belongs to one sample.
    """
    watched: dict[Node, list[tuple[Record, int]]] = defaultdict(list)
    for record, edge in records:
        watched[edge.node].append((record, edge.output_nr))
    silent = _without_gradient(uses, leaves, forward)
    # A use without a gradient has said nothing of its data, by which it may be where the samples come in.
    idle = {node for _, node in uses.idle}
    found: dict[BatchFreeValue, list[tuple[Record, int]]] = {}
    for use, consumer in uses.placed:
        for _, value in use.values:
            if value not in found:
                found[value] = _add_outputs(value, watched, silent, idle, evidence)
            for record, nr in found[value]:
                # The gradient is pulled back through the first output of a node only.
                if nr or use.unreadable_because(consumer):
                    raise UnsupportedError(
                        f"{record.site}: all samples share its output, and what each of them makes of it can't be read in the "
                        "autograd graph: run it without activation checkpointing, or leave out activations=True"
                    )


def _add_outputs(
    value: BatchFreeValue,
    watched: dict[Node, list[tuple[Record, int]]],
    silent: set[Node],
    idle: set[Node],
    evidence: Mapping[Record, Evidence | None],
) -> list[tuple[Record, int]]:
    """Add the watched outputs behind a value to its targets; returns them, each with which output of its node it is."""
    added: list[tuple[Record, int]] = []
    made, starts = value.targets[0][1].value, {vjp.start for _, vjp in value.targets}
    closed = value.targets[0][1].closed - starts  # An output may be that of a call which is a target itself.
    free = [one for one in _behind(made[0], watched, closed) if _is_free(one[2], starts | silent, closed)]
    for record, nr, node in free:
        if not _is_free(node, starts | silent, closed | idle):
            shown = evidence.get(record)
            if isinstance(shown, Placement) or shown in SILENT:
                continue
            if shown is not Unplaced.SHARED_BY_SAMPLES:
                raise UnsupportedError(
                    f"{record.site}: no gradient reaches a parameter that its output was computed with (behind a closed gate, "
                    "say), and nothing shows whether data takes part in it or all samples share it: leave out activations=True "
                    "there"
                )
        value.add_target(record, batch_free_vjp(made, node, tuple(record.shape), closed))
        record.placement = None
        added.append((record, nr))
    return added


def _without_gradient(uses: Uses, leaves: Mapping[Node, int], forward: Forward) -> set[Node]:
    """Where parameters and calls of which no gradient is expected are in the graph, such as those behind a dead unit."""
    idle = {target for one, _ in uses.idle for target in one.targets}
    calls = {edge.node for record, edge in forward.records if record.idle is not None or record in idle}
    return calls.union(node for node, position in leaves.items() if position in idle)


def _require_samples(evidence: Mapping[Record, Evidence | None]) -> None:
    """Raise if all samples share a watched output that no gradient of an analyzed parameter leads to.

    Nothing leads to it where the parameters behind it are not analyzed, or where weights of zero hide that it is read from a
    table, of which each sample is then seen to read a row of its own.
    """
    for record, shown in evidence.items():
        if record.placement and shown is Unplaced.SHARED_BY_SAMPLES:
            raise UnsupportedError(
                f"{record.site}: all samples share its output, which was computed from parameters that are not analyzed or get "
                "no gradient through it, as behind a closed gate or weights of zero, so that nothing brings the gradient of each "
                'sample: analyze all of them (parameters="trainable") and let the gate or the weights begin at small numbers, or '
                "leave out activations=True"
            )


def _evidence_of(watched: Sequence[tuple[Record, GradientEdge]], search: SampleSearch) -> dict[Record, Evidence | None]:
    """Where watched outputs have their samples; None where the numbers of this batch fit several readings."""
    wanted = [
        (("output", record.site.name, len(record.shape), number), edge, record.shape)
        for number, (record, edge) in enumerate(watched)
    ]
    search(wanted)
    known = search.placements
    return {
        record: known.evidence[key] if known.is_proven(key) else None
        for (record, _), (key, _, _) in zip(watched, wanted, strict=True)
    }


def _is_free(output: Node, starts: set[Node], closed: Container[Node]) -> bool:
    """Whether an output was computed from nothing but what the value's gradient is pulled back to.

    The data is not in the graph if it needs no gradient. It came in at the ``closed`` nodes, behind which there may be nothing
    but the parameters of a layer that was called both on data and on what all samples share.
    """
    stack, seen = [output], {output}
    while stack:
        node = stack.pop()
        if node in starts:
            continue
        if node in closed or not node.next_functions:
            return False
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return True


def _behind(
    start: Node, watched: dict[Node, list[tuple[Record, int]]], closed: Container[Node]
) -> Iterator[tuple[Record, int, Node]]:
    """The watched outputs among a value and all nodes that it was computed from, without passing through closed ones."""
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        for record, nr in watched.get(node, ()):
            yield record, nr, node
        for child, _ in node.next_functions:
            if child is not None and child not in seen and child not in closed:
                seen.add(child)
                stack.append(child)
