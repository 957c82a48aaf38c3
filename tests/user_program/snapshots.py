"""Values as they were when they were looked at, and where two of them differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Bits:
    """A tensor to the last bit, and everything else about it that its author can ask for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | str
    requires_grad: bool
    numbers: bytes

    @property
    def tensor(self) -> Tensor:
        if not self.numbers:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.numbers), dtype=self.dtype).view(self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}, strides {self.stride}, requires_grad={self.requires_grad}"


@torch.no_grad()
def snapshot(value: Any) -> Any:
    """`value` with each tensor replaced by its bits; what a later write to the tensor changes is not changed in it."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, (tuple, list)):
        return tuple(snapshot(part) for part in value)
    return {key: snapshot(part) for key, part in value.items()} if isinstance(value, Mapping) else value


def of_tensor(tensor: Tensor) -> Any:
    transforms = torch._C._functorch
    if transforms.is_functorch_wrapped_tensor(tensor) or transforms.is_legacy_batchedtensor(
        tensor
    ):  # no numbers of its own
        return f"a tensor inside of a transform, of shape {tuple(tensor.shape)}"
    if tensor.layout != torch.strided:
        about = f"{tensor.layout} {tuple(tensor.shape)}, requires_grad={tensor.requires_grad}"
        return about, of_tensor(tensor.detach()._indices()), of_tensor(tensor.detach()._values())
    numbers = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return Bits(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.requires_grad, numbers)


def difference(actual: Any, expected: Any) -> str:
    """In words how `actual` differs from `expected`, both snapshots; "" where they are equal."""
    if type(actual) is type(expected) and actual == expected:
        return ""
    if isinstance(actual, Bits) and isinstance(expected, Bits):
        return of_bits(actual, expected)
    if isinstance(actual, tuple) and isinstance(expected, tuple):
        return of_tuples(actual, expected)
    return f"{shown(actual)} for {shown(expected)}"


def of_tuples(actual: tuple[Any, ...], expected: tuple[Any, ...]) -> str:
    if len(actual) == len(expected):
        pairs = enumerate(zip(actual, expected, strict=True))
        return "; ".join(f"[{i}] {words}" for i, (a, b) in pairs if (words := difference(a, b)))
    more, fewer = (
        [part for part in one if part not in other] for one, other in ((actual, expected), (expected, actual))
    )
    return " and ".join(
        f"{word} {shown(part)}" for word, parts in (("with", more), ("without", fewer)) for part in parts
    )


def of_bits(actual: Bits, expected: Bits) -> str:
    if str(actual) != str(expected):
        return f"{actual} for {expected}"
    a, b = (bits.tensor.to(torch.complex128 if bits.dtype.is_complex else torch.float64) for bits in (actual, expected))
    bytes_a, bytes_b = (np.frombuffer(bits.numbers, np.uint8).reshape(a.numel(), -1) for bits in (actual, expected))
    count = int((bytes_a != bytes_b).any(1).sum())
    return f"{shown(actual)} for {shown(expected)}, of which {count} numbers differ by up to {(a - b).abs().max():.3g}"


def shown(value: Any) -> str:
    if isinstance(value, Bits):
        first = value.tensor.flatten()[:3].tolist()
        return f"[{', '.join(f'{number:.6g}' for number in first)}{', ...' if value.tensor.numel() > 3 else ''}]"
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
