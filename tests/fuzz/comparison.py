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
    """A number is not what it should be, or the user's state was changed."""


def require_equal(what: str, got: Any, expected: Any, total: Any, dtype: str) -> None:
    """Raises unless |got - expected| <= rtol |expected| + atol * total everywhere."""
    rtol, atol = TOLERANCES[dtype]
    got, expected, total = (torch.as_tensor(value).detach().double() for value in (got, expected, total))
    if got.shape != expected.shape:
        raise Wrong(f"{what}: got shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    total = total if dtype == "float64" else total.max() + 1e-30
    if not bool(((got - expected).abs() <= rtol * expected.abs() + atol * total).all()):
        raise Wrong(f"{what}: got {_told(got)}, expected {_told(expected)}")


def _told(values: torch.Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.flatten()[:4].tolist()]
