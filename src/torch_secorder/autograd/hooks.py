"""The tables in which torch keeps the hooks of modules and tensors."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from itertools import chain, count
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, nn

from torch_secorder.model.hooks import WeakHook

Hook = Callable[..., Any]
Table = dict[int, Any]

# The tables of hooks that every module has, without those of hooks that run when its state is saved or loaded.
_TABLES = [
    name
    for name, table in vars(nn.Module()).items()
    if "hooks" in name and "state_dict" not in name and isinstance(table, dict)
]
_tables_of = itemgetter(*_TABLES)

# torch numbers hooks from 0 upwards, so that no hook of its own ever has one of these numbers.
_numbers = count(-1, -1)


def hook_counts(modules: Iterable[nn.Module]) -> Hashable:
    """How many hooks each module has in each table of those that run in its calls; an empty tuple if no module has any."""
    tables = list(chain.from_iterable(map(_tables_of, map(vars, modules))))
    return tuple(map(len, tables)) if any(tables) else ()


class HookSet:
    """Hooks of ours on modules and tensors.

    They are written into torch's tables without the functions that torch has for this: those take several times as long, give
    handles that nobody needs here, and note last of all that a hook wants keyword arguments, so that a thread which calls the
    module in between passes none. Where a hook is about to be is noted before it is there: otherwise an interruption between
    the two moments, a Ctrl-C say, would leave it on the user's model for good. An interruption at the first instruction of
    ``__exit__`` is the one that no block can help; then they go with whoever held them.
    """

    def __init__(self) -> None:
        self._ours: list[tuple[int, WeakHook, tuple[Table, ...]]] = []

    def before_forward(self, module: nn.Module, hook: WeakHook, *, first: bool = False, kwargs: bool = False) -> None:
        """Have a hook called before each call of a module.

        Args:
            module: the module.
            hook: the hook.
            first: whether it runs before all hooks that are there.
            kwargs: whether it gets the keyword arguments of the call as well.
        """
        hook.module = weakref.ref(module)
        options = (module._forward_pre_hooks_with_kwargs,) if kwargs else ()
        self._add(module._forward_pre_hooks, hook, options, first=first)

    def after_forward(
        self, module: nn.Module, hook: WeakHook, *, first: bool = False, kwargs: bool = False, always: bool = False
    ) -> None:
        """Have a hook called after each call of a module.

        Args:
            module: the module.
            hook: the hook.
            first: whether it runs before all hooks that are there.
            kwargs: whether it gets the keyword arguments of the call as well.
            always: whether it runs even if the call raises an error.
        """
        hook.module = weakref.ref(module)
        options: tuple[Table, ...] = (module._forward_hooks_with_kwargs,) if kwargs else ()
        options += (module._forward_hooks_always_called,) if always else ()
        self._add(module._forward_hooks, hook, options, first=first)

    def on_gradient(self, leaf: Tensor, hook: WeakHook) -> None:
        """Have a hook called with the gradient of a leaf of the autograd graph."""
        if leaf._backward_hooks is None:
            leaf._backward_hooks = OrderedDict()
        self._add(leaf._backward_hooks, hook, ())

    def _add(self, table: Any, hook: WeakHook, options: tuple[Table, ...], *, first: bool = False) -> None:
        number = next(_numbers)
        while (
            number in table
        ):  # A model that was pickled inside of a block has hooks that do nothing under such numbers.
            number = next(_numbers)
        self._ours.append((number, hook, (table, *options)))
        for option in options:
            option[number] = True
        table[number] = hook
        if first:
            table.move_to_end(number, last=False)

    def remove(self) -> None:
        """Take them all off."""
        for number, hook, tables in self._ours:
            hook.disarm()  # first, since another thread may be about to call it, and not know that it wants keyword arguments
            for table in tables:
                table.pop(number, None)
        self._ours = []

    def __del__(self) -> None:
        if hasattr(self, "_ours"):  # torch's compiler makes objects that it never initializes.
            self.remove()


# The hooks for a tensor's gradient by their numbers; None if it never had one. (A Python function would double what it costs to
# read this for each parameter of each step.)
gradient_hooks: Callable[[Tensor], dict[int, Any] | None] = attrgetter("_backward_hooks")
