"""Copies of the model that the program makes inside of the block, as for an average over steps or a checkpoint on disk."""

from __future__ import annotations

import copy
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn

from torch_secorder import FisherMonitor
from traps.exactness import numbers


def users_hook(module: nn.Module, args: object, output: object) -> None:
    """A hook of the user's."""


def tables(model: nn.Module) -> list[dict[str, int]]:
    return [{name: len(value) for name, value in vars(m).items() if "hooks" in name and value} for m in model.modules()]


@pytest.mark.parametrize("options", [{}, {"activations": True}, {"parameters": "all"}], ids=str)
def test_a_copy_is_the_users_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[1].register_forward_hook(users_hook)
    plain, x, y = copy.deepcopy(model), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    with FisherMonitor(model, **options) as monitor:
        copied, pickled = copy.deepcopy(model), pickle.dumps(model)
        for other in (copied, pickle.loads(pickled)):
            assert torch.equal(other(x), plain(x))
            numbers(other(x), y).backward()
        numbers(model(x), y).backward()
    assert tables(copied) == tables(plain)
    assert b"torch_secorder" not in pickled
    assert monitor.n_samples == 5


def test_a_model_goes_to_another_process_without_a_warning() -> None:
    """Torch warns of hooks on tensors that it leaves behind."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    with FisherMonitor(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        copied = pickle.loads(ForkingPickler.dumps(model))
    for own, other in zip(model.parameters(), copied.parameters(), strict=True):
        assert torch.equal(own, other)
