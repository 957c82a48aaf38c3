"""Which backward pass is which: those that compute gradients of what is analyzed, those inside of them, and all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from torch_secorder.recording.backward_pass import BackwardPass, vmapped_pass


class UserPasses:
    """The user's backward passes that are under way, by their numbers.

    A pass is of the samples if it computes a gradient of an analyzed parameter. Of what is analyzed but has no gradient, frozen
    parameters and gates, it is if it accumulates the gradient of some leaf (``.backward()``), or returns that of a parameter of
    the model. A pass of the samples inside of another pass belongs to the one around it; any other pass is ignored.

    Args:
        leaves: the nodes that accumulate the gradients of those analyzed parameters that have one.
        all_have_gradients: whether these are all of what is analyzed.
        model: the model whose parameters' gradients may be asked for instead.
        on_refusal: called with what is refused of a pass whose samples are not counted, and at whose end nothing is raised.
        watches_outputs: whether the outputs of modules without an analyzed parameter are of interest.

    Attributes:
        under_way: the number of each outermost pass of the samples -> what is collected of it.
        known: the number of a pass under way -> the outermost one that it belongs to, once a gradient of it has arrived; gone
            as soon as that is over.
        unfinished: the numbers of passes that began and whose end was not reached yet, or never will be.
        ignored: the passes under way that are none of the samples, with the calls of the model that they have reached; passes
            inside of them may be of the samples nevertheless.
    """

    def __init__(
        self,
        leaves: Sequence[Node],
        all_have_gradients: bool,
        model: nn.Module | None,
        on_refusal: Callable[[Exception], None],
        *,
        watches_outputs: bool = False,
    ):
        self._leaves, self._all_have_gradients = leaves, all_have_gradients
        self._model, self._on_refusal, self._watches_outputs = model, on_refusal, watches_outputs
        # Only autograd keeps a pass alive: one that an exception breaks off is gone.
        self.under_way: WeakValueDictionary[int, BackwardPass] = WeakValueDictionary()
        self.known: WeakValueDictionary[int, BackwardPass] = WeakValueDictionary()
        self._outer_of: dict[int, int] = {}  # a pass of the samples inside of another pass -> the outermost one
        self.unfinished = set[int]()
        self.ignored: dict[int, list[Forward]] = {}

    def clear(self) -> None:
        """Forget all of them."""
        self.under_way.clear()
        self.known.clear()
        self._outer_of.clear()
        self.unfinished.clear()
        self.ignored.clear()

    def forget_broken_off(self) -> None:
        """No pass is under way in this thread: one that still seems to be is kept by the traceback that broke it off."""
        while (current := self._of_this_thread()) is not None:
            self.close(current)

    def of(self, task: int) -> BackwardPass | None:
        """What is collected of a pass, if that has begun."""
        return self.under_way.get(self._outer_of.get(task, task))

    def close(self, current: BackwardPass) -> bool:
        """A pass is over; says whether it was open."""
        self.known.pop(current.task, None)
        if self._outer_of:
            self.known.clear()
            for inner in [inner for inner, outer in list(self._outer_of.items()) if outer == current.task]:
                self._outer_of.pop(inner, None)
        return self.under_way.pop(current.task, None) is not None

    def is_broken_off(self, task: int) -> bool:
        """Whether a pass began and its end will never be reached, since an exception ended it."""
        return task in self.unfinished and task not in self.under_way

    def ignore(self, task: int) -> None:
        """The pass under way is none of the samples."""
        self.ignored[task] = []
        after_backward(partial(self._forget, task))

    def _forget(self, task: int) -> None:
        self.ignored.pop(task, None)

    def nest(self, task: int, recomputed_in: int | None) -> int:
        """Let the pass under way belong to the one around it; returns the number of the outermost.

        Args:
            task: the pass under way.
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
        """One that began in this thread; another thread may begin one meanwhile."""
        open_ones = (reference() for reference in self.under_way.valuerefs())
        return next((one for one in open_ones if one is not None and one.thread == get_ident()), None)

    def outermost(self, task: int, grads: Sequence[Tensor | None], recomputed_in: int | None) -> int | None:
        """The number of the pass that the one under way belongs to, in which something arrives for the first time.

        Args:
            task: the pass under way.
            grads: the gradients of a node's outputs that arrive in it.
            recomputed_in: the pass that ran the forward which this one goes through, if one did.

        Returns:
            None if it is none of the samples; it is ignored from now on.
        """
        if self.is_of_samples():
            if not any_vmapped(grads):
                # In most steps nothing is under way that this pass may be inside of.
                alone = not self.under_way and recomputed_in is None
                return task if alone else self.nest(task, recomputed_in)
            self._on_refusal(vmapped_pass())
        self.ignore(task)
        return None

    def is_of_samples(self) -> bool:
        """Whether the pass under way computes gradients of what is analyzed; if nothing tells, that is refused."""
        try:
            return self._computes_analyzed_gradients()
        except UnsupportedError as error:
            self._on_refusal(error)
            return False

    def _computes_analyzed_gradients(self) -> bool:
        if any(map(computes_gradient_of, self._leaves)):
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
