"""How much of the diagonal is kept of each parameter: every entry, sums over channels, or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import get_args

from torch import nn

from torch_secorder.arguments import DiagonalLayout, DiagonalSums, require_choice
from torch_secorder.errors import ArgumentError
from torch_secorder.model.channels import ChannelSums, channel_sums
from torch_secorder.model.parameters import Table, named_modules

# True keeps every entry of all parameters. A mapping has the parameters that are kept: name -> an empty sequence for every entry,
# or the axis and the groups of its :class:`~torch_secorder.model.channels.ChannelSums`, as integers that a file can hold.
Layout = bool | Mapping[str, Sequence[int]]


def layout_of(diagonal: DiagonalLayout, model: nn.Module, table: Table) -> bool | dict[str, list[int]]:
    """What an argument ``diagonal=`` asks for, such as a mapping from patterns of names to "full", "rows" or "columns".

    If a name matches several patterns, the last one counts.

    Raises:
        ArgumentError: for anything else, a pattern that no parameter matches, or columns of a parameter that has none.
    """
    if isinstance(diagonal, bool):
        return diagonal
    if not isinstance(diagonal, Mapping) or not diagonal:
        raise ArgumentError(
            'diagonal must be True, False, or a mapping from patterns of parameter names to "full", "rows" or "columns", not '
            f"{diagonal!r:.80}"
        )
    chosen: dict[str, str] = {}
    for pattern, kind in diagonal.items():
        require_choice(f"diagonal[{pattern!r}]", kind, get_args(DiagonalSums))
        found = [name for name in table.names if fnmatchcase(name, str(pattern))]
        if not found:
            raise ArgumentError(
                f"diagonal: no analyzed parameter matches {pattern!r}; there are {', '.join(table.names[:5])}"
                f"{', ...' if len(table.names) > 5 else ''}"
            )
        chosen |= dict.fromkeys(found, kind)
    modules = dict(named_modules(model))
    rows = [row for row in table.rows if row.name in chosen]
    return {row.name: _sums(row.name, chosen[row.name], modules[row.module], row.shape) for row in rows}


def _sums(name: str, kind: str, module: nn.Module, shape: tuple[int, ...]) -> list[int]:
    if kind == "full" or not shape:
        return []
    sums = channel_sums(kind, module, shape)
    if sums is None:
        raise ArgumentError(f'diagonal: {name} of shape {shape} has no columns; say "rows" or "full" for it')
    return [sums.axis, sums.groups]


def sums_in(layout: Layout, name: str) -> ChannelSums | None:
    """The sums that are kept for a parameter; None if all of its entries are kept."""
    numbers = () if isinstance(layout, bool) else layout[name]
    return ChannelSums(*numbers) if numbers else None


def is_kept(layout: Layout, name: str) -> bool:
    """Whether anything is kept for a parameter."""
    return isinstance(layout, bool) or name in layout
