"""What was found out about a model: kept as long as the model, for later graphs of the same kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from torch_secorder.batch_axis.evidence import Evidence

Key = tuple[object, ...]


@dataclass(eq=False)
class Memory:
    """What was found out about one model.

    Attributes:
        known: the evidence for each place that was looked at.
        outputs: for nodes with several outputs, which one tells.
        warned: whether somebody was warned of slow rules.
        turns: how many graphs were looked at.
        others: the memory of each structure of graph, for the memory of a model.
        trusting: whether shapes that allow one reading only have never misled.
        reductions: how functions combine samples.
        checked: function -> structure of graph -> how often samples were taken apart for it, of callers that check some.
    """

    known: dict[Key, Evidence] = field(default_factory=dict)
    outputs: dict[Key, int] = field(default_factory=dict)
    warned: bool = False
    turns: int = 0
    others: dict[int, Memory] = field(default_factory=dict)
    trusting: bool = True
    reductions: WeakKeyDictionary[Any, str] = field(default_factory=WeakKeyDictionary)
    checked: WeakKeyDictionary[Any, Counter[int]] = field(default_factory=WeakKeyDictionary)

    def of(self, structure: int) -> Memory:
        """What was found out about graphs of this structure: a model may change its way, and its samples their axis."""
        if len(self.others) > 64:  # of a model that never makes the same graph twice nothing is worth keeping
            self.others.clear()
        return self.others.setdefault(structure, Memory())

    def distrust(self) -> None:
        """Forget everything, and believe no shapes from now on."""
        self.trusting = False
        for found in (self.known, self.outputs, self.others, self.checked):
            found.clear()

    def reduction(self, function: Callable[..., Any], find: Callable[[str | None], str]) -> str:
        """How a function combines samples: ``find(what it did before)``."""
        try:
            before = self.reductions.get(function)
        except TypeError:  # something that can't be remembered
            return find(None)
        found = self.reductions[function] = find(before)
        return found

    def will_be_due(self, function: Callable[..., Any], structure: int) -> bool:
        """What :meth:`due` will say."""
        try:
            return self.checked.get(function, Counter())[structure].bit_count() < 2
        except TypeError:
            return True

    def due(self, function: Callable[..., Any], structure: int) -> bool:
        """Whether a call of ``function`` with a graph of this structure is to be checked: the 1st, 2nd, 3rd, 5th, 9th, ..."""
        try:
            turns = self.checked.setdefault(function, Counter())
        except TypeError:  # something that can't be remembered
            return True
        turns[structure] += 1
        return (turns[structure] - 1).bit_count() < 2


_memories: WeakKeyDictionary[nn.Module, dict[Hashable, Memory]] = WeakKeyDictionary()


def knowledge_of(model: nn.Module, batch_axis: int | Mapping[str, int] | None, *, checks: bool = True) -> Memory:
    """What was found out about a model before, by callers that check a sample now and then, or by those that don't."""
    axis = tuple(sorted(batch_axis.items())) if isinstance(batch_axis, Mapping) else batch_axis
    return _memories.setdefault(model, {}).setdefault((axis, checks), Memory())
