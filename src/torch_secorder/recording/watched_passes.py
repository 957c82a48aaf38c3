"""Which backward passes of a compiled model are watched; the watched ones run the code uncompiled.

Compiled code does not call hooks that were added later, and with hooks it would be compiled anew. Therefore the model runs
uncompiled until a watched backward pass is over. One in ``every`` backward passes is watched. Before the others, the hooks are
taken off the modules and the compiled code comes back, so that nothing is seen of their forwards; these passes are counted when
parameters get gradients.
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
    """Decides after each backward pass whether the next is watched, once compiled code was called inside the block.

    Args:
        every: one in this many backward passes is watched.
        on_compiled_call: called when compiled code is first called inside the block, if ``every`` is more than one.
        attach: puts the hooks on the modules.
        detach: takes the hooks off.

    Attributes:
        resting: whether the next pass is left out.
        are_counted: whether passes are counted instead of calls of the model, since code is compiled.
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
        self._noted: set[int] = set()  # running passes that are not watched
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
        """Called when a parameter gets a gradient in a pass that is not watched."""
        task = current_graph_task()
        if task not in self._noted and not is_library_pass(task):
            self._noted.add(task)
            after_backward(self.pass_over)

    @never_compiled
    def pass_over(self) -> None:
        """Called when a backward pass is over. A pass inside of another one does not count on its own."""
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
