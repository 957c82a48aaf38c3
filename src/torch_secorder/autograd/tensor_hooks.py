"""The user's hooks on parameters and their ``.grad``, which gradients that are none of the user's must not reach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from torch_secorder.autograd.engine import current_graph_task, is_library_pass
from torch_secorder.autograd.hooks import gradient_hooks
from torch_secorder.model.hooks import WeakHook, restoring

TensorHook = Callable[[Tensor], "Tensor | None"]


def put_last(leaf: Tensor) -> None:
    """Have the library's hooks on a tensor run after all others, so that they see what those make of its gradient."""
    hooks = gradient_hooks(leaf)
    if hooks is None or len(hooks) < 2:
        return
    ours = [(key, hook) for key, hook in hooks.items() if isinstance(hook, WeakHook)]
    if [key for key, _ in ours] != list(hooks)[len(hooks) - len(ours) :]:
        for key, hook in ours:  # torch reads the table as a plain dict, in the order of insertion
            del hooks[key]
            hooks[key] = hook


def are_last(leaf: Tensor) -> bool:
    """Whether the library's hooks on a tensor run after all others."""
    hooks = gradient_hooks(leaf) or {}
    return not hooks or isinstance(hooks[next(reversed(hooks))], WeakHook)


@contextmanager
def untouched(leaves: Sequence[Tensor]) -> Iterator[None]:
    """The library's own backward passes inside run no hook of the user's on these tensors, and leave their ``.grad`` as it was.

    A pass that is asked for other gradients would not touch them by itself, but a function whose backward starts a pass of its
    own does. Inside, ``.grad`` is None but for what such a function accumulates.
    """
    kept = [(leaf, leaf.grad) for leaf in leaves if leaf.requires_grad]

    def restore() -> None:
        for leaf, grad in kept:
            leaf.grad = grad

    with silenced_in_library_passes(leaves), restoring(restore):
        for leaf, _ in kept:
            leaf.grad = None
        yield


@contextmanager
def silenced_in_library_passes(leaves: Sequence[Tensor]) -> Iterator[None]:
    """The user's hooks on these tensors run in the user's backward passes only, and change no gradient in the library's.

    They stay in their places, so that a backward pass in another thread misses none of them.
    """
    tables: list[dict[int, Any]] = [leaf._backward_hooks for leaf in leaves if leaf._backward_hooks]
    tables += [hooks for leaf in leaves if (hooks := leaf._post_accumulate_grad_hooks)]

    def restore() -> None:
        for hooks in tables:
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Silenced):
                    hooks[key] = hook.hook

    with restoring(restore):
        for hooks in tables:
            for key, hook in list(hooks.items()):
                if not isinstance(hook, WeakHook):  # The library's own hooks know which passes are theirs.
                    hooks[key] = _Silenced(hook)
        yield


class _Silenced:
    """A hook that does nothing in the library's own passes."""

    def __init__(self, hook: TensorHook):
        self.hook = hook

    def __call__(self, grad: Tensor) -> Tensor | None:
        return None if is_library_pass(current_graph_task()) else self.hook(grad)
