"""The refusals of what a look at a graph does not show."""

from __future__ import annotations

from collections.abc import Sequence

from torch_secorder.batch_axis.count import Count, Seen
from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoupledSamplesError, CurvatureError, NonFiniteError, ShapeError, UnsupportedError
from torch_secorder.model.ranks import Ranks

# What of a function of the user's can't be called for single samples.
OPAQUE_FUNCTION = (
    "a function whose backward calls modules, starts a backward pass, keeps what can't be copied on ctx, or names a list, a "
    "mapping or a tensor from outside"
)


def hidden(what: str, n: int | None) -> UnsupportedError:
    """The refusal of something whose samples an opaque node hides."""
    return UnsupportedError(
        f"{what}: the shapes leave open where its {n} samples are, and what shows it is hidden, by re-entrant activation "
        "checkpointing (use torch.utils.checkpoint with use_reentrant=False, or another batch size), by hooks on saved tensors, "
        f"or by {OPAQUE_FUNCTION}"
    )


def not_counted(count: Count, shapes: Sequence[Sequence[int]]) -> ShapeError:
    """The refusal of outputs of which none has the samples, with what to do.

    Args:
        count: how many samples there are, and what says so.
        shapes: of the differentiable outputs.
    """
    seen = f"the differentiable tensors that it returns, of shape {listed_shapes(shapes)}, have"
    other = (
        "another number on the axis that counts them"
        if count.n is not None
        else "no number that is known to count them"
    )
    what = f"{seen} {other}" if shapes else "it returns no differentiable tensor"
    rows = count.indices[0] if count.why == "sample_of=" else None
    if rows is not None and shapes and not any(len(rows) in shape for shape in shapes):
        return ShapeError(
            f"sample_of says of {len(rows)} rows which sample they are of, and {seen} another number of rows: let it have a "
            "number for each row of what the loss is computed from"
        )
    if count.n is None:
        return ShapeError(
            f"how many samples this model has can't be found out, since no tensor among its arguments counts them: {what}; "
            f"{_remedy(count, shapes)}"
        )
    return ShapeError(f"where this model has its {count} can't be found out: {what}; {_remedy(count, shapes)}")


def listed_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """The first few of them."""
    few = [str(tuple(shape)) for shape in shapes[:3]]
    return ", ".join(few) + (", ..." if len(shapes) > len(few) else "")


# Of outputs (N * T, C) with as many classes as samples, shapes don't say more than of steps in front.
_SEVERAL_ROWS = (
    "if the outputs have several rows for each sample, return them as (N, T, ...), or pass sample_of=, the sample of "
    "each row"
)


def _remedy(count: Count, shapes: Sequence[Sequence[int]]) -> str:
    """What helps, as far as the shapes tell."""
    with_axes = [shape for shape in shapes if len(shape)]
    if not with_axes:
        return "return the outputs along with the loss, or unreduced losses of shape (N,)"
    m = with_axes[0][0]
    for seen in count.seen:
        if seen.inside == m:
            return (
                f"if input {seen.key!r} is a list with an item for each of {m} samples, pass "
                f"batch_axis={{'inputs': {{{seen.key!r}: 'list'}}}}"
            )
    for shape in shapes:
        if axis := next((axis for axis, size in enumerate(shape) if size == count.n), None):
            return f"if the samples are on axis {axis} of the outputs, pass batch_axis={{'outputs': {axis}}}; {_SEVERAL_ROWS}"
    for seen in count.seen:
        if m in seen.shape and isinstance(seen.axis, int):
            axis = list(seen.shape).index(m)
            return (
                f"if there are {m} samples, pass batch_axis={{'inputs': {{{seen.key!r}: {axis}}}}}, and None in the place of the "
                "axis for arguments that all samples share; or n_samples=, a number or a function of the model's arguments"
            )
    if len(shapes) == count.n:
        return "if the model returns a list with an item for each sample, pass batch_axis={'outputs': 'list'}"
    return (
        f"if there are {m} samples, pass n_samples=, a number or a function of the model's arguments; {_SEVERAL_ROWS}"
    )


def on_another_axis(record: Record, count: Count, seen: Seen, axis: int) -> ShapeError:
    """The refusal of samples that are along two axes of an argument: by its shape, and by what the outputs say of a layer."""
    where = f"{seen.key!r}" if isinstance(seen.key, str) else f"{seen.key}"
    return ShapeError(
        f"{record.site}: of the model's {count}, the outputs show that they are on axis {axis} of that input, if they are on the "
        f"axis of the outputs that is taken for theirs: pass batch_axis={{'inputs': {{{where}: {axis}}}}} if that is so, or say "
        "which axis of the outputs has them, as in batch_axis={'outputs': 1}"
    )


def compares_samples() -> CoupledSamplesError:
    """The refusal of a loss of outputs that compare samples."""
    return CoupledSamplesError(
        "the loss uses an output of the model that compares samples with each other, as a matrix of similarities does, so that "
        "no sample has a gradient of its own: use a loss of the other outputs, or, if steps or draws are first in it, name the "
        "axis of its samples, as in batch_axis={'outputs': {0: 1}} for the first output"
    )


def unexpected(names: Sequence[str], why: Unplaced, count: Count) -> CurvatureError:
    """The refusal of a gradient where a look at the graph found none, or none that belongs to single samples."""
    if why is Unplaced.NOT_FINITE:
        return not_finite(f"the gradients of {', '.join(names)}")
    if why is Unplaced.SHARED_BY_SAMPLES:
        return CoupledSamplesError(
            f"{', '.join(names)}: all that is computed from them belongs to several samples at once, so that no sample has a "
            "gradient of its own: the model's outputs compare samples, or have them on another axis (batch_axis=)"
        )
    if why is Unplaced.NOT_REACHED:
        return ShapeError(
            f"{', '.join(names)}: the loss uses an output of the model that is computed from them and not taken for one with a "
            f"row for each of the model's {count}: return it once for each sample, as x.expand(n, ...) does, or use a loss of "
            "the other outputs, or, if its rows are the samples' own, as those that each of them looks up in a table, say so by "
            "batch_axis={'outputs': 0}, or, if it has another number of samples, say which argument counts them, as in "
            "batch_axis={'inputs': {0: 0}}, or, if it has them on another axis, name that, as in batch_axis={'outputs': 1}, or, "
            "if the model returns a list with an item for each sample, batch_axis={'outputs': 'list'}"
        )
    return ShapeError(
        f"{', '.join(names)}: where the model's {count} are in what is computed from them is not known yet, as no gradient "
        "reached them when it was looked for: give another batch, or, if it has another number of samples, say which argument "
        "counts them, as in batch_axis={'inputs': {0: 0}}; if the loss takes an output that has no samples, such as a "
        "determinant's logarithm, let the model return it expanded, x.expand(n)"
    )


def silent_use(names: Sequence[str]) -> UnsupportedError:
    """The refusal to differentiate a trace in which one of several uses of a parameter has a zero gradient."""
    return UnsupportedError(
        f"{', '.join(names)}: used several times, of which one has a zero gradient now (behind a gate that is 0?), so that "
        "nothing shows where its samples are; its part of the trace is right, and the derivative of that is not: leave out "
        "create_graph, or let the gate begin at a small number"
    )


def not_finite(what: str) -> NonFiniteError:
    """The refusal of a batch that isn't finite before it is known where the model has its samples."""
    return NonFiniteError(
        f"{what} are not finite, in the first batch in which it was looked for where the model has its samples, which such a "
        "batch can't show; it is left out as a whole"
    )


def refuse(forward: Forward, error: CurvatureError, ranks: Ranks) -> None:
    """Have passes through a forward refused when they are over; ranks that hold the model together refuse it at once."""
    if ranks.distributed:
        raise error
    forward.refusal = forward.refusal or error
