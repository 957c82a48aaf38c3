"""Sums over samples that merge exactly across batches, runs and machines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError
from torch_secorder.per_sample import SquareSum

VERSION = 1


class Statistics:
    """Mean and second moments of the per-sample squared norms t_{n,p}, and what else a report needs.

    Means and centred second moments are updated and merged by the pairwise formulas of Chan, Golub and LeVeque (1979),
    "Updating formulae and a pairwise algorithm for computing sample variances", which don't lose digits.

    Args:
        names: of the parameters.
        shapes: of the parameters.
        diagonal: whether the sum of squared gradients is kept entry by entry.
        per_sample: whether every t_{n,p} is kept.
        activations: whether module outputs are kept account of.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[tuple[int, ...]],
        *,
        diagonal: bool = False,
        per_sample: bool = False,
        activations: bool = False,
    ):
        self.names, self.shapes = list(names), [tuple(shape) for shape in shapes]
        self.keeps = {"diagonal": diagonal, "per_sample": per_sample, "activations": activations}
        self.clear()

    def clear(self, *, moments: bool = True) -> None:
        """Forget every sample, with the moments or without those."""
        p = len(self.names)
        self.n = 0
        self.n_skipped = 0
        self.mean = torch.zeros(p, dtype=torch.float64)
        if moments:
            self.moments = torch.zeros(p, p, dtype=torch.float64)  # sum_n (t_n - mean)(t_n - mean)^T
        self.reached = torch.zeros(p, dtype=torch.bool)
        self.rules: list[list[str]] = [[] for _ in range(p)]
        self.passes = 0
        self.gradient_passes = 0  # those whose parameter gradients were computed, and are finite
        self.inverse_batch_sizes = 0.0  # sum over those passes of 1 / N_b
        self.gradient_sums = torch.zeros(p, dtype=torch.float64)  # sum over passes of ||grad_p L_b||^2
        self.gradient_counts = torch.zeros(p, dtype=torch.int64)
        self.squares: list[Tensor] = []  # sum_n g_n ** 2, a tensor per parameter
        self.rows: list[Tensor] = []  # blocks of t, [n, p]
        # module -> its type, sum_n ||gradient in its output||^2, and number, sum, sum of squares, min, max of outputs
        self.outputs: dict[str, tuple[str, float, list[float]]] = {}

    def update(
        self,
        t: Tensor,
        squares: Mapping[int, Sequence[SquareSum]],
        rules: Mapping[int, Iterable[str]],
        reached: set[int],
        gradients: Mapping[int, float],
        skipped: int = 0,
        outputs: Mapping[str, tuple[str, float, list[float]]] | None = None,
    ) -> None:
        """Add one backward pass.

        Args:
            t: squared norms of the gradients of l_n, ``[p, n]``.
            squares: position -> sums of squared gradients, entry by entry.
            rules: position -> how its numbers were computed.
            reached: positions that the pass reached.
            gradients: position -> ||grad_p L_b||^2, for the parameters whose gradient was computed.
            skipped: samples that were left out.
            outputs: module -> its type, sum of squared gradients in its output, and the output's moments.
        """
        other = copy(self)
        other.clear(moments=False)
        t = t.detach().to("cpu", torch.float64)
        other.n, other.n_skipped, other.passes = t.shape[1], skipped, 1
        if other.n:
            other.mean = t.mean(1)
        other.reached[list(reached)] = True
        for position, found in rules.items():
            other.rules[position] = list(found)
        if gradients and all(map(math.isfinite, gradients.values())):
            other.gradient_passes, other.inverse_batch_sizes = 1, 1 / (other.n + skipped)
            other.gradient_sums[list(gradients)] = torch.tensor(list(gradients.values()), dtype=torch.float64)
            other.gradient_counts[list(gradients)] = 1
        if self.keeps["per_sample"]:
            other.rows = [t.T]
        other.outputs = dict(outputs or {})
        before = dict(vars(self))
        try:
            self._absorb(other, partial(self._with_samples, t - other.mean[:, None]))
            if self.keeps["diagonal"]:
                self._add_squares(squares)
        except BaseException:  # an interrupt in between: half of a batch is worse than none
            begun = self.squares is not before["squares"]
            vars(self).update(before)
            if begun:
                self.clear()  # what was added in place can't be taken back
            raise

    def _add_squares(self, squares: Mapping[int, Sequence[SquareSum]]) -> None:
        self.squares = list(self.squares) or [torch.zeros(()) for _ in self.names]
        for position, several in squares.items():
            for one in several:
                total = self.squares[position]
                # Else it stands for a parameter that no pass has reached, or is a single number.
                in_place = total.dim() > 0
                value = one.added(total if in_place else None)
                self.squares[position] = value if in_place or value.dim() else value + total.to(value.device)

    def merge(self, other: Statistics) -> None:
        """Add the samples of ``other``, which stays as it is."""
        self.check_same_kind(other)
        self._absorb(other, lambda shift, weight: torch.addr(self.moments + other.moments, shift, shift, alpha=weight))

    def _with_samples(self, deviations: Tensor, shift: Tensor, weight: float) -> Tensor:
        """The moments with those of some samples, ``[p, n]``, in one product: for many parameters they are large."""
        factors = torch.cat([deviations, math.sqrt(weight) * shift[:, None]], 1)
        return torch.addmm(self.moments, factors, factors.T)

    def _absorb(self, other: Statistics, moments: Callable[[Tensor, float], Tensor]) -> None:
        """Add the samples of ``other``; ``moments(shift, weight)`` are those of all, their means being ``shift`` apart."""
        n = self.n + other.n
        if other.n:
            shift = other.mean - self.mean
            self.moments = moments(shift, self.n * other.n / n)
            self.mean = self.mean + shift * (other.n / n)
        self.n = n
        self.n_skipped += other.n_skipped
        self.passes += other.passes
        self.gradient_passes += other.gradient_passes
        self.inverse_batch_sizes += other.inverse_batch_sizes
        self.reached = self.reached | other.reached
        self.rules = [
            a if a == b else list(dict.fromkeys([*a, *b])) for a, b in zip(self.rules, other.rules, strict=True)
        ]
        self.gradient_sums = self.gradient_sums + other.gradient_sums
        self.gradient_counts = self.gradient_counts + other.gradient_counts
        if other.squares:
            mine = self.squares or [torch.zeros(())] * len(self.names)
            self.squares = [
                b.to(a.device) + a if a.dim() else b + a.to(b.device) for a, b in zip(mine, other.squares, strict=True)
            ]
        self.rows = [*self.rows, *other.rows]
        outputs = dict(self.outputs)
        for name, (kind, squares, theirs) in other.outputs.items():
            _, before, seen = outputs.get(name, (kind, 0.0, [0.0, 0.0, 0.0, math.inf, -math.inf]))
            sums = [a + b for a, b in zip(seen[:3], theirs[:3], strict=True)]
            outputs[name] = (kind, before + squares, [*sums, min(seen[3], theirs[3]), max(seen[4], theirs[4])])
        self.outputs = outputs

    def check_same_kind(self, other: Statistics) -> None:
        """Raise unless ``other`` counts the same things.

        Raises:
            ArgumentError: naming the first difference.
        """
        if self.names != other.names:
            only = sorted(set(self.names) ^ set(other.names)) or ["the order of the parameters"]
            raise ArgumentError(f"these statistics are of different parameters; the first difference is {only[0]}")
        if self.shapes != other.shapes:
            for name, mine, theirs in zip(self.names, self.shapes, other.shapes, strict=True):
                if mine == theirs:
                    continue
                raise ArgumentError(f"{name} has shape {mine} here and {theirs} in the other statistics")
        if self.keeps != other.keeps:
            raise ArgumentError(f"these statistics are of different kinds: {self.keeps} here, {other.keeps} there")

    def variance_of_sum(self, positions: Sequence[int]) -> float:
        """Variance (ddof = 1) over samples of the sum of these parameters' squared norms; NaN for one sample."""
        if self.n < 2:
            return float("nan")
        index = torch.tensor(list(positions))
        return max(0.0, float(self.moments[index][:, index].sum()) / (self.n - 1))

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors, numbers, strings and lists of them."""
        return {
            "version": VERSION,
            "names": list(self.names),
            "shapes": [list(shape) for shape in self.shapes],
            "keeps": dict(self.keeps),
            "n": self.n,
            "n_skipped": self.n_skipped,
            "passes": self.passes,
            "gradient_passes": self.gradient_passes,
            "inverse_batch_sizes": self.inverse_batch_sizes,
            "rules": [list(rules) for rules in self.rules],
            **{name: getattr(self, name).clone() for name in _TENSORS},
            "squares": [value.clone() for value in self.squares],
            "rows": [value.clone() for value in self.rows],
            "outputs": dict(self.outputs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state_dict` gave.

        Raises:
            ArgumentError: if the state is of other parameters, of another kind or of another version.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing or state["version"] != VERSION:
            raise ArgumentError(f"not statistics of this version ({VERSION}): missing {missing or 'nothing'}")
        other = Statistics(state["names"], [tuple(shape) for shape in state["shapes"]], **state["keeps"])
        self.check_same_kind(other)
        self.n, self.n_skipped, self.passes = int(state["n"]), int(state["n_skipped"]), int(state["passes"])
        self.gradient_passes = int(state["gradient_passes"])
        self.inverse_batch_sizes = float(state["inverse_batch_sizes"])
        self.rules = [list(rules) for rules in state["rules"]]
        for name in _TENSORS:
            setattr(self, name, state[name].clone())
        self.squares = [value.clone() for value in state["squares"]]
        self.rows = [value.clone() for value in state["rows"]]
        self.outputs = dict(state["outputs"])


_TENSORS = ("mean", "moments", "reached", "gradient_sums", "gradient_counts")
