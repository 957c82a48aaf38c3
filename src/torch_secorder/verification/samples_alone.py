"""One sample alone, differentiated by plain autograd, is compared with the analysis of its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from torch_secorder.autograd.indices import checked_on_host
from torch_secorder.autograd.product_bits import bits_of, most_bits
from torch_secorder.autograd.random_state import forked_random
from torch_secorder.errors import CurvatureError, VerificationError, warn_at_users_line
from torch_secorder.model.containers import mapped, tensors
from torch_secorder.model.ranks import Ranks
from torch_secorder.model.restore import eval_mode, restoring_state
from torch_secorder.per_sample import as_refusal
from torch_secorder.running.analysis import Analysis
from torch_secorder.running.analyzed import Batch
from torch_secorder.verification.comparison import (
    are_same,
    differ_by_rounding,
    require_equal_norms,
    rounding_beside_others,
    unequal_norms,
)
from torch_secorder.verification.differentiable_model import DifferentiableModel
from torch_secorder.verification.loss_slopes import (
    Loss,
    LossSlopes,
    inner_product,
    loss_gradients,
    loss_slopes,
    multiple,
)
from torch_secorder.verification.own_rows import with_own_rows
from torch_secorder.verification.plain_autograd import as_row, of_one_sample, squared_norms_of_loss
from torch_secorder.verification.tolerances import sample_alone


def verify_samples(
    analysis: Analysis, loss: Loss, inputs: Any, batch: Batch, samples: Sequence[int] | None = None
) -> None:
    """Raise unless these samples of a batch have the squared norms of the batch's analysis.

    Each sample runs through the model alone. If it has the same outputs as in its batch, the gradient of the batch's loss in them
    is sent back through it by plain autograd. Otherwise its outputs replace its rows in the batch's outputs, which are constants,
    and the loss of these is differentiated. Either is a step of one sample, in which no rule takes part. If the model
    draws random numbers, the batch is analyzed once more in eval mode, which stops dropout, for the comparison. Samples for which
    the user declared several rows stay in their batch, since such arguments cannot be taken apart (edges of graphs, offsets of
    bags); then the loss's gradient in a sample's own rows of the outputs is sent back.

    Args:
        analysis: the analysis to verify.
        loss: from the model's outputs to a sum over samples.
        inputs: the batch.
        batch: the result of the analysis.
        samples: the numbers of the samples to check; by default the first, the last and one at random.

    Raises:
        VerificationError: naming the parameters that differ, with both numbers.
    """
    samples = samples_to_check(batch.where.n, analysis.table.ranks) if samples is None else samples
    with comparable(analysis, loss, inputs, batch, samples[0]) as found:
        if found is not None:
            batch, model = found
            if batch.where.takes_no_rows:
                for sample in samples:
                    _SampleInBatch(analysis, model, loss, inputs, batch, sample).verify()
                return
            slopes = loss_slopes(analysis, loss, batch.outputs)
            for sample in samples:
                SampleAlone(analysis, model, loss, inputs, batch, sample, slopes).verify()


@contextmanager
def comparable(
    analysis: Analysis, loss: Loss, inputs: Any, batch: Batch, sample: int
) -> Iterator[tuple[Batch, DifferentiableModel] | None]:
    """A block in which samples can be run alone: a batch without random draws to compare with, and the model for autograd.

    The block gets None, after a warning, if the model draws random numbers in eval mode too.

    Args:
        analysis: the analysis to verify.
        loss: from the model's outputs to a sum over samples.
        inputs: the batch.
        batch: the result of the analysis.
        sample: the number of the sample on which quantized weights are tried.
    """
    with ExitStack() as stack:
        stack.enter_context(forked_random(analysis.table.tensors))
        stack.enter_context(restoring_state(analysis.model))
        if batch.random:
            stack.enter_context(eval_mode(analysis.model))
            with on_samples_alone(analysis):
                batch = analysis.of(loss, inputs)
            if batch.random:
                warn_at_users_line("not verified: the model draws random numbers in eval mode too", UserWarning)
                yield None
                return
        stack.enter_context(on_samples_alone(analysis))
        one = inputs if batch.where.takes_no_rows else batch.where.rows("inputs", inputs, [sample])
        yield batch, DifferentiableModel(analysis.model, analysis.table, one)


@contextmanager
def on_samples_alone(analysis: Analysis) -> Iterator[None]:
    """A block in which the user's model and loss are called with some samples of a batch; their errors are not about the batch.

    An index of a sample that is not there raises on every device.

    Raises:
        VerificationError: in place of whatever is raised inside, unless that is an error of this library's.
    """
    try:
        with checked_on_host(analysis.table.tensors):
            yield
    except Exception as error:
        refusal = as_refusal(error)
        if isinstance(refusal, CurvatureError):
            raise refusal  # noqa: B904  # a refusal names its cause itself
        raise VerificationError(
            f"the numbers can't be checked, since on some samples of the batch alone the model or the loss raised "
            f"{type(error).__name__} ({str(error)[:200]}): an input that is not one row per sample (a mask, a hidden state, a "
            "list of lengths) can't be taken apart, or the samples belong together: say where each argument has its samples, as "
            "in batch_axis={'inputs': {1: None}} for a mask that all share, {'inputs': {1: 1}} for another axis, {'inputs': {1: "
            "'list'}} for a list with an item for each sample, or n_samples= where rows are no samples, as the ids of "
            "bags; where each sample has a loss of its own, verify=False returns the numbers unchecked"
        ) from error


# Draws the sample between the first and the last, independently of the user's random numbers.
_ANY = Random(0)


def samples_to_check(n: int, ranks: Ranks) -> list[int]:
    """The numbers of the samples to check among n: the first, the last and one at random.

    The first alone is not enough: if the steps of a layer that only sees the past, such as an LSTM, are mistaken for samples, the
    first one is right. Ranks that hold a model together all check the same number of samples, and none at random.
    """
    if ranks.distributed:
        return [0, n // 2, n - 1]
    return [0, 1 + _ANY.randrange(n - 2), n - 1] if n > 2 else [*range(n)]


class SampleAlone:
    """One sample of a batch that runs through the model alone.

    Args:
        analysis: the analysis to verify.
        model: the model.
        loss: from the model's outputs to the loss.
        inputs: the batch.
        batch: the result of the analysis.
        sample: the sample's number.
        slopes: the gradient of the loss in the batch's outputs; None if it is not known.

    Attributes:
        loss_of_outputs: from the model's outputs to the loss.
        norms_in_batch: the sample's squared norms from the analysis of the batch, ``[parameters]``.
    """

    def __init__(
        self,
        analysis: Analysis,
        model: DifferentiableModel,
        loss: Loss,
        inputs: Any,
        batch: Batch,
        sample: int,
        slopes: LossSlopes | None = None,
    ):
        self._analysis, self._model, self.loss_of_outputs, self._sample = analysis, model, loss, sample
        self._where = batch.where
        self._inputs = self._own_inputs(inputs)
        self._in_batch = self._where.rows("outputs", batch.outputs, [sample])
        self._outputs = batch.outputs
        self._slopes = None if slopes is None else tensors(self._where.rows("outputs", slopes.gradients, [sample]))
        self._losses = [] if slopes is None else [slopes.loss]
        self._norms = batch.samples.squared_norms.detach()[model.positions]
        self.norms_in_batch = self._norms[:, sample]

    def verify(self) -> None:
        """Raise unless the sample has the same squared norms alone as in its batch."""
        alone, bits_of_graph = self.squared_norms_of(self._loss_by_slopes)
        # Most samples agree within the smallest tolerance, for which nobody has to look through the graph.
        if not self._are_unequal(alone, most_bits(self._analysis.table.tensors)):
            return
        if self._are_unequal(alone, bits := bits_of_graph()):
            self.require_equal(alone, bits, self._effect_of_rounding(alone) + self._rounding_of_gradients(alone, bits))

    def _are_unequal(self, alone: Tensor, bits: int) -> bool:
        """Whether the sample has other squared norms in its batch; ranks that hold the model together agree on it."""
        return bool(
            self._analysis.table.ranks.max_over_ranks(bool(unequal_norms(self.norms_in_batch, alone, bits=bits)))
        )

    def require_equal(self, alone: Tensor, bits: int, rounding: Tensor | float = 0.0) -> None:
        """Raise unless the sample has these squared norms, ``[parameters]``, in its batch; if one rank raises, all do."""
        names = [self._analysis.table.names[position] for position in self._model.positions]
        rounding = rounding + rounding_beside_others(self._norms, bits=bits)
        with self._analysis.table.ranks.fail_together():
            require_equal_norms(names, self.norms_in_batch, alone, bits=bits, rounding=rounding, sample=self._sample)

    def _own_inputs(self, inputs: Any) -> Any:
        return self._where.rows("inputs", inputs, [self._sample])

    def squared_norms_of(self, loss: Loss) -> tuple[Tensor, Callable[[], int]]:
        """``||g||^2`` of each parameter for a loss of the sample's own outputs.

        A function that looks up the precision of the products in it comes with them.
        """
        with torch.enable_grad(), self._analysis.differentiable(), self._model.unchanged():
            outputs = self._model(self._inputs)
            root = self._root(loss, outputs)
            bits = partial(bits_of, [root, *tensors(outputs), *self._losses], self._analysis.table.tensors)
            return as_row(squared_norms_of_loss(root, self._model.leaves)), bits

    def _root(self, loss: Loss, outputs: Any) -> Tensor:
        """The scalar that is differentiated for a loss."""
        return loss(outputs)

    def _loss_in_batch(self, own: Any) -> Tensor:
        """The batch's loss with the sample's own outputs in its rows, and all other outputs constant."""
        return self.loss_of_outputs(with_own_rows(self._where, self._sample, own, self._outputs))

    def _loss_by_slopes(self, own: Any) -> Tensor:
        """A number with the loss's gradient in the sample's own outputs, or in the batch's if these are the same."""
        if self._slopes is None or not are_same(own, self._in_batch):
            return self._loss_in_batch(own)
        return inner_product(self._slopes, own)

    def _effect_of_rounding(self, alone: Tensor) -> Tensor:
        """By how much the norms may differ because the sample's outputs are rounded differently alone and in its batch.

        Near its minimum, a loss goes by small differences of outputs and targets, of which rounding may be a large part. With g a
        gradient and d its change by rounding, ``||g + d||^2`` differs from ``||g||^2`` by at most
        ``||d||^2 + 2 ||d|| ||g||``.
        """
        with self._model.unchanged():
            own = mapped(Tensor.detach, self._model(self._inputs))
        change = self._change_of_gradients(own)
        squared, _ = self.squared_norms_of(partial(inner_product, change))
        return 4 * (squared + 2 * (squared * alone).sqrt())  # Four times, since d is itself an estimate.

    def _rounding_of_gradients(self, alone: Tensor, bits: int) -> Tensor:
        """By how much the norms may differ because gradients are sums that cancel up to rounding.

        A backward pass is linear: c times the loss has c times the gradient, and ``c ** 2`` times its squared norm. Any
        difference from that is rounding, which differs for each c that is not a power of two. The result is limited to the
        tolerance for a norm that is small beside others, so that a model which changes from call to call is not excused.
        """
        tries = (
            self.squared_norms_of(partial(multiple, factor, self._loss_in_batch))[0] / factor**2 for factor in (3, 5, 7)
        )
        # Three tries may miss the largest difference, hence the factor.
        found = 4 * torch.stack([(squared - alone).abs() for squared in tries]).amax(0)
        return found.clamp(max=sample_alone(bits).of_total * alone[alone.isfinite()].sum())

    def _change_of_gradients(self, own: Any) -> list[Tensor | None]:
        """The change of the loss's gradient in the outputs by rounding; zero if the outputs differ by more than rounding."""
        pairs = list(zip(tensors(own), tensors(self._in_batch), strict=True))
        if not all(differ_by_rounding(x, y) for x, y in pairs):
            return [torch.zeros_like(x) for x, _ in pairs]
        both = (loss_gradients(self._loss_in_batch, outputs) for outputs in (own, self._in_batch))
        return [None if a is None or b is None else a - b for a, b in zip(*both, strict=True)]


class _SampleInBatch(SampleAlone):
    """One sample of a batch that cannot be taken apart: its own rows of the outputs when the whole batch runs."""

    def verify(self) -> None:
        alone, bits = self.squared_norms_of(self.loss_of_outputs)
        self.require_equal(alone, bits())

    def _own_inputs(self, inputs: Any) -> Any:
        return inputs

    def _root(self, loss: Loss, outputs: Any) -> Tensor:
        if self._where.is_one:
            return loss(outputs)
        found = [x for x in tensors(outputs) if x.requires_grad]
        seeds = torch.autograd.grad(loss(outputs), found, allow_unused=True, retain_graph=True)
        placed = zip(tensors(outputs), self._where.placements("outputs", outputs), strict=True)
        located = [where for x, where in placed if x.requires_grad]
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for x, seed, where in zip(found, seeds, located, strict=True):
            if seed is not None and where is not None:
                total = total + (x * of_one_sample(seed, self._sample, where).conj()).real.sum().cpu().double()
        return total
