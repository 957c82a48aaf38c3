"""Loss types: the likelihood that each of them stands for, and the losses of torch that belong to it."""

from __future__ import annotations

from collections.abc import Hashable

import torch.nn.functional as F
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, ShapeError, UnsupportedError, warn_at_users_line
from torch_secorder.likelihoods.categorical import Categorical
from torch_secorder.likelihoods.elementwise import ELEMENTWISE
from torch_secorder.likelihoods.output_gradients import Likelihood

LOSS_TYPES = ("nll", *ELEMENTWISE)

# Other names that users give to the loss types.
SYNONYMS = {
    **dict.fromkeys(("ce", "cross_entropy", "crossentropy", "categorical", "softmax", "classification"), "nll"),
    **dict.fromkeys(("binary", "bernoulli", "sigmoid", "binary_cross_entropy"), "bce"),
    **dict.fromkeys(("l2", "gaussian", "regression", "squared"), "mse"),
}

# The losses of torch that are the negative logarithm of a likelihood, up to a constant and a factor.
LOSSES_OF = {
    **dict.fromkeys((nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss), "nll"),
    **dict.fromkeys((nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits), "bce"),
    **dict.fromkeys((nn.MSELoss, F.mse_loss), "mse"),
    **dict.fromkeys((nn.PoissonNLLLoss, F.poisson_nll_loss), "poisson"),
}

# The function that a loss type applies to outputs, what outputs are, and what a model that applies it already should return.
APPLIED = {
    "nll": ("softmax", "logits", "return the logits, or their logarithm (log_softmax)"),
    "bce": ("sigmoid", "logits", "return the logits"),
    "poisson": ("exp", "log rates", "return the log rates"),
}


def require_loss_of(loss_type: str, loss_fn: object) -> None:
    """Raise if a loss of torch belongs to another loss type.

    Raises:
        ArgumentError: naming both loss types.
    """
    own = LOSSES_OF.get(type(loss_fn)) or (LOSSES_OF.get(loss_fn) if isinstance(loss_fn, Hashable) else None)
    if own is not None and own != loss_type:
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ArgumentError(
            f'loss_fn is {name}, the loss of loss_type="{own}", and loss_type is "{loss_type}": pass loss_type="{own}", or '
            "loss_fn=None if the likelihood is meant to be another one"
        )


def warn_of_probabilities(outputs: Tensor, loss_type: str) -> None:
    """Warn if a model ends in the function that a loss type applies to outputs, so that it would be applied twice."""
    if not isinstance(loss_type, str) or loss_type not in APPLIED:
        return
    last, taken_for, remedy = APPLIED[loss_type]
    node = outputs.grad_fn
    if node is not None and node.name().startswith(f"{last.title()}Backward"):
        warn_at_users_line(
            f'the model ends in {last}, and loss_type="{loss_type}" takes its outputs for {taken_for}, so that {last} is applied '
            f"twice: {remedy}",
            UserWarning,
        )


def axis_of_classes(outputs: Tensor, class_axis: int) -> int:
    """The axis of the classes, counted from the front.

    Raises:
        ArgumentError: if it is the batch axis or not an axis of the outputs.
    """
    axis = class_axis if class_axis >= 0 else class_axis + outputs.dim()
    if not 0 < axis < outputs.dim():
        there = (
            f"the others are 1 to {outputs.dim() - 1}, or -1 for the last" if outputs.dim() > 1 else "there is no other"
        )
        raise ArgumentError(
            f"class_axis={class_axis} for outputs of shape {tuple(outputs.shape)}, whose axis 0 is the batch: {there}"
        )
    return axis


def likelihood(
    loss_type: str, outputs: Tensor, targets: Tensor | None, *, ignore_index: int = -100, class_axis: int = 1
) -> Likelihood:
    """The likelihood that a loss type stands for.

    Raises:
        UnsupportedError: for an unknown ``loss_type``.
        ArgumentError: if ``class_axis`` is the batch axis or not an axis of the outputs.
        ShapeError: if targets do not have the outputs' shape without the class axis, or there are fewer than two classes.
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
    axis = axis_of_classes(outputs, class_axis)
    if not outputs.shape[axis]:
        raise ShapeError(
            f"outputs of shape {tuple(outputs.shape)} have no class on axis {axis}: class_axis says where they are"
        )
    if outputs.shape[axis] == 1:
        raise ShapeError(
            f'loss_type="nll" needs logits of two classes or more, and outputs of shape {tuple(outputs.shape)} have one on axis '
            f'{axis}: pass loss_type="mse" for regression, loss_type="bce" for one logit of two classes, or class_axis= if the '
            "classes are on another axis"
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
