"""The cells of LSTM and GRU, which torch wants in one kernel on any device but the CPU, as the CPU computes them."""

from __future__ import annotations

import torch
from torch import Tensor

KEY = "AutogradPrivateUse1"
Cell = tuple[Tensor, ...]


def register_cells() -> torch.library.Library:
    """Teach the device the cells, made of operations that it has; what is returned has to be kept."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_thnn_fused_lstm_cell", _lstm, KEY)
    library.impl("_thnn_fused_gru_cell", _gru, KEY)
    return library


def _lstm(a: Tensor, b: Tensor, state: Tensor, bias_a: Tensor | None = None, bias_b: Tensor | None = None) -> Cell:
    take, keep, new, show = (_plus(a, bias_a) + _plus(b, bias_b)).chunk(4, 1)
    after = keep.sigmoid() * state + take.sigmoid() * new.tanh()
    return show.sigmoid() * after.tanh(), after, a.new_empty(0)


def _gru(a: Tensor, b: Tensor, state: Tensor, bias_a: Tensor | None = None, bias_b: Tensor | None = None) -> Cell:
    (reset_a, keep_a, new_a), (reset_b, keep_b, new_b) = _plus(a, bias_a).chunk(3, 1), _plus(b, bias_b).chunk(3, 1)
    new = (new_a + (reset_a + reset_b).sigmoid() * new_b).tanh()
    return (state - new) * (keep_a + keep_b).sigmoid() + new, a.new_empty(0)


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias
