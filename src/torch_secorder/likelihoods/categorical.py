"""The likelihood of classes, from logits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_secorder.errors import ArgumentError
from torch_secorder.likelihoods.output_gradients import LastLayer, Likelihood, random_signs


class Categorical(Likelihood):
    """Classes with logits on ``class_axis``, independent for each position on the other axes.

    Args:
        class_axis: the axis of the classes.
        counted: ``[n, *positions]``, False for positions whose target is ``ignore_index``; None if all positions count.
    """

    def __init__(self, class_axis: int = 1, counted: Tensor | None = None):
        self._axis, self._counted = class_axis, counted

    def exact_passes(self, outputs: Tensor) -> int:
        return self._positions(outputs) * (outputs.shape[self._axis] - 1)

    def exact_output_gradients(self, outputs: Tensor) -> Iterator[Tensor]:
        r"""Columns of the Cholesky factor of ``diag(p) - p p^T``, in closed form.

        With tails ``q_j = sum_{i >= j} p_i``, column j is ``sqrt(p_j q_{j+1} / q_j) (e_j - r_j)``, where
        ``r_j = p / q_{j+1}`` on the classes after j (Tanabe and Sagae, 1992, "An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the multinomial distribution"). The tails are sums of
        what remains, not ``1 - cumsum``, which has no digits left when one class is nearly certain.
        """
        p = self._probabilities(outputs)
        weights, tails = self._cholesky(p)
        for position in range(p.shape[1]):
            for j in range(p.shape[2] - 1):
                weight, after = weights[:, position, j], tails[:, position, j + 1]
                share = p[:, position, j + 1 :] / after[:, None]
                gradient = torch.zeros_like(p)
                gradient[:, position, j] = weight
                gradient[:, position, j + 1 :] = -weight[:, None] * share
                yield self._shaped(gradient, outputs)

    @staticmethod
    def _cholesky(p: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal of the factor, ``[n, positions, classes - 1]``, and the tails of all classes, none of them zero."""
        tails = p.flip(-1).cumsum(-1).flip(-1)
        known, here = tails.clamp(min=torch.finfo(p.dtype).tiny), tails[..., :-1]
        return torch.where(here > 0, p[..., :-1] * (tails[..., 1:] / known[..., :-1]), 0).sqrt(), known

    def exact_input_gradients(self, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
        """``sqrt(p_j q_{j+1} / q_j) (M_j - sum_{i > j} p_i M_i / q_{j+1})``, from the last class to the first."""
        p = self._probabilities(outputs)
        weights, tails = (x[:, 0] for x in self._cholesky(p))
        if self._counted is not None:
            weights = weights * self._counted.reshape(-1, 1)
        rows = last_layer.matrix.T.to(p.dtype)
        after = rows.new_zeros(len(p), rows.shape[1])  # the sum over later classes
        for j in reversed(range(p.shape[2] - 1)):
            after.addcmul_(p[:, 0, j + 1, None], rows[j + 1])
            weight = weights[:, j, None]
            yield (after * (-weight / tails[:, j + 1, None])).addcmul_(weight, rows[j])

    def of_samples(self, rows: slice) -> Categorical:
        return Categorical(self._axis, None if self._counted is None else self._counted[rows])

    def curvature_traces(self, outputs: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        most = p.argmax(-1, keepdim=True)
        # For a class that is nearly certain, 1 - p has no digits left, but the sum of the other probabilities has.
        rest = (1 - p).scatter(-1, most, p.scatter(-1, most, 0.0).sum(-1, keepdim=True))
        traces = (p * rest).sum(-1)
        return (traces if self._counted is None else traces * self._counted.reshape(traces.shape)).sum(1)

    def _sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None
    ) -> Iterator[Tensor]:
        r"""K labels for each position, drawn without replacement by importance, with random signs.

        Only a trace is needed, ``tr(J^T A J) = sum_c p_c q_c`` with ``q_c = ||J^T (e_c - p)||^2``, so a label may be drawn
        with any probability that is positive where ``p_c q_c`` is. Label c is among the k with probability ``pi_c``, as
        nearly proportional to the weights of :meth:`_weights` as ``pi_c <= 1`` allows, by systematic sampling: the labels at
        which ``u, u + 1, ..., u + k - 1`` fall into the cumulated ``pi``, u uniform in [0, 1). Its output gradient is
        ``sqrt(p_c / pi_c) (e_c - p)``, so that ``E[sum_s s s^T] = sum_c pi_c (p_c / pi_c) (e_c - p)(e_c - p)^T
        = diag(p) - p p^T``, whatever the weights are (Horvitz and Thompson, 1952); independent signs make the products
        between positions vanish in expectation.
        """
        p = self._probabilities(outputs)
        # The probabilities are constants even where the trace is differentiated: any pi > 0 is unbiased, so that the expected
        # gradient is the gradient of the expectation.
        pi = _inclusion(self._weights(p.detach(), last_layer), k)
        ends = pi.cumsum(-1)
        start = torch.rand((*p.shape[:2], 1), generator=generator, device=generator.device, dtype=p.dtype).to(p.device)
        for turn in range(k):
            label = torch.searchsorted(ends, start + turn, right=True)
            # A start behind the last end draws no label: fewer than k labels are possible, or rounding has shortened the sum.
            drawn = label < p.shape[-1]
            label = label.clamp(max=p.shape[-1] - 1)
            share = p.gather(-1, label) / pi.gather(-1, label).clamp(min=torch.finfo(p.dtype).tiny)
            size = torch.where(drawn, share, 0).sqrt() * random_signs((*p.shape[:2], 1), p, generator)
            yield self._shaped(size * (torch.zeros_like(p).scatter(-1, label, 1.0) - p), outputs)

    def _weights(self, p: Tensor, last_layer: LastLayer | None) -> Tensor:
        """Estimates of the labels' parts ``p_c q_c`` of a trace, up to a factor, ``[n, positions, classes]``, none below zero.

        There are two proxies for q_c. The last layer's own part is proportional to ``||e_c - p||^2``; the part of the layers
        before it is roughly proportional to :meth:`LastLayer.influence`. The ratio of the two parts is unknown, so each is
        normalized and they are added. An estimate's second moment is at most twice that with the better one alone.
        """
        eps = torch.finfo(p.dtype).eps
        rest = (1 - p).clamp(min=eps).square()
        # ||e_c - p||^2 lies between this and twice this, even if 1 - p has no digits left.
        parts = [rest + (p.square().sum(-1, keepdim=True) - p.square()).clamp(min=0).minimum(rest)]
        if last_layer is not None and p.shape == (len(last_layer.inputs), 1, last_layer.matrix.shape[1]):
            parts.append(last_layer.influence(p[:, 0])[:, None])
        weights = [p * part for part in parts]
        return sum(
            (w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny) for w in weights), torch.zeros_like(p)
        )

    def observed_output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        if targets.is_floating_point() or targets.is_complex():
            raise ArgumentError(f"targets must be class indices, integers, not {targets.dtype}")
        label = targets.long().reshape(*p.shape[:2], 1)
        if self._counted is not None:
            label = label.where(self._counted.reshape(label.shape), 0)
        if bool(((label < 0) | (label >= p.shape[-1])).any()):
            raise ArgumentError(
                f"targets from {int(label.min())} to {int(label.max())} for {p.shape[-1]} classes, 0 to {p.shape[-1] - 1}: pass "
                "ignore_index= if one of them means that there is none"
            )
        hot = torch.zeros_like(p).scatter(-1, label, 1.0)
        return self._shaped(p - hot, outputs)

    def _positions(self, outputs: Tensor) -> int:
        return math.prod(outputs.shape[1:]) // outputs.shape[self._axis]

    def _probabilities(self, outputs: Tensor) -> Tensor:
        """``[n, positions, classes]``."""
        logits = outputs.movedim(self._axis, -1)
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        return logits.reshape(len(logits), -1, logits.shape[-1]).to(dtype).softmax(-1)

    def _shaped(self, gradient: Tensor, outputs: Tensor) -> Tensor:
        """A gradient ``[n, positions, classes]`` in the shape of the outputs, zero at positions that don't count."""
        if self._counted is not None:
            gradient = gradient * self._counted.reshape(*gradient.shape[:2], 1)
        moved = outputs.movedim(self._axis, -1).shape
        return gradient.reshape(moved).movedim(-1, self._axis)


def _inclusion(weights: Tensor, k: int) -> Tensor:
    """Each label's probability of being among k drawn ones: proportional to its weight, but at most one."""
    pi = k * weights / weights.sum(-1, keepdim=True)
    for _ in range(k):  # each round makes at least one more label certain, or returns since no probability exceeds one
        certain = pi >= 1
        left = k - certain.sum(-1, keepdim=True)
        rest = torch.where(certain, 0, weights)
        total = rest.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        new = torch.where(certain, 1, left * rest / total)
        if bool((new <= 1).all()):
            return new
        pi = torch.maximum(pi.clamp(max=1), new)
    return pi.clamp(max=1)
