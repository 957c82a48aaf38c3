"""What is believed of where samples are, and what is told instead where the numbers of one batch are not enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_secorder.batch_axis.derivation import Derivation
from torch_secorder.batch_axis.evidence import SILENT, Finding, Unplaced
from torch_secorder.batch_axis.knowledge import Key
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.search_pass import Viewed
from torch_secorder.errors import UnsupportedError


@dataclass(frozen=True)
class Trust:
    """What is believed of where samples are, and what is looked at.

    Attributes:
        shapes: whether an axis is taken for the samples' without a search if it alone has N indices. It is where a sample is
            verified afterwards.
        numbers: whether a placement counts that explains the gradients of one batch. Where traces are differentiated, it has to
            explain those of others, too.
        first_axis: whether outputs have the samples on their first axis where nothing shows it. It is where samples are verified
            afterwards, or somebody does without that.
        rehearsal: whether everything is looked at, in a batch of a few samples.
    """

    shapes: bool = False
    numbers: bool = True
    first_axis: bool = False
    rehearsal: bool = False


BY_SEARCH = Trust()


def by_labels_first(
    keys: Sequence[Key], viewed: Sequence[Viewed], found: Sequence[Finding], n: int, derive: Callable[[], Derivation]
) -> list[Finding | None]:
    """What labels say of some places, and what passes found there where labels say nothing and it is proven.

    An entry whose gradient is zero adds nothing to a trace, whoever it is counted for. Its derivative need not be zero: a table
    of which each sample reads one row may be read as a whole behind a closed gate. What labels take for shared is right for
    samples of their own, too, and costs more.

    Args:
        keys: those of the first places, which are asked about. What is not proven of the others is left open, as None.
        viewed: the places.
        found: what passes found there.
        n: how many samples there are.
        derive: makes what tells the labels.

    Raises:
        UnsupportedError: if neither says anything of a place that is asked about.
    """
    told: Sequence[Finding | None] = derive().findings(viewed) or [None] * len(found)
    proven = [_proven(by_labels, one, n) for by_labels, one in zip(told, found, strict=True)]
    # A place is told by a module's name, or by that of a parameter and the way from it.
    open_at = [str(key[1]).split("/")[0] for key, one in zip(keys, proven, strict=False) if one is None]
    if open_at:
        raise _not_proven(open_at)
    return proven


def _proven(by_labels: Finding | None, by_numbers: Finding, n: int) -> Finding | None:
    """What no other batch can contradict.

    Where a sample has no row, all samples may share the tensor, and this one's gradient is zero, as that of padding is.
    """
    if by_numbers.evidence is Unplaced.SHARED_BY_SAMPLES:
        return by_numbers
    if by_labels is not None and by_labels.evidence not in SILENT:
        return by_labels
    listed = by_numbers.evidence.sample_index if isinstance(by_numbers.evidence, Placement) else None
    return by_numbers if by_numbers.proven and (listed is None or len(listed.unique()) == n) else None


def _not_proven(names: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"{', '.join(dict.fromkeys(names))}: some samples have no gradient there, such as those of padding, and nothing shows "
        "which rows are theirs; the trace is right, and its derivative may not be: leave out create_graph, or those samples"
    )
