"""What single modules show about the samples, whether or not they have an analyzed parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.hooks import HookSet
from torch_secorder.autograd.node_hooks import gradient_edge_of
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.capture.own_axes import OwnAxis
from torch_secorder.errors import CurvatureError
from torch_secorder.model.containers import tensors
from torch_secorder.model.hooks import WeakHook
from torch_secorder.model.ranks import fsdp_modules

# Layers whose own settings tell which axis counts samples.
OWN_AXES = (nn.RNNBase, nn.MultiheadAttention)


class ModuleNotes:
    """Hooks that note facts about the running call of the model, beside the recorded calls of its modules.

    Args:
        forwards: knows which call of the model a module's call belongs to.
    """

    def __init__(self, forwards: ForwardTracker):
        self._forwards = forwards

    def attach(
        self,
        hooks: HookSet,
        model: nn.Module,
        modules: Sequence[tuple[str, nn.Module]],
        guards: Mapping[nn.Module, Callable[[], None]],
    ) -> None:
        """Put the hooks on a model's modules.

        Args:
            hooks: the set that the hooks are added to, which also removes them.
            model: the model, unwrapped.
            modules: all of its modules, under their plain names.
            guards: for some modules, a function that is called before each of their calls and raises for a state in which no rule
                is right.
        """
        for module in fsdp_modules(model):
            hooks.after_forward(module, WeakHook(self, "on_sharded_output"), first=True)
        kinds = {type(module) for _, module in modules}
        noted = {kind for kind in kinds if issubclass(kind, (*OWN_AXES, nn.EmbeddingBag))}
        for name, module in modules if noted else ():
            if isinstance(module, OWN_AXES):
                hooks.after_forward(module, WeakHook(self, "on_own_axis", name), first=True)
            if isinstance(module, nn.EmbeddingBag):
                hooks.after_forward(module, WeakHook(self, "on_bags"), first=True, kwargs=True)
        for module, guard in guards.items():
            hooks.before_forward(module, WeakHook(self, "check_state", guard))

    def check_state(self, guard: Callable[[], None], *_: Any) -> None:
        """Called before a call of a module that may be in a state in which no rule is right."""
        if self._forwards.records_calls():
            try:
                guard()
            except CurvatureError as error:
                self._forwards.refuse(error)

    @never_compiled
    def on_own_axis(self, name: str, module: nn.Module, args: object, outputs: Any) -> None:
        """Note the output of a module whose own settings tell which axis counts samples."""
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        if not isinstance(output, Tensor) or output.dim() not in (2, 3) or not output.requires_grad:
            return
        forward, edge = self._forwards.of_call(output, 0), gradient_edge_of(output)
        if forward is not None and forward.in_model_call and edge is not None:
            axis = None if output.dim() == 2 else 0 if module.batch_first else 1
            forward.own_axes.append(OwnAxis(name, module, axis, output.shape, edge))

    @never_compiled
    def on_bags(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Note how many bags an EmbeddingBag made from ids without a batch axis."""
        ids = args[0] if args else kwargs.get("input")
        forward = self._forwards.of_call(output, 0)
        if forward is not None and isinstance(ids, Tensor) and isinstance(output, Tensor) and ids.dim() == 1:
            forward.bags.add(len(output))

    @never_compiled
    def on_sharded_output(self, module: nn.Module, args: object, output: Any) -> None:
        """Note where in the graph a module begins whose weights have to be gathered for a pass through it."""
        forward = self._forwards.of_call(output, 0)
        if forward is not None:
            forward.sharded += [(module, x.grad_fn) for x in tensors(output) if x.grad_fn is not None]
