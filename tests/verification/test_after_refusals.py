"""A call that was refused shows nothing of the next one, which is checked as the first is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems._base import Forward, randomized
from torch_secorder import empirical_fisher_trace
from torch_secorder.errors import VerificationError


def mixing(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    return m.last((h - h.mean(0)).tanh())


def test_every_call_of_a_model_that_mixes_samples_is_refused() -> None:
    model = randomized(Forward(mixing, first=nn.Linear(4, 3), last=nn.Linear(3, 2))).double()
    for _ in range(10):
        with pytest.raises(VerificationError):
            empirical_fisher_trace(model, lambda o, y: o.square().sum(), torch.randn(5, 4).double(), None)
