"""Whether a loss keeps samples apart, proven by the functions of torch that it calls.

The loss is called once, and each function of torch that gets something computed from the model's outputs must be one that is
known to keep samples apart. Such a proof is cheaper than trials with other outputs. It needs to know all that takes part: no
function may get a tensor of unknown origin, read numbers out of a tensor, or differentiate by rules of its own. Nor may an
operation run that no such function has called, as those of scripted functions do.

A mode follows what happens in its own thread. The outputs are of a class of their own, which also sees what other threads do with
them, so that a number that a worker reads is no less seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_secorder.autograd.nodes import has_others_function
from torch_secorder.autograd.operations import OperationWatch
from torch_secorder.batch_axis.placement import Placement
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.model.containers import copied, is_continuous, tensors
from torch_secorder.running.loss_calls import on_copies_of_buffers
from torch_secorder.verification.samples_kept_apart import OF_SHAPES, RULES, SHAPES, SUM, UNKNOWN, Place


def keeps_samples_apart(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, where: BatchSamples) -> bool:
    """Whether it is proven that a loss is a sum over samples; if not, it may be one all the same."""
    with on_copies_of_buffers(loss_fn):
        return _keeps_samples_apart(loss_fn, outputs, copied(targets), where)


def _keeps_samples_apart(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, where: BatchSamples
) -> bool:
    followed = _Followed([*tensors(targets), *_state(loss_fn)])

    def leaf(x: Tensor, placement: Placement | None) -> Tensor:
        if placement is None or type(x) is not Tensor or not x.is_floating_point() or x.is_nested:
            return x
        return followed.begin(x.detach(), placement.axis)

    try:
        with torch.enable_grad():
            own = where.mapped(leaf, "outputs", outputs)
            with OperationWatch(followed.note_operation), followed:
                loss = loss_fn(own, targets)
    except Exception:  # Whatever it raises, the trials with other outputs tell the user.
        return False
    proven = followed.place(loss) == SUM and loss.requires_grad
    return proven and not has_others_function(loss)


def _state(loss_fn: Any) -> list[Tensor]:
    """The tensors that a loss function keeps, as far as they are known to be no results of the model's."""
    if isinstance(loss_fn, partial):
        return [*tensors([list(loss_fn.args), loss_fn.keywords]), *_state(loss_fn.func)]
    return [*loss_fn.parameters(), *loss_fn.buffers()] if isinstance(loss_fn, nn.Module) else []


class _Followed(TorchFunctionMode):
    """A mode that follows outputs through the functions of torch that are called inside.

    Args:
        constants: tensors that do not depend on the outputs.
    """

    def __init__(self, constants: Sequence[Tensor]):
        super().__init__()
        self._failed, self._thread = False, get_ident()
        self._kind = _seen_in_all_threads(weakref.WeakMethod(self.note_use))
        self._calls = 0  # how many functions of torch are being called
        # Each tensor with its place; None for a constant. The tensors are kept, so that their identities stay their own.
        self._known: dict[int, tuple[Any, Place | None]] = {id(x): (x, None) for x in constants}

    def begin(self, x: Tensor, place: Place) -> Tensor:
        """The same numbers as a leaf that is followed from now on."""
        leaf = x.as_subclass(self._kind).requires_grad_()
        self._known[id(leaf)] = (leaf, place)
        return leaf

    def place(self, x: Any) -> Place:
        """The place of the samples in a result; unknown if something unknown has happened before."""
        place = self._known.get(id(x), (x, UNKNOWN))[1]
        return UNKNOWN if self._failed or place is None else place

    def note_use(self) -> None:
        """Remember that nothing is known any more if another thread does something with what is followed."""
        self._failed |= get_ident() != self._thread

    def note_operation(self) -> None:
        """Remember that nothing is known any more if an operation runs outside of all functions that are followed."""
        self._failed |= not self._calls

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._calls += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._calls -= 1
        if not self._failed and not _is_of_shapes(function):
            self._note(function, args, kwargs, result)
        return result

    def _note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """Remember where the result of a function has the samples, or that something is not known to keep them apart."""
        given = tensors([list(args), dict(kwargs)])
        places = [self._known.get(id(x), (x, UNKNOWN))[1] for x in given]
        if UNKNOWN in places:
            self._failed = True
        elif all(place is None for place in places):
            self._known |= {id(x): (x, None) for x in tensors([result])}
        else:
            self._failed = not self._follow(function, args, kwargs, result, places)

    def _follow(
        self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, places: list[Place | None]
    ) -> bool:
        """Whether the samples are still apart after a function, as far as is known."""
        if not isinstance(result, Tensor) or not is_continuous(result) or "out" in kwargs:
            return False
        if places == [SUM, SUM] and function in (torch.add, Tensor.add, Tensor.sub):
            self._known[id(result)] = (result, SUM)
            return not result.dim()
        rule = RULES.get(function) if len(places) - places.count(None) == 1 else None
        if rule is None or not args or not isinstance(args[0], Tensor) or places[0] is None:
            return False
        place = rule(places[0], args[0], (args[1:], kwargs), result)
        self._known[id(result)] = (result, place)
        return place != UNKNOWN


def _seen_in_all_threads(note_use: Callable[[], Callable[[], None] | None]) -> type[Tensor]:
    """A class of tensors of which each use is noted in whatever thread, as are uses of all that is computed from them.

    Args:
        note_use: finds the function to call; it finds None once nobody wants to know.
    """

    class Seen(Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (note := note_use()) is not None:
                note()
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch does not type it

    return Seen


def _is_of_shapes(function: Any) -> bool:
    """Whether a function says nothing of a tensor's entries."""
    if getattr(function, "__name__", None) == "__get__":
        return any(getattr(function, "__self__", None) is attribute for attribute in SHAPES)
    return function in OF_SHAPES
