"""The samples of outputs that were computed before: from their graph, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial, reduce

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.product_bits import bits_of
from torch_secorder.autograd.sharded import GatheredWeights
from torch_secorder.batch_axis.knowledge import ModelKnowledge
from torch_secorder.errors import (
    CoverageError,
    CurvatureError,
    NonFiniteError,
    SlowFallbackWarning,
    warn_at_users_line,
)
from torch_secorder.model.parameters import ParameterTable
from torch_secorder.recording.options import PassOptions
from torch_secorder.recording.plan import Plan
from torch_secorder.running.by_last_layer import ExactByLastLayer, at_position, stand_ins
from torch_secorder.running.outputs_backward import OutputsBackward
from torch_secorder.verification.comparison import require_equal_norms, rounding_beside_others
from torch_secorder.verification.plain_autograd import as_row, squared_norms_of_sample
from torch_secorder.verification.samples_alone import samples_to_check


class SamplesOfGraph:
    """``||J_n^T s_n||^2`` of every sample for one seed after another, through the graph of some outputs.

    The samples are taken apart by what the graph's nodes have saved. Where that fails, be it for the first seed or for a later
    one, each sample takes a backward pass of its own from then on.

    Args:
        outputs: what the model returned, with the samples on axis 0.
        table: the analyzed parameters.
        knowledge: what is known about the model already.
        create_graph: make the norms differentiable.
    """

    def __init__(self, outputs: Tensor, table: ParameterTable, knowledge: ModelKnowledge, create_graph: bool):
        self._outputs, self._table, self._create_graph = outputs, table, create_graph
        self._knowledge, self._hooked = knowledge, ExitStack()
        self._passes: OutputsBackward | None = OutputsBackward(
            *(table, Plan(), knowledge, PassOptions()), create_graph=create_graph
        )
        self._due = False

    def __enter__(self) -> SamplesOfGraph:
        self._or_one_by_one(self._find_samples)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooked.close()

    def __call__(self, seed: Tensor) -> Tensor:
        """``[n]`` for one seed, of the outputs' shape."""
        found = self._or_one_by_one(partial(self._at_once, seed))
        return self._one_by_one(seed) if found is None else found

    def by_last_layer(self, exact: ExactByLastLayer) -> Tensor | None:
        """The sum over all seeds, ``[n]``, by backward passes that begin before the last layer.

        It is None where the graph does not show what that takes.
        """
        return self._or_one_by_one(partial(self._by_last_layer, exact))

    def _by_last_layer(self, exact: ExactByLastLayer, passes: OutputsBackward) -> Tensor | None:
        if (parts := passes.before_last_product(exact.positions)) is None:
            return None
        if self._due:
            # Any seed will do that is different for all outputs of one position.
            rows = self._outputs.detach().flatten(0, -2)
            seed = torch.arange(rows.numel(), device=rows.device).cos().to(rows.dtype).view_as(rows)
            seed = at_position(seed, exact.positions - 1, exact.positions)
            own = stand_ins(seed.square().sum(1), rows.shape[1], exact.positions)
            norms = self._by_parts(passes, parts, own, [seed @ exact.matrix.T])
            self._verify(seed.view_as(self._outputs), norms)
            self._due = False
        return self._by_parts(passes, parts, exact.own_gradients, exact.input_gradients).sum(0)

    @staticmethod
    def _by_parts(
        passes: OutputsBackward,
        parts: tuple[Node, GraphPass | None],
        own_gradients: Iterable[Tensor],
        input_gradients: Iterable[Tensor],
    ) -> Tensor:
        """``[parameters, n]``, given gradients of the last product, and those with which passes begin before it."""
        product, before = parts
        norms = reduce(torch.add, (passes.at({product: gradient}) for gradient in own_gradients))
        return norms if before is None else norms + passes.of_seeds(input_gradients, before)

    def _or_one_by_one(self, step: Callable[[OutputsBackward], Tensor | None]) -> Tensor | None:
        """What a step finds in the graph; None where samples are taken one by one, since this or an earlier step failed."""
        if self._passes is None:
            return None
        try:
            return step(self._passes)
        except NonFiniteError:
            raise
        except CurvatureError as error:
            if self._table.ranks.distributed:  # The other ranks may not have to take samples one by one.
                raise
            self._passes = None
            self._hooked.close()
            self._announce_one_by_one(error)
            return None

    def _find_samples(self, passes: OutputsBackward) -> None:
        self._hooked.enter_context(passes.through(self._outputs))
        due = self._knowledge.schedule.due(SamplesOfGraph, passes.fingerprint)
        self._due = bool(self._table.ranks.max_over_ranks(due))

    def _at_once(self, seed: Tensor, passes: OutputsBackward) -> Tensor:
        """All samples in one backward pass, checked for the first seed if a check is due."""
        norms = passes.of_seed(seed).squared_norms
        if self._due:
            self._verify(seed, norms.detach())
            self._due = False
        return norms.sum(0)

    def _verify(self, seed: Tensor, norms: Tensor) -> None:
        """Raise unless plain autograd finds the same squared norms, ``[parameters, n]``, for the samples that are checked."""
        bits = bits_of([self._outputs], self._table.leaves)
        rounding = rounding_beside_others(norms, bits=bits)
        for sample in samples_to_check(len(self._outputs), self._table.ranks):
            alone = as_row(self._of_sample(seed, sample, create_graph=False))
            require_equal_norms(self._table.names, norms[:, sample], alone, bits=bits, rounding=rounding, sample=sample)

    def _of_sample(self, seed: Tensor, sample: int, *, create_graph: bool) -> list[Tensor | None]:
        """``||J_n^T s_n||^2`` of every parameter for one sample, by plain autograd; None for those not reached."""
        weights = GatheredWeights(throughout=self._table.sharded)
        return squared_norms_of_sample(
            *([self._outputs], [seed], self._table.leaves, sample), create_graph=create_graph, weights=weights
        )

    def _one_by_one(self, seed: Tensor) -> Tensor:
        """All samples by one backward pass for each."""
        found = (self._of_sample(seed, sample, create_graph=self._create_graph) for sample in range(len(self._outputs)))
        each = [[norm.to(self._outputs.device) for norm in norms if norm is not None] for norms in found]
        return torch.stack([torch.stack(norms).sum() for norms in each])

    def _announce_one_by_one(self, reason: CurvatureError) -> None:
        """Warn of the many passes, or raise if no parameter is reached, so that there is nothing to take apart."""
        if all(norm is None for norm in self._of_sample(torch.ones_like(self._outputs), 0, create_graph=False)):
            raise CoverageError("the outputs do not depend on any trainable parameter of this model")
        if len(self._outputs) > 1:
            warn_at_users_line(
                "the graph of these outputs does not show every sample's gradient, so that each sample takes a backward pass "
                f"of its own; fisher_report, which runs the model, may be faster ({reason})",
                SlowFallbackWarning,
            )
