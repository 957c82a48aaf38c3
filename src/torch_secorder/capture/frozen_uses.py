"""Uses of frozen parameters, which leave no trace in the autograd graph and are therefore watched while the model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import HookedModule
from torch_secorder.errors import CoverageError
from torch_secorder.model.containers import tensors
from torch_secorder.model.numpy_of_frozen import NumpyOfFrozen


class FrozenUses(NumpyOfFrozen):
    """A mode that counts the operations which take one of these parameters and return a tensor.

    Args:
        positions: the id of each frozen parameter -> its position in the parameter table.

    Attributes:
        counts: position -> how many operations have taken it.
    """

    def __init__(self, positions: Mapping[int, int]):
        super().__init__()
        self._positions = positions
        self.counts: Counter[int] = Counter()

    def _ran(self, func: Callable[..., Any], arguments: Sequence[Any], result: Any) -> None:
        # Attributes of a tensor are read through ``__get__``, which does not count.
        if getattr(func, "__name__", "") != "__get__" and isinstance(result, (Tensor, tuple, list)):
            for x in tensors(arguments):
                if (position := self._positions.get(id(x))) is not None:
                    self.counts[position] += 1


class FrozenParameters:
    """Watches which operations take the frozen parameters of hooked modules, from each call of the model until it returns.

    Args:
        sites: the hooked modules whose frozen parameters are analyzed.
        forwards: knows which call of the model a module's call belongs to.

    Attributes:
        positions: the id of each frozen parameter -> its position in the parameter table.
    """

    def __init__(self, sites: Sequence[HookedModule], forwards: ForwardTracker):
        self._sites, self._forwards = sites, forwards
        self.positions = {
            id(tensor): site.parameters[local]
            for site in sites
            for local, tensor in site.tensors.items()
            if not tensor.requires_grad and type(tensor) in (Tensor, nn.Parameter)
        }
        self._running: dict[int, FrozenUses] = {}  # thread -> the uses of frozen parameters in its run of the model

    def keep_leaf(self, leaf: Tensor) -> None:
        """Note a leaf that the library put into the graph for one of the frozen parameters."""
        if (uses := self._running.get(get_ident())) is not None:
            uses.leaves.append(leaf)

    @never_compiled
    def on_model_enter(self, *_: Any) -> None:
        """Called when the model is called: watch which operations take its frozen parameters."""
        thread = get_ident()
        if thread not in self._running and self._forwards.records_calls():
            uses = self._running[thread] = FrozenUses(self.positions)
            uses.__enter__()  # type: ignore[no-untyped-call]  # torch gives it no types.

    def on_model_exit(self, module: nn.Module, args: object, output: Any) -> None:
        """Called when the model returns or raises: refuse its pass if a frozen parameter was used outside of its module."""
        uses = self._running.pop(get_ident(), None)
        if uses is None:
            return
        uses.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch gives it no types.
        forward = self._forwards.of_call(output, 0)
        if output is None or forward is None:
            return
        more = [site for site in self._sites if self._is_used_elsewhere(site, uses.counts, forward)]
        if more and forward.refusal is None:
            forward.refusal = CoverageError(
                f"{', '.join(map(str, more))}: a frozen parameter is used outside of its module's forward, of which the autograd "
                "graph shows nothing: let it require a gradient, or use fisher_report, which turns gradients on for the time"
            )

    @staticmethod
    def _is_used_elsewhere(site: HookedModule, counts: Mapping[int, int], forward: Forward) -> bool:
        """Whether operations besides a module's own calls took a parameter of it, at one operation for each call."""
        standard = type(site.module).__module__.startswith("torch.nn.")
        return any(
            counts.get(position, 0) > forward.calls[position]
            for position in site.positions
            if standard or not forward.calls[position]
        )
