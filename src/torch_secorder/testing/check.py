"""The library's numbers beside those of a plain loop over samples, and whether they agree."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.approximations.batches import LabeledBatch, Layout
from torch_secorder.approximations.fisher_report import fisher_results
from torch_secorder.approximations.report_arguments import ReportArguments
from torch_secorder.arguments import Loss, called_as
from torch_secorder.autograd.random_state import forked_random, random_state
from torch_secorder.errors import ArgumentError, VerificationError
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import unwrapped
from torch_secorder.model.restore import eval_mode, restoring_state
from torch_secorder.running.own_loss import loss_function
from torch_secorder.tables import table
from torch_secorder.testing.sample_loop import float64_copy, in_float64, loss_dtype, run, sample_gradients

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

# What "equal" means: |library - loop| <= relative * loop + of_total * (the sum over all parameters). The second term is for
# gradients that are zero by symmetry, of which only rounding is left. Single precision has 24 bits and double precision 53; both
# bounds leave room for sums of a few thousand terms.
_EXACT, _SINGLE = (1e-8, 1e-20), (1e-4, 1e-12)


@dataclass(frozen=True)
class _Numbers:
    """A trace for each parameter, in one order."""

    names: list[str]
    traces: Tensor

    def agree_with(self, loop: Tensor, bounds: tuple[float, float]) -> Tensor:
        """For each parameter whether the loop's trace is the same within these bounds; NaN never is."""
        relative, of_total = bounds
        return (self.traces - loop).abs() <= relative * loop.abs() + of_total * loop.sum()


@called_as(
    "check(model, loss_fn, batch), where batch is one pair (inputs, targets) or a mapping, and all other arguments by name",
    ReportArguments.__annotations__,
)
def check(model: nn.Module, loss_fn: Loss, batch: Any, **options: Unpack[ReportArguments]) -> pd.DataFrame:
    """The Fisher traces of one batch by this library and by a plain float64 loop over its samples, side by side.

    The loop takes a forward and a backward pass for each sample, so a batch of eight or so is enough. Where the model draws
    random numbers, as dropout does, both run in eval mode, since a loop draws others.

    Args:
        model: the model, which stays as it is.
        loss_fn: from ``(outputs, targets)`` to a scalar that averages or sums over the batch; "model" for the loss that the model
            computes itself.
        batch: one batch as for :func:`~torch_secorder.fisher_report`: ``(inputs, targets)`` and what may follow, or a mapping.
        options: those of :func:`~torch_secorder.fisher_report`, such as ``labels``, ``parameters`` and ``batch_axis``. The loop
            needs samples that an axis counts: not ``n_samples`` and ``sample_of``.

    Returns:
        A row for each parameter: ``library``, the trace that the library finds in the model's own precision; ``loop``, that
        of the loop in float64; ``relative_error``; and the ``verdict``. ``"equal"``: they differ by 1e-4 of the loop's at
        most, 1e-8 if the parameter is in float64 and so is its loss (models of transformers compute theirs in float32), or by
        1e-12 (1e-20) of the total. ``"rounding"``: they differ by more than that, and the library finds what the loop finds
        if it is given the float64 model too, so that the difference is the precision of the model's own arithmetic.
        ``"different"``: one of the two is wrong. ``attrs`` say ``reduction``, ``n_samples``, ``mode`` ("as it is" or "eval"),
        and in ``equal`` whether no row is different.

    Raises:
        ArgumentError: if there is no loop to compare with, since the model or the loss does not run in float64 or on one sample.
        VerificationError: if the library and the loop count different numbers of samples.
        CurvatureError: if the library refuses the model, the loss or the batch.

    Example:
        >>> import torch
        >>> from torch_secorder.testing import check
        >>> layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
        >>> model = torch.nn.Sequential(*layers)
        >>> batch = torch.randn(8, 3), torch.randint(2, (8,))
        >>> checked = check(model, torch.nn.CrossEntropyLoss(), batch)
        >>> list(checked["verdict"]), checked.attrs["equal"]
        (['equal', 'equal', 'equal', 'equal'], True)
    """
    loss_function(loss_fn)  # An invalid loss is refused before anything runs.
    if not isinstance(batch, Mapping) and not (isinstance(batch, (tuple, list)) and len(batch) >= 2):
        raise ArgumentError(f"batch must be (inputs, targets) or a mapping, not a {type(batch).__name__}")
    if given := [name for name in ("n_samples", "sample_of") if options.get(name) is not None]:
        raise ArgumentError(f"the loop over samples takes samples that an axis counts, and no {given[0]}=")
    bare = unwrapped(model)
    parts = Layout(bare, options.get("labels"), labels_go_in=loss_fn == "model").parts(batch)
    random = _draws(bare, parts.inputs)
    with eval_mode(bare) if random else nullcontext():
        if random and _draws(bare, parts.inputs):
            raise ArgumentError(
                f"{type(bare).__name__} draws random numbers in eval mode too, which a loop over samples can't repeat: switch "
                "them off for the check"
            )
        rows, facts = _compared(bare, loss_fn, batch, parts, options | {"progress": False})
    facts |= {"mode": "eval" if random else "as it is", "equal": all(row["verdict"] != "different" for row in rows)}
    return table(rows, "parameter", **facts)


def _compared(
    model: nn.Module, loss_fn: Loss, batch: Any, parts: LabeledBatch, options: ReportArguments
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table's rows, and the facts that hold for all of them."""
    report = fisher_results(model, loss_fn, [batch], **options).report()
    library = _Numbers(
        [str(name) for name in report.index],
        torch.tensor(list(report["fisher_trace"]), dtype=torch.float64, device="cpu"),
    )
    reduction, n = report.attrs["reduction"], report.attrs["n_samples"]
    axis = options.get("batch_axis") or 0
    gradients = sample_gradients(model, loss_fn, parts.inputs, parts.targets, names=library.names, batch_axis=axis)
    loop = torch.stack([_trace(g, reduction) for g in gradients.values()]).cpu()
    if (seen := len(next(iter(gradients.values())))) != n:
        raise VerificationError(
            f"the library counts {n} samples and the loop {seen}, on the first input with batch_axis={axis!r}: say with "
            "batch_axis= which axis counts the samples"
        )
    dtypes = {plain_name(name): p.dtype for name, p in model.named_parameters()}
    single = torch.tensor([_is_single(dtypes[name]) for name in library.names], device="cpu")
    loss_in = loss_dtype(model, loss_fn, parts.inputs, parts.targets, batch_axis=axis)
    exact = _SINGLE if _is_single(loss_in) else _EXACT
    equal = torch.where(single, library.agree_with(loop, _SINGLE), library.agree_with(loop, exact))
    rounding = equal
    if not bool(equal.all()):
        rounding = _in_float64_too(model, loss_fn, batch, options).agree_with(loop, exact)
    return [
        {
            "parameter": name,
            "library": float(ours),
            "loop": float(theirs),
            "relative_error": _relative_error(float(ours), float(theirs)),
            "verdict": "equal" if same else "rounding" if but_for_rounding else "different",
        }
        for name, ours, theirs, same, but_for_rounding in zip(
            library.names, library.traces, loop, equal.tolist(), rounding.tolist(), strict=True
        )
    ], {"reduction": reduction, "n_samples": n}


def _in_float64_too(model: nn.Module, loss_fn: Loss, batch: Any, options: ReportArguments) -> _Numbers:
    """The library's traces of the float64 model."""
    results = fisher_results(float64_copy(model), in_float64(loss_fn), [in_float64(batch)], **options)
    report = results.report()
    return _Numbers(
        [str(name) for name in report.index],
        torch.tensor(list(report["fisher_trace"]), dtype=torch.float64, device="cpu"),
    )


def _trace(gradients: Tensor, reduction: str) -> Tensor:
    """``c sum_n ||g_n||^2``."""
    squares = gradients.abs().square().sum()
    return squares / len(gradients) if reduction == "mean" else squares


def _draws(model: nn.Module, inputs: Any) -> bool:
    """Whether a forward draws random numbers from torch's global generators."""
    with torch.no_grad(), forked_random(list(model.parameters())), restoring_state(model):
        before = random_state()
        run(model, inputs)
        return any(not torch.equal(a, b) for a, b in zip(before, random_state(), strict=True))


def _is_single(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float64, torch.complex128)


def _relative_error(ours: float, theirs: float) -> float:
    """``|ours - theirs| / theirs``; 0 if both are the same."""
    difference = abs(ours - theirs)
    return difference / theirs if theirs else (0.0 if difference == 0 else float("inf"))
