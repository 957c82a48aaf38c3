"""What the one-call functions share: batches in, per-sample squared norms out, with nothing of the user's changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, CoverageError
from torch_secorder.graph import last_product, memory_of, one_at_a_time, used_by_loss
from torch_secorder.hooks import at_last
from torch_secorder.likelihoods import Likelihood, Through, likelihood
from torch_secorder.parameters import ParameterTable, named_modules, unwrapped
from torch_secorder.passes import Samples
from torch_secorder.per_sample import checked_budget
from torch_secorder.plan import BatchAxis, planned
from torch_secorder.run import Run, checked_loss, checked_targets, reduction_of, undisturbed
from torch_secorder.sharding import Ranks, written_class
from torch_secorder.trees import mapped


@dataclass(frozen=True)
class FisherKind:
    """Which Fisher, for everything but the empirical one.

    Attributes:
        labels: "model" for labels of the model's own prediction, "observed" for the given targets.
        num_samples: None for the exact expectation over the model's labels, k for an estimate from k backward passes.
    """

    loss_type: str = "nll"
    labels: str = "model"
    num_samples: int | None = None
    ignore_index: int = -100
    class_axis: int = 1
    max_passes: int = 10_000

    def __post_init__(self) -> None:
        for name in ("ignore_index", "class_axis"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int):
                raise ArgumentError(f"{name} must be an int, not {value!r}")
        positive_int("max_passes", self.max_passes)

    def seeds(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, ranks: Ranks, *, differentiable: bool = False
    ) -> tuple[int, Iterator[Tensor]]:
        """How many backward passes, and their seeds, in common with the ranks that hold the model together.

        Their own graph is kept if they are to be ``differentiable``.

        Raises:
            ArgumentError: if the exact expectation takes more than ``max_passes``, or observed labels are missing.
            CoverageError: if other ranks need another number of passes.
        """
        product = None if self.num_samples is None else last_product(outputs)
        outputs = outputs if differentiable else outputs.detach()
        through = None if product is None else Through(*product)
        count, seeds = self._seeds(outputs, targets, ranks.seeded(generator), through)
        ranks.agreed(count, "their outputs take different numbers of backward passes; pad them to one shape")
        return count, seeds

    def _seeds(
        self, outputs: Tensor, targets: Any, generator: torch.Generator, through: Through | None
    ) -> tuple[int, Iterator[Tensor]]:
        model: Likelihood = likelihood(
            self.loss_type, outputs, targets, ignore_index=self.ignore_index, class_axis=self.class_axis
        )
        if self.labels == "observed":
            if not isinstance(targets, Tensor):
                raise ArgumentError('labels="observed" needs targets')
            return 1, iter([model.observed(outputs, targets)])
        passes = model.exact_passes(outputs)
        if self.num_samples is None:
            if passes > self.max_passes:
                raise ArgumentError(
                    f"the exact Fisher of outputs of shape {tuple(outputs.shape)} takes {passes:,} backward passes, more than "
                    f"max_passes={self.max_passes:,}: pass num_samples=k for an unbiased estimate from k passes"
                )
            return passes, model.exact(outputs)
        return min(passes, self.num_samples), model.draws(outputs, self.num_samples, generator, through)


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
        self.model, self._max_memory = unwrapped(model), checked_budget(max_memory)
        self._keeps = {"diagonal": diagonal, "activations": activations}
        self.types = {name: written_class(m).__name__ for name, m in named_modules(self.model)} if activations else {}
        self._create_graph = create_graph
        with one_at_a_time(self.model):
            self.table = ParameterTable(self.model, parameters)
            self.table.gather(self.model)
        self.memory = memory_of(self.model, batch_axis)
        # A graph of the checks would be kept along with the result's, so that there is none; and a check that fails on one rank
        # can't have the others do the batch once more.
        self.trusting = self.memory.trusting and not create_graph and not self.table.ranks.several
        with one_at_a_time(self.model), self.differentiable():
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
            checked_targets(targets, run.n, self.batch_axis)
            loss = checked_loss(loss_fn(outputs, targets), run.n, targets)
            if direct := used_by_loss(loss, outputs, self.table):
                raise CoverageError(
                    f"the loss uses {', '.join(direct)} by another way than through the model's outputs; a penalty on weights "
                    "belongs to no sample: leave it out of the loss, or move the computation into the model's forward"
                )
            reduction = self.memory.reduction(
                loss_fn, partial(reduction_of, loss_fn, outputs, targets, loss, run.n, self.batch_axis)
            )
            kept = mapped(Tensor.detach, outputs) if self.table.ranks.several or checked(run.structure) else None
            del outputs
            samples = run.backward(loss)
        samples = samples.times(run.n**2 if reduction == "mean" else 1)
        return Batch(samples, kept, run.random, run.structure, reduction)

    def fisher(self, kind: FisherKind, inputs: Any, targets: Any, generator: torch.Generator) -> Samples:
        """Expected squared norms of the gradient of -log p(y | x_n)."""
        with self._prepared() as run:
            outputs = logits(run(inputs))
            checked_targets(targets, run.n, self.batch_axis)
            count, seeds = kind.seeds(outputs, targets, generator, self.table.ranks)
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
        coded = {id(self.table.tensors[position]) for position in self.table.coded}
        analysed = {id(p): p for p in (*self.table.tensors, *self.table.leaves) if id(p) not in coded}
        frozen = [p for p in analysed.values() if not p.requires_grad]

        def require(wanted: bool) -> None:
            for p in frozen:
                p.requires_grad_(wanted)

        with at_last(partial(require, False)):
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
            trusting=self.trusting,
            max_memory=self._max_memory,
        )
        # (Left twice: an interruption at the first instruction of an __exit__ is one that it can't help.)
        with undisturbed(self.model), torch.enable_grad(), self.differentiable(), at_last(run.__exit__), run:
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


def positive_int(name: str, value: object) -> int:
    """``value``, if it is an int of at least 1.

    Raises:
        ArgumentError: otherwise; a bool is no int here.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be an int >= 1, not {value!r}")
    return value


def a_function(name: str, value: Any) -> None:
    """Raise unless ``value`` can be called.

    Raises:
        ArgumentError: naming the argument.
    """
    if not callable(value):
        raise ArgumentError(f"{name} must be a module or a function of (outputs, targets), not {value!r:.80}")


def fresh_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or one of its own with a fresh seed, so that the global random state is left alone."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if not isinstance(generator, torch.Generator):
        raise ArgumentError(f"generator must be a torch.Generator, not {generator!r}")
    return generator
