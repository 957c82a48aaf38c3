"""Which backward passes are watched of a model whose code is compiled, and that the watched ones run as it was written.

Code calls no hook that it was compiled without, and would be compiled anew with hooks. Therefore it runs as it was written
until a watched backward pass is over. Of ``every`` backward passes one is watched; before the others the hooks leave the
modules and the compiled code comes back, so that nothing is seen of their forwards. They are counted where parameters get
gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from torch_secorder.autograd.compiled import EagerCode, never_compiled
from torch_secorder.autograd.engine import (
    after_backward,
    current_graph_task,
    current_node,
    in_library_call,
    is_library_pass,
)
from torch_secorder.model.hooks import WeakHook


class WatchedPasses:
    """From the moment when compiled code is called inside the block, decides after each backward pass about the next.

    Args:
        every: watch one of so many backward passes.
        on_compiled_call: called when compiled code is called inside the block, of which one in ``every`` passes is to be watched.
        attach: puts the hooks on the modules.
        detach: takes them off.

    Attributes:
        resting: whether the next pass is not watched.
        are_counted: whether passes are counted, and not calls of the model, since code is compiled.
    """

    def __init__(
        self,
        every: int,
        on_compiled_call: Callable[[], object],
        attach: Callable[[], object],
        detach: Callable[[], object],
    ):
        self._every, self._on_compiled_call, self._attach, self._detach = every, on_compiled_call, attach, detach
        self._code = EagerCode(WeakHook(self, "_begin_to_count"))
        self._noted: set[int] = set()  # passes under way that are not watched
        self._count, self._turn = 0, RLock()  # several threads may train the model
        self.resting = self.are_counted = False

    def enter(self) -> None:
        """The block begins."""
        self._code.hold()

    def leave(self) -> None:
        """The block is over: compiled code is the user's again."""
        self._code.release()

    def _begin_to_count(self) -> None:
        if self._every > 1 and not self.are_counted and not in_library_call():
            self.are_counted = True
            self._on_compiled_call()

    def note_gradient(self) -> None:
        """A parameter gets a gradient in a pass that is not watched."""
        task = current_graph_task()
        if task not in self._noted and not is_library_pass(task):
            self._noted.add(task)
            after_backward(self.pass_over)

    @never_compiled
    def pass_over(self) -> None:
        """A backward pass is over, or one inside of another, which is no pass of its own."""
        if not self.are_counted or current_node() is not None:
            return
        self._noted.clear()
        with self._turn:
            self._count += 1
            rests = self._count % self._every != 0
            if rests and not self.resting:
                self._rest()
            elif self.resting and not rests:
                self._watch()

    def _rest(self) -> None:
        self.resting = True
        self._detach()
        self._code.release()

    def _watch(self) -> None:
        self._code.hold()
        self._attach()
        self.resting = False
