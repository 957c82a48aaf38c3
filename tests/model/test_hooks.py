"""Hooks of objects that may be gone when somebody still calls them."""

from __future__ import annotations

import copy
import gc

import torch
from torch import nn

from torch_secorder.autograd.hooks import HookSet
from torch_secorder.model.hooks import WeakHook


class Owner:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def note(self, first: str, *args: object) -> None:
        self.seen.append(first)


def test_a_hook_that_was_removed_does_nothing_in_a_thread_that_still_calls_it() -> None:
    """As where another thread has read the table of hooks, and its turn comes when the owner is gone."""
    owner, module, hooks = Owner(), nn.Linear(2, 2), HookSet()
    hooks.add(module, module.register_forward_hook, WeakHook(owner, "note", "called"))
    about_to_be_called = list(module._forward_hooks.values())
    module(torch.ones(1, 2))
    assert owner.seen == ["called"]
    hooks.remove()
    del owner
    gc.collect()
    for hook in about_to_be_called:
        assert hook(module, (), torch.ones(1)) is None


def test_a_copy_of_a_model_has_hooks_that_do_nothing() -> None:
    owner, module, hooks = Owner(), nn.Linear(2, 2), HookSet()
    hooks.add(module, module.register_forward_hook, WeakHook(owner, "note", "called"))
    copy.deepcopy(module)(torch.ones(1, 2))
    assert owner.seen == []
