"""Whether a user's loss compares every output with every target, as far as its gradients show that.

From outputs ``[n, 1]`` and targets ``[n]``, ``outputs - targets`` is ``[n, n]``. A backward pass shows no graph above the model's
outputs, only the gradient that arrives there. That of a squared error is then a * output + b with the same b for all samples, as
if every sample had the mean target. Data whose targets are all equal give the same, so that this is a warning and no refusal.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from torch_secorder.autograd.precision import is_half
from torch_secorder.errors import BroadcastLossWarning
from torch_secorder.verification.tolerances import ROUNDING_OF_A_LINE, SMALLEST_SLOPE

# Any two points are on a line, and so are three now and then.
FEWEST = 4


def warn_of_broadcast(outputs: Tensor, gradient: Tensor) -> None:
    """Warn if the gradients of outputs ``[n, 1]`` are those of a squared error that broadcasts."""
    if shares_its_targets(outputs, gradient):
        warnings.warn(
            f"the loss seems to compare each of the outputs of shape {tuple(outputs.shape)} with all targets: their gradients "
            "are those of a squared error with one target for all samples. Targets of shape "
            f"{tuple(outputs.shape[:1])} broadcast so: pass targets.unsqueeze(-1), or outputs.squeeze(-1). If all targets are "
            "equal, nothing is wrong",
            BroadcastLossWarning,
            stacklevel=2,
        )


def shares_its_targets(outputs: Tensor, gradient: Tensor) -> bool:
    """Whether the gradient is a * output + b, with numbers a and b other than zero, up to rounding."""
    if gradient.shape != outputs.shape or len(outputs) < FEWEST or not outputs.is_floating_point() or is_half(gradient):
        return False
    x, y = (value.detach().cpu().double().flatten() for value in (outputs, gradient))
    x_spread, y_spread = x - x.mean(), y - y.mean()
    slope = (x_spread * y_spread).sum() / x_spread.square().sum()
    line, largest = slope * x_spread, y.abs().max()
    rounding = ROUNDING_OF_A_LINE * torch.finfo(gradient.dtype).eps * largest
    is_line = (y_spread - line).abs().max() <= rounding
    # Without a slope it is no squared error, and without an intercept one without targets.
    intercept = y.mean() - slope * x.mean()
    return bool(is_line & (line.abs().max() > SMALLEST_SLOPE * largest) & (intercept.abs() > SMALLEST_SLOPE * largest))
