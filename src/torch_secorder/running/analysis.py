"""What the one-call functions share: batches go in, per-sample squared norms come out, and the user's model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, reduce
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from torch_secorder.arguments import require_max_memory
from torch_secorder.autograd.engine import call_model
from torch_secorder.autograd.indices import checked_on_host
from torch_secorder.autograd.product_bits import TF32, bits_of
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.batch_axis.knowledge import knowledge_of
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.told import NOTHING, Told
from torch_secorder.errors import ArgumentError, CoverageError
from torch_secorder.graph.queries import LossGraph
from torch_secorder.likelihoods import LastLayer
from torch_secorder.model.containers import mapped, tensors
from torch_secorder.model.hooks import restoring
from torch_secorder.model.parameters import ParameterTable, refuse_inference_mode, unwrapped
from torch_secorder.model.restore import eval_mode, lock_of, requiring_grad, restoring_buffers, restoring_state
from torch_secorder.model.selection import Selection
from torch_secorder.model.tree import Modules, modules_by_path
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import planned
from torch_secorder.recording.quantities import Keeps, kept, wanted
from torch_secorder.recording.sample_norms import SampleNorms
from torch_secorder.running.analyzed import Batch
from torch_secorder.running.by_last_layer import stand_ins
from torch_secorder.running.counted import has_mask
from torch_secorder.running.fisher_kind import FisherKind
from torch_secorder.running.frozen_others import FrozenOthers
from torch_secorder.running.last_layer_passes import norms_by_last_layer
from torch_secorder.running.logits import logits, with_samples_first
from torch_secorder.running.loss import loss_of, reduction_of, require_targets_of_batch
from torch_secorder.running.loss_calls import OutputsChangedError, unchanged, with_copies_of_outputs
from torch_secorder.running.own_loss import is_computed_inside, own_reduction
from torch_secorder.running.run import HookedForward, require_twice_differentiable
from torch_secorder.running.trials import LossFunction

Checked = Literal["always", "when due", "never"]


class Analysis:
    """A model prepared for batches.

    Args:
        model: the user's model.
        parameters: as in FisherMonitor.
        words: what the user says about where the samples are.
        create_graph: whether the norms are differentiable.
        keeps: what is kept besides squared norms, as the arguments ``diagonal=`` and so on ask for it.
        max_memory: as in FisherMonitor.
        checks: whether samples are checked after the batch.

    Attributes:
        knowledge: what is known about where the model's samples are.
        keeps: the argument ``keeps``, resolved for this model's parameters.
        trusts_shapes: whether shapes that allow only one reading are trusted.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Selection = "trainable",
        words: Told = NOTHING,
        *,
        create_graph: bool = False,
        keeps: Keeps | None = None,
        max_memory: int | None = None,
        checks: bool = True,
    ):
        refuse_inference_mode()
        self.model = unwrapped(model)
        max_memory = require_max_memory(max_memory)
        self._create_graph = create_graph
        # For all that is prepared here and for the first batch. The user's program runs before a second one.
        self._listed: Modules | None = modules_by_path(self.model)
        with lock_of(self.model):
            self.table = ParameterTable(self.model, parameters, self._listed)
            self.table.gather(self.model)
        # The other parameters are not frozen if ranks gather them for each call, or if the result may be differentiated in them.
        self._others = FrozenOthers(self.table, allowed=not (self.table.sharded or create_graph))
        self.keeps = kept(keeps or {}, self.model, self.table)
        self._passes = PassOptions(wanted(self.keeps), max_memory=max_memory)
        # A check shows that a trace is right, and not that its derivative is, so that no shapes are trusted with create_graph;
        # nor are they on several ranks, where one rank's failure cannot make the others repeat the batch.
        checks = checks and not create_graph
        self.knowledge = knowledge_of(self.model, words, checks=checks)
        self.trusts_shapes = self.knowledge.trusts_shapes and checks and not self.table.ranks.distributed
        with lock_of(self.model), self.differentiable():
            self._plan = planned(self.model, self.table, words, self._passes.quantities, self._listed)
        self._fingerprint = 0  # of the latest batch's graph

    def empirical(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        *,
        checked: Checked = "always",
    ) -> Batch:
        """The squared norms of the samples' gradients g_n.

        Args:
            loss_fn: from ``(outputs, targets)`` to a scalar.
            inputs: a batch.
            targets: whatever the loss takes.
            checked: whether the caller is going to check the batch. "when due" leaves that to the schedule, once the forward has
                shown what kind of graph this is. The outputs of a batch that is not checked are freed before the backward
                pass, when memory is scarcest.
        """
        reached, kind = attrgetter("samples.reached"), lambda: self._fingerprint
        try:
            analyze = partial(self._empirical, loss_fn, inputs, targets, checked)
            return self._others.without_cuts(analyze, reached, kind)
        except OutputsChangedError:
            analyze = partial(self._empirical, with_copies_of_outputs(loss_fn), inputs, targets, checked)
            with forked_random(self.table.tensors):
                return self._others.without_cuts(analyze, reached, kind)

    def _empirical(self, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any, checked: Checked) -> Batch:
        with self._prepared() as run:
            outputs = run(inputs)
            if outputs is None:
                raise ArgumentError("the model returned None: let its forward return what the loss is computed from")
            require_targets_of_batch(targets, run.samples)
            with unchanged(outputs):
                loss = loss_of(loss_fn, outputs, targets)
            if self._create_graph:
                require_twice_differentiable(loss, self.table)
            if loss.requires_grad and not any(x.requires_grad for x in tensors(outputs)):
                raise CoverageError(
                    f"the model returned a {type(outputs).__name__}, in which no tensor with a gradient is seen: return what the "
                    "loss is computed from (the logits of a distribution), in tensors, mappings, sequences or dataclasses"
                )
            graph = LossGraph(loss, outputs)
            if direct := graph.parameters(self.table):
                raise CoverageError(
                    f"the loss uses {', '.join(direct)} by another way than through the model's outputs; a penalty on weights "
                    "belongs to no sample: leave it out of the loss, or move the computation into the model's forward"
                )
            inside = not run.samples.is_one and is_computed_inside(loss_fn, outputs, targets, run.samples)
            rounded = inside and bits_of([loss, *tensors(outputs)], self.table.tensors) <= TF32
            finite = not inside or bool(loss.isfinite())
            if not inside:
                find = partial(reduction_of, loss_fn, outputs, targets, loss, run.samples)
                reduction = self.knowledge.reduction(loss_fn, find)
            is_checked = self._is_checked(checked, loss_fn, hash((run.fingerprint, graph.kind)))
            kept = mapped(Tensor.detach, outputs) if is_checked else None
            del outputs, graph
            samples = run.backward(loss)
        if inside:
            of_samples = partial(self._loss_of_samples, loss_fn, inputs, targets, run.samples, run.random)
            reduction = own_reduction(of_samples, run.n, self.table.ranks, rounded=rounded, finite=finite)
        samples = samples.scaled(run.n**2 if reduction == "mean" else 1)
        return Batch(samples, kept, run.random, run.samples, run.fingerprint, reduction, inside)

    def _loss_of_samples(
        self, loss_fn: LossFunction, inputs: Any, targets: Any, where: BatchSamples, random: bool, samples: list[int]
    ) -> Tensor:
        """The loss that the model computes for some samples of a batch; in eval mode if it draws random numbers in training."""
        if where.takes_no_rows:
            raise ArgumentError("rows of its inputs are not samples, so that it can't be given some of them")
        with ExitStack() as stack:
            stack.enter_context(forked_random(self.table.tensors))
            stack.enter_context(restoring_state(self.model))
            stack.enter_context(torch.enable_grad())
            if random:
                stack.enter_context(eval_mode(self.model))
            stack.enter_context(checked_on_host(self.table.tensors))
            outputs = call_model(self.model, where.rows("inputs", inputs, samples))
            return loss_of(loss_fn, outputs, where.rows("targets", targets, samples)).detach()

    def fisher(
        self,
        kind: FisherKind,
        inputs: Any,
        targets: Any,
        generator: torch.Generator,
        counted: Callable[[int, Iterator[Tensor]], Iterable[Tensor]] = lambda count, output_gradients: output_gradients,
    ) -> SampleNorms:
        """Expected squared norms of the gradient of -log p(y | x_n).

        Args:
            kind: which Fisher.
            inputs: a batch.
            targets: its targets, for observed labels and for positions to ignore.
            generator: draws the labels of the sampled Fisher.
            counted: gets the number of backward passes and the gradients that they start with, and returns the gradients.
        """
        analyze = partial(self._fisher, kind, inputs, targets, generator, counted)
        return self._others.without_cuts(analyze, lambda samples: samples.reached, lambda: self._fingerprint)

    def _fisher(
        self,
        kind: FisherKind,
        inputs: Any,
        targets: Any,
        generator: torch.Generator,
        counted: Callable[[int, Iterator[Tensor]], Iterable[Tensor]],
    ) -> SampleNorms:
        with self._prepared() as run:
            if targets is None and has_mask(inputs) and kind.labels == "model":
                targets = inputs  # Their mask says what is padding.
            outputs, targets = with_samples_first(logits(run(inputs)), targets, run.samples)
            count, seeds = kind.output_gradients(outputs, targets, generator, self.table.ranks)
            layer = self._last_layer(run, outputs)
            exact = None if layer is None else kind.by_last_layer(outputs, targets)
            if layer is not None and exact is not None:
                gradients = counted(exact.count, exact.input_gradients)
                return norms_by_last_layer(run, outputs, layer.inputs, exact.own_gradients, gradients, exact.count)
            passes = (
                run.backward(outputs, seed.to(outputs.dtype), last=number == count)
                for number, seed in enumerate(counted(count, seeds), start=1)
            )
            nothing = SampleNorms(run.n, outputs.new_zeros(len(self.table), run.n), set(), {})
            return reduce(SampleNorms.plus, passes, nothing)

    def _last_layer(self, run: HookedForward, outputs: Tensor) -> LastLayer | None:
        """The layer that made these outputs, if its part of the numbers takes a single pass."""
        # A diagonal depends on more than the size of each sample's output gradient, and ranks have to make the same passes.
        if self._passes.quantities or self.table.ranks.distributed or self.table.sharded:
            return None
        return run.last_layer(outputs)

    def of(self, root: Callable[[Any], Tensor], inputs: Any, *, by_last_layer: bool = False) -> Batch:
        """Squared norms of the per-sample gradients of ``root(outputs)``, a sum over samples.

        Args:
            root: from the model's outputs, or from the logits in them, to a scalar.
            inputs: a batch.
            by_last_layer: whether passes begin before the last layer where those of the exact Fisher do.
        """
        analyze = partial(self._of, root, inputs, by_last_layer)
        return self._others.without_cuts(analyze, lambda batch: batch.samples.reached, lambda: self._fingerprint)

    def _of(self, root: Callable[[Any], Tensor], inputs: Any, by_last_layer: bool) -> Batch:
        with self._prepared() as run:
            outputs = run(inputs)
            found = logits(outputs) if by_last_layer else None
            layer = None if found is None else self._last_layer(run, found)
            if found is None or layer is None:
                samples = run.backward(root(outputs))
            else:
                leaf = found.detach().requires_grad_()
                (slope,) = torch.autograd.grad(root(leaf), leaf)
                slope = slope.flatten(0, -2)
                # The gradients of several positions mix in the layer's own part, so that nothing stands for them.
                own = stand_ins(slope.square().sum(1), slope.shape[1]) if found.dim() == 2 else [slope]
                samples = norms_by_last_layer(run, found, layer.inputs, own, [slope @ layer.matrix.T], 1)
            return Batch(samples, mapped(Tensor.detach, outputs), run.random, run.samples, run.fingerprint)

    def _is_checked(self, checked: Checked, loss_fn: Callable[..., Any], kind: int) -> bool:
        """Whether a batch is checked whose graph is of this kind; ranks that hold the model together check it if one does."""
        if checked == "never":
            return False
        due = bool(self.table.ranks.max_over_ranks(self.knowledge.schedule.due(loss_fn, kind)))
        return due or checked == "always"

    def is_due(self, function: Callable[..., Any]) -> bool:
        """Whether the result for a function of the latest batch's outputs is due for a check, on any rank."""
        return self._is_checked("when due", function, self._fingerprint)

    def restart_checks(self) -> None:
        """Have the next batch checked, and as many after it as after the first one."""
        self.knowledge.schedule.restart()

    def forget_shapes(self) -> None:
        """Trust no shapes from now on."""
        self.knowledge.forget_shapes()
        self.trusts_shapes = False

    def differentiable(self) -> AbstractContextManager[None]:
        """A block in which the analyzed parameters require a gradient, except quantized ones, and if possible no others do."""
        return requiring_grad(self.table.differentiable, self._others.parameters())

    @contextmanager
    def _prepared(self) -> Iterator[HookedForward]:
        listed, self._listed = self._listed, None
        with restoring_buffers(self.model, listed), torch.enable_grad(), self.differentiable():
            # The run is made here, where frozen parameters have leaves in the graph, too.
            run = HookedForward(
                *(self.table, self._plan, self.knowledge, self._passes),
                create_graph=self._create_graph,
                trust_shapes=self.trusts_shapes,
            )
            # The run is exited twice, since its __exit__ cannot handle an interrupt at its own first instruction.
            with restoring(run.__exit__), run:
                yield run
        self._fingerprint = run.fingerprint
