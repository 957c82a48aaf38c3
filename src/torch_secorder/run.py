"""One forward of a model under hooks, for any number of backward passes through it; and what leaves the user's model alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_secorder.backward import Passes
from torch_secorder.capture import Capture
from torch_secorder.engine import own_call
from torch_secorder.errors import ArgumentError, ShapeError, UnsupportedError
from torch_secorder.graph import Audit, Memory, Use, without_second_derivative
from torch_secorder.hooks import Attached, at_last
from torch_secorder.parameters import ParameterTable
from torch_secorder.plan import Plan
from torch_secorder.records import Record
from torch_secorder.trees import mapped, rows, sample_axis, shrunk, tensors


class Run(Attached, Passes):
    """``with Run(...) as run: outputs = run(inputs); samples = run.backward(loss)``: one forward of a model under hooks.

    Args:
        model: the model, unwrapped.
        plan: how it is captured.
        activations: also watch every module's output.
        options: as for :class:`Passes`.

    Attributes:
        random: whether the latest forward drew from the global random state.
    """

    def __init__(
        self,
        model: nn.Module,
        table: ParameterTable,
        plan: Plan,
        memory: Memory,
        *,
        activations: bool = False,
        **options: Any,
    ):
        super().__init__(table, memory, plan.batch_axis, self._rehearse, **options)
        self._model, self._plan = model, plan
        sites = plan.sites + (plan.watched(model) if activations else [])
        self._capture = Capture(
            *(model, sites, self._arrived, plan.batch_axis, plan.guards),
            on_end=self.audited,
            anchored=bool(table.coded),
            alone=True,
        )
        self._arguments: Any = None
        self.random = False

    def active(self) -> bool:
        """Whether gradients that arrive now are of the pass under way, and not of a rehearsal."""
        return self._capture.active and super().active()

    def _attach(self) -> None:
        self._capture.__enter__()

    def _detach(self) -> None:
        self._capture.__exit__()
        for record in self._records:
            record.inputs, record.kwargs = None, {}  # the graph, which may outlive this, has the records in its hooks
        self._starts, self._arguments, self._records = [], None, []

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs: a tensor is the argument, a tuple all positional and a mapping all keyword arguments."""
        self._arguments = inputs
        self._inputs = [x for x in tensors(inputs) if x.requires_grad]
        before = random_state()
        with torch.enable_grad(), twice_differentiable(self._create_graph):
            outputs = called(self._model, inputs)
        self.random = not all(map(torch.equal, before, random_state()))
        if self._create_graph:
            check_twice_differentiable(outputs, self._table)
        return outputs

    def _rehearse(self) -> None:
        """See where samples are in a batch of three of them, which costs far less than in the whole batch."""
        n, axis = self._capture.last.n, self._plan.batch_axis
        if n is None or n < 8:
            return
        few = rows(self._arguments, [0, 1, 2], n, axis)
        capture = Capture(
            *(self._model, self._plan.sites, lambda record, grad: None, axis),
            on_end=lambda *found: audit.uses(*found),
            anchored=bool(self._table.coded),
            alone=True,
        )
        audit = Audit(self._table, lambda use, grads: None, axis, self._memory)
        self._capture.active = False
        try:
            with (
                fork_random(self._table.tensors),
                same_versions(self._model),
                undisturbed(self._model),
                torch.enable_grad(),
                capture,
            ):
                called(self._model, few)
        finally:
            self._capture.active = True

    def _add(self, item: Record | Use, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        with self._capture.again():
            super()._add(item, node, grads)

    def _arrived(self, record: Record, grad: Tensor) -> None:
        if not record.starts_graph:  # those that do come from _gradients
            self._guarded(lambda: None if self._pass is None else self._pass.add(record, grad))


@contextmanager
def fork_random(parameters: Sequence[Tensor]) -> Iterator[None]:
    """What is drawn inside leaves the global random state alone, also on the parameters' devices."""
    devices = list({p.device for p in parameters if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield


def random_state() -> list[Tensor]:
    """The state of every global random generator in use."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def called(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)``, with a tuple spread over positions and a mapping over keywords."""
    with own_call():
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def twice_differentiable(wanted: bool) -> AbstractContextManager[object]:
    """Attention by operations that have second derivatives, where they are wanted: the fused ones have none."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


def check_twice_differentiable(outputs: Any, table: ParameterTable) -> None:
    """Raise if the graph of these outputs has a fused operation that can't be differentiated twice."""
    if found := without_second_derivative(outputs, table):
        what, remedy = found
        raise UnsupportedError(
            f"create_graph: {what} has no second derivative; compute it under {remedy}, by operations that have one"
        )


def same_versions(model: nn.Module) -> AbstractContextManager[object]:
    """What a forward changes and :func:`undisturbed` puts back is as good as untouched, for a graph that is there already."""
    return _unsafe_preserve_version_counter((*model.parameters(), *model.buffers()))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What a forward changes gets its values back: buffers, and tables that ``max_norm`` rewrites."""
    modules = list(model.modules())
    kept: list[tuple[Any, str, Tensor]] = [
        (m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None
    ]
    for m in modules:
        if vars(m).get("max_norm", getattr(type(m), "max_norm", None)) is not None:
            kept += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
    before = [(owner, name, value, value._version, value.detach().clone()) for owner, name, value in kept]

    @torch.no_grad()
    def restore() -> None:
        for owner, name, tensor, version, value in before:
            # (The kernel that updates running statistics counts no version. What is untouched must stay so, for a later
            # backward pass may want it.)
            if tensor._version != version or not torch.equal(tensor, value):
                tensor.copy_(value)
            owner[name] = tensor

    with at_last(restore):
        yield


def reduction_of(
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    targets: Any,
    loss: Tensor,
    n: int,
    axis: int = 0,
    expected: str | None = None,
) -> str:
    """Whether a loss averages or sums over the batch, found out by giving it samples twice.

    One sample twice is enough; where its loss says nothing (zero, or NaN because its target is ignored), the whole batch
    is taken, and after that the batch with other outputs. What was found out for this loss before, and is ``expected``, only has
    to hold for the loss of one sample.

    Raises:
        ArgumentError: if twice the samples give neither the loss nor twice the loss.
    """
    found: list[float] = []
    tolerance = 2e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
    with torch.no_grad(), torch.random.fork_rng(devices=[loss.device] if loss.is_cuda else []):
        if expected is not None:
            one = [rows(value, [0], n, axis) for value in (outputs, targets)]
            alone, again = _number(loss_fn, *one), _number(loss_fn, *(rows(value, [0, 0], 1, axis) for value in one))
            if abs(_ratio(again, alone) - {"mean": 1, "sum": 2}[expected]) < tolerance:
                return expected
        for size, index in ((1, [0]), (n, list(range(n)))):
            # Also for other outputs: the ratio of differences shows a constant that the loss itself may hide.
            single, double = [], []
            few = rows(outputs, index, n, axis)
            for out in (few, mapped(shrunk, few)):
                tgt = rows(targets, index, n, axis)
                single.append(_number(loss_fn, out, tgt))
                twice = [*range(size)] * 2
                double.append(_number(loss_fn, rows(out, twice, size, axis), rows(tgt, twice, size, axis)))
            ratio = _ratio(double[0], single[0])
            change = _ratio(double[0] - double[1], single[0] - single[1])
            for value, name in ((1.0, "mean"), (2.0, "sum")):
                agrees = math.isnan(change) or abs(change - value) < 0.1
                if (
                    abs((change if math.isnan(ratio) else ratio) - value) < (0.1 if math.isnan(ratio) else tolerance)
                    and agrees
                ):
                    return name
            found.append(ratio)
    if not bool(loss.isfinite()):
        return "mean"  # the gradients will say which parameters are hit
    raise ArgumentError(
        "the loss neither averages nor sums over the batch: given every sample twice it is "
        f"{' / '.join(f'{ratio:.6g}' for ratio in found)} times as large, not 1 or 2 times (a loss that compares samples "
        "with each other has no per-sample gradients)"
    )


def _number(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> float:
    try:
        return float(loss_fn(outputs, targets))
    except Exception as error:
        raise ArgumentError(
            f"the loss can't be told to average or to sum, since it takes no other number of samples ({str(error)[:200]})"
        ) from error


def _ratio(a: float, b: float) -> float:
    return a / b if b and math.isfinite(b) else math.nan


def checked_loss(loss: Any, n: int, targets: Any) -> Tensor:
    """The loss, if it is a scalar tensor."""
    if not isinstance(loss, Tensor):
        raise ArgumentError(f"the loss must be a scalar tensor, not {type(loss).__name__}")
    if loss.numel() != 1:
        raise ArgumentError(
            f'the loss must be a scalar, not of shape {tuple(loss.shape)}: average or sum it, e.g. reduction="mean"'
        )
    return loss


def checked_targets(targets: Any, n: int, axis: int = 0) -> None:
    """Raise if there is another number of targets than of samples."""
    if isinstance(targets, Tensor) and targets.dim() and sample_axis(targets, n, axis) is None:
        raise ShapeError(f"{n} samples in the inputs and {targets.shape[0]} in the targets")
