"""Traces of the empirical and of the generalized Fisher information, as functions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_secorder.approximations.samples_of_graph import SamplesOfGraph
from torch_secorder.arguments import (
    Labels,
    Loss,
    LossType,
    Reduction,
    called_as,
    fresh_generator,
    require_choice,
    require_model_before_loss,
    require_positive_int,
)
from torch_secorder.autograd.compiled import eager_code
from torch_secorder.autograd.guard import recomputation
from torch_secorder.batch_axis.knowledge import ModelKnowledge, knowledge_of
from torch_secorder.batch_axis.samples import BatchSamples
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf, told
from torch_secorder.errors import ArgumentError, CoverageError, ShapeError, listed
from torch_secorder.model.parameters import ParameterTable, unwrapped
from torch_secorder.model.restore import keeping_graphs, lock_of
from torch_secorder.model.selection import Selection
from torch_secorder.running.analysis import Analysis, Checked
from torch_secorder.running.by_last_layer import ExactByLastLayer
from torch_secorder.running.fisher_kind import FisherKind
from torch_secorder.running.logits import logits
from torch_secorder.running.loss import require_targets_of_batch
from torch_secorder.running.misplaced import explaining_misplaced
from torch_secorder.running.own_loss import loss_function
from torch_secorder.running.run import require_twice_differentiable
from torch_secorder.verification.empirical import verify_empirical
from torch_secorder.verification.schedule import analyze_and_verify


@called_as(
    "empirical_fisher_trace(model, loss_fn, inputs, targets) for one batch, or fisher_report(model, loss_fn, data) for a loader",
    reduction="leave it out, since whether the loss averages or sums is found out from the loss",
    diagonal="use fisher_results(model, loss_fn, data, diagonal=True).diagonal",
)
def empirical_fisher_trace(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Any,
    targets: Any,
    num_samples: int = 1,
    *,
    create_graph: bool = False,
    verify: bool = True,
    parameters: Selection = "trainable",
    batch_axis: BatchAxis = None,
    n_samples: NSamples = None,
    sample_of: SampleOf = None,
) -> Tensor:
    r"""The trace of the empirical Fisher of one batch, exactly.

    .. math:: \operatorname{tr} F = c \sum_{n=1}^{N} \lVert g_n \rVert^2

    with g_n the gradient of sample n's loss in the trainable parameters; c = 1/N for a loss that averages over the batch and c
    = 1 for one that sums. Which of the two it is, is found out from the loss.

    The model runs once, in its current mode, and on samples alone where these are verified. Parameters, buffers, ``.grad``,
    hooks, mode and ``requires_grad`` are left as they were, graphs that were there before are kept, and attributes that a forward
    sets and the global random state are as after one plain forward. No parameter gradient is computed.

    Args:
        model: the model.
        loss_fn: from ``(outputs, targets)`` to a scalar; a module, a function or a partial. "model" stands for the loss that
            the model computes itself, ``outputs.loss``.
        inputs: a tensor; a tuple for several positional arguments; a mapping for keyword arguments.
        targets: whatever the loss takes.
        num_samples: has no effect, since the value is exact.
        create_graph: make the result differentiable.
        verify: compare samples alone with the batch on the calls named below; False for a model or a loss that takes whole
            batches only.
        parameters: which ones, as in :class:`~torch_secorder.FisherMonitor`.
        batch_axis: where the samples are counted, if not on axis 0; as in :class:`~torch_secorder.FisherMonitor`.
        n_samples: how many samples there are, where no axis of the inputs counts them; as there.
        sample_of: the sample of each row, where rows are not samples; as there.

    Returns:
        A 0-dim tensor on the model's device, in the parameters' dtype but at least float32.

    Raises:
        ArgumentError: for a ``num_samples`` that is no int >= 1, or a loss that is no scalar or neither averages nor sums.
        VerificationError: if the first, the last or a random sample alone has other gradients than in its batch, or the loss
            compares samples; that is looked at in the first three calls for a model, a loss function and a kind of graph,
            and then in the 5th, 9th, 17th, ...
        NonFiniteError: naming the parameters whose gradient is not finite.
        CurvatureError: in one of its kinds, for whatever else can't be exact; it says what to do.

    Example:
        >>> import torch
        >>> from torch_secorder import empirical_fisher_trace
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> empirical_fisher_trace(model, torch.nn.MSELoss(), x, y)  # (2^2 + 8^2) / 2
        tensor(34.)

    References:
        Martens (2020), "New insights and perspectives on the natural gradient method", section 11; Kunstner, Balles and
        Hennig (2019), "Limitations of the empirical Fisher approximation for natural gradient descent".
    """
    require_positive_int("num_samples", num_samples)
    loss_fn = loss_function(loss_fn)
    require_model_before_loss(model, loss_fn)
    words = told(unwrapped(model), batch_axis, n_samples, sample_of)
    analysis = Analysis(model, parameters, words, create_graph=create_graph, checks=verify)
    checked: Checked = "when due" if verify else "never"
    analyze = partial(analysis.empirical, loss_fn, inputs, targets, checked=checked)
    check = partial(verify_empirical, analysis, loss_fn, inputs, targets)
    with (
        lock_of(analysis.model),
        keeping_graphs(analysis.model),
        eager_code(),
        explaining_misplaced(inputs, targets),
    ):
        batch = analyze_and_verify(analysis, analyze, check)
    return _as_result(batch.samples.squared_norms.sum(0), batch.reduction, analysis.table)


@called_as(
    "generalized_fisher_trace(model, model(inputs), targets), where targets may be None",
    loss_fn="say which likelihood it is, with loss_type=",
    diagonal='use fisher_results(model, None, data, fisher="exact", diagonal=True).diagonal',
)
def generalized_fisher_trace(
    model: nn.Module,
    outputs: Any,
    targets: Any,
    loss_type: LossType = "nll",
    num_samples: int | None = None,
    create_graph: bool = False,
    *,
    labels: Labels = "model",
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    class_axis: int = 1,
    generator: torch.Generator | None = None,
    max_passes: int = 10_000,
    parameters: Selection = "trainable",
) -> Tensor:
    r"""The trace of the generalized (type-II) Fisher of one batch, from outputs that were computed before.

    .. math::
        \operatorname{tr} F = c \sum_{n=1}^{N} \mathbb{E}_{y \sim p(\cdot \mid x_n)}
        \lVert \nabla \log p(y \mid x_n) \rVert^2 = c \sum_{n=1}^{N} \operatorname{tr} J_n^\top A_n J_n

    with c = 1/N for ``reduction="mean"``, c = 1 for ``"sum"``; J_n the Jacobian of sample n's outputs in the trainable
    parameters.

    ============  ==========================  ===============================  ==========================================
    loss_type     outputs                     p(y given f)                     A_n
    ============  ==========================  ===============================  ==========================================
    ``nll``       logits, (N, C, ...)         categorical for each position    diag(p) - p p^T for each position
    ``bce``       logits, any shape           Bernoulli for each element       diag(p (1 - p))
    ``mse``       means, any shape            Gaussian of variance 1           identity
    ``poisson``   log rates, any shape        Poisson for each element         diag(exp f)
    ============  ==========================  ===============================  ==========================================

    The samples are taken apart in the graph that the outputs carry, from what its nodes have saved; that graph is kept. Where
    it doesn't show every sample's gradient (compiled code, samples that influence each other), each sample takes a backward
    pass of its own, with a :class:`~torch_secorder.errors.SlowFallbackWarning`. No hook of yours runs in that graph, so that one
    which changes gradients is left out.

    Where a product with a matrix made outputs ``(N, ..., C)``, as a Linear layer does, the exact passes begin before it, since
    its own part takes none; and where it has fewer than half as many inputs as classes, there is one for each input and position.

    With ``num_samples=k``, "nll" draws k labels for each position without replacement, each with a probability pi_c in
    proportion to how much it is expected to add, and takes ``sqrt(p_c / pi_c) (e_c - p)`` for its gradient. Whatever the pi_c
    are, as long as they are positive where p_c is, ``E sum_c p_c / pi_c ||J^T (e_c - p)||^2 = sum_c p_c ||J^T (e_c - p)||^2``,
    which is the trace; independent signs make products between positions vanish on average. The other likelihoods take
    independent signs on the square root of A_n. With as many samples as exact passes, the value is exact.

    Args:
        model: the model that made the outputs.
        outputs: a tensor with the batch on axis 0, or a model output with ``logits``.
        targets: enter only through ``ignore_index`` and for ``labels="observed"``; may be None otherwise.
        loss_type: "nll", "bce", "mse" or "poisson".
        num_samples: None for the exact expectation, k for an unbiased estimate from k random seeds.
        create_graph: make the result differentiable.
        labels: "model" for labels of the model's own prediction, "observed" for the given targets.
        reduction: "mean" or "sum".
        ignore_index: "nll" positions with this target contribute nothing.
        class_axis: where "nll" outputs have their classes.
        generator: for the random seeds; by default one of its own, with a fresh seed.
        max_passes: the most seeds that the exact expectation may take.
        parameters: which ones, as in :class:`~torch_secorder.FisherMonitor`; they have to require a gradient, since the outputs'
            graph shows nothing of frozen ones.

    Returns:
        A 0-dim tensor on the model's device, in the parameters' dtype but at least float32.

    Raises:
        ArgumentError: for an invalid argument, and when more than ``max_passes`` seeds would be needed.
        UnsupportedError: for an unknown ``loss_type``.
        CoverageError: if the outputs carry no graph that leads to a trainable parameter.

    Example:
        >>> import torch
        >>> from torch_secorder import generalized_fisher_trace
        >>> model = torch.nn.Linear(2, 3)
        >>> outputs = model(torch.tensor([[1.0, 2.0]]))
        >>> # 3 outputs, each (1^2 + 2^2) + 1
        >>> generalized_fisher_trace(model, outputs, None, loss_type="mse")
        tensor(18.)

    References:
        Martens (2020), "New insights and perspectives on the natural gradient method"; Schraudolph (2002), "Fast curvature
        matrix-vector products for second-order gradient descent".
    """
    require_choice("labels", labels, ("model", "observed"))
    require_choice("reduction", reduction, ("mean", "sum"))
    if num_samples is not None:
        require_positive_int("num_samples", num_samples)
    if callable(outputs) and not isinstance(outputs, Tensor):
        raise ArgumentError(
            "generalized_fisher_trace takes the model's outputs and no loss function: pass (model, model(inputs), targets), with "
            "loss_type= for another likelihood than that of classes"
        )
    outputs = logits(outputs)
    with lock_of(unwrapped(model)):
        table = ParameterTable(unwrapped(model), parameters)
        table.gather(unwrapped(model))
    if frozen := [name for name, leaf in zip(table.names, table.leaves, strict=True) if not leaf.requires_grad]:
        raise CoverageError(
            f"{listed(frozen, 'parameter')}: frozen, so that the graph of these outputs shows nothing of them: let them require "
            "a gradient and compute the outputs again, or use fisher_report, which runs the model"
        )
    if isinstance(targets, Tensor) and targets.grad_fn is not None and not outputs.requires_grad:
        raise ArgumentError(
            f"targets of shape {tuple(targets.shape)} were computed by a model, and outputs of shape {tuple(outputs.shape)} were "
            "not: they have changed places, pass (model, model(inputs), targets)"
        )
    if not outputs.requires_grad:
        raise CoverageError(
            "the outputs carry no autograd graph: compute them outside of torch.no_grad() and torch.inference_mode(), outputs = "
            "model(inputs), and pass these, not the inputs"
        )
    if not outputs.dim() or not len(outputs):
        raise ShapeError(f"the batch is empty: outputs of shape {tuple(outputs.shape)}")
    require_targets_of_batch(targets, BatchSamples(len(outputs)))
    kind = FisherKind(loss_type, labels, num_samples, ignore_index, class_axis, max_passes)
    _, seeds = kind.output_gradients(
        outputs, targets, fresh_generator(generator), table.ranks, differentiable=create_graph
    )
    by_last_layer = None if create_graph or table.ranks.distributed else kind.by_last_layer(outputs, targets)
    with lock_of(unwrapped(model)):
        norms = _squared_norms(outputs, seeds, by_last_layer, table, knowledge_of(unwrapped(model)), create_graph)
    return _as_result(norms, reduction, table)


def _squared_norms(
    outputs: Tensor,
    seeds: Iterable[Tensor],
    by_last_layer: ExactByLastLayer | None,
    table: ParameterTable,
    knowledge: ModelKnowledge,
    create_graph: bool,
) -> Tensor:
    """``sum_s ||J_n^T s_n||^2`` of every sample, ``[n]``."""
    if create_graph:
        require_twice_differentiable(outputs, table)
    norms = outputs.new_zeros(len(outputs), dtype=torch.promote_types(outputs.dtype, torch.float32))
    with recomputation(), SamplesOfGraph(outputs, table, knowledge, create_graph) as of_seed:
        if by_last_layer is not None and (found := of_seed.by_last_layer(by_last_layer)) is not None:
            return found
        for seed in seeds:
            norms = norms + of_seed(seed.to(outputs.dtype))
    return norms


def _as_result(norms: Tensor, reduction: str, table: ParameterTable) -> Tensor:
    """``c sum_n norms_n`` where the model is, in its dtype."""
    parameter = table.tensors[0]
    trace = norms.sum() / (len(norms) if reduction == "mean" else 1)
    return trace.to(parameter.device, torch.promote_types(parameter.dtype.to_real(), torch.float32))
