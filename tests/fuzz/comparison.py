"""When two numbers are the same."""

from __future__ import annotations

from typing import Any

import torch

# In float64 chains of a few pieces amplify rounding tenfold each, above what DESIGN allows a single layer. In float32 and
# under autocast the yardstick is itself computed in that precision, and only errors of the method are looked for.
TOLERANCES = {"float64": (1e-7, 1e-18), "float32": (3e-3, 1e-7), "autocast": (8e-2, 3e-3)}
# Samples that influence each other by less than what the checks take for rounding are not told from separate ones.
TOLERANCES["weakly coupled"] = (1e-5, 1e-12)


class Wrong(AssertionError):
    """A number is not what it should be, or the user's state was changed.

    Args:
        text: what is wrong.
        off: the `difference` of the numbers, if there are any.
    """

    def __init__(self, text: str, off: float = float("inf")):
        super().__init__(text)
        self.off = off


class Inconsistent(Wrong):
    """A sample alone differs from its share of the batch, though no piece is said to mix samples: a fault of the fuzzer."""


def require_equal(what: str, got: Any, expected: Any, total: Any, dtype: str) -> None:
    """Raises unless |got - expected| <= rtol |expected| + atol * total everywhere."""
    got, expected, total = (torch.as_tensor(value).detach().double() for value in (got, expected, total))
    if got.shape != expected.shape:
        raise Wrong(f"{what}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not (off := difference(got, expected, total, dtype)) <= TOLERANCES[dtype][0]:
        raise Wrong(f"{what}: got {_told(got)}, expected {_told(expected)}", off)


def difference(got: torch.Tensor, expected: torch.Tensor, total: torch.Tensor, dtype: str) -> float:
    """The largest of |got - expected| / (|expected| + atol / rtol * total); NaN if one of the numbers is."""
    rtol, atol = TOLERANCES[dtype]
    total = total if dtype == "float64" else total.max() + 1e-30
    allowed = expected.abs() + atol / rtol * total
    apart = (got - expected).abs()
    return float(torch.where(apart == 0, apart, apart / allowed).max()) if apart.numel() else 0.0


def _told(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.flatten()[:4].tolist()]
