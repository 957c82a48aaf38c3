"""FisherMonitor: the context manager around the user's own forward and backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torch_secorder.arguments import loss_scale_value, require_choice, require_max_memory
from torch_secorder.autograd.engine import (
    after_backward,
    current_graph_task,
    current_node,
    in_search_pass,
    is_library_pass,
    raise_after_backward,
)
from torch_secorder.autograd.hooks import Hooks, hook_count
from torch_secorder.batch_axis.knowledge import knowledge_of
from torch_secorder.capture.module_hooks import Capture
from torch_secorder.capture.records import Forward, Record
from torch_secorder.errors import ArgumentError, CoverageError, LifecycleError, NonFiniteError
from torch_secorder.graph.audit import Audit
from torch_secorder.graph.frontier import Use
from torch_secorder.model.containers import tensors
from torch_secorder.model.hooks import Hook, HookScope
from torch_secorder.model.parameters import ParameterTable, named_modules, unwrapped
from torch_secorder.model.ranks import class_as_written, whole
from torch_secorder.model.restore import lock_of
from torch_secorder.per_sample import as_refusal, direction
from torch_secorder.recording.accumulator import Pass
from torch_secorder.recording.gradient_norms import OpenPass, full_precision, is_autocast
from torch_secorder.recording.plan import BatchAxis, planned
from torch_secorder.results.results import Results
from torch_secorder.verification.plain_autograd import compare, squared_norms_of_first


class FisherMonitor(HookScope, Results):
    r"""Exact empirical-Fisher traces of every parameter, from the forward and backward passes that run inside.

    With samples n = 1..N, l_n a sample's loss and g_n its gradient, the contribution of parameter p is

    .. math:: \mathrm{fisher\_trace}[p] = c \sum_n \lVert g_{n,p} \rVert^2,

    c = 1/N for ``reduction="mean"``, c = 1 for ``"sum"``. This is never the squared gradient of the batch. The
    samples of all backward passes are pooled. The gradients that the user gets in ``.grad`` are bit-identical to those
    without the monitor.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        reduction: how the loss that is differentiated combines its samples, "mean" or "sum".
        loss_scale: the factor that the loss was multiplied by: 1/k for ``loss / k`` over k accumulation steps, or a
            GradScaler's scale. A number, or a function that is called at each backward pass.
        parameters: "trainable", or "all" for frozen ones too.
        diagonal: also keep the Fisher diagonal, a tensor of each parameter's size.
        per_sample: also keep every t_{n,p}.
        activations: also keep account of every module's output: its Fisher trace and its moments.
        batch_axis: where the samples are counted, if not on axis 0: an int for the model's inputs and all of its
            layers, or a mapping from module names to axes ("" is the model itself).
        nonfinite: "raise" when a gradient is infinite or NaN, or "skip" those samples.
        repeated_calls: what it means that one backward pass reaches two calls of the model: "same" if row n of both is
            one sample (siamese networks), "new" if they are different samples. By default that is an error.
        every: watch the first of every so many calls of the model only, at about the price of a plain step for the others.
        fisher: what the differentiated losses make of it, for ``report().attrs`` and all that reads them: "empirical" for
            the data's labels, "sampled" for labels that were drawn from the model's own prediction, "observed" for
            log-likelihoods of the data's labels.
        max_memory: how many bytes what is computed for one parameter may take at once, above the layer's own input and output
            gradient and what is kept of the result. By default a few MiB, or one sample's gradient where it is larger;
            smaller budgets cost time. A convolution takes one sample at least, and so does an operation without a rule.

    Raises:
        ArgumentError: for an argument that means nothing, or a model with no trainable parameter.
        UnsupportedError: naming all frozen layers without a rule, where ``parameters="all"`` asks for them.

    Example:
        >>> import torch
        >>> from torch_secorder import FisherMonitor
        >>> model = torch.nn.Linear(3, 2)
        >>> with FisherMonitor(model) as monitor:
        ...     for _ in range(4):
        ...         x, y = torch.randn(8, 3), torch.randint(2, (8,))
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        >>> monitor.n_samples
        32
        >>> list(monitor.report().index)
        ['weight', 'bias']
    """

    def __init__(
        self,
        model: nn.Module,
        reduction: str = "mean",
        *,
        loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        parameters: str = "trainable",
        diagonal: bool = False,
        per_sample: bool = False,
        activations: bool = False,
        batch_axis: BatchAxis = None,
        nonfinite: str = "raise",
        repeated_calls: str | None = None,
        every: int = 1,
        fisher: str = "empirical",
        max_memory: int | None = None,
    ):
        require_choice("reduction", reduction, ("mean", "sum"))
        require_choice("nonfinite", nonfinite, ("raise", "skip"))
        require_choice("repeated_calls", repeated_calls, (None, "same", "new"))
        require_choice("fisher", fisher, ("empirical", "sampled", "observed"))
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ArgumentError(f"every must be an int >= 1, not {every!r}")
        if not callable(loss_scale):
            loss_scale_value(loss_scale)
        self._model = unwrapped(model)
        with lock_of(self._model):
            table = ParameterTable(self._model, parameters)
        planned(self._model, table, batch_axis)  # refuse now what can't be right later
        self._table = table
        keeps = {"diagonal": diagonal, "per_sample": per_sample, "activations": activations}
        super().__init__(table, reduction, fisher, **keeps)
        self._loss_scale, self._nonfinite, self._every = loss_scale, nonfinite, every
        self._repeated_calls, self._batch_axis, self._diagonal = repeated_calls, batch_axis, diagonal
        self._types = {name: class_as_written(module).__name__ for name, module in named_modules(self._model)}
        self._all, self._max_memory = parameters == "all", require_max_memory(max_memory)
        self._memory = knowledge_of(self._model, batch_axis, checks=False)
        self._capture: Capture | None = None
        self._hooks = Hooks()
        self._passes: WeakValueDictionary[int, OpenPass] = WeakValueDictionary()
        self._turn = RLock()  # several threads may train the model
        self._outputs: list[weakref.ref[Tensor]] = []  # of the model's latest call
        self._expected: Tensor | None = None  # the first sample's squared norms, where they are to be verified
        self._parents: dict[int, int] = {}  # a backward pass inside of another one (checkpointing) -> the outer one

    # ------------------------------------------------------------------------------------------------ the block

    def __enter__(self) -> FisherMonitor:
        if self._capture is not None:
            raise LifecycleError("this monitor is active already; leave its block first, or use a second monitor")
        return super().__enter__()

    def _attach(self) -> None:
        self._table.gather(self._model)
        plan = planned(self._model, self._table, self._batch_axis)
        sites = plan.sites + (plan.watched(self._model) if self._statistics.keeps["activations"] else [])
        audit = Audit(self._table, self._used, plan.batch_axis, self._memory)
        self._capture = Capture(
            *(self._model, sites, self._arrived, plan.batch_axis, plan.guards),
            anchored=self._all,
            on_replay=self._opened,
            on_end=partial(self._ended, audit.uses),
            every=self._every,
        )
        self._capture.__enter__()
        for position, (tensor, leaf) in enumerate(zip(self._table.tensors, self._table.leaves, strict=True)):
            for watched in (leaf,) if leaf is tensor else (leaf, tensor):  # a shard is in the graph of a penalty only
                if watched.requires_grad:
                    self._hooks.add(watched, watched.register_hook, Hook(self, "_gradient", position))

    def _detach(self) -> None:
        self._passes.clear()
        self._parents.clear()
        self._hooks.remove()
        if self._capture is not None:
            self._capture.__exit__()
            self._capture = None

    @property
    def _counts(self) -> bool:
        return self._table.ranks.first

    def _ended(self, audit: Callable[[Forward, Any], object], forward: Forward, outputs: Any) -> None:
        """The model returns."""
        audit(forward, outputs)
        self._outputs = [weakref.ref(x) for x in tensors(outputs)]

    def _arrived(self, record: Record, grad: Tensor) -> None:
        """The gradient of a module's output, inside the backward pass."""
        outer = record.forward.recomputed_in
        if outer is not None and outer != (task := current_graph_task()):
            self._parents[task] = outer
        self._guarded(self._add, record, grad)

    def _used(self, use: Use, grads: tuple[Tensor | None, ...]) -> None:
        """The gradients at a use outside of any hooked module's call have arrived."""
        if self._capture is not None and self._capture.active and not in_search_pass():
            node = current_node()
            self._guarded(self._add_use, use, node, grads)

    def _add_use(self, current: OpenPass, use: Use, node: Node, grads: tuple[Tensor | None, ...]) -> None:
        self._once(use, current.task, "a parameter's use outside of its module")
        current.collected.add_use(use, node, grads)

    def _add(self, current: OpenPass, record: Record, grad: Tensor) -> None:
        self._once(record, current.task, record.site)
        current.collected.add(record, grad)

    def _once(self, seen: Record | Use, task: int, what: object) -> None:
        if seen.last_pass not in (None, task) and self._repeated_calls != "new":
            raise LifecycleError(
                f"{what}: a second backward pass went through the same forward, whose samples are counted "
                'already; call the model again, or pass repeated_calls="new" to count them as new samples'
            )
        seen.last_pass = task

    def _gradient(self, position: int, grad: Tensor) -> None:
        """The gradient of a parameter, as this backward pass adds it to ``.grad``."""
        # Re-entrant checkpointing has backward passes inside of one that is passed over; those open none of ours.
        if self._passes or not (self._capture and self._capture.passed_over):
            self._guarded(self._add_gradient, position, grad)

    def _add_gradient(self, current: OpenPass, position: int, grad: Tensor) -> None:
        grad = whole(grad)
        # What a hook of the user's makes of a gradient is not in its factors, and not ours to check.
        as_computed = hook_count(self._table.leaves[position]) <= 1
        if not as_computed:
            current.collected.gradient_norms.pop(position, None)
        current.add(position, grad)
        if as_computed and current.collected.checks and not grad.is_sparse:
            left, right = direction(grad.shape, grad)
            along = left @ (grad.detach().reshape(len(left), -1) @ right)
            current.projections[position] = current.projections.get(position, 0) + along

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Do something for the backward pass under way; what goes wrong must wait for its end."""
        task = current_graph_task()
        if is_library_pass(task):
            return
        current = self._opened(self._parents.get(task, task) if self._parents else task)
        if current.error is not None:
            return
        if self._capture is not None and task in self._capture.passed_over:
            current.error = LifecycleError(
                f"one backward pass reached a call of the model that every={self._every} passed over, and one that it did not: "
                "enter and leave the monitor's block for the steps to watch instead"
            )
            return
        try:
            if current.autocast:
                with full_precision():
                    action(current, *args)
            else:
                action(current, *args)
        except Exception as error:
            current.error = as_refusal(error)

    def _opened(self, task: int) -> OpenPass:
        current = self._passes.get(task)
        if current is None:
            collected = Pass(
                self._table,
                diagonal=self._diagonal,
                repeated_calls=self._repeated_calls,
                keep=self._repeated_calls == "new",
                checks=self._statistics.passes.bit_count() < 2,
                gradients=True,
                max_memory=self._max_memory,
            )
            current = self._passes[task] = OpenPass(task, collected, is_autocast())
            # Autograd alone keeps it: a pass that an exception breaks off is gone with its traceback.
            after_backward(partial(self._closed, task, current))
        return current

    def verify(self, loss: Tensor) -> None:
        """Have the next backward pass, which must be that of ``loss``, checked for one sample.

        The first sample's gradient is taken by plain autograd, through the outputs of the model's latest call inside the
        block, which must still be there; at the end of the backward pass the hooks must have found the same. It costs one more
        backward pass, and finds rules that are wrong and samples that were looked for in the wrong place.
        :func:`fisher_report` does the like by itself.

        Args:
            loss: computed from the model's latest outputs inside this monitor's block, not yet differentiated.

        Raises:
            VerificationError: at the end of the backward pass, naming the parameters that differ.
            LifecycleError: outside of the block, or if the loss doesn't depend on the latest outputs.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(3, 2)
            >>> with FisherMonitor(model) as monitor:
            ...     outputs = model(torch.randn(8, 3))
            ...     loss = outputs.square().mean()
            ...     monitor.verify(loss)
            ...     loss.backward()
        """
        outputs = [x for reference in self._outputs if (x := reference()) is not None and x.requires_grad]
        if self._capture is None or not outputs:
            raise LifecycleError(
                "verify: call the model inside the monitor's block, keep its outputs, and pass their loss"
            )
        self._expected = squared_norms_of_first(loss, outputs, self._table.leaves, self._capture.batch_axis)

    def _closed(self, task: int, current: OpenPass) -> None:
        """A backward pass is over: count it, or raise why not. The user's gradients are complete by now."""
        if self._passes.pop(task, None) is None or self._capture is None:
            return
        for inner in [inner for inner, outer in self._parents.items() if outer == task]:
            del self._parents[inner]
        self._capture.loose = Forward(inside=False)
        try:
            with torch.no_grad(), full_precision(), self._turn:
                self._count(current)
        except Exception as error:
            raise_after_backward(as_refusal(error))

    def _count(self, current: OpenPass) -> None:
        if current.error is not None:
            raise current.error
        positions, norms = current.all_norms()
        if not (positions or current.collected):
            return
        samples = current.collected.finish(self._nonfinite) if current.collected else None
        reached = samples.reached if samples else set()
        if missed := [index for index, p in enumerate(positions) if p not in reached]:
            names = ", ".join(self._table.names[positions[index]] for index in missed)
            if not bool(norms[missed].isfinite().all()):
                raise NonFiniteError(
                    f"the gradients of {names} are not finite, in the first batch in which it was looked for where the model "
                    "has its samples, which such a batch can't show; it is left out as a whole"
                )
            raise CoverageError(
                f"the backward pass reached {names} by a way that nothing accounts for: through something that the "
                "model doesn't return, inside of re-entrant checkpointing, in compiled code, or in a forward that ran before "
                "the monitor was entered; the batch is left out"
            )
        assert samples is not None
        if wrong := current.collected.unexplained(current.projections, samples):
            raise CoverageError(
                f"the gradient of {', '.join(self._table.names[p] for p in wrong)} is not the sum of what the model's samples "
                "contribute: the loss uses these parameters by another way than through the model (a weight penalty, "
                "which belongs to no sample: differentiate it in a backward pass outside of the monitor, or use the "
                "optimizer's weight_decay), or they are used inside of re-entrant checkpointing and outside of it (use "
                "use_reentrant=False), or a rule is wrong; the batch is left out"
            )
        self._memory.warned = self._memory.warned or current.collected.warned()
        expected, self._expected = self._expected, None
        if expected is not None and not samples.skipped:
            compare(self._table.names, samples.norms[:, 0], expected, current.collected.half)
        factor = (
            samples.batch / loss_scale_value(self._loss_scale)
            if self._reduction == "mean"
            else 1 / loss_scale_value(self._loss_scale)
        )
        norms = norms / loss_scale_value(self._loss_scale)
        self._statistics.update(
            samples.norms.double() * factor**2,
            {p: [s.times(factor**2) for s in several] for p, several in samples.squares.items()},
            samples.rules,
            reached,
            dict(zip(positions, norms.square().tolist(), strict=True)),
            samples.skipped,
            samples.output_sums(self._types, factor**2),
        )

    def __reduce__(self) -> str:
        raise TypeError(
            "a monitor belongs to its model and is not copied: take its report(), its state_dict(), or save(path)"
        )

    def __repr__(self) -> str:
        state = "active" if self._capture is not None else "idle"
        return (
            f"FisherMonitor({type(self._model).__name__}, {len(self._table)} parameters, reduction={self._reduction!r}, "
            f"{self.n_samples} samples, {state})"
        )
