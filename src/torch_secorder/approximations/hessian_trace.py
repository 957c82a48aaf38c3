"""The trace of the Hessian itself: the yardstick for every Fisher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import (
    By,
    called_as,
    fresh_generator,
    require_loss,
    require_model_before_loss,
    require_positive_int,
)
from torch_secorder.autograd.compiled import eager_code
from torch_secorder.autograd.double_precision import sum_in_double_precision
from torch_secorder.autograd.engine import call_model, library_pass
from torch_secorder.autograd.tensor_hooks import silenced_in_library_passes
from torch_secorder.autograd.twice_differentiable import twice_differentiable
from torch_secorder.batch_axis.count import count_of, empty_batch
from torch_secorder.batch_axis.told import NOTHING
from torch_secorder.errors import ArgumentError, CoverageError, NonFiniteError, UnsupportedError
from torch_secorder.likelihoods import random_signs
from torch_secorder.model.parameters import ParameterTable, refuse_complex, refuse_inference_mode, unwrapped
from torch_secorder.model.ranks import refuse_dtensors
from torch_secorder.model.restore import keeping_graphs, lock_of, requiring_grad, restoring_buffers
from torch_secorder.model.selection import Selection
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.results.report import Report
from torch_secorder.results.statistics import Statistics
from torch_secorder.running.loss import require_scalar_loss
from torch_secorder.running.loss_calls import loss_value
from torch_secorder.running.misplaced import explaining_misplaced

if TYPE_CHECKING:
    import pandas as pd

MIN_PROBES = 8  # A standard error from fewer probes is no more than a guess.


@called_as("hessian_trace(model, loss_fn, inputs, targets) for one batch", k="num_samples= says how many probes")
def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    num_samples: int = 100,
    *,
    tolerance: float | None = None,
    by: By = None,
    parameters: Selection = "trainable",
    generator: torch.Generator | None = None,
) -> pd.DataFrame:
    r"""The trace of the Hessian of a batch's loss in every parameter, estimated by Hutchinson's method.

    With random signs z, drawn k times, the contribution of parameter p is the mean of

    .. math:: z_p^\top (H z)_p, \qquad \mathbb{E}[z_p^\top (H z)_p] = \operatorname{tr} H_{pp},

    since ``E[z z^T]`` is the identity. H is the Hessian of the loss as it is, with the loss's own reduction; its trace may be
    negative, which a Fisher's never is. Each probe takes one backward pass through the graph of the gradient, about
    twice the price of a gradient. Samples may influence each other here (batch statistics, contrastive losses).

    The model runs once, in its current mode; parameters, buffers, ``.grad`` and ``requires_grad`` are left alone.

    Args:
        model: the model.
        loss_fn: from ``(outputs, targets)`` to a scalar, twice differentiable.
        inputs: a tensor; a tuple for several positional arguments; a mapping for keyword arguments.
        targets: whatever the loss takes.
        num_samples: how many probes at most.
        tolerance: stop once the standard error of the total is at most this fraction of the total, after 8 probes at least.
        by: as in :meth:`torch_secorder.FisherMonitor.report`.
        parameters: which ones, as in :class:`~torch_secorder.FisherMonitor`.
        generator: for the probes; by default one of its own, with a fresh seed.

    Returns:
        A DataFrame with the columns of a report up to ``numel``, then ``hessian_trace``, ``hessian_trace_stderr`` (over
        probes: how far the estimate may be from this batch's Hessian), ``hessian_trace_share`` and ``hessian_mean``; its
        ``attrs`` say ``num_samples``, ``trace`` and ``trace_stderr``.

    Raises:
        ArgumentError: for an invalid argument, or a loss that is no scalar.
        ShapeError: if the batch is empty.
        UnsupportedError: if something in the model or the loss has no second derivative.
        CoverageError: if the loss depends on no trainable parameter.
        NonFiniteError: naming the parameters whose Hessian is not finite.

    Example:
        >>> import torch
        >>> from torch_secorder import hessian_trace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> inputs, targets = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> table = hessian_trace(model, torch.nn.MSELoss(), inputs, targets, 4)
        >>> table.hessian_trace.round(4).to_dict()  # 2 (1^2 + 2^2) / 2
        {'weight': 5.0}

    References:
        Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines".
    """
    refuse_inference_mode()
    require_positive_int("num_samples", num_samples)
    require_loss(loss_fn)
    require_model_before_loss(model, loss_fn)
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise ArgumentError(
            f"tolerance must be a positive number, or None for all num_samples probes, not {tolerance!r}"
        )
    if (count := count_of(NOTHING, inputs)).n == 0:
        raise empty_batch(count)
    generator = fresh_generator(generator)
    bare = unwrapped(model)
    refuse_dtensors(bare, "the Hessian")
    refuse_complex(bare, "the Hessian")
    with lock_of(bare):
        table = ParameterTable(bare, parameters)
    statistics = Statistics(table.names, [row.shape for row in table.rows])
    with (
        lock_of(bare),
        eager_code(),
        keeping_graphs(bare),
        restoring_buffers(bare),
        requiring_grad(table.tensors),
        silenced_in_library_passes(table.tensors),
        torch.enable_grad(),
        twice_differentiable(True),
    ):
        with explaining_misplaced(inputs, targets):
            loss = require_scalar_loss(loss_value(loss_fn, call_model(bare, inputs), targets))
        gradients = _gradients(loss, table)
        reached = {position for position, g in enumerate(gradients) if g.requires_grad}
        rules = {position: ["hutchinson"] for position in reached}
        for _ in range(num_samples):
            statistics.update(SampleNorms(1, _probe(gradients, table, generator)[:, None], reached, rules))
            if tolerance is not None and _is_known_to(tolerance, statistics):
                break
    frame = Report(table.rows, statistics, "mean", "hessian").table(by).drop(columns=["grad_sq_norm", "rule"])
    frame = frame.rename(columns=lambda name: name.replace("fisher_", "hessian_"))
    frame.attrs.clear()
    trace = float(statistics.mean.sum())
    frame.attrs.update(num_samples=statistics.n, trace=trace, trace_stderr=_stderr(statistics))
    return frame


def _gradients(loss: Tensor, table: ParameterTable) -> tuple[Tensor, ...]:
    """The loss's gradient in every parameter, with its graph; zeros where the loss doesn't depend on one."""
    if not loss.requires_grad:
        raise CoverageError("the loss does not depend on any trainable parameter of this model")
    with library_pass([loss]) as (root,):
        found = torch.autograd.grad(root, table.tensors, create_graph=True, allow_unused=True)
    if all(g is None for g in found):
        raise CoverageError("the loss does not depend on any trainable parameter of this model")
    return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, table.tensors, strict=True))


def _probe(gradients: tuple[Tensor, ...], table: ParameterTable, generator: torch.Generator) -> Tensor:
    """``z_p^T (H z)_p`` of every parameter for one z."""
    signs = [random_signs(p.shape, p, generator) for p in table.tensors]
    curved = [(g, z) for g, z in zip(gradients, signs, strict=True) if g.requires_grad]
    if not curved:  # The loss is linear in the parameters.
        return torch.zeros(len(signs), dtype=torch.float64, device="cpu")
    ends, seeds = zip(*curved, strict=True)
    try:
        with library_pass(ends) as roots:
            products = torch.autograd.grad(roots, table.tensors, seeds, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise UnsupportedError(
            f"something in the model or the loss has no second derivative ({str(error).splitlines()[0]}): use operations that "
            "have one, such as attention by matrix products"
        ) from error
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    values = [zero if h is None else sum_in_double_precision(z, h).cpu() for z, h in zip(signs, products, strict=True)]
    found = torch.stack(values)
    if not bool(found.isfinite().all()):
        names = [table.names[position] for position in (~found.isfinite()).nonzero().flatten().tolist()]
        raise NonFiniteError(f"the Hessian is not finite in {', '.join(names)}")
    return found


def _is_known_to(tolerance: float, statistics: Statistics) -> bool:
    """Whether the standard error of the total is at most this fraction of the total."""
    return statistics.n >= MIN_PROBES and _stderr(statistics) <= tolerance * abs(float(statistics.mean.sum()))


def _stderr(statistics: Statistics) -> float:
    """The standard error of the total, over probes."""
    return (statistics.squared_norms.variance_of_sum(range(len(statistics.names))) / statistics.n) ** 0.5
