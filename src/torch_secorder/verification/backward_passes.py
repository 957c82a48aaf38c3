"""The conditions that a user's backward pass must meet before its samples count."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, nn

from torch_secorder.errors import CoverageError, CurvatureError, listed
from torch_secorder.graph.refusals import not_finite
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.recording.backward_pass import BackwardPass, replaced
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.verification.gradient_sums import unexplained_gradients


def require_sound_pass(
    model: nn.Module,
    table: ParameterTable,
    positions: Sequence[int],
    norms: Tensor,
    current: BackwardPass,
    samples: SampleNorms,
) -> None:
    """Raise unless the captured gradients account for every parameter gradient of a pass.

    Args:
        model: the model.
        table: its analyzed parameters.
        positions: the positions of the parameters that got a gradient.
        norms: the norms of these gradients.
        current: the pass.
        samples: the squared norms that it found.

    Raises:
        CoverageError: naming the parameters that are not accounted for.
        NonFiniteError: if the reason is that their gradients are not finite.
    """
    if len(samples.reached) < len(table.rows):
        _require_present(model, table, samples)
    if not samples.reached.issuperset(positions):
        missed = [index for index, position in enumerate(positions) if position not in samples.reached]
        raise unaccounted([table.names[positions[index]] for index in missed], norms[missed])
    if current.projections and not samples.skipped:
        _require_explained_sums(table.names, current, samples)


def _require_present(model: nn.Module, table: ParameterTable, samples: SampleNorms) -> None:
    """Raise unless every parameter that the pass did not reach still belongs to the model."""
    missed = [position for position in range(len(table)) if position not in samples.reached]
    if gone := [table.names[position] for position in missed if not table.is_present(position, model)]:
        raise replaced(gone)


def require_trainable(table: ParameterTable, current: BackwardPass, samples: SampleNorms) -> None:
    """Raise unless every parameter still requires a gradient; otherwise its uses are in no graph.

    Raises:
        CoverageError: naming the parameters that require none.
    """
    if not all(map(attrgetter("requires_grad"), table.leaves)):
        frozen = [name for name, leaf in zip(table.names, table.leaves, strict=True) if not leaf.requires_grad]
        raise CoverageError(
            f"{', '.join(frozen)}: frozen since the monitor was made (requires_grad_(False)); the batch is left out: leave the "
            'block, and make a new monitor for the model as it is now, with parameters="all" to analyze frozen parameters too'
        )


def is_of_nothing(norms: Tensor) -> bool:
    """Whether gradients of these norms may be those of an empty batch: zero, or not known since a hook may change them."""
    return bool(((norms == 0) | norms.isnan()).all())


def unaccounted(names: Sequence[str], norms: Tensor) -> CurvatureError:
    """The refusal of a pass in which these parameters got gradients that nothing accounts for."""
    if not bool(norms.isfinite().all()):
        return not_finite(f"the gradients of {listed(names, 'parameter')}")
    return CoverageError(
        f"the backward pass reached {listed(names, 'parameter')} by a way that nothing accounts for: a loss of the weights "
        "alone, such as a penalty (differentiate it outside of the block), a loss that takes a parameter itself, such as a "
        "learned variance or temperature (let the model return it expanded to its samples, p.expand(n, -1)), a forward that ran "
        "before the block was entered (call the model inside), something that the model doesn't return, a part inside of "
        "re-entrant checkpointing (pass use_reentrant=False), or code that ran compiled (under a stance of torch.compiler that "
        "was set inside the block, or in a pass that every= left out); the batch is left out"
    )


def without_a_call(model: str, names: Sequence[str], norms: Tensor) -> CurvatureError:
    """The refusal of a pass that gave these parameters gradients although no call of the model was seen in the block."""
    if not bool(norms.isfinite().all()):
        return unaccounted(names, norms)
    return CoverageError(
        f"the backward pass reached {listed(names, 'parameter')}, but no call of this {model} was seen inside the block: call "
        "the model, too, inside the with statement. Code that ran compiled under a stance of torch.compiler that was set inside "
        "the block isn't seen either; the batch is left out"
    )


def _require_explained_sums(names: Sequence[str], current: BackwardPass, samples: SampleNorms) -> None:
    """Raise unless the captured gradients add up to autograd's own, in a pass that noted these along one direction."""
    found = current.accumulator
    if wrong := unexplained_gradients(found.projections, current.projections, samples.squared_norms, found.half):
        raise CoverageError(
            f"the gradient of {listed([names[position] for position in wrong], 'parameter')} is not the sum of what the model's "
            "samples contribute. Either the loss uses them by another way than through the model, as a weight penalty does (it "
            "belongs to no sample: differentiate it in a backward pass outside of the block, or use the optimizer's "
            "weight_decay), or they are used both inside of re-entrant checkpointing and outside of it (pass "
            'use_reentrant=False), or a call of the model takes what another call has computed (pass repeated_calls="same" if '
            "row n of both belongs to one sample), or a rule is wrong; the batch is left out"
        )
