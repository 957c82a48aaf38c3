"""Gradients of values that several nodes take, which are added up before they are pulled back to the parameters.

A decay that each step of a recurrence takes, or a weight that is normalized once and used in each layer, was computed once. Its
vector-Jacobian product is linear, so that one call of it for the sum of all gradients gives what a call for each would.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_secorder.graph.uses import BatchFreeValue, ParameterUse
from torch_secorder.per_sample import Dense, PerSampleGradient
from torch_secorder.recording.batch import SampleBatch


@dataclass(eq=False)
class WaitingValue:
    """The gradient of a value, to which more may come.

    Attributes:
        batch: the batch that the samples belong to.
        use: the first use whose gradient came.
        value: the value.
        rule: the name of the rule that gave that gradient.
        total: the sum so far, ``[n, *value shape]``.
    """

    batch: SampleBatch
    use: ParameterUse
    value: BatchFreeValue
    rule: str
    total: Tensor

    @property
    def form(self) -> PerSampleGradient:
        """The sum."""
        return Dense(self.total)


def add_up(
    waiting: dict[object, WaitingValue],
    batch: SampleBatch,
    use: ParameterUse,
    value: BatchFreeValue,
    form: PerSampleGradient,
    rule: str,
) -> None:
    """Add the gradient that one node has for a value to those that wait, which are found by the values' keys."""
    grads = form.dense()
    if (found := waiting.get(value.key)) is None:
        # A copy, since others may write on the gradient of which this may be a view.
        waiting[value.key] = WaitingValue(batch, use, value, rule, grads.clone())
    else:
        found.total = found.total + grads
