"""What the sizes in a graph leave open, and what they have in common with those of other batches."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple


class SizePattern(NamedTuple):
    """What matters of the sizes in a graph of n samples.

    Attributes:
        is_ambiguous: whether some tensor has n indices on another axis than the first.
        equalities: a hash of which sizes equal each other, and which equal n; other batch sizes give the same one.
    """

    is_ambiguous: bool
    equalities: int | None


@lru_cache(64)  # since step after step has the same shapes
def size_pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> SizePattern:
    """The pattern of the sizes in these shapes."""
    sizes = {n: 0}
    equalities = hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))
    return SizePattern(any(n in shape[1:] for shape in set(shapes)), equalities)
