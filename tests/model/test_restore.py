"""Buffers get the values again that they had: small ones are kept and compared together, and none is written without need."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from torch_secorder.model.restore import FEW, restoring_buffers


class Buffers(nn.Module):
    """Several small buffers of two dtypes, one without an axis, one with NaN, an empty one, and a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.table = nn.Embedding(4, 2, max_norm=0.5)
        self.register_buffer("odd", torch.tensor([1.0, float("nan")]))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("matrix", torch.arange(6.0).view(2, 3))
        self.register_buffer("large", torch.ones(FEW + 1))
        self.register_buffer("nothing", None)


def in_place(model: Buffers) -> None:
    model.norm(torch.randn(5, 3))


def behind_the_versions(model: Buffers) -> None:
    model.matrix.data[1, 2] = -1.0


def replaced(model: Buffers) -> None:
    model.norm.running_mean = torch.full((3,), 7.0)


def a_large_one(model: Buffers) -> None:
    model.large[FEW] = 2.0


def a_table(model: Buffers) -> None:
    model.table(torch.tensor([0, 1]))


@pytest.mark.parametrize("change", [in_place, behind_the_versions, replaced, a_large_one, a_table])
def test_what_a_block_changes_is_put_back(change: Callable[[Buffers], None]) -> None:
    torch.manual_seed(0)
    model = Buffers()
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with restoring_buffers(model):
        change(model)
        now = {**dict(model.named_buffers()), **dict(model.named_parameters())}
        assert any(not torch.equal(now[name].nan_to_num(), values[name].nan_to_num()) for name in values)
    for name, now_there in {**dict(model.named_buffers()), **dict(model.named_parameters())}.items():
        assert now_there is tensors[name]
        torch.testing.assert_close(now_there.detach(), values[name], rtol=0, atol=0, equal_nan=True)


def test_a_buffer_that_was_not_changed_is_not_written() -> None:
    model = Buffers()
    versions = {name: b._version for name, b in model.named_buffers() if name != "odd"}  # NaN is equal to nothing
    with restoring_buffers(model):
        model.norm.running_var.mul_(2)
    after = {name: b._version for name, b in model.named_buffers() if name != "odd"}
    assert {name for name in versions if after[name] != versions[name]} == {"norm.running_var"}


def test_modules_that_the_caller_lists_are_those_that_are_looked_at() -> None:
    model = Buffers()
    with restoring_buffers(model, [("norm", model.norm)]):
        model.norm.running_var.mul_(2)
        model.matrix.mul_(2)
    assert torch.equal(model.norm.running_var, torch.ones(3))
    assert torch.equal(model.matrix, 2 * torch.arange(6.0).view(2, 3))
