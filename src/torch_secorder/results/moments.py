"""The mean and second moments of per-sample squared norms, and sums of the batch gradients' squared norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class SampleMoments:
    """Mean and centered second moments of the per-sample squared norms t_{n,p}.

    They are updated and merged by the pairwise formulas of Chan, Golub and LeVeque (1979), "Updating formulae and a
    pairwise algorithm for computing sample variances", which lose no digits.

    Attributes:
        n: the number of samples.
        mean: ``[p]``.
        moments: ``sum_n (t_n - mean)(t_n - mean)^T``, ``[p, p]``.
    """

    def __init__(self, p: int):
        self.n, self.mean = 0, torch.zeros(p, dtype=torch.float64, device="cpu")
        self.moments = torch.zeros(p, p, dtype=torch.float64, device="cpu")

    def add(self, t: Tensor) -> None:
        """Add samples, ``[p, n]`` in float64."""
        if not t.shape[1]:
            return
        mean, n = t.mean(1), self.n + t.shape[1]
        shift = mean - self.mean
        weight = math.sqrt(self.n * t.shape[1] / n)
        # One product adds the samples and the shift of the mean: for many parameters the moments are large.
        factors = torch.cat([t - mean[:, None], weight * shift[:, None]], 1)
        self.moments = torch.addmm(self.moments, factors, factors.T)
        self.mean, self.n = self.mean + shift * (t.shape[1] / n), n

    def merge(self, other: SampleMoments) -> None:
        """Add the samples of another object, which stays as it is."""
        if not other.n:
            return
        n, shift = self.n + other.n, other.mean - self.mean
        self.moments = torch.addr(self.moments + other.moments, shift, shift, alpha=self.n * other.n / n)
        self.mean, self.n = self.mean + shift * (other.n / n), n

    def variance_of_sum(self, positions: Sequence[int]) -> float:
        """Variance (ddof = 1) over samples of the sum of these parameters' squared norms; NaN for one sample."""
        if self.n < 2:
            return float("nan")
        if len(positions) == 1:  # A table asks this for each parameter.
            return max(0.0, float(self.moments[positions[0], positions[0]]) / (self.n - 1))
        index = torch.tensor(list(positions), device="cpu")
        return max(0.0, float(self.moments[index][:, index].sum()) / (self.n - 1))

    def state(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        return {"n": self.n, "mean": self.mean.clone(), "moments": self.moments.clone()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state` gave."""
        self.n, self.mean, self.moments = int(state["n"]), state["mean"].clone(), state["moments"].clone()


class BatchGradients:
    """Sums over backward passes of ``||grad_p L_b||^2``.

    Attributes:
        passes: how many passes computed parameter gradients that are finite.
        inverse_batch_sizes: the sum over those passes of 1 / N_b.
        sums: ``[p]``, the sums of the squared norms.
        counts: ``[p]``, in how many passes each parameter had a gradient.
    """

    def __init__(self, p: int):
        self.passes, self.inverse_batch_sizes = 0, 0.0
        self.sums, self.counts = (
            torch.zeros(p, dtype=torch.float64, device="cpu"),
            torch.zeros(p, dtype=torch.int64, device="cpu"),
        )

    def add(self, positions: Sequence[int], squared_norms: Tensor, n: int) -> None:
        """Add a pass of a batch of n samples: ``||grad_p L_b||^2`` of the parameters at these positions, in float64."""
        if not len(positions):
            return
        # A sum of squares is finite only if each of them is; it may be too large for its dtype without that.
        if not math.isfinite(squared_norms.sum()) and not bool(squared_norms.isfinite().all()):
            return
        index = torch.tensor(positions, device="cpu")
        self.sums = self.sums.index_add(0, index, squared_norms)
        self.counts = self.counts.index_add(0, index, torch.ones_like(index))
        self.passes += 1
        self.inverse_batch_sizes += 1 / n

    def merge(self, other: BatchGradients) -> None:
        """Add the passes of another object, which stays as it is."""
        self.passes += other.passes
        self.inverse_batch_sizes += other.inverse_batch_sizes
        self.sums, self.counts = self.sums + other.sums, self.counts + other.counts

    def mean_of(self, positions: Sequence[int]) -> float:
        """Mean over passes of some parameters' squared gradient norm; NaN if no gradient of them was computed."""
        index = list(positions)
        if not self.passes or not bool((self.counts[index] > 0).any()):
            return math.nan
        return float(self.sums[index].sum()) / self.passes

    def state(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        return {
            "gradient_passes": self.passes,
            "inverse_batch_sizes": self.inverse_batch_sizes,
            "gradient_sums": self.sums.clone(),
            "gradient_counts": self.counts.clone(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Replace everything by what :meth:`state` gave."""
        self.passes, self.inverse_batch_sizes = int(state["gradient_passes"]), float(state["inverse_batch_sizes"])
        self.sums, self.counts = state["gradient_sums"].clone(), state["gradient_counts"].clone()
