"""A case: everything that is drawn from its seed, as plain values, so that it can be made smaller and printed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fuzz import losses, pieces, ways  # noqa: F401  # They enter what is drawn from.
from fuzz.model import Model, Site
from fuzz.registry import HEADS, LOSSES, PIECES, STEMS, WAYS

SUMS = ("sum_of_samples", "sum_of_places")


@dataclass(frozen=True)
class Step:
    """A piece of the model: which, with which random numbers, and whether there is a way around it."""

    piece: str
    number: int
    around: bool


@dataclass(frozen=True)
class Case:
    """What is run."""

    seed: int
    width: int
    places: int
    stem: str
    steps: tuple[Step, ...]
    head: str
    loss: str
    ways: tuple[str, ...]
    sizes: tuple[int, ...]  # samples of each batch
    data: str = "normal"  # or which part of the input is zero
    dtype: str = "float64"  # or "float32", "autocast"
    frozen: float = 0.0  # share of parameters
    updates: bool = False  # an optimizer's step after every pass of the loop
    evaluates: bool = False
    sequence_first: bool = False
    device: str = "cpu"  # where it runs, as the default device
    options: dict[str, Any] = field(default_factory=dict)  # of the monitor

    @property
    def coupled(self) -> bool:
        """Whether samples are mixed, so that a refusal is right."""
        return LOSSES[self.loss].coupled or any(PIECES[step.piece].coupled for step in self.steps)

    @property
    def reduction(self) -> str:
        return "sum" if self.loss in SUMS else "mean"

    def model(self) -> Model:
        """The same model each time that it is called."""

        def built(table: Any, name: str, number: object, earlier: Sequence[torch.nn.Module] = ()) -> torch.nn.Module:
            torch.manual_seed(_number(self.seed, number))
            return table[name].make(Site(f"{self.seed}/{number}", self.width, self.places, earlier))

        parts: list[torch.nn.Module] = []
        for step in self.steps:
            parts.append(built(PIECES, step.piece, step.number, parts))
        stem, head = built(STEMS, self.stem, "stem"), built(HEADS, self.head, "head")
        model = Model(stem, parts, [step.around for step in self.steps], head, self.sequence_first)
        model.to(torch.float64 if self.dtype == "float64" else torch.float32).train(not self.evaluates)
        r = random.Random(f"frozen {self.seed}")
        for name, p in model.named_parameters():
            if not name.startswith("head"):
                p.requires_grad_(r.random() >= self.frozen)
        return model

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs `[n, t, d]`, or `[t, n, d]` for a model that is sequence-first, and targets."""
        generator = torch.Generator().manual_seed(_number(self.seed, "data"))
        return [self._batch(n, generator) for n in self.sizes]

    def _batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, self.places, self.width, generator=generator, dtype=torch.float64)
        x = x if self.dtype == "float64" else x.float()
        shape = (n,) if LOSSES[self.loss].needs == "pooled" else (n, self.places)
        y = torch.randint(3, shape, generator=generator)
        if self.data == "sorted":
            x = x[x[:, 0, 0].argsort()]
        elif self.data == "first sample is padding":
            x[0] = 0
        elif self.data == "padding but for one token":
            x[:, 1:], x[1:] = 0, 0
        elif self.data == "padded at the end":
            x[:, -1:] = 0
        if y.dim() == 2 and self.data != "normal":
            y[:, -1] = -100
            if self.data == "first sample is padding" and n > 1:
                y[0] = -100
        return (x.transpose(0, 1) if self.sequence_first else x), y


def _number(*parts: object) -> int:
    return random.Random("/".join(map(str, parts))).randrange(2**31)


def drawn(seed: int, only: Sequence[str] = (), skip: Sequence[str] = ()) -> Case:
    """The case of a seed, with pieces of `only` if there are any, and no piece, stem or head of `skip`."""
    r = random.Random(f"case {seed}")
    plain = [k for k, entry in PIECES.items() if not entry.coupled and k not in skip and (not only or k in only)]
    mixing = [k for k, entry in PIECES.items() if entry.coupled and k not in skip and (not only or k in only)]
    width, places, n = r.choice([4, 4, 6]), r.randint(2, 6), r.randint(1, 6)
    chosen = [r.choice(plain or mixing) for _ in range(r.choice([1, 1, 2, 2, 3, 4]))]
    if mixing and r.random() < 0.1:
        chosen[r.randrange(len(chosen))] = r.choice(mixing)
    head = r.choice([k for k in HEADS if k not in skip])
    reads = ("pooled", "tokens") if HEADS[head].needs == "both" else (HEADS[head].needs,)
    wants_coupled = r.random() < 0.05
    fitting = [k for k, entry in LOSSES.items() if entry.needs in reads and entry.coupled <= wants_coupled]
    loss = r.choice(fitting)
    case = Case(
        *(seed, width, places, r.choice(["plain", *(k for k in STEMS if k not in skip)])),
        tuple(Step(piece, i, r.random() < 0.4) for i, piece in enumerate(chosen)),
        *(head, loss, _ways(r), _sizes(r, n, places, width)),
        data=r.choice(
            ["normal"] * 5 + ["sorted", "first sample is padding", "padding but for one token", "padded at the end"]
        ),
        dtype=r.choice(["float64"] * 7 + ["float32"] * 2 + ["autocast"]),
        frozen=r.choice([0.0, 0.0, 0.1, 0.5]),
        updates=r.random() < 0.4,
        evaluates=r.random() < 0.3,
        sequence_first=r.random() < 0.1 and HEADS[head].needs == "tokens",
        options={
            "diagonal": r.random() < 0.3,
            "per_sample": r.random() < 0.7,
            "activations": r.random() < 0.2,
            "parameters": r.choice(["trainable", "trainable", "all"]),
            "loss_scale": r.choice([1.0, 1.0, 0.5, 1024.0]),
            "max_memory": r.choice([None, None, 100, 3000]),
        },
    )
    return replace(case, sizes=case.sizes[:1], updates=False) if LOSSES[loss].coupled else case


def _ways(r: random.Random) -> tuple[str, ...]:
    return tuple(r.sample(list(WAYS), r.randint(1, 3)))


def _sizes(r: random.Random, n: int, places: int, width: int) -> tuple[int, ...]:
    """How many samples each batch has: often as many as another axis has, which must not be taken for the samples'."""
    usual = r.choice([n, n, places, width])
    return tuple(usual if r.random() < 0.7 else r.randint(1, 6) for _ in range(r.choice([1, 1, 2, 3])))
