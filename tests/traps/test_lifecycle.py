"""Trap 14: exceptions, copies and several monitors; trap 15, training as without them, is in tests/user_program."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from model_state import assert_same_gradients, gradients, hooks
from oracles import assert_equal, per_sample_squared_norms, total, trace
from torch_secorder import FisherMonitor
from traps.exactness import Square, drawn, numbers


def test_trap_14_two_monitors_and_copies_of_a_model_that_needs_the_graph() -> None:
    model = Square(4)
    model, x, y = drawn(model, 4, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model, per_sample=True) as one:
        with FisherMonitor(model, reduction="sum", diagonal=True) as two:
            numbers(model(x), y).backward()
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved_and_loaded(model)]
        for twin in twins:
            numbers(twin(x), y).backward()
        numbers(model(x), y).backward()
    for twin in twins:
        assert_same_gradients(gradients(twin), gradients(twins[0]))
    for name, t in expected.items():
        mine = torch.tensor(one.per_sample[name].to_numpy())
        assert_equal(mine, t.repeat(2), one.trace * 8)
        summed = t.sum() / 16  # that loss was a mean
        assert_equal(torch.tensor(two.report().loc[name, "fisher_trace"]), summed, two.trace, torch.float64)
        assert_equal(two.diagonal[name].sum(), summed, two.trace)
    assert not any(hooks(model).values())


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_trap_14_an_exception_in_the_middle_of_a_model_that_needs_the_graph() -> None:
    model, x, y = drawn(Square(4), 4, 4)
    expected = per_sample_squared_norms(model, numbers, x, y)
    with FisherMonitor(model) as monitor:
        handle = model.conv.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
        model(x)
        numbers(model(x), y).backward()
    assert_equal(monitor.trace, total(trace(expected)), monitor.trace)
    assert not any(hooks(model).values())
