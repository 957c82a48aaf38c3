"""Indices that are out of range are found before they are used, as a CPU finds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_secorder.autograd.indices import checked_on_host

ON_ANOTHER_DEVICE = [torch.empty(0, device="meta")]
X = torch.arange(12.0).view(3, 4)
# Operations of an index with entries that are in range, and of one that is too large or too small.
OPERATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[int], int]] = {
    "x[i]": (lambda i: X[i], [-3, 2], 3),
    "x[:, i]": (lambda i: X[:, i], [3], -5),
    "x[mask, i]": (lambda i: X[None][torch.ones(1, 3, dtype=torch.bool), i], [3], 4),
    "x[i] = y": (lambda i: X.clone().index_put((i,), torch.tensor(1.0)), [2], 3),
    "gather": (lambda i: X.gather(1, i[:, None]), [0, 3], 4),
    "index_select": (lambda i: X.index_select(0, i), [2], 3),
    "index_add": (lambda i: X.index_add(0, i, torch.ones(len(i), 4)), [2], 3),
    "scatter": (lambda i: X.scatter(1, i[:, None], 1.0), [3], 4),
    "take": (lambda i: X.take(i), [-12, 11], 12),
    "embedding": (lambda i: F.embedding(i, X), [2], 3),
    "embedding_bag": (lambda i: F.embedding_bag(i[None], X), [2], 3),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_index_that_is_out_of_range_raises_on_the_host(name: str) -> None:
    operation, right, wrong = OPERATIONS[name]
    with checked_on_host(ON_ANOTHER_DEVICE):
        assert torch.equal(operation(torch.tensor(right)), operation(torch.tensor(right)))
        with pytest.raises(IndexError, match="is out of range for"):
            operation(torch.tensor([wrong]))


def test_a_scalar_and_an_empty_index_are_in_range() -> None:
    with checked_on_host(ON_ANOTHER_DEVICE):
        assert torch.tensor(2.0).gather(0, torch.tensor(0)) == 2
        assert X[torch.empty(0, dtype=torch.long)].shape == (0, 4)


def test_a_cpu_checks_its_indices_itself() -> None:
    with checked_on_host([X]), pytest.raises(IndexError, match="out of bounds"):
        X[torch.tensor([3])]
