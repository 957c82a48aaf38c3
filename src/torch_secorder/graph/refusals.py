"""The refusals of what a look at a graph does not show."""

from __future__ import annotations

from torch_secorder.errors import NonFiniteError, UnsupportedError


def hidden(what: str, n: int | None) -> UnsupportedError:
    """The refusal of something whose samples an opaque node hides."""
    return UnsupportedError(
        f"{what}: the shapes leave open where its {n} samples are, and what shows it is hidden, by re-entrant activation "
        "checkpointing (use torch.utils.checkpoint with use_reentrant=False, or another batch size) or by a function whose "
        "backward calls modules or starts a backward pass"
    )


def not_finite(what: str) -> NonFiniteError:
    """The refusal of a batch that isn't finite before it is known where the model has its samples."""
    return NonFiniteError(
        f"{what} are not finite, in the first batch in which it was looked for where the model has its samples, which such a "
        "batch can't show; it is left out as a whole"
    )
