"""Sums over samples that merge exactly across batches, runs and machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from torch_secorder.autograd.double_precision import on_host
from torch_secorder.errors import ArgumentError
from torch_secorder.recording.quantities import QUANTITIES, Quantity, wanted
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.results.moments import BatchGradients, SampleMoments

# The version of the layout of states; a state of another version is refused. torch-secorder 0.1 writes version 1.
VERSION = 1

# Entries that early states of this version lack, and the values that stand in for them.
ADDED_LATER: dict[str, Any] = {"skipped_passes": 0, "origins": [], "ids": []}


class Statistics:
    """What is accumulated over samples: the moments of the squared gradient norms, and the quantities that are asked for.

    Args:
        names: the parameters' names.
        shapes: the parameters' shapes.
        keeps: name of a quantity -> whether it is kept, or which part of it is kept.

    Attributes:
        squared_norms: mean and second moments of t_{n,p}.
        gradients: the squared norms of the batch gradients.
        quantities: name -> quantity.
        passes: the number of backward passes.
        n_skipped: how many samples were left out because they were not finite.
        skipped_passes: how many backward passes were left out because they were refused.
        origins: for each accumulation whose samples are in here, a name that was drawn at random.
        reached: ``[p]``, which parameters a pass has reached.
        rules: for each parameter, how its numbers were computed.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]], **keeps: Any):
        self.names, self.shapes = list(names), [tuple(shape) for shape in shapes]
        assert keeps.keys() <= QUANTITIES.keys(), keeps
        self.keeps = {name: keeps.get(name, False) for name, kind in QUANTITIES.items() if kind.accumulates}
        self.clear()

    def clear(self) -> None:
        """Forget every sample."""
        p = len(self.names)
        self.squared_norms, self.gradients = SampleMoments(p), BatchGradients(p)
        self.quantities: dict[str, Quantity] = {
            name: QUANTITIES[name](self.names, self.shapes, how) for name, how in wanted(self.keeps).items()
        }
        self.passes = self.n_skipped = self.skipped_passes = 0
        self.origins: frozenset[str] = frozenset()
        self._origin: str | None = (
            None  # drawn with the first samples, so that processes which fork before them draw different names
        )
        self.reached = torch.zeros(p, dtype=torch.bool, device="cpu")
        self._noted: frozenset[int] = frozenset()  # positions that are known to be noted as reached
        self.rules: list[list[str]] = [[] for _ in range(p)]

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.squared_norms.n

    @property
    def mean(self) -> Tensor:
        """The mean of t_{n,p} over the samples, ``[p]``."""
        return self.squared_norms.mean

    def update(
        self,
        samples: SampleNorms,
        gradients: tuple[Sequence[int], Tensor] | None = None,
        scale: float = 1.0,
        loss_scale: float = 1.0,
    ) -> None:
        """Add one backward pass: all of it, or nothing if that is interrupted.

        Args:
            samples: the pass.
            gradients: the positions of the parameters whose gradient was computed, and the gradient's norm for each.
            scale: the factor from the pass's squares to those of gradients of l_n.
            loss_scale: the factor from the gradients of L_b to those whose norms are given.
        """
        parts = [self, *self._parts()]
        before = list(zip(parts, map(dict, map(vars, parts)), strict=True))
        try:
            self.passes, self.n_skipped = self.passes + 1, self.n_skipped + samples.skipped
            self._origin = self._origin or uuid4().hex
            self.origins |= {self._origin}
            self._note_rules(samples)
            t = on_host(samples.squared_norms) * scale
            positions, norms = ([], t.new_zeros(0)) if gradients is None else gradients
            squares = (on_host(norms) / loss_scale).square()
            self.squared_norms.add(t)
            self.gradients.add(positions, squares, samples.batch)
            for name, quantity in self.quantities.items():
                quantity.add(samples.parts.get(name), t, scale)
        except BaseException:  # an interrupt in between: half of a batch is worse than none
            torn = any(quantity.torn for quantity in self.quantities.values())
            for part, attributes in before:
                vars(part).update(attributes)
            if torn:
                self.clear()  # what was added in place cannot be taken back
            raise

    def _parts(self) -> list[Any]:
        return [self.squared_norms, self.gradients, *self.quantities.values()]

    def _note_rules(self, samples: SampleNorms) -> None:
        """Note which parameters were reached, and how; both lists are replaced, so that an interrupt leaves the old ones."""
        reached, rules = self.reached, self.rules
        if not samples.reached <= self._noted:
            reached = reached.index_fill(0, torch.tensor(list(samples.reached), device="cpu"), True)
            self._noted |= samples.reached
        for position, found in samples.rules.items():
            if rules[position] != list(found):
                rules = [*rules[:position], list(dict.fromkeys([*rules[position], *found])), *rules[position + 1 :]]
        self.reached, self.rules = reached, rules

    def merge(self, other: Statistics) -> None:
        """Add the samples of ``other``, which stays as it is.

        Raises:
            ArgumentError: if it has other parameters or is of another kind, or if some of its samples are counted here already.
        """
        self.check_same_kind(other)
        self.require_none_of(other)
        self.origins |= other.origins
        self.squared_norms.merge(other.squared_norms)
        self.gradients.merge(other.gradients)
        self.passes, self.n_skipped = self.passes + other.passes, self.n_skipped + other.n_skipped
        self.skipped_passes += other.skipped_passes
        self.reached = self.reached | other.reached
        self.rules = [list(dict.fromkeys([*a, *b])) for a, b in zip(self.rules, other.rules, strict=True)]
        for name, quantity in self.quantities.items():
            quantity.merge(other.quantities[name])

    def require_none_of(self, other: Statistics) -> None:
        """Raise if samples of ``other`` are counted here already.

        Raises:
            ArgumentError: if so.
        """
        if not self.origins.isdisjoint(other.origins):
            raise ArgumentError(
                "these statistics have samples in common, which would be counted twice, as a monitor and what was saved of it "
                "have: merge the last state of each run, once"
            )

    def check_same_kind(self, other: Statistics) -> None:
        """Raise unless ``other`` counts the same things.

        Raises:
            ArgumentError: naming the first difference.
        """
        if self.names != other.names:
            only = sorted(set(self.names) ^ set(other.names)) or ["the order of the parameters"]
            raise ArgumentError(f"these statistics are of different parameters; the first difference is {only[0]}")
        for name, mine, theirs in zip(self.names, self.shapes, other.shapes, strict=True):
            if mine != theirs:
                raise ArgumentError(f"{name} has shape {mine} here and {theirs} in the other statistics")
        if self.keeps != other.keeps:
            raise ArgumentError(f"these statistics are of different kinds: {self.keeps} here, {other.keeps} there")

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers, strings, and lists and mappings of them."""
        state: dict[str, Any] = {
            "version": VERSION,
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "keeps": dict(self.keeps),
            "n_skipped": self.n_skipped,
            "skipped_passes": self.skipped_passes,
            "passes": self.passes,
            "origins": sorted(self.origins),
            "reached": self.reached.clone(),
            "rules": [list(rules) for rules in self.rules],
        }
        for part in self._parts():
            state |= part.state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state_dict` gave.

        Raises:
            ArgumentError: if the state is of other parameters, of another kind or of another version.
        """
        if (version := state.get("version")) != VERSION:
            raise ArgumentError(
                f"the state has version {version} of this library's files, and this release reads version {VERSION}: load it "
                "with the release that wrote it"
            )
        state = {**ADDED_LATER, **state}
        if missing := [key for key in self.state_dict() if key not in state]:
            raise ArgumentError(f"not a whole state of version {VERSION}: it lacks {', '.join(missing)}")
        other = Statistics(state["names"], [tuple(shape) for shape in state["shapes"]], **state["keeps"])
        self.check_same_kind(other)
        for part in other._parts():
            part.load(state)
        other.n_skipped, other.skipped_passes = int(state["n_skipped"]), int(state["skipped_passes"])
        other.passes, other.origins = int(state["passes"]), frozenset(state["origins"])
        other.reached, other.rules = state["reached"].clone(), [list(rules) for rules in state["rules"]]
        vars(self).update(vars(other))
