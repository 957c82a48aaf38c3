"""One forward of a model under hooks, and any number of backward passes through it that write no ``.grad``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from torch_secorder.capture import Capture, probing
from torch_secorder.errors import ArgumentError, CoverageError, ShapeError, UnsupportedError
from torch_secorder.graph import Audit, Memory, Use
from torch_secorder.parameters import ParameterTable
from torch_secorder.passes import Pass, Samples
from torch_secorder.plan import Plan
from torch_secorder.records import Forward, Record
from torch_secorder.trees import mapped, rows, sample_axis, shrunk, tensors


class Run:
    """``with Run(...) as run: outputs = run(inputs); samples = run.backward(loss)``.

    Args:
        model: the model, unwrapped.
        table: the analysed parameters.
        plan: how it is captured.
        create_graph: make the squared norms differentiable.
        memory: what is known about the model already.
        trusting: believe shapes that allow one reading only, for callers that check a sample afterwards.

    Attributes:
        n: how many samples the latest forward had.
        random: whether it drew from the global random state.
        structure: tells its graph from graphs of other nodes.
    """

    def __init__(
        self,
        model: nn.Module,
        table: ParameterTable,
        plan: Plan,
        *,
        create_graph: bool = False,
        memory: Memory,
        trusting: bool,
    ):
        self._model, self._table, self._plan, self._create_graph = model, table, plan, create_graph
        self._capture = Capture(
            *(model, plan.sites, self._arrived, plan.batch_axis, plan.guards),
            on_end=self._audited,
        )
        self._memory = memory
        self._audit = Audit(*(table, self._used, plan.batch_axis, self._memory, self._rehearse), trusting=trusting)
        self._pass: Pass | None = None
        self._error: Exception | None = None
        self._starts: list[tuple[Record | Use, list[GradientEdge]]] = []
        self._arguments: Any = None
        self._inputs: list[Tensor] = []
        self._defers = False
        self._deferred: list[Callable[[], None]] = []  # what has to wait for the end of the backward pass
        self.n = self.structure = 0
        self.random = False

    def __enter__(self) -> Run:
        self._capture.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._capture.__exit__(*exc_info)
        self._starts, self._arguments = [], None

    def __call__(self, inputs: Any) -> Any:
        """The model's outputs: a tensor is the argument, a tuple all positional and a mapping all keyword arguments."""
        self._arguments = inputs
        self._inputs = [x for x in tensors(inputs) if x.requires_grad]
        before = random_state()
        with torch.enable_grad():
            outputs = called(self._model, inputs)
        self.random = not all(map(torch.equal, before, random_state()))
        return outputs

    def _rehearse(self) -> None:
        """See where samples are in a batch of three of them, which costs far less than in the whole batch."""
        n, axis = self._capture.last.n, self._plan.batch_axis
        if n is None or n < 8:
            return
        few = rows(self._arguments, [0, 1, 2], n, axis)
        capture = Capture(
            *(self._model, self._plan.sites, lambda record, grad: None, axis), on_end=lambda *found: audit.uses(*found)
        )
        audit = Audit(self._table, lambda use, grads: None, axis, self._memory)
        self._capture.active = False
        try:
            with fork_random(self._table.tensors), undisturbed(self._model), torch.enable_grad(), capture:
                called(self._model, few)
        finally:
            self._capture.active = True

    def _audited(self, forward: Forward, outputs: Any) -> None:
        uses = self._audit.uses(forward, outputs)
        self._starts = [
            (record, [edge]) for record, edge in forward.records if record.starts_graph and record.placement
        ]
        self._starts += [(use, use.edges(node)) for use, node in uses if use.starts_graph]
        self._defers = any(use.calls_nodes for use, _ in uses)
        self.n, self.structure = forward.n or 0, self._audit.structure

    def backward(self, root: Tensor, seed: Tensor | None = None, *, last: bool = True) -> Samples:
        """Squared norms of the per-sample gradients of ``root`` (with ``seed`` for its gradient).

        Only what lies between the root and the first analysed layers' outputs is differentiated, so no parameter gradient
        is computed.

        Args:
            root: what is differentiated.
            seed: its gradient, for a root that is not a scalar.
            last: whether the graph may be freed.
        """
        self._pass, self._error = Pass(self._table, keep=not last or self._create_graph), None
        edges = [edge for _, several in self._starts for edge in several]
        if root.requires_grad and (edges or self._inputs):
            self._deferred = []
            found = self._gradients(root, [*edges, *self._inputs], seed, not last or self._create_graph or self._defers)
            with torch.set_grad_enabled(self._create_graph):
                for action in self._deferred:
                    self._guarded(action)
                arrived = iter(found)
                for item, several in self._starts:
                    grads = tuple(itertools.islice(arrived, len(several)))
                    self._guarded(partial(self._add, item, several[0].node, grads))
                if self._error is not None:
                    raise self._error
                if self._pass:
                    self._memory.warned = self._memory.warned or self._pass.warned()
                    return self._pass.finish()
        raise CoverageError("the loss does not depend on any analysed parameter through a differentiable way")

    def _gradients(self, root: Tensor, inputs: list[Any], seed: Tensor | None, retain: bool) -> Sequence[Tensor | None]:
        options = {"retain_graph": retain, "create_graph": self._create_graph, "allow_unused": True}
        try:
            return torch.autograd.grad(root, inputs, seed, **options)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedError(
                "re-entrant activation checkpointing computes gradients only together with those of the parameters: use "
                "torch.utils.checkpoint with use_reentrant=False, or a FisherMonitor around your own backward"
            ) from error

    def _arrived(self, record: Record, grad: Tensor) -> None:
        if not record.starts_graph:  # those that do come from _gradients
            self._guarded(lambda: None if self._pass is None else self._pass.add(record, grad))

    def _used(self, use: Use, grads: tuple[Tensor | None, ...]) -> None:
        if self._capture.active and not probing() and not use.starts_graph and self._pass is not None:
            action = partial(self._pass.add_use, use, torch._C._current_autograd_node(), grads)
            if use.calls_nodes:
                self._deferred.append(action)
            else:
                self._guarded(action)

    def _add(self, item: Record | Use, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        assert self._pass is not None
        if isinstance(item, Use):
            self._pass.add_use(item, node, grads)
        elif grads[0] is not None:
            self._pass.add(item, grads[0])

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do something inside of a backward pass, which must not be left half-way."""
        if self._error is None and self._pass is not None:
            try:
                action()
            except Exception as error:
                self._error = error


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
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What a forward changes gets its values back: buffers, and tables that ``max_norm`` rewrites."""
    kept: list[tuple[Any, str, Tensor]] = [
        (m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    for m in model.modules():
        if getattr(m, "max_norm", None) is not None:
            kept += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
    before = [(owner, name, value, value._version, value.detach().clone()) for owner, name, value in kept]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, tensor, version, value in before:
                if tensor._version != version:
                    tensor.copy_(value)
                owner[name] = tensor


def reduction_of(
    loss_fn: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, loss: Tensor, n: int, axis: int = 0
) -> str:
    """Whether a loss averages or sums over the batch, found out by giving it samples twice.

    One sample twice is enough; where its loss says nothing (zero, or NaN because its target is ignored), the whole batch
    is taken, and after that the batch with other outputs.

    Raises:
        ArgumentError: if twice the samples give neither the loss nor twice the loss.
    """
    found: list[float] = []
    tolerance = 2e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
    with torch.no_grad(), torch.random.fork_rng(devices=[loss.device] if loss.is_cuda else []):
        for size, index in ((1, [0]), (n, list(range(n)))):
            # Also for other outputs: the ratio of differences shows a constant that the loss itself may hide.
            single, double = [], []
            few = rows(outputs, index, n, axis)
            for out in (few, mapped(shrunk, few)):
                tgt = rows(targets, index, n, axis)
                single.append(float(loss_fn(out, tgt)))
                twice = [*range(size)] * 2
                double.append(float(loss_fn(rows(out, twice, size, axis), rows(tgt, twice, size, axis))))
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
