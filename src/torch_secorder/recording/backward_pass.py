"""One backward pass while it runs, and the refusals of passes that cannot be counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import get_ident

from torch import Tensor

from torch_secorder.capture.model_run import Forward
from torch_secorder.capture.records import Record
from torch_secorder.errors import CoverageError, LifecycleError, UnsupportedError
from torch_secorder.graph.uses import IdleUse, ParameterUse
from torch_secorder.model.parameters import Table
from torch_secorder.per_sample import one_direction, sign_vectors
from torch_secorder.recording.accumulator import PassAccumulator
from torch_secorder.recording.gradient_norms import GradientNorms
from torch_secorder.recording.sample_norms import SampleNorms


@dataclass(eq=False)
class BackwardPass:
    """A backward pass while it runs.

    Attributes:
        task: its number.
        accumulator: collects its squared norms.
        gradients: the norms of the parameters' own gradients.
        projections: position -> the parameter's own gradient along one direction, in a pass that is checked.
        special: whether the library's sums need settings of their own, since autocast is on, memory is limited, or a mode of the
            user's sees every operation.
        thread: the thread that it began in.
        error: the first error, which is raised at the end of the pass.
        is_of_empty_batch: whether it went through a call of the model without samples.
        kind: a hash of the model's graph and of the loss's, equal for passes that are checked as often as if they were one.
        broadcast: where the loss makes ``[n, n]`` of n outputs: the name of the node that does it, and the outputs' shape there.
        loss_reduction: how the loss combines its samples, where its graph shows that.
    """

    task: int
    accumulator: PassAccumulator
    gradients: GradientNorms
    special: bool
    projections: dict[int, Tensor] = field(default_factory=dict)
    thread: int = field(default_factory=get_ident)
    error: Exception | None = None
    kind: int = 0
    is_of_empty_batch: bool = False
    broadcast: tuple[str, tuple[int, ...]] | None = None
    loss_reduction: str | None = None

    def project(self, position: int, grad: Tensor) -> None:
        """Note a parameter's own gradient along one direction."""
        left, right = sign_vectors(grad.shape, grad)
        along = left @ (one_direction(grad.detach()).reshape(len(left), len(right)) @ right)
        self.projections[position] = self.projections.get(position, 0) + along


# Finds a pass as long as autograd keeps it.
PassReference = Callable[[], "BackwardPass | None"]

# Raises if something is wrong with what a pass found.
Check = Callable[[BackwardPass, SampleNorms], None]


def described(table: Table, seen: Record | ParameterUse | IdleUse | None) -> str:
    """The names of what has a gradient, for messages."""
    if isinstance(seen, Record):
        return str(seen.site)
    targets = seen.targets if isinstance(seen, ParameterUse) else []
    names = [table.names[target] if isinstance(target, int) else str(target.site) for target in targets]
    return ", ".join(names) or "this batch"


def counted_again(seen: Record | ParameterUse | IdleUse | Forward) -> LifecycleError:
    """The refusal of a backward pass that reaches samples which another pass has counted."""
    if isinstance(seen, Forward):
        what = "the model"
    else:
        what = str(seen.site) if isinstance(seen, Record) else "a parameter's use outside of its module"
    return LifecycleError(
        f"{what}: a second backward pass went through the same forward, whose samples are counted already: add the losses and "
        "differentiate their sum, or all at once (torch.autograd.backward([first, second])); for other samples call the model "
        'again; or pass repeated_calls="new" to count them as new samples'
    )


def changed_by_hook(what: str) -> UnsupportedError:
    """The refusal of a pass in which a hook changes a gradient after the node where it is taken apart by samples."""
    return UnsupportedError(
        f"{what}: a hook on the node that computes its gradients (grad_fn.register_hook) changes them, or was put on in the "
        "backward pass itself, so that no sample's share in them is known; the batch is left out: change the gradient of the "
        "layer's output instead (a hook on that tensor, or grad_fn.register_prehook), or the parameter's own (a hook on the "
        "parameter)"
    )


def partly_passed_over(every: int) -> LifecycleError:
    """The refusal of a pass that goes through a recorded call of the model and through one that is not recorded."""
    return LifecycleError(
        f"one backward pass reached a call of the model that every={every} passed over, and one that it did not: enter and leave "
        "the monitor's block for the steps to watch instead"
    )


def vmapped_pass() -> UnsupportedError:
    """The refusal of a backward pass that computes many gradients at once."""
    return UnsupportedError(
        "a backward pass under vmap (torch.autograd.grad with is_grads_batched=True, torch.func.vmap) computed gradients of "
        "analyzed parameters, of several losses at once, whose samples are left out: differentiate the loss of the batch in a "
        "pass of its own, and such gradients outside of the monitor's block"
    )


def replaced(names: Sequence[str]) -> CoverageError:
    """The refusal of a pass through a model whose parameters of these names are not those that are watched."""
    return CoverageError(
        f"{', '.join(names)}: replaced, removed or added since the monitor was made (by an assignment to a module or a "
        "parameter); the batch is left out: leave the block, and make a new monitor for the model as it is now"
    )
