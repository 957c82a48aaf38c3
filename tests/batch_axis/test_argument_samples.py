"""Where something that was made of one of the model's arguments has the argument's samples: by memory, and by numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_secorder.batch_axis.argument_samples import ArgumentSamples, labels_in

N, T, D = 5, 4, 3

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "expanded": lambda x: x.expand(N, -1, -1, -1),
    "a step": lambda x: x[:, 2],
    "some steps and features": lambda x: x[:, 1:3, ::2],
    "a few samples": lambda x: x[1:4],
    "one sample": lambda x: x[3],
    "rows": lambda x: x.reshape(-1, D),
    "transposed rows": lambda x: x.reshape(-1, D).T,
    "all in one row": lambda x: x.reshape(-1),
    "steps first": lambda x: x.transpose(0, 1),
    "windows": lambda x: x.unfold(1, 2, 1),
}

COPIES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "repeated": (lambda x: x.repeat(T, 1, 1), 1),
    "stacked": (lambda x: torch.stack([x] * N), 1),
    "turned": (lambda x: x.transpose(0, 2).contiguous(), 1),
    "single precision": (lambda x: x.float(), 1),
    "half precision": (lambda x: x.bfloat16().expand(N, -1, -1, -1), 1),
    "scaled and shifted": (lambda x: (2 * x - 1).flatten(1), 1),
    "repeated each": (lambda x: x.repeat_interleave(T, 0), 1),
    "a step": (lambda x: x[:, 2].contiguous(), 1),
    "a step of single precision, repeated": (lambda x: x[:, 1].float().repeat(T, 1, 1), 1),
    "squared": (lambda x: x.square(), 0),
    "in another order": (lambda x: x[[1, 0, 2, 3, 4]], 0),
    "random": (torch.randn_like, 0),
    "some steps": (lambda x: x[:, :2].contiguous(), 0),
    "empty": (lambda x: x[:0].clone(), 0),
    "a mask": (lambda x: x > 0, 0),
    "complex": (lambda x: x.to(torch.complex128), 0),
}


def arguments() -> dict[str, tuple[Tensor, Tensor]]:
    """Arguments of some layouts, each with the sample of each entry."""
    samples = torch.arange(N)[:, None, None].expand(N, T, D)
    x = torch.randn(N, T, D).double()
    return {
        "contiguous": (x, samples),
        "a part of a larger tensor": (torch.randn(N, T + 2, D).double()[:, 1:-1], samples),
        "of a larger batch": (torch.randn(N + 3, T, D).double()[2:-1], samples),
        "steps first in memory": (x.transpose(0, 1).contiguous().transpose(0, 1), samples),
    }


@pytest.mark.parametrize("layout", arguments())
@pytest.mark.parametrize("way", VIEWS)
def test_views_tell_by_their_places_in_memory(way: str, layout: str) -> None:
    x, samples = arguments()[layout]
    view = VIEWS[way](x)
    labels = ArgumentSamples(x, 0).labels_by_memory(view)
    if view.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
        assert labels is None  # In this layout it takes a copy.
        return
    assert labels is not None
    np.testing.assert_array_equal(np.broadcast_to(labels, tuple(view.shape)), VIEWS[way](samples).numpy())


def test_an_argument_on_another_axis() -> None:
    x = torch.randn(T, N, D).double()
    labels = ArgumentSamples(x, 1).labels_by_memory(x.reshape(-1, D))
    assert labels is not None
    np.testing.assert_array_equal(labels[:, 0], np.tile(np.arange(N), T))


@pytest.mark.parametrize("start", [0, 2, 7])
def test_other_rows_of_the_data_that_a_batch_is_a_part_of_are_not_its_samples(start: int) -> None:
    data = torch.randn(3 * N, D).double()
    batch = ArgumentSamples(data[N : 2 * N], 0)
    assert batch.labels_by_memory(data[start : start + N]) is None
    assert labels_in([data[start : start + N]], [batch], N) == [[]]


def test_an_expanded_argument_tells_nothing_by_memory() -> None:
    x = torch.randn(1, D).expand(N, -1)
    assert ArgumentSamples(x, 0).labels_by_memory(x) is None
    assert labels_in([x], [ArgumentSamples(x, 0)], N) == [[]]


@pytest.mark.parametrize("way", COPIES)
def test_copies_tell_by_their_numbers(way: str) -> None:
    x = torch.randn(N, T, D).double()
    samples = torch.arange(N)[:, None, None].expand(N, T, D).double()
    copied, count = COPIES[way]
    copy = copied(x)
    ((*labels,),) = labels_in([copy], [ArgumentSamples(x, 0)], N)
    assert len(labels) == count
    for one in labels:
        expected = (copied(samples).double() + 1) / 2 if way == "scaled and shifted" else copied(samples)
        np.testing.assert_array_equal(np.broadcast_to(one, tuple(copy.shape)), expected.double().numpy())


@pytest.mark.parametrize(
    "lay", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.repeat(T, 1, 1), lambda x: x[:, 2]]
)
def test_copies_with_another_scale_of_each_feature_tell(lay: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(N, T, D).double()
    samples = torch.arange(N)[:, None, None].expand(N, T, D)
    ((labels,),) = labels_in([lay(x * torch.tensor([2.0, -1, 0.1]) - torch.arange(D))], [ArgumentSamples(x, 0)], N)
    np.testing.assert_array_equal(np.broadcast_to(labels, tuple(lay(x).shape)), lay(samples).numpy())


def test_samples_that_are_equal_tell_nothing_by_their_numbers() -> None:
    x = torch.randn(N, D).double()
    x[3] = x[1]
    assert labels_in([x.clone(), x], [ArgumentSamples(x, 0)], N)[0] == []


def test_features_with_numbers_that_are_not_finite_tell_nothing() -> None:
    x = torch.randn(N, D).double()
    x[1, 1], x[2, 2] = torch.nan, torch.inf
    ((labels,),) = labels_in([x.clone()], [ArgumentSamples(x, 0)], N)
    assert labels.ravel().tolist() == [*range(N)]
    x[3, 0] = torch.nan
    assert labels_in([x.clone()], [ArgumentSamples(x, 0)], N) == [[]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_tell_after_a_conversion(dtype: torch.dtype) -> None:
    x = torch.randint(200, (N, T, D), dtype=torch.int64).to(dtype)
    (found,) = labels_in([(x.float() / 255).repeat(2, 1, 1)], [ArgumentSamples(x, 0)], N)
    assert [one.reshape(-1).tolist() for one in found] == [[*range(N)] * 2]
