"""Data that each sample of the outputs takes all of: the samples, if nothing else tells these apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_secorder.batch_axis.labels import SEVERAL, Labels
from torch_secorder.batch_axis.same_rows import first_of_same_rows

N = 4

Operands = list[tuple[Tensor, Labels]]

X = torch.randn(N, 3)
ON_FIRST, ON_SECOND, SHARED = np.arange(N).reshape(N, 1, 1), np.arange(N).reshape(1, N, 1), np.full((1, 1), SEVERAL)


def of(sample: int) -> Labels:
    return np.full((N, 1), sample)


CASES: dict[str, tuple[Callable[[], Operands], int | None]] = {
    "the same for each index": (lambda: [(X.expand(N, -1, -1), ON_FIRST)], 0),
    "copied for each index": (lambda: [(X.repeat(N, 1, 1), ON_FIRST)], 0),
    "along another axis": (lambda: [(X[:, None].repeat(1, N, 1), ON_SECOND)], 0),
    "one tensor for each index": (lambda: [(X, of(i)) for i in range(N)], 0),
    "equal tensors": (lambda: [(X.clone(), of(i)) for i in range(N)], 0),
    "two for each index": (lambda: [(x, of(i)) for i in range(N) for x in (2 * X, X)], 0),
    "behind a number": (lambda: [(torch.tensor(0.9), np.full((), 1)), (X.expand(N, -1, -1), ON_FIRST)], 1),
    "integers": (lambda: [(torch.arange(N)[:, None].repeat(N, 1, 1), ON_FIRST)], 0),
    "others for each index": (lambda: [(X + i, of(i)) for i in range(N)], None),
    "many of one shape": (lambda: [(X + k, of(i)) for i in range(N) for k in range(5)], None),
    "taken by what may be several samples": (lambda: [(X.expand(N, -1, -1), ON_FIRST), (X, SHARED)], None),
    "of some indices": (lambda: [(X, of(i)) for i in range(N - 1)], None),
    "one that tells": (lambda: [(X.expand(N, -1, -1), ON_FIRST), (torch.randn(N, N, 3), ON_FIRST)], None),
    "in another order": (lambda: [(X.expand(N, -1, -1), ON_FIRST[::-1])], None),
    "equal rows": (lambda: [(torch.ones(N, N, 3), ON_FIRST)], None),
    "of other sizes": (lambda: [(torch.randn(N + 1, 3).expand(N, -1, -1), ON_FIRST)], None),
    "from parameters": (lambda: [(X.clone().requires_grad_().expand(N, -1, -1), ON_FIRST)], None),
    "not a number": (lambda: [(torch.full((N, N, 3), torch.nan), ON_FIRST)], None),
    "nothing": (list, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_rows(name: str) -> None:
    operands, expected = CASES[name]
    assert first_of_same_rows(operands(), N) == expected
