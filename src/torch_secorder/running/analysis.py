"""What the one-call functions share: batches in, per-sample squared norms out, with nothing of the user's changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import require_max_memory
from torch_secorder.batch_axis.knowledge import knowledge_of
from torch_secorder.errors import ArgumentError, CoverageError
from torch_secorder.graph.queries import used_by_loss
from torch_secorder.model.containers import mapped
from torch_secorder.model.hooks import restoring
from torch_secorder.model.parameters import ParameterTable, named_modules, unwrapped
from torch_secorder.model.ranks import class_as_written
from torch_secorder.model.restore import lock_of, restoring_buffers
from torch_secorder.recording.plan import BatchAxis, planned
from torch_secorder.recording.sample_norms import Samples
from torch_secorder.running.fisher_kind import FisherKind
from torch_secorder.running.loss import reduction_of, require_scalar_loss, require_targets_of_batch
from torch_secorder.running.run import Run


@dataclass(frozen=True)
class Batch:
    """One batch, analysed.

    Attributes:
        samples: squared norms of its per-sample gradients.
        outputs: what the model returned, without its graph, if that is to be checked.
        random: whether the forward drew random numbers.
        structure: tells the graph from graphs of other nodes.
        reduction: how the loss combines samples, where that was found out.
    """

    samples: Samples
    outputs: Any
    random: bool
    structure: int
    reduction: str = "sum"


class Analysis:
    """A model prepared for batches.

    Args:
        model: the user's model.
        parameters: "trainable" or "all".
        batch_axis: as in FisherMonitor.
        create_graph: make the norms differentiable.
        diagonal: also take the squares entry by entry.
        activations: also take the gradients in the outputs of all modules.
        max_memory: as in FisherMonitor.

    Attributes:
        memory: what is known about where the model's samples are.
        trusting: whether shapes that allow one reading only are believed.
        types: module -> its class, of the modules whose outputs are watched.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: str = "trainable",
        batch_axis: BatchAxis = None,
        *,
        create_graph: bool = False,
        diagonal: bool = False,
        activations: bool = False,
        max_memory: int | None = None,
    ):
        if torch.is_inference_mode_enabled():
            raise ArgumentError("torch.inference_mode() forbids gradients: call this outside of it")
        self.model, self._max_memory = unwrapped(model), require_max_memory(max_memory)
        self._keeps = {"diagonal": diagonal, "activations": activations}
        self.types = (
            {name: class_as_written(m).__name__ for name, m in named_modules(self.model)} if activations else {}
        )
        self._create_graph = create_graph
        with lock_of(self.model):
            self.table = ParameterTable(self.model, parameters)
            self.table.gather(self.model)
        self.memory = knowledge_of(self.model, batch_axis)
        # A graph of the checks would be kept along with the result's, so that there is none; and a check that fails on one rank
        # can't have the others do the batch once more.
        self.trusting = self.memory.trusting and not create_graph and not self.table.ranks.distributed
        with lock_of(self.model), self.differentiable():
            self._plan = planned(self.model, self.table, batch_axis)
        self.batch_axis = self._plan.batch_axis

    def empirical(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        checked: Callable[[int], bool] = lambda structure: True,
    ) -> Batch:
        """Squared norms of g_n.

        ``checked`` tells by the graph's structure whether the outputs will be wanted; else they are gone before the backward
        pass, which is when memory is scarcest.
        """
        with self._prepared() as run:
            outputs = run(inputs)
            require_targets_of_batch(targets, run.n, self.batch_axis)
            loss = require_scalar_loss(loss_fn(outputs, targets), run.n, targets)
            if direct := used_by_loss(loss, outputs, self.table):
                raise CoverageError(
                    f"the loss uses {', '.join(direct)} by another way than through the model's outputs; a penalty on weights "
                    "belongs to no sample: leave it out of the loss, or move the computation into the model's forward"
                )
            reduction = self.memory.reduction(
                loss_fn, partial(reduction_of, loss_fn, outputs, targets, loss, run.n, self.batch_axis)
            )
            kept = mapped(Tensor.detach, outputs) if self.table.ranks.distributed or checked(run.structure) else None
            del outputs
            samples = run.backward(loss)
        samples = samples.times(run.n**2 if reduction == "mean" else 1)
        return Batch(samples, kept, run.random, run.structure, reduction)

    def fisher(self, kind: FisherKind, inputs: Any, targets: Any, generator: torch.Generator) -> Samples:
        """Expected squared norms of the gradient of -log p(y | x_n)."""
        with self._prepared() as run:
            outputs = logits(run(inputs))
            require_targets_of_batch(targets, run.n, self.batch_axis)
            count, seeds = kind.output_gradients(outputs, targets, generator, self.table.ranks)
            passes = (
                run.backward(outputs, seed.to(outputs.dtype), last=number == count)
                for number, seed in enumerate(seeds, start=1)
            )
            nothing = Samples(run.n, outputs.new_zeros(len(self.table), run.n), {}, set(), {})
            return reduce(Samples.plus, passes, nothing)

    def of(self, root: Callable[[Any], Tensor], inputs: Any) -> Batch:
        """Squared norms of the per-sample gradients of ``root(outputs)``, a sum over samples."""
        with self._prepared() as run:
            outputs = run(inputs)
            return Batch(run.backward(root(outputs)), mapped(Tensor.detach, outputs), run.random, run.structure)

    def distrust(self) -> None:
        """Believe no shapes from now on."""
        self.memory.distrust()
        self.trusting = False

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """All analysed parameters require a gradient inside."""
        quantized = {id(self.table.tensors[position]) for position in self.table.quantized}
        analysed = {id(p): p for p in (*self.table.tensors, *self.table.leaves) if id(p) not in quantized}
        frozen = [p for p in analysed.values() if not p.requires_grad]

        def require(wanted: bool) -> None:
            for p in frozen:
                p.requires_grad_(wanted)

        with restoring(partial(require, False)):
            require(True)
            yield

    @contextmanager
    def _prepared(self) -> Iterator[Run]:
        run = Run(
            self.model,
            self.table,
            self._plan,
            self.memory,
            create_graph=self._create_graph,
            **self._keeps,
            trust_shapes=self.trusting,
            max_memory=self._max_memory,
        )
        # (Left twice: an interruption at the first instruction of an __exit__ is one that it can't help.)
        with restoring_buffers(self.model), torch.enable_grad(), self.differentiable(), restoring(run.__exit__), run:
            yield run


def logits(outputs: Any) -> Tensor:
    """The tensor that the likelihood is about: the outputs, or their ``logits``."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise ArgumentError(f"the model returned a {type(outputs).__name__} without logits; return a tensor of outputs")
    return found
