"""Which backward passes compute gradients of what is analyzed, which run inside of those, and which are ignored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from threading import get_ident
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.autograd.engine import (
    accumulates_gradient_of,
    after_backward,
    any_vmapped,
    computes_gradient_of,
    current_node,
    is_of_python_function,
    leaf_of,
)
from torch_secorder.capture.model_run import Forward
from torch_secorder.errors import UnsupportedError
from torch_secorder.recording.backward_pass import BackwardPass, PassReference, vmapped_pass


class UserPasses:
    """The user's running backward passes, by their numbers.

    A pass is "of the samples" if it computes a gradient of an analyzed parameter. Frozen parameters and gates are analyzed but
    have no gradient; for their sake, a pass also is of the samples if it accumulates the gradient of some leaf (``.backward()``)
    or returns the gradient of a parameter of the model. A pass of the samples that runs inside of another pass belongs to the
    one around it. Any other pass is ignored.

    Args:
        leaves: the nodes that accumulate the gradients of the analyzed parameters that have one.
        refused: those of parameters for which forwards were refused; passes that reach them are of the samples, too.
        renew: called where no leaf is reached, to put new nodes among the leaves: parameters that were converted inside of the
            block have others than on entry.
        all_have_gradients: whether every analyzed parameter has such a node.
        model: the model whose parameters' gradients may be asked for instead.
        on_refusal: called with the refusal of a pass whose samples are not counted, and at whose end nothing is raised.
        watches_outputs: whether the outputs of modules without an analyzed parameter are of interest.

    Attributes:
        leaves: the nodes that accumulate the gradients of the analyzed parameters that have one.
        under_way: the number of each running, outermost pass of the samples -> what it has collected.
        known: the number of a running pass -> a reference to the outermost pass that it belongs to, from its first gradient
            until some pass is over.
        unfinished: the numbers of passes that began and have not ended yet, or never will.
        ignored: the running passes that are not of the samples, with the calls of the model that they have reached. Passes
            inside of them may be of the samples nevertheless.
    """

    def __init__(
        self,
        leaves: Collection[Node],
        refused: Collection[Node],
        renew: Callable[[], None],
        all_have_gradients: bool,
        model: nn.Module | None,
        on_refusal: Callable[[Exception], None],
        *,
        watches_outputs: bool = False,
    ):
        self.leaves, self._refused, self._renew = leaves, refused, renew
        self._all_have_gradients = all_have_gradients
        self._model, self._on_refusal, self._watches_outputs = model, on_refusal, watches_outputs
        # Only autograd keeps a pass alive: a pass that an exception breaks off is gone.
        self.under_way: WeakValueDictionary[int, BackwardPass] = WeakValueDictionary()
        self.known: dict[int, PassReference] = {}  # Every gradient asks it, and no function of Python's is called then.
        self._outer_of: dict[int, int] = {}  # a pass of the samples inside of another pass -> the outermost one
        self.unfinished: set[int] = set()
        self.ignored: dict[int, list[Forward]] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self.under_way.clear()
        self.known.clear()
        self._outer_of.clear()
        self.unfinished.clear()
        self.ignored.clear()

    def forget_broken_off(self) -> None:
        """Close what is left of this thread's passes, where none can be running; the traceback of an error keeps it alive."""
        while (current := self._of_this_thread()) is not None:
            self.close(current)

    def of(self, task: int) -> BackwardPass | None:
        """What a pass has collected, if it has begun."""
        return self.under_way.get(self._outer_of.get(task, task))

    def close(self, current: BackwardPass) -> bool:
        """Forget a pass that is over; returns whether it was open."""
        self.known.clear()
        if self._outer_of:
            for inner in [inner for inner, outer in list(self._outer_of.items()) if outer == current.task]:
                self._outer_of.pop(inner, None)
        return self.under_way.pop(current.task, None) is not None

    def is_broken_off(self, task: int) -> bool:
        """Whether a pass began and an exception ended it, so that it will never reach its end."""
        return task in self.unfinished and task not in self.under_way

    def ignore(self, task: int) -> None:
        """Note that the running pass is not of the samples."""
        self.ignored[task] = []
        after_backward(partial(self._forget, task))

    def _forget(self, task: int) -> None:
        self.ignored.pop(task, None)

    def nest(self, task: int, recomputed_in: int | None) -> int:
        """Let the running pass belong to the one around it; returns the number of the outermost.

        Args:
            task: the running pass.
            recomputed_in: the pass that ran the forward which this one goes through, if one did.
        """
        outer = self._outer_of.get(task, task)
        if recomputed_in is not None and recomputed_in != task:
            outer = self._outer_of.get(recomputed_in, recomputed_in)
        elif outer == task and self.under_way:
            around = self._of_this_thread()
            outer = task if around is None else around.task
        if outer != task:
            self._outer_of[task] = outer
        return outer

    def _of_this_thread(self) -> BackwardPass | None:
        """A pass that began in this thread; other threads may begin passes meanwhile."""
        open_ones = (reference() for reference in self.under_way.valuerefs())
        return next((one for one in open_ones if one is not None and one.thread == get_ident()), None)

    def outermost(self, task: int, grads: Sequence[Tensor | None], recomputed_in: int | None) -> int | None:
        """The number of the outermost pass that the running one belongs to, asked when its first gradient arrives.

        Args:
            task: the running pass.
            grads: the gradients of a node's outputs that arrive in it.
            recomputed_in: the pass that ran the forward which this one goes through, if one did.

        Returns:
            The number, or None if the pass is not of the samples; it is ignored from now on.
        """
        if self.is_of_samples():
            if not any_vmapped(grads):
                # In most steps no other pass is running that this one may be inside of.
                alone = not self.under_way and recomputed_in is None
                return task if alone else self.nest(task, recomputed_in)
            self._on_refusal(vmapped_pass())
        self.ignore(task)
        return None

    def is_of_samples(self) -> bool:
        """Whether the running pass computes gradients of what is analyzed; if nothing shows that, a refusal is noted."""
        try:
            return self._computes_analyzed_gradients()
        except UnsupportedError as error:
            self._on_refusal(error)
            return False

    def _computes_analyzed_gradients(self) -> bool:
        if any(map(computes_gradient_of, self.leaves)) or any(map(computes_gradient_of, self._refused)):
            return True
        self._renew()
        if any(map(computes_gradient_of, self.leaves)):
            return True
        # Around a checkpoint that holds all analyzed parameters are modules whose outputs are watched.
        hidden = self._watches_outputs and any(map(is_of_python_function, below(current_node())))
        return (hidden or not self._all_have_gradients) and self._reaches_leaf(current_node())

    def _reaches_leaf(self, node: Node | None) -> bool:
        """Whether the pass accumulates the gradient of some leaf below a node, or returns that of a parameter of the model."""
        leaves = 0
        for one in below(node):
            if (variable := leaf_of(one)) is not None:
                leaves += 1
                found = accumulates_gradient_of(one)
                if found or (found is None and self._is_parameter(variable)):
                    return True
        if not leaves:
            raise UnsupportedError(
                f"{type(self._model).__name__}: nothing shows whether a backward pass is one of training or asks for gradients "
                "of inputs only, since what is analyzed has no gradient of its own and the graph ends in no leaf: let a "
                "parameter require a gradient, or leave the monitor's block for gradients of inputs"
            )
        return False

    def _is_parameter(self, variable: Tensor) -> bool:
        return self._model is not None and any(p is variable for p in self._model.parameters())


def below(node: Node | None) -> Iterator[Node]:
    """A node and all nodes that it leads to, deepest first."""
    stack, seen = [node], {node}
    while stack:
        if (current := stack.pop()) is None:
            continue
        yield current
        children = {child for child, _ in current.next_functions} - seen
        seen |= children
        stack += children
