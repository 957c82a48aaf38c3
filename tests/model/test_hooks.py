"""Hooks of objects that may be gone when somebody still calls them."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torch_secorder import FisherMonitor
from torch_secorder.autograd import hooks as autograd_hooks
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
    hooks.after_forward(module, WeakHook(owner, "note", "called"))
    about_to_be_called = list(module._forward_hooks.values())
    module(torch.ones(1, 2))
    assert owner.seen == ["called"]
    hooks.remove()
    del owner
    gc.collect()
    for hook in about_to_be_called:
        assert hook(module, (), torch.ones(1)) is None


def test_hooks_run_where_torchs_own_functions_would_put_them() -> None:
    owner, module, hooks = Owner(), nn.Linear(2, 2), HookSet()
    module.register_forward_pre_hook(lambda *args: owner.seen.append("user's, before"))
    module.register_forward_hook(lambda *args: owner.seen.append("user's, after"))
    hooks.before_forward(module, WeakHook(owner, "note", "before"))
    hooks.before_forward(module, WeakHook(owner, "note", "first of all"), first=True)
    hooks.after_forward(module, WeakHook(owner, "note", "after"))
    hooks.after_forward(module, WeakHook(owner, "note", "first after"), first=True)
    hooks.after_forward(module, WeakHook(owner, "note", "always"), always=True)
    hooks.on_gradient(module.weight, WeakHook(owner, "note", "gradient"))
    module(torch.ones(1, 2)).sum().backward()
    calls = ["first of all", "user's, before", "before", "first after", "user's, after", "after", "always", "gradient"]
    assert owner.seen == calls
    owner.seen.clear()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        module(torch.ones(1, 3))
    assert owner.seen == ["first of all", "user's, before", "before", "always"]
    hooks.remove()
    owner.seen.clear()
    module(torch.ones(1, 2)).sum().backward()
    assert owner.seen == ["user's, before", "user's, after"]


def test_a_hook_takes_no_number_that_a_pickled_model_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was pickled inside of a block keeps hooks that do nothing, and what was noted about them."""
    monkeypatch.setattr(autograd_hooks, "_numbers", itertools.count(-1, -1))
    owner, module, hooks = Owner(), nn.Linear(2, 2), HookSet()
    pickled = Noted()
    module._forward_hooks[-1], module._forward_hooks_with_kwargs[-1] = pickled, True
    hooks.after_forward(module, WeakHook(owner, "note", "called"))
    module(torch.ones(1, 2))
    assert owner.seen == ["called"]
    hooks.remove()
    assert (module._forward_hooks, module._forward_hooks_with_kwargs) == ({-1: pickled}, {-1: True})


class Noted:
    """A hook of the user's."""

    def __call__(self, *args: object) -> None:
        pass


def tables(module: nn.Module) -> dict[str, int]:
    return {name: len(table) for name, table in vars(module).items() if "hooks" in name and table}


def watched_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))
    model[0].register_forward_hook(Noted())
    model.register_forward_pre_hook(Noted(), with_kwargs=True)
    return model


def test_a_copy_of_a_model_has_the_users_hooks_only() -> None:
    model = watched_model()
    plain = [tables(module) for module in copy.deepcopy(model).modules()]
    with FisherMonitor(model, parameters="all"):
        copied = copy.deepcopy(model)
        assert [tables(module) for module in model.modules()] != plain
    assert [tables(module) for module in copied.modules()] == plain
    assert type(next(iter(copied[0]._forward_hooks.values()))) is Noted


def test_a_copy_whose_memo_is_kept_has_a_hook_that_does_nothing_so_long() -> None:
    owner, module, hooks, memo = Owner(), nn.Linear(2, 2), HookSet(), dict[int, object]()
    hooks.after_forward(module, WeakHook(owner, "note", "called"))
    copied = copy.deepcopy(module, memo)
    copied(torch.ones(1, 2))
    assert owner.seen == []
    memo.clear()
    assert not copied._forward_hooks


WITHOUT_US = """
import sys
sys.modules["torch_secorder"] = None  # importing it raises
import torch
model = torch.load(sys.argv[1], weights_only=False)
assert not any(name.startswith("torch_secorder.") for name in sys.modules)
print(model(torch.ones(5, 2)).sum().item())
"""


@pytest.mark.slow  # It starts processes.
@pytest.mark.parametrize("write", [torch.save, lambda model, path: path.write_bytes(pickle.dumps(model))])
def test_a_pickle_that_was_made_inside_of_a_block_is_loaded_without_this_package(write: Any, tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), tmp_path / "model.pt"
    expected = model(torch.ones(5, 2)).sum().item()
    with FisherMonitor(model):
        write(model, path)
    assert b"torch_secorder" not in path.read_bytes()
    code = (
        WITHOUT_US
        if write is torch.save
        else WITHOUT_US.replace(
            "torch.load(sys.argv[1], weights_only=False)", "__import__('pickle').load(open(sys.argv[1], 'rb'))"
        )
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected)
