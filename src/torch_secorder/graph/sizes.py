"""What the sizes in a graph leave open, and what they have in common with those of other batches."""

from __future__ import annotations

from functools import lru_cache


# Both are remembered, since step after step has the same shapes.
@lru_cache(64)
def size_pattern(n: int, shapes: tuple[tuple[int, ...], ...]) -> int:
    """A hash of which sizes in these shapes equal each other, and which equal n; other batch sizes give the same one."""
    sizes = {n: 0}
    return hash(tuple([tuple([sizes.setdefault(size, len(sizes)) for size in shape]) for shape in shapes]))


@lru_cache(64)
def has_ambiguous_axis(n: int, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether some shape has n indices on another axis than the first."""
    return any(n in shape[1:] for shape in set(shapes))
