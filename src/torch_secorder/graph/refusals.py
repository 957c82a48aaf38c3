"""The refusals of what a look at a graph does not show."""

from __future__ import annotations

from collections.abc import Sequence

from torch_secorder.batch_axis.evidence import Unplaced
from torch_secorder.errors import CoupledSamplesError, CurvatureError, NonFiniteError, ShapeError, UnsupportedError


def hidden(what: str, n: int | None) -> UnsupportedError:
    """The refusal of something whose samples an opaque node hides."""
    return UnsupportedError(
        f"{what}: the shapes leave open where its {n} samples are, and what shows it is hidden, by re-entrant activation "
        "checkpointing (use torch.utils.checkpoint with use_reentrant=False, or another batch size), by hooks on saved tensors, "
        "or by a function whose backward calls modules, starts a backward pass or keeps more than saved tensors"
    )


def compares_samples() -> CoupledSamplesError:
    """The refusal of a loss of outputs that compare samples."""
    return CoupledSamplesError(
        "the loss uses an output of the model that compares samples with each other, as a matrix of similarities does, so that "
        "no sample has a gradient of its own: use a loss of the other outputs"
    )


def unexpected(names: Sequence[str], why: Unplaced, n: int) -> CurvatureError:
    """The refusal of a gradient where a look at the graph found none, or none that belongs to single samples."""
    if why is Unplaced.NOT_FINITE:
        return not_finite(f"the gradients of {', '.join(names)}")
    if why is Unplaced.SHARED_BY_SAMPLES:
        return CoupledSamplesError(
            f"{', '.join(names)}: all that is computed from them belongs to several samples at once, so that no sample has a "
            "gradient of its own: the model's outputs compare samples, or have them on another axis (batch_axis=)"
        )
    return ShapeError(
        f"{', '.join(names)}: where the {n} samples are in what is computed from them is not known yet, as no gradient reached "
        "them when it was looked for: give another batch, or pass batch_axis="
    )


def not_finite(what: str) -> NonFiniteError:
    """The refusal of a batch that isn't finite before it is known where the model has its samples."""
    return NonFiniteError(
        f"{what} are not finite, in the first batch in which it was looked for where the model has its samples, which such a "
        "batch can't show; it is left out as a whole"
    )
