"""What is left of a step without its weight gradients: the least that squared norms, at no cost of their own, come with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.workloads import Setting


@dataclass(frozen=True)
class Floor:
    """Forward and input gradients, over forward, input gradients and weight gradients.

    Attributes:
        operations: the multiplications and additions of matrix products and convolutions.
        bytes: what all operations read and write, views aside, as if nothing stayed in a cache.
    """

    operations: float
    bytes: float


def floor(setting: Setting) -> Floor:
    """The floor of a workload.

    Gradients of parameters with one axis are mere sums over output gradients. To ask for them alone makes autograd
    compute the input gradients down to the first layers, and no weight gradient.
    """
    everything = list(setting.model.parameters())
    vectors = [p for p in everything if p.dim() == 1]
    with decomposed():
        return Floor(
            operations(setting, vectors) / operations(setting, everything),
            traffic(setting, vectors) / traffic(setting, everything),
        )


def operations(setting: Setting, parameters: Sequence[Tensor]) -> int:
    """Of the loss and its gradient in `parameters`; four samples are enough, since all of it grows with the batch."""
    inputs, targets = setting.batch(4)
    backward: dict[Any, Callable[..., int]] = {torch.ops.aten.convolution_backward: convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        torch.autograd.grad(setting.loss_fn(setting.model(inputs), targets), parameters)
    return int(counter.get_total_flops())


def convolution_backward(grad: Sequence[int], inputs: Any, weight: Sequence[int], *args: Any, **_: Any) -> int:
    """Each of the two gradients costs what the forward does; torch's own formula forgets the groups of one."""
    transposed, mask = args[4], args[7]
    positions = (inputs if transposed else grad)[2:]
    return 2 * grad[0] * math.prod(positions) * math.prod(weight) * (mask[0] + mask[1])


class Traffic(TorchDispatchMode):
    """Counts the bytes of all tensors that operations take and return."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            found = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in found)
        return result


def traffic(setting: Setting, parameters: Sequence[Tensor]) -> int:
    """Of the loss and its gradient in `parameters`, in bytes."""
    inputs, targets = setting.batch()
    with Traffic() as counter:
        torch.autograd.grad(setting.loss_fn(setting.model(inputs), targets), parameters)
    return counter.bytes


@contextmanager
def decomposed() -> Iterator[None]:
    """Attention and recurrence are made of operations that the counters know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            yield
