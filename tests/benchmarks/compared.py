"""Where other packages are exact, silently wrong, or refuse: small models in float64 against a loop over single samples.

Prints the table; with `--save` it also writes docs/concepts/compared_cases.csv, which docs/concepts/compared.rst shows.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.variants import TOTAL, VARIANTS, loop

N, C = 6, 3
NEAR = 1e-6  # relative; what is exact in float64 is nearer by far
WAYS = {
    "report": "torch-secorder",
    "batch_l2": "BackPACK BatchL2Grad",
    "opacus": "Opacus hooks",
    "ghost": "Opacus ghost norms",
    "vmap": "torch.func.vmap(grad)",
}
PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "compared_cases.csv"
Case = tuple[nn.Module, Tensor, nn.Module]


class Flat(nn.Module):
    """A classifier on what a body returns, averaged over everything but samples and features."""

    def __init__(self, body: nn.Module, features: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(features, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head(y.flatten(2).mean(2) if y.dim() > 2 else y)


class Positions(nn.Module):
    """Words and their positions, which are looked up without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return (self.words(ids) + self.positions(torch.arange(ids.shape[1]))).transpose(1, 2)


class Tied(nn.Module):
    """A language model whose head is its embedding; the last position is read."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(C, 4), nn.Linear(4, C, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1).tanh())


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Attention(nn.Module):
    """Self-attention, with features in front of positions in what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].transpose(1, 2)


class FeaturesFirst(nn.Module):
    """Sequences with features in front of positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Last(nn.Module):
    """The last step of a recurrent layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 4, layers, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0][:, -1]


def images(body: nn.Module, features: int) -> Case:
    return Flat(body, features), torch.randn(N, 4, 6, 6), nn.CrossEntropyLoss()


def vectors(body: nn.Module) -> Case:
    return Flat(body, 4), torch.randn(N, 4), nn.CrossEntropyLoss()


def sequences(body: nn.Module) -> Case:
    return Flat(body, 4), torch.randn(N, 5, 4), nn.CrossEntropyLoss()


CASES: dict[str, Callable[[], Case]] = {
    "linear layers": lambda: vectors(nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
    "convolution": lambda: images(nn.Conv2d(4, 4, 3), 4),
    "grouped convolution": lambda: images(nn.Conv2d(4, 4, 3, groups=2), 4),
    'convolution with ``padding_mode="circular"``': lambda: images(
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), 4
    ),
    "``ReLU(inplace=True)`` after a layer": lambda: images(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)), 4),
    "``GroupNorm``": lambda: images(nn.GroupNorm(2, 4), 4),
    "``LayerNorm`` on sequences": lambda: sequences(nn.Sequential(nn.LayerNorm(4), FeaturesFirst())),
    "position embeddings": lambda: (Flat(Positions(), 4), torch.randint(7, (N, 5)), nn.CrossEntropyLoss()),
    "an embedding with ``padding_idx``": lambda: (
        *(Flat(nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 4)), 4),),
        *(torch.randint(3, (N, 5)), nn.CrossEntropyLoss()),
    ),
    "tied weights": lambda: (Tied(), torch.randint(C, (N, 4)), nn.CrossEntropyLoss()),
    "a layer called twice": lambda: vectors(Twice()),
    "``MultiheadAttention``": lambda: sequences(Attention()),
    "``LSTM`` of two layers": lambda: sequences(Last(2)),
    "a parameter outside of layers": lambda: vectors(Scaled()),
    "the model in ``eval`` mode": lambda: (
        *(Flat(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), 4).eval(), torch.randn(N, 4), nn.CrossEntropyLoss()),
    ),
}


def setting(case: str) -> tuple[nn.Module, Tensor, nn.Module, Tensor]:
    """The model, a batch and a loss of a case, the same at every call."""
    torch.manual_seed(0)
    model, inputs, loss_fn = CASES[case]()
    targets = torch.randint(C, (N,))
    return model.double(), inputs.double() if inputs.is_floating_point() else inputs, loss_fn, targets


def traces(case: str, way: str) -> dict[str, float]:
    """What a package says of a case, by parameter or under `TOTAL`."""
    model, inputs, loss_fn, targets = setting(case)
    variant = VARIANTS[way]
    return variant.read(variant.prepare(model, loss_fn)(inputs, targets))


def outcome(case: str, way: str) -> str:
    """ "exact", what it is times the right value, or "refused"."""
    model, inputs, loss_fn, targets = setting(case)
    right = {name: float(value) for name, value in loop(model, loss_fn)(inputs, targets).items()}
    try:
        found = traces(case, way)
    except Exception:
        return "refused"
    if not found:
        return "refused"
    pairs = [(sum(found.values()), sum(right.values()))]
    pairs += [] if TOTAL in found else [(found.get(name, 0.0), value) for name, value in right.items()]
    whole, least = sum(right.values()), NEAR * sum(right.values())
    if all(abs(theirs - value) <= NEAR * value + least for theirs, value in pairs):
        return "exact"
    ratio = sum(found.values()) / whole
    return f"{ratio:.2f} times" if abs(ratio - 1) >= 0.005 else "wrong in a parameter"


def table() -> Iterator[list[str]]:
    yield ["case", *WAYS.values()]
    for case in CASES:
        yield [case, *(outcome(case, way) for way in WAYS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--save", action="store_true", help="write the table of the docs")
    save: Any = parser.parse_args().save
    warnings.simplefilter("ignore")
    rows = list(table())
    for row in rows:
        print(f"{row[0]:44}" + "".join(cell.rjust(24) for cell in row[1:]))
    if save:
        with PAGE.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
