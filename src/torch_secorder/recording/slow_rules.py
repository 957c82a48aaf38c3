"""How much of a pass is done by rules that take one sample at a time, and the warning where that is most of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch_secorder.errors import SlowFallbackWarning, warn_at_users_line


@dataclass(eq=False)
class SlowRules:
    """The rules that took one sample at a time in one backward pass.

    Attributes:
        elements: the rule's name -> how many elements the gradients had that went through it, over all samples.
        seen: how many elements all gradients of the pass had.
    """

    elements: dict[str, int] = field(default_factory=dict)
    seen: int = 0

    def add(self, rule: str, elements: int) -> None:
        """Count a gradient that went through a rule which takes one sample at a time."""
        self.elements[rule] = self.elements.get(rule, 0) + elements

    def warned(self) -> bool:
        """Warn if such rules did most of the work; says whether they did."""
        if sum(self.elements.values()) <= self.seen:
            return False
        warn_at_users_line(
            f"most of the work is done by rules that take one sample at a time ({', '.join(sorted(self.elements))}); the "
            "numbers are exact, and torch_secorder.register_rule for the layer makes them cheaper",
            SlowFallbackWarning,
        )
        return True
