"""The flow of per-sample gradients from a value down a batch-free chain: those of all samples at once, or one after the other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.kept_values import vjp_in_look
from torch_secorder.autograd.nodes import Edge, output_dtype, output_shapes
from torch_secorder.autograd.opaque import Gradients
from torch_secorder.autograd.route import Call, Route
from torch_secorder.autograd.vmapped import as_one, called_with_many, take_many
from torch_secorder.per_sample.budget import chunks
from torch_secorder.per_sample.profiles import profile_of

Start = tuple[Node, tuple[int, ...]]  # the node where a chain begins, and the shape of what it makes or accumulates

# Kinds of chains, and whether all samples at once get what each gets alone. A stack of layers has the same few in each step.
_AGREES: dict[Hashable, bool] = {}
REMEMBERED = 2**10


class ChainFlow:
    """The flow from one value down to the starts of its chains.

    Args:
        route: the way there.
        value: the node that made the value, and which of its outputs it is.
        starts: the starts.
        permutes: whether the chains only move entries.
    """

    def __init__(self, route: Route, value: Edge, starts: Sequence[Start], *, permutes: bool):
        self._route, self._value, self._starts, self._permutes = route, value, starts, permutes
        self._nodes = [node for node in route.order if node not in route.ends]
        self._dtypes = [output_dtype(start, 0) for start, _ in starts]

    def __call__(self, grads: Tensor) -> list[Tensor]:
        """``[n, *value shape]`` -> ``[n, *shape]`` of each start."""
        # A node that computes has saved tensors of the model's dtype, which may be narrower than that of our gradients.
        dtype = grads.dtype if self._permutes else output_dtype(*self._value)
        wanted = [_no_narrower(start, grads.dtype) for start in self._dtypes]
        grads = grads.to(dtype)
        parts = self._parts(grads, wanted)
        found = [
            self._at_once(grads[part], wanted)
            if part.stop - part.start > 1
            else self._of_one(grads[part.start], wanted)
            for part in parts
        ]
        if not found:
            return [
                grads.new_zeros(0, *shape, dtype=wide) for (_, shape), wide in zip(self._starts, wanted, strict=True)
            ]
        return found[0] if len(found) == 1 else [torch.cat(several) for several in zip(*found, strict=True)]

    def _parts(self, grads: Tensor, wanted: Sequence[torch.dtype]) -> list[slice]:
        """The samples that are taken at once: as many as memory allows, or one."""
        each = [slice(place, place + 1) for place in range(len(grads))]
        is_plain = len(grads) > 1 and bool(self._nodes) and not any(start.is_complex for start in self._dtypes)
        if not is_plain or not take_many(self._nodes):
            return each
        size = max(map(math.prod, output_shapes(self._nodes))) * grads.dtype.itemsize
        parts = list(chunks(len(grads), size, profile_of(grads.device).chunk_bytes))
        return parts if len(parts) < len(grads) and self._agrees(grads, wanted) else each

    def _agrees(self, like: Tensor, wanted: Sequence[torch.dtype]) -> bool:
        """Whether two samples at once get what each gets alone, which is tried for the first chain of a kind."""
        kind = (tuple([node.name() for node in self._nodes]), like.dtype, like.device.type)
        if (agrees := _AGREES.get(kind)) is None:
            if len(_AGREES) > REMEMBERED:
                _AGREES.clear()
            agrees = _AGREES[kind] = self._tried(like, wanted)
        return agrees

    def _tried(self, like: Tensor, wanted: Sequence[torch.dtype]) -> bool:
        generator = torch.Generator().manual_seed(0)
        grads = torch.randn(2, *like.shape[1:], generator=generator, dtype=torch.float32, device="cpu")
        grads = grads.to(like.device, like.dtype)
        alone = [self._of_one(grad, wanted) for grad in grads]
        try:
            both = self._at_once(grads, wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # This torch has no rule for something that a node does.
            return False
        return _are_close(both, list(map(torch.cat, zip(*alone, strict=True))))

    def _at_once(self, grads: Tensor, wanted: Sequence[torch.dtype]) -> list[Tensor]:
        with as_one(grads) as (one, apart):
            return [apart(own) for own in self._flowed(one, wanted, called_with_many)]

    def _of_one(self, grad: Tensor, wanted: Sequence[torch.dtype]) -> list[Tensor]:
        # Copies, since a complex gradient may be a view that is conjugated when it is read, which not every operation reads.
        return [torch.stack([own]) for own in self._flowed(grad, wanted, vjp_in_look)]

    def _flowed(self, grad: Tensor, wanted: Sequence[torch.dtype], call: Call) -> list[Tensor]:
        """The gradients of all starts, given that of the value; of a start that none arrives at, zeros."""
        arrived: dict[Node, Tensor] = {}
        arrive = partial(_first_of, arrived)
        self._route.flow({self._value: grad}, arrive, call=call, complete=True, keeps_dtype=self._permutes)
        found: list[Tensor] = []
        for (start, shape), wide in zip(self._starts, wanted, strict=True):
            there = arrived.get(start)
            found.append(grad.new_zeros(shape, dtype=wide) if there is None else there.reshape(shape).to(wide))
        return found


def _no_narrower(start: torch.dtype, gradients: torch.dtype) -> torch.dtype:
    """The dtype of a start's gradients: complex if the start is, and with as many digits as the gradients that come in."""
    real = gradients.to_real()
    return torch.promote_types(start, real) if start.is_complex else real


def _first_of(arrived: dict[Node, Tensor], start: Node, grads: Gradients) -> None:
    """Keep the gradient of a start, which has one output."""
    if grads[0] is not None:
        arrived[start] = grads[0]


def _are_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether these tensors are equal to half of the digits of the largest number, since some may be zero but for rounding."""
    digits = math.sqrt(torch.finfo(expected[0].dtype).eps)
    largest = max(float(one.nan_to_num(0, 0, 0).abs().amax()) if one.numel() else 0.0 for one in expected)
    return all(
        torch.allclose(one, other, rtol=digits, atol=digits * largest, equal_nan=True)
        for one, other in zip(found, expected, strict=True)
    )
