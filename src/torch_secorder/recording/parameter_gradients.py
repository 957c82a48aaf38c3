"""The gradients of the analyzed parameters themselves, as the user's backward passes add them to ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from torch_secorder.autograd.compiled import never_compiled
from torch_secorder.autograd.engine import accumulates_gradient_of, current_graph_task
from torch_secorder.autograd.hooks import HookSet, gradient_hooks
from torch_secorder.autograd.node_hooks import hooks_before
from torch_secorder.autograd.tensor_hooks import are_last
from torch_secorder.capture.forwards import ForwardTracker
from torch_secorder.model.hooks import WeakHook
from torch_secorder.model.parameters import Table
from torch_secorder.model.ranks import full_tensor
from torch_secorder.recording.backward_pass import BackwardPass
from torch_secorder.recording.passes import UserPasses
from torch_secorder.recording.watched_passes import WatchedPasses


class ParameterGradients:
    """Hooks on the analyzed parameters that hand their gradients to the backward passes which compute them.

    Args:
        table: the analyzed parameters.
        leaves: the nodes that accumulate their gradients -> the parameters' positions.
        forwards: the calls of the model.
        passes: the running passes.
        watched: which passes are watched if code is compiled.
        pass_under_way: finds the pass that gradients which arrive now belong to; None for a pass that is not recorded.
        within: adds something to a pass, so that an error waits for the end of the pass.
    """

    def __init__(
        self,
        table: Table,
        leaves: Mapping[Node, int],
        forwards: ForwardTracker,
        passes: UserPasses,
        watched: WatchedPasses,
        *,
        pass_under_way: Callable[[Sequence[Tensor | None]], BackwardPass | None],
        within: Callable[..., None],
    ):
        self._table, self._forwards, self._passes, self._watched = table, forwards, passes, watched
        self._pass_under_way, self._within = pass_under_way, within
        # Position -> the hooks on the node that accumulates the parameter's gradient.
        self._before_accumulation = {position: hooks_before(node) for node, position in leaves.items()}
        self._hooks = HookSet()

    def attach(self) -> None:
        """Put the hooks on the parameters that require a gradient."""
        for position, (tensor, leaf) in enumerate(zip(self._table.tensors, self._table.leaves, strict=True)):
            for watched in (leaf,) if leaf is tensor else (leaf, tensor):  # a shard is only in the graph of a penalty
                if watched.requires_grad:
                    self._hooks.on_gradient(watched, WeakHook(self, "on_gradient", position))

    def detach(self) -> None:
        """Take the hooks off."""
        self._hooks.remove()

    @never_compiled
    def on_gradient(self, position: int, grad: Tensor) -> None:
        """Called with the gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing runs backward passes inside of a pass that is skipped; nothing is recorded for them.
        if self._forwards.skipped_passes and not self._passes.under_way:
            return
        task = current_graph_task()
        known = self._passes.known.get(task)
        current = (known and known()) or self._pass_under_way((grad,))
        if current is None:
            if self._watched.resting:
                self._watched.note_gradient()
            return
        leaf = self._table.leaves[position]
        if current.task != task and not accumulates_gradient_of(get_gradient_edge(leaf).node):
            return  # A function's backward asked for this gradient, and may return it to this pass.
        alone = len(gradient_hooks(leaf) or ()) <= 1
        # A hook that was added in this very pass runs after ours, and so does a hook on the node that accumulates the gradient.
        as_added = (alone or are_last(leaf)) and not self._before_accumulation.get(position)
        if type(grad) is Tensor and not current.accumulator.checks:
            # Every step does this for every parameter, most of which are small.
            if not (as_added and current.error is None and current.gradients.keep(position, grad)):
                self._within(current, None, current.gradients.add, position, grad, as_added)
        else:
            self._within(current, None, self._add_checked_gradient, current, position, grad, as_added, alone)

    def _add_checked_gradient(
        self, current: BackwardPass, position: int, grad: Tensor, as_added: bool, alone: bool
    ) -> None:
        grad = full_tensor(grad)
        current.gradients.add(position, grad, as_added)
        # A change that a hook of the user's makes to a gradient is not in its factors, so it cannot be checked.
        if current.accumulator.checks and alone and not grad.is_sparse:
            current.project(position, grad)
