"""Hooks: from the user's own forward and backward to one record per call of a module. No mathematics.

A forward hook on each module that owns an analysed parameter keeps the module's inputs; a prehook on the autograd node
of its output receives the output's gradient. A node's prehook, unlike a tensor hook, also survives an in-place operation
on the output. Nothing is written on the user's modules or parameters, and leaving the ``with`` block removes
every handle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.autograd.engine import current_graph_task, in_library_call, in_search_pass
from torch_secorder.autograd.hooks import Hooks
from torch_secorder.autograd.nodes import gradient_edge_of, made_by
from torch_secorder.batch_axis.placement import FIRST, Placement
from torch_secorder.capture.records import Forward, Record, Site
from torch_secorder.errors import CoverageError, ShapeError, UnsupportedError
from torch_secorder.model.containers import tensors
from torch_secorder.model.hooks import Hook, HookScope
from torch_secorder.model.ranks import is_dtensor

# For a moment a new hook is there, and torch doesn't know yet that it takes keyword arguments: another thread's call of the model
# may come in between.
NO_OUTPUT = object()


class Capture(HookScope):
    """Attaches the hooks (``with capture:``) and hands over what they see.

    Args:
        model: the model, unwrapped.
        sites: its modules to hook.
        on_gradient: called with a record and its output's gradient, inside the backward pass.
        batch_axis: where the model's own inputs have the batch axis.
        guards: for some modules, what is called before each of their calls, to raise for a state that no rule
            can be right in.
        anchored: give outputs that need no gradient one, so that frozen layers are seen too.
        on_replay: called with the backward pass that runs a forward again (activation checkpointing).
        on_end: called with each run of the model and its outputs, when the gradient's way through it is known.
        every: see the first of every so many runs only.
        alone: see the library's own calls of the model in this thread, and nothing else; by default all others.

    Attributes:
        passed_over: backward passes that reached a run that was not seen.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        on_gradient: Callable[[Record, Tensor], None],
        batch_axis: int = 0,
        guards: Mapping[nn.Module, Callable[[], None]] | None = None,
        *,
        anchored: bool = False,
        on_replay: Callable[[int], object] | None = None,
        on_end: Callable[[Forward, Any], object] | None = None,
        every: int = 1,
        alone: bool = False,
    ):
        self._model, self._sites, self._on_gradient = model, sites, on_gradient
        self.batch_axis, self._guards, self._anchored = batch_axis, guards or {}, anchored
        self._on_replay, self._on_end = on_replay, on_end
        self._every, self._turn = every, 0
        self._thread = get_ident() if alone else None
        self.passed_over: set[int] = set()
        self._running: dict[int, Forward] = {}  # in which thread (of several that train the model, say) what runs
        self._unseen: set[int] = set()  # threads whose run is not to be seen
        self._hooks = Hooks()
        self.last = Forward()  # the latest complete run of the model
        self.loose = Forward(inside=False)  # calls of submodules with no call of the model around them
        self.active = False

    def _attach(self) -> None:
        hook, add = partial(Hook, self), self._hooks.add
        add(self._model, self._model.register_forward_pre_hook, hook("begin"), prepend=True, with_kwargs=True)
        for site in self._sites:
            # First in line: a user's hook may return something else than what the module computed.
            add(site.module, site.module.register_forward_hook, hook("seen", site), prepend=True, with_kwargs=True)
        for module, guard in self._guards.items():
            add(module, module.register_forward_pre_hook, hook("guarded", guard))
        add(self._model, self._model.register_forward_hook, hook("end"), always_call=True)
        self.active = True

    def _detach(self) -> None:
        self.active = False
        self._hooks.remove()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Layers run again inside, outside of any backward pass, for what a checkpoint threw away."""
        self._running[get_ident()] = Forward(self.last.n, Counter(self.last.calls), recomputed_in=-1)
        try:
            yield
        finally:
            del self._running[get_ident()]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """The model is called."""
        if not self._listens() or kwargs is None:
            return
        replay = current_graph_task()
        if replay == -1:
            self.passed_over.clear()
            self._turn += 1
        if replay in self.passed_over if replay != -1 else (self._turn - 1) % self._every != 0:
            self._unseen.add(get_ident())
            return
        self._unseen.discard(get_ident())
        n = batch_size((*args, *kwargs.values()), self.batch_axis)
        self._running[get_ident()] = Forward(n, recomputed_in=self._replay())

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model returns, or raises: then the output is None."""
        if not self._listens():
            return
        forward = self._running.pop(get_ident(), None)
        if get_ident() in self._unseen:
            self._unseen.discard(get_ident())
            for node in {x.grad_fn for x in tensors(output) if x.grad_fn is not None}:
                node.register_prehook(self._pass_over)
        if forward is None:
            return
        self.last = forward
        try:
            if self._on_end is not None and output is not None and forward.recomputed_in is None:
                self._on_end(forward, output)
        finally:
            for record, _ in forward.records:
                record.boundary = record.boundary[:1]
            forward.records = []

    def _pass_over(self, *_: Any) -> None:
        if not in_search_pass():
            self.passed_over.add(current_graph_task())

    def guarded(self, guard: Callable[[], None], *_: Any) -> None:
        """A module is called that may be in a state in which no rule is right."""
        if self._listens():
            guard()

    def seen(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = NO_OUTPUT
    ) -> Tensor | None:
        """Record one call; returns a new output only where a frozen layer's output needs an anchor."""
        thread = get_ident()
        if not self._listens() or output is NO_OUTPUT or thread in self._unseen:
            return None
        if self.passed_over and current_graph_task() in self.passed_over:
            return None
        forward = self._running.get(thread) or self._outside(output, site)
        calls = forward.calls
        for position in site.positions:
            calls[position] = calls.get(position, 0) + 1
        if not torch.is_grad_enabled():
            return None
        placement = site.placement or FIRST
        if site.rule is None and not (isinstance(output, Tensor) and placement.fits(output.shape, forward.n or -1)):
            return None
        if not isinstance(output, Tensor):
            raise UnsupportedError(f"{site} returned a {type(output).__name__}; a rule needs a tensor")
        if site.rule is None and is_dtensor(output):
            raise UnsupportedError(
                f"{site}: its output is in parts on several ranks, of which activations=True knows nothing"
            )
        for local, tensor in site.tensors.items():
            if module._parameters.get(local) is not tensor:
                raise CoverageError(
                    f"{site}: its parameter '{local}' was replaced since the analysis began (torch.func.functional_call, "
                    "a parametrization, an assignment); start a new analysis of the model as it is now"
                )
        anchor = None
        if not output.requires_grad:
            if not self._anchored or site.rule is None:
                return None
            output = anchor = output + output.new_zeros((), requires_grad=True)
        if forward.n is None:
            forward.n = _size(output, placement.axis)
        # (What has no elements, an expert's output that no token was sent to, is nobody's.)
        fits = not output.numel() or placement.fits(output.shape, forward.n or -1)
        found: Placement | None = placement if fits else None
        if not forward.inside and site.placement is None:
            raise ShapeError(
                f"{site} was called outside of a call of the monitored model, where nothing shows which axis counts the "
                "samples: call the model itself, monitor the part that is called, or say where they are (batch_axis=0)"
            )
        if found is None and (site.placement is not None or forward.recomputed_in is not None):
            raise ShapeError(
                f"{site}: its output has shape {tuple(output.shape)}, whose axis {placement.axis} is not the batch of "
                f"{forward.n} samples; pass batch_axis={{'{site.name}': axis}} if it has one"
            )
        edge = gradient_edge_of(output)
        if edge is None:
            raise UnsupportedError(
                f"{site}: its output is a leaf of the autograd graph, not something that it computed"
            )
        values = (*args, *kwargs.values()) if kwargs else args
        boundary = tuple([made_by(x) for x in values if isinstance(x, Tensor) and x.requires_grad])
        record = Record.of(site, forward, args, kwargs, output.shape, found, boundary)
        record.in_output_graph = not forward.inside or forward.recomputed_in is not None
        if site.rule is not None and args and isinstance(args[0], Tensor):
            forward.takers[id(args[0])] = forward.takers.get(id(args[0]), 0) + 1
        if site.rule is None:
            record.inputs, record.kwargs, record.versions, record.moments = (), {}, (), moments(output)
        edge.node.register_prehook(partial(self._fired, record, edge.output_nr))
        if forward.inside and forward.recomputed_in is None:
            forward.records.append((record, edge))
        return anchor

    def _listens(self) -> bool:
        return self.active and (not in_library_call() if self._thread is None else self._thread == get_ident())

    def _outside(self, output: Any, site: Site) -> Forward:
        """The forward of a call with no call of the model around it."""
        replay = self._replay()
        if replay is not None:
            if self.loose.recomputed_in != replay:
                self.loose = Forward(self.last.n, Counter(self.last.calls), recomputed_in=replay)
        elif self.loose.recomputed_in is not None or self.loose.n not in (
            None,
            _size(output, (site.placement or FIRST).axis),
        ):
            self.loose = Forward(inside=False)
        return self.loose

    def _replay(self) -> int | None:
        task = current_graph_task()
        if task == -1:
            return None
        if self._on_replay is not None:
            self._on_replay(task)
        return task

    def _fired(self, record: Record, output_nr: int, grads: tuple[Tensor | None, ...]) -> None:
        if (
            self.active
            and not in_search_pass()
            and record.placement is not None
            and (grad := grads[output_nr]) is not None
        ):
            self._on_gradient(record, grad)


def moments(output: Tensor) -> Tensor:
    """Number of elements, sum, sum of squares, minimum and maximum, in float64."""
    x = output.detach().double()
    return torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum(), x.min(), x.max()])


def batch_size(values: Sequence[Any], axis: int) -> int | None:
    """The size that the tensors among ``values`` (also inside of mappings and sequences) have on the batch axis.

    A tensor of size 1 there is shared by all samples, as position ids often are, unless all have size 1. Of several other
    sizes the first tensor's counts: masks come after what they mask.
    """
    sizes = [x.shape[axis] for x in tensors(values) if x.dim() > axis]
    if 0 in sizes:
        raise ShapeError("the batch is empty: a tensor among the model's inputs has 0 samples")
    return next((size for size in sizes if size != 1), 1 if sizes else None)


def _size(value: Any, axis: int) -> int | None:
    return value.shape[axis] if isinstance(value, Tensor) and value.dim() > axis else None
