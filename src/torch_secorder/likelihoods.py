r"""Likelihoods: what a loss type says of the labels, and the output gradients whose squares add up to the Fisher.

For outputs f_n and a likelihood p(y | f_n), the Fisher is ``c sum_n J_n^T A_n J_n`` with A_n the curvature of
``-log p`` in f. A likelihood returns gradients s for the outputs, to be sent back through the model one after the other.
They are square roots of that curvature: ``sum_s s s^T = A_n`` if they are exact, ``E[sum_s s s^T] = A_n`` if they are
sampled. So the trace's part of sample n is the sum of ``||J_n^T s_n||^2`` over them, or its expectation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, ShapeError, UnsupportedError, warn_at_users_line


@dataclass(frozen=True)
class LastLayer:
    """The product that ends a model: its outputs are ``inputs @ matrix``, plus a bias if there is one.

    Attributes:
        inputs: ``[n, i]``.
        matrix: ``[i, c]``.
    """

    inputs: Tensor
    matrix: Tensor

    def influence(self, p: Tensor) -> Tensor:
        """How strongly each label of each sample acts on the layers before: ``||D_n M (e_c - p_n)||^2``, ``[n, c]``.

        D_n is one for the layer's inputs that are not zero: a ReLU lets no gradient through to the others, and neither
        does dropout.
        """
        weight, active = self.matrix.T.to(p.dtype), self.inputs.to(p.dtype).sign().abs()
        sizes = (weight.square() @ active.T).T  # ||D M_c||^2
        mixed = (weight @ (active * (p @ weight)).T).T  # M_c . D m, with m = sum_c p_c M_c
        found = sizes - 2 * mixed + (p * mixed).sum(1, keepdim=True)
        # The difference has no digits left for a class that is nearly certain. Written as sum_j p_j D (M_c - M_j), its norm
        # can't exceed 2 (1 - p_c) max_j ||D M_j||.
        return found.clamp(min=0).minimum(4 * (1 - p).square() * sizes.amax(1, keepdim=True))


class Likelihood(ABC):
    """A model of the targets, given outputs whose axis 0 is the batch."""

    @abstractmethod
    def exact_passes(self, outputs: Tensor) -> int:
        """How many gradients :meth:`exact_output_gradients` yields, each of which takes a backward pass."""

    @abstractmethod
    def exact_output_gradients(self, outputs: Tensor) -> Iterator[Tensor]:
        """Gradients s, shaped like the outputs, with ``sum_s s s^T = A_n`` for every sample."""

    @abstractmethod
    def exact_input_gradients(self, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
        """``s M^T`` for all exact gradients s of outputs ``[n, c]``: those of the last layer's inputs, ``[n, i]``, in any order.

        None of them takes a product with M, which would cost as much as the layer itself for each class.
        """

    def of_samples(self, rows: slice) -> Likelihood:
        """The same for a part of the batch."""
        return self

    @abstractmethod
    def curvature_traces(self, outputs: Tensor) -> Tensor:
        """``tr A_n = sum_s ||s_n||^2`` of every sample, ``[n]``."""

    def sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None = None
    ) -> Iterator[Tensor]:
        """At most k random gradients with ``E[sum_s s s^T] = A_n``; the exact ones where k of them suffice.

        Args:
            outputs: those of the model.
            k: how many.
            generator: where the randomness comes from.
            last_layer: the product that made the outputs; knowing it may lower the variance.
        """
        if k >= self.exact_passes(outputs):
            return self.exact_output_gradients(outputs)
        return self._sampled_output_gradients(outputs, k, generator, last_layer)

    @abstractmethod
    def _sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None
    ) -> Iterator[Tensor]:
        """K random gradients, for fewer than the exact ones."""

    @abstractmethod
    def observed_output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gradient of ``-log p(targets | outputs)``.

        Raises:
            ArgumentError: for targets that the likelihood gives no meaning to.
        """


@dataclass(frozen=True)
class Elementwise(Likelihood):
    """One independent variable for each output element, so that A_n is diagonal.

    Random signs on the square root of a diagonal A are unbiased for a trace, ``E[r r^T] = I``, and vary less than
    drawing the variable itself.

    Attributes:
        mean: from the outputs to the mean of each element's variable.
        root: from the outputs to the square root of A_n's diagonal.
    """

    mean: Callable[[Tensor], Tensor]
    root: Callable[[Tensor], Tensor]

    def exact_passes(self, outputs: Tensor) -> int:
        return math.prod(outputs.shape[1:])

    def exact_output_gradients(self, outputs: Tensor) -> Iterator[Tensor]:
        root = self.root(outputs).reshape(len(outputs), -1)
        for element in range(root.shape[1]):
            gradient = torch.zeros_like(root)
            gradient[:, element] = root[:, element]
            yield gradient.view(outputs.shape)

    def exact_input_gradients(self, outputs: Tensor, last_layer: LastLayer) -> Iterator[Tensor]:
        return map(torch.outer, self.root(outputs).unbind(1), last_layer.matrix.unbind(1))

    def curvature_traces(self, outputs: Tensor) -> Tensor:
        return self.root(outputs).square().flatten(1).sum(1)

    def _sampled_output_gradients(
        self, outputs: Tensor, k: int, generator: torch.Generator, last_layer: LastLayer | None
    ) -> Iterator[Tensor]:
        root = self.root(outputs) / math.sqrt(k)
        return (root * random_signs(outputs.shape, outputs, generator) for _ in range(k))

    def observed_output_gradient(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.shape != outputs.shape:
            raise ShapeError(f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)}")
        if targets.is_complex():
            raise ArgumentError(f"targets must be real numbers, not {targets.dtype}")
        return self.mean(outputs) - targets.to(outputs.dtype)


# Loss type -> its likelihood. A further one is a row here.
ELEMENTWISE = {
    "bce": Elementwise(mean=torch.sigmoid, root=lambda f: (torch.sigmoid(f) * torch.sigmoid(-f)).sqrt()),
    "mse": Elementwise(mean=lambda f: f, root=torch.ones_like),
    "poisson": Elementwise(mean=torch.exp, root=lambda f: (f / 2).exp()),
}
LOSS_TYPES = ("nll", *ELEMENTWISE)

# What else they are called.
SYNONYMS = {
    **dict.fromkeys(("ce", "cross_entropy", "crossentropy", "categorical", "softmax", "classification"), "nll"),
    **dict.fromkeys(("binary", "bernoulli", "sigmoid", "binary_cross_entropy"), "bce"),
    **dict.fromkeys(("l2", "gaussian", "regression", "squared"), "mse"),
}

# The losses of torch that are the negative logarithm of a likelihood, but for a constant or a factor.
LOSSES_OF = {
    **dict.fromkeys((nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss), "nll"),
    **dict.fromkeys((nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits), "bce"),
    **dict.fromkeys((nn.MSELoss, F.mse_loss), "mse"),
    **dict.fromkeys((nn.PoissonNLLLoss, F.poisson_nll_loss), "poisson"),
}


def require_loss_of(loss_type: str, loss_fn: object) -> None:
    """Raise if a loss of torch is that of another likelihood.

    Raises:
        ArgumentError: naming both.
    """
    own = LOSSES_OF.get(type(loss_fn)) or (LOSSES_OF.get(loss_fn) if isinstance(loss_fn, Hashable) else None)
    if own is not None and own != loss_type:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ArgumentError(
            f'loss_fn is {name}, the loss of loss_type="{own}", and loss_type is "{loss_type}": pass loss_type="{own}", or '
            "loss_fn=None if the likelihood is meant to be another one"
        )


def warn_of_probabilities(outputs: Tensor) -> None:
    """Warn of a model that ends in a softmax, whose outputs are no logits."""
    node = outputs.grad_fn
    if node is not None and node.name().startswith("SoftmaxBackward"):
        warn_at_users_line(
            'the model ends in a softmax, and loss_type="nll" takes its outputs for logits, so that a softmax of a softmax is '
            "analyzed: return the logits, or their logarithm (log_softmax)",
            UserWarning,
        )


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
        after = rows.new_zeros(len(p), rows.shape[1])  # the sum over classes that come later
        for j in reversed(range(p.shape[2] - 1)):
            after.addcmul_(p[:, 0, j + 1, None], rows[j + 1])
            weight = weights[:, j, None]
            yield (after * (-weight / tails[:, j + 1, None])).addcmul_(weight, rows[j])

    def of_samples(self, rows: slice) -> Categorical:
        return Categorical(self._axis, None if self._counted is None else self._counted[rows])

    def curvature_traces(self, outputs: Tensor) -> Tensor:
        p = self._probabilities(outputs)
        most = p.argmax(-1, keepdim=True)
        # Of a class that is nearly certain, 1 - p has no digits left; the sum of the others has.
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
            # A start behind the last end draws nothing: fewer than k labels are possible, or rounding has shortened the sum.
            drawn = label < p.shape[-1]
            label = label.clamp(max=p.shape[-1] - 1)
            share = p.gather(-1, label) / pi.gather(-1, label).clamp(min=torch.finfo(p.dtype).tiny)
            size = torch.where(drawn, share, 0).sqrt() * random_signs((*p.shape[:2], 1), p, generator)
            yield self._shaped(size * (torch.zeros_like(p).scatter(-1, label, 1.0) - p), outputs)

    def _weights(self, p: Tensor, last_layer: LastLayer | None) -> Tensor:
        """Guesses of how the labels' parts ``p_c q_c`` of a trace relate, ``[n, positions, classes]``, none below zero.

        There are two proxies for q_c. The last layer's own part is proportional to ``||e_c - p||^2``; the part of the layers
        before it is roughly proportional to :meth:`LastLayer.influence`. How large the two are beside each other is unknown,
        so each is normalized and they are added. An estimate's second moment is at most twice that with the better one alone.
        """
        eps = torch.finfo(p.dtype).eps
        rest = (1 - p).clamp(min=eps).square()
        # ||e_c - p||^2 lies between this and twice this, also where 1 - p has no digits left.
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


def likelihood(
    loss_type: str, outputs: Tensor, targets: Tensor | None, *, ignore_index: int = -100, class_axis: int = 1
) -> Likelihood:
    """The likelihood that a loss type stands for.

    Raises:
        UnsupportedError: for an unknown ``loss_type``.
        ArgumentError: if ``class_axis`` is the batch axis or none of the outputs'.
        ShapeError: if targets don't have the outputs' shape without the class axis.
    """
    if isinstance(loss_type, str) and loss_type in ELEMENTWISE:
        return ELEMENTWISE[loss_type]
    if loss_type != "nll":
        *names, last = (f'"{name}"' for name in LOSS_TYPES)
        meant = (
            f'; {loss_type!r} is "{SYNONYMS[loss_type]}" here'
            if isinstance(loss_type, str) and loss_type in SYNONYMS
            else ""
        )
        raise UnsupportedError(f"loss_type must be {', '.join(names)} or {last}, not {loss_type!r}{meant}")
    return _categorical(outputs, targets, ignore_index, class_axis)


def _categorical(outputs: Tensor, targets: Tensor | None, ignore_index: int, class_axis: int) -> Categorical:
    if not 1 <= class_axis % max(outputs.dim(), 1) < outputs.dim():
        raise ArgumentError(
            f"class_axis={class_axis} for outputs of shape {tuple(outputs.shape)}, whose axis 0 is the batch"
        )
    axis = class_axis % outputs.dim()
    if not outputs.shape[axis]:
        raise ShapeError(
            f"outputs of shape {tuple(outputs.shape)} have no class on axis {axis}: class_axis says where they are"
        )
    if outputs.shape[axis] == 1:
        raise ShapeError(
            f'loss_type="nll" needs logits of two classes or more, and outputs of shape {tuple(outputs.shape)} have one on axis '
            f'{axis}: pass loss_type="mse" for regression, loss_type="bce" for one logit of two classes, or class_axis='
        )
    if not isinstance(targets, Tensor):
        return Categorical(axis)
    positions = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
    if targets.shape == outputs.shape and targets.is_floating_point():
        raise ShapeError(
            f'targets have the outputs\' shape, {tuple(targets.shape)}, and loss_type="nll" takes class indices: pass '
            'loss_type="mse" for regression, loss_type="bce" for independent labels, or, for probabilities of classes, no targets'
        )
    if tuple(targets.shape) != positions:
        fits = "; they fit class_axis=-1" if targets.shape == outputs.shape[:-1] else ""
        raise ShapeError(
            f"targets of shape {tuple(targets.shape)} for outputs of shape {tuple(outputs.shape)} with class_axis={axis}: "
            f"expected {positions}{fits}"
        )
    return Categorical(axis, targets != ignore_index)


def _inclusion(weights: Tensor, k: int) -> Tensor:
    """Each label's probability of being among k drawn ones: proportional to its weight, but at most one."""
    pi = k * weights / weights.sum(-1, keepdim=True)
    for _ in range(
        k
    ):  # each round makes at least one more label certain, or else no probability exceeds one and it returns
        certain = pi >= 1
        left = k - certain.sum(-1, keepdim=True)
        rest = torch.where(certain, 0, weights)
        total = rest.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        new = torch.where(certain, 1, left * rest / total)
        if bool((new <= 1).all()):
            return new
        pi = torch.maximum(pi.clamp(max=1), new)
    return pi.clamp(max=1)


def random_signs(shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 and -1 with equal probability, on the device and in the dtype of ``like``."""
    bits = torch.randint(2, tuple(shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(like.device, like.dtype)
