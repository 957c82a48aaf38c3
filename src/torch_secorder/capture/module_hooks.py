"""The hooks on modules, which make a record of each call in the user's own forward and hand it over in the backward pass.

A forward hook on each module that owns an analyzed parameter keeps the module's inputs. A hook on the autograd node of its output
gets the output's gradient when the node has run; unlike a hook on the tensor, it stays when the output is changed in place.
Nothing is written on the user's modules or parameters, and leaving the ``with`` block removes every hook.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import saved_tensors_hooks, without_modes
from torch_secorder.autograd.hooks import HookSet
from torch_secorder.autograd.node_hooks import call_after, gradient_edge_of
from torch_secorder.autograd.nodes import made_by
from torch_secorder.autograd.versions import version
from torch_secorder.batch_axis.placement import FIRST
from torch_secorder.batch_axis.told import Told
from torch_secorder.capture.forwards import ForwardTracker, size_on
from torch_secorder.capture.frozen_uses import FrozenParameters
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.module_notes import ModuleNotes
from torch_secorder.capture.records import HookedModule, Record
from torch_secorder.errors import CoverageError, CurvatureError, ShapeError, UnsupportedError
from torch_secorder.model.hooks import HookScope, WeakHook
from torch_secorder.model.nested import shows_sizes, whole_shape
from torch_secorder.model.ranks import is_dtensor


class ModuleHooks(HookScope):
    """Attaches the hooks (``with hooks:``) and hands over what they see.

    Args:
        model: the model, unwrapped.
        modules: all of its modules, under their plain names.
        sites: its modules to hook.
        on_gradient: called in each backward pass that reaches a recorded call, when the node that made its output has run, with
            the record, which of the node's outputs is the call's, what the node returned, and the gradients of its outputs.
        forwards: knows which run of the model a call belongs to.
        guards: module -> a function that is called before each of its calls, and raises in a state for which no rule is right.
        before_node: called before the node of a call runs, with the record and the gradients of the node's outputs, if the call
            is outside of any run of the model or is run again.
        attach_leaf: whether outputs that require no gradient are made to require one, so that frozen layers are seen too.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[tuple[str, nn.Module]],
        sites: Sequence[HookedModule],
        on_gradient: Callable[[Record, int, object, tuple[Tensor | None, ...]], None],
        forwards: ForwardTracker,
        guards: Mapping[nn.Module, Callable[[], None]],
        *,
        before_node: Callable[[Record, tuple[Tensor | None, ...]], None],
        attach_leaf: bool = False,
    ):
        self._model, self._modules, self._sites, self._on_gradient = model, modules, sites, on_gradient
        self._before_node = before_node
        self.forwards, self._guards, self._attach_leaf = forwards, guards, attach_leaf
        self._hooks = HookSet()
        self._frozen = FrozenParameters(sites if attach_leaf else (), forwards)
        self._notes = ModuleNotes(forwards)
        # Module that is watched for its output alone -> whether its calls are under transforms of torch.func.
        self._transformed: dict[str, bool] = {}

    def _attach(self) -> None:
        hooks, model, forwards = self._hooks, self._model, self.forwards
        hooks.before_forward(model, WeakHook(forwards, "on_model_enter"), first=True, kwargs=True)
        for site in self._sites:
            # The hook is first in line: a user's hook may return something else than what the module computed.
            hook = WeakHook(self, "on_watched_output" if site.rule is None else "on_module_output", site)
            hooks.after_forward(site.module, hook, first=True, kwargs=True)
        self._notes.attach(hooks, model, self._modules, self._guards)
        if self._frozen.positions:
            hooks.before_forward(model, WeakHook(self._frozen, "on_model_enter"))
            hooks.after_forward(model, WeakHook(self._frozen, "on_model_exit"), always=True)
        hooks.after_forward(model, WeakHook(forwards, "on_model_exit"), always=True)
        forwards.active = True

    def _detach(self) -> None:
        self.forwards.active = False
        self._hooks.remove()

    @never_compiled
    def on_module_output(
        self,
        site: HookedModule,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Tensor | None:
        """Record one call; returns a new output for a frozen layer alone, whose own output would be in no graph."""
        if not site.tensors and self.forwards.is_transformed_in_run():
            self.forwards.refuse(_transformed(site, "leave it out of the modules that have gates"))
            return None
        forward = self.forwards.of_call(output, site.placement.axis if site.placement else 0)
        if forward is None:
            return None
        calls = forward.calls
        for position in site.positions:  # A Counter would call a function of Python's for each that it does not have.
            calls[position] = calls.get(position, 0) + 1
        if not torch.is_grad_enabled():
            return None
        try:
            return self._recorded(site, forward, module, args, kwargs, output)
        except CurvatureError as error:
            self.forwards.refuse(error)
        if site.keep is None and (hooks := saved_tensors_hooks()) is not None:
            # Activation checkpointing counts the tensors that are packed in each run, so that a refused call packs its own, too.
            Record(site, forward, args, kwargs, torch.Size(), None, True, ()).pack_inputs(*hooks)
        return None

    def _recorded(
        self,
        site: HookedModule,
        forward: Forward,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> Tensor | None:
        """Keep what a rule needs of a call; returns the new output, if there is one."""
        # torch.func.functional_call replaces parameters like that. Every step makes this comparison, so that it calls no function
        # of Python's for each parameter.
        if any(map(is_not, map(module._parameters.get, site.tensors), site.tensors.values())):
            if self._attach_leaf:  # The graph shows no other use of a frozen parameter.
                raise CoverageError(
                    f"{site}: its parameter '{_replaced_parameter(site, module)}' was replaced since the analysis began "
                    "(torch.func.functional_call, a parametrization, an assignment); start a new analysis of the model as it is "
                    "now"
                )
            return None
        if not isinstance(output, Tensor):
            raise UnsupportedError(f"{site} returned a {type(output).__name__}; a rule needs a tensor")
        if output.is_nested and not shows_sizes(output):
            raise UnsupportedError(
                f"{site} returned a nested tensor that shows no sizes: make it with layout=torch.jagged"
            )
        if "forward" in vars(module):
            raise CoverageError(
                f"{site}: its forward was replaced on the instance since the analysis began, so that no rule knows what it "
                "computes; start a new analysis of the model as it is now"
            )
        leaf = None
        if not output.requires_grad:
            if not self._attach_leaf:
                return None
            zero = output.new_zeros((), requires_grad=True)
            output = leaf = output + zero
            self._frozen.keep_leaf(zero)
        if not forward.in_model_call and site.placement is None:
            raise ShapeError(
                f"{site} was called outside of a call of the monitored model, where nothing shows which axis counts the "
                "samples: call the model itself, monitor the part that is called, or say where they are (batch_axis=0)"
            )
        record = _record(site, forward, args, kwargs, output, self.forwards.words)
        record.training = module.training
        if site.keep is not None:
            record.kwargs, record.versions = {}, ()
            with without_modes():
                record.kept = site.keep(module, args, kwargs, output)
        else:
            if (hooks := saved_tensors_hooks()) is not None:
                record.pack_inputs(*hooks)
            if args and isinstance(args[0], Tensor):
                forward.input_uses[id(args[0])] = forward.input_uses.get(id(args[0]), 0) + 1
        self._hook_gradient(record, output)
        return leaf

    @never_compiled
    def on_watched_output(
        self,
        site: HookedModule,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Record a call of which only the output is of interest.

        In a run of the model, the graph shows whether the samples share the output. Elsewhere the output needs a batch axis.
        A module all of whose calls are under transforms of torch.func is left out.
        """
        transformed = self.forwards.is_transformed_in_run()
        if self._transformed.setdefault(site.name, transformed) != transformed:
            self.forwards.refuse(_transformed(site, "leave activations= and on_output= out"))
        if transformed:
            return
        placement = site.placement or FIRST
        forward = self.forwards.of_call(output, placement.axis)
        if forward is None or not torch.is_grad_enabled() or not isinstance(output, Tensor) or not shows_sizes(output):
            return
        in_graph = forward.n is not None and forward.in_model_call and forward.recomputed_in is None
        if not output.requires_grad or not (in_graph or placement.fits(output.shape, forward.n or -1)):
            return
        if is_dtensor(output):
            self.forwards.refuse(
                UnsupportedError(
                    f"{site}: its output is in parts on several ranks, of which activations=True knows nothing"
                )
            )
            return
        assert site.keep is not None
        nodes, _ = _nodes_and_versions(args, kwargs)
        record = Record(site, forward, (), {}, whole_shape(output), placement, not nodes, nodes)
        with without_modes():
            record.kept = site.keep(module, args, kwargs, output)
        self._hook_gradient(record, output)

    def _hook_gradient(self, record: Record, output: Tensor) -> None:
        """Have the gradient of the output handed over, and note where it arrives."""
        edge, forward = gradient_edge_of(output), record.forward
        if edge is None:
            raise UnsupportedError(
                f"{record.site}: its output is a leaf of the autograd graph, not something that it computed"
            )
        # The record is handed over after the node has run. By then the user's hooks may have changed the node's gradients, and a
        # checkpoint has run its forward again for tensors that the node needs, as early as it would without us.
        table = call_after(edge.node, self._on_gradient, record, edge.output_nr)
        if record.site.rule is not None:
            record.node_hooks = table
            forward.node_hooks.append(table)
        if forward.in_model_call and forward.recomputed_in is None:
            forward.records.append((record, edge))
        else:
            if record.site.rule is not None:  # No output of the model tells when a pass is about to reach it.
                edge.node.register_prehook(partial(self._before_node, record))
                self.forwards.note_call(record, edge)
            record.in_output_graph = True  # No call of the model is under way, whose outputs' graph could show it.
            record.input_nodes = ()


def _transformed(site: HookedModule, remedy: str) -> UnsupportedError:
    """The refusal of a module of which only some calls would be seen."""
    return UnsupportedError(
        f"{site} was called under a transform of torch.func (grad, vmap, jvp), where nothing shows the gradient of its output: "
        f"{remedy}"
    )


def _record(
    site: HookedModule, forward: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, words: Told
) -> Record:
    """The record of a call, with its samples on the batch axis if the shape of the output allows that."""
    placement = site.placement or FIRST
    if forward.n is None:
        forward.n = size_on(output, placement.axis)
    # An output without elements belongs to no sample, such as that of an expert that no token was sent to.
    if placement is FIRST:
        odd = forward.recomputed_in is not None and forward.count.is_odd
        fits = not output.numel() or (output.shape[:1] == (forward.n,) and not odd)
    else:
        fits = not output.numel() or placement.fits(output.shape, forward.n or -1)
    if not fits and site.placement is not None and words.is_of_everything and placement.axis:
        raise _axis_of_everything(site, placement.axis, output)
    if not fits and (site.placement is not None or forward.recomputed_in is not None):
        raise ShapeError(
            f"{site}: its output has shape {tuple(output.shape)}, whose axis {placement.axis} is not the batch of "
            f"{forward.n} samples; pass batch_axis={{'modules': {{'{site.name}': axis}}}} if it has one"
        )
    nodes, versions = _nodes_and_versions(args, kwargs)
    shape = whole_shape(output) if output.is_nested else output.shape
    return Record(site, forward, args, kwargs, shape, placement if fits else None, not nodes, nodes, versions)


def _axis_of_everything(site: HookedModule, axis: int, output: Tensor) -> ShapeError:
    """The refusal of an axis that the user gave for all tensors, and that does not count the samples in this one."""
    return ShapeError(
        f"{site}: its output has shape {tuple(output.shape)}, and batch_axis={axis} says that every tensor, this one too, has "
        f"its samples on axis {axis}: leave batch_axis out if samples come first in what the model takes, or pass "
        f"batch_axis={{'inputs': {axis}}} if only the model's inputs have them there, and {{'inputs': {axis}, 'outputs': "
        f"{axis}}} if its outputs have them there, too"
    )


def _replaced_parameter(site: HookedModule, module: nn.Module) -> str:
    """The local name of the first parameter in whose place there is another tensor."""
    return next(local for local, tensor in site.tensors.items() if module._parameters.get(local) is not tensor)


def _nodes_and_versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The nodes that made those inputs that require a gradient, and how often each input was changed in place so far."""
    nodes: list[Any] = []
    versions: list[int] = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(x, Tensor):
            if x.requires_grad:
                nodes.append(x.grad_fn or made_by(x))
            if not x.is_inference():
                versions.append(version(x))
    return tuple(nodes), tuple(versions)
