"""What random models are made of. These classes are copied into the programs that are printed of findings."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Part(nn.Module):
    """An operation: `function(self, h)`, with the modules and parameters that it owns as attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **owned: Any):
        super().__init__()
        self.function = function
        for name, value in owned.items():
            setattr(self, name, value)

    def forward(self, h: Tensor) -> Any:
        return self.function(self, h)


class Site:
    """Where a part is built: its own random numbers, the sizes of h `[n, places, width]`, and what earlier parts own."""

    def __init__(self, seed: str, width: int, places: int, earlier: Sequence[nn.Module] = ()):
        self.random, self.width, self.places = random.Random(seed), width, places
        self.earlier = [module for part in earlier for module in part.modules()]

    def choice(self, *options: Any) -> Any:
        return self.random.choice(options)

    def linear(self) -> nn.Linear:
        """A square layer, now and then one that an earlier part owns."""
        square = (self.width, self.width)
        found = [m for m in self.earlier if type(m) is nn.Linear and (m.in_features, m.out_features) == square]
        return self.choice(*found) if found and self.random.random() < 0.4 else nn.Linear(*square)

    def parameter(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape) / self.width**0.5)


class Model(nn.Module):
    """A stem, parts with or without a way around them, and a head; `sequence_first` models have samples on axis 1."""

    def __init__(
        self, stem: nn.Module, parts: Sequence[nn.Module], around: Sequence[bool], head: nn.Module, sequence_first: bool
    ):
        super().__init__()
        self.stem, self.parts, self.head = stem, nn.ModuleList(parts), head
        self.around, self.sequence_first = tuple(around), sequence_first

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x.transpose(0, 1) if self.sequence_first else x)
        for part, around in zip(self.parts, self.around, strict=True):
            h = h.tanh() + part(h) if around else part(h)
        out = self.head(h)
        return out.transpose(0, 1) if self.sequence_first else out
