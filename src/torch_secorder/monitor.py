"""FisherMonitor: the context manager around the user's own forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from torch_secorder.arguments import (
    DiagonalLayout,
    MonitorFisher,
    OnError,
    Reduction,
    RepeatedCalls,
    called_as,
    described,
)
from torch_secorder.autograd.engine import without_modes
from torch_secorder.batch_axis.told import BatchAxis, NSamples, SampleOf
from torch_secorder.errors import ArgumentError, LifecycleError, users_place
from torch_secorder.model.names import plain_name
from torch_secorder.model.parameters import unwrapped
from torch_secorder.model.selection import Selection
from torch_secorder.recording.history import History
from torch_secorder.recording.monitoring import MonitorOptions, WatchedModel
from torch_secorder.recording.plan import planned
from torch_secorder.recording.quantities import OnOutput, kept
from torch_secorder.recording.recorded_block import RecordedBlock
from torch_secorder.recording.user_recorder import UserRecorder
from torch_secorder.results.delegation import WithResults
from torch_secorder.results.results import Results
from torch_secorder.verification.expected_norms import expected_norms
from torch_secorder.verification.pass_counter import PassCounter

if TYPE_CHECKING:
    from typing_extensions import Self

TAKES_NO_LOSS = (
    "a monitor takes no loss and no data, but watches the backward passes of your own loop in its block; fisher_report(model, "
    "loss_fn, data) runs the loop itself"
)


class FisherMonitor(WithResults, RecordedBlock):
    r"""Exact empirical-Fisher traces of every parameter, from the forward and backward passes that run inside.

    With samples n = 1..N, l_n a sample's loss and g_n its gradient, the contribution of parameter p is

    .. math:: \mathrm{fisher\_trace}[p] = c \sum_n \lVert g_{n,p} \rVert^2,

    c = 1/N for ``reduction="mean"``, c = 1 for ``"sum"``. This is never the squared gradient of the batch. The
    samples of all backward passes are pooled, and a pass of an empty batch adds nothing. The gradients that
    the user gets in ``.grad`` are bit-identical to those without the monitor.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped. Watched calls run uncompiled.
        reduction: how the loss that is differentiated combines its samples, "mean" or "sum".
        loss_scale: the factor that the loss was multiplied by: 1/k for ``loss / k`` over k accumulation steps, or a
            GradScaler's scale. A number, or a function that is called at each backward pass.
        parameters: "trainable", or "all" for frozen ones too; names or patterns of names, such as ``["*.weight"]``, or a function
            from a name and a parameter to whether it is analyzed, which may choose frozen ones as well. Other parameters have no
            row and are not in the total.
        diagonal: also keep the Fisher diagonal, a tensor of each parameter's size; or, for less memory and time, a mapping from
            patterns of names to "full", "rows" (the sum for each output channel) or "columns" (for each input channel), as in
            ``{"*.weight": "rows", "lm_head.weight": "columns"}``. Of several patterns that match, the last counts; parameters
            that none matches are left out.
        per_sample: also keep every t_{n,p}. Rows are in the order of the backward passes, and of several calls of the model
            that one pass reaches, those come first whose gradients arrive first, which are most often the later ones. A monitor
            sees no batches, so the loop has to collect names for the rows: ``monitor.per_sample.set_axis(ids)``.
        activations: also keep the Fisher trace and the moments of every module's output.
        on_output: a function that is called in the backward pass with each module, its output without a graph, and the gradient
            of the loss in it, both with the samples first: for sums over channels, samples or positions of one's own.
            The gradient is that of the loss which is differentiated; a sample's own is N times that if the loss averages.
            An output that all samples share is expanded to all of them; outputs in which nothing tells the samples apart are left
            out, and outputs that are changed in place are refused. If a pass is refused,
            the function may have been called for a part of it.
        batch_axis: where the samples are counted, if not on axis 0: an int for the model's inputs, its outputs and all of its
            layers, or a mapping with some of the keys "inputs", "outputs" and "modules", as in ``{"inputs": 1, "outputs": 0}``.
            Inputs may differ by position or name, ``{"inputs": {0: 1, "mask": None}}``, and outputs by position or key: None
            means that all samples share it, "list" that it is a list with an item for each sample. Modules go by names or
            patterns, ``{"modules": {"encoder.*": 1}}``; of several patterns that match, the last counts.
        n_samples: how many samples a call of the model has, where no axis of its inputs counts them: a number, or a function of
            the model's arguments.
        sample_of: the sample of each row, if rows are nodes of graphs or tokens: the position or name of the model's argument
            that has these numbers, or a function of the model's arguments. In inputs and outputs with as many rows, the rows with
            the same number form one sample.
        nonfinite: "raise" when a gradient is infinite or NaN, or "skip" those samples.
        on_refusal: what happens at the end of a backward pass that can't be counted exactly, whose samples are left out in
            either case: "raise" the error, or "skip" the pass, so that ``report().attrs["skipped_passes"]`` says how many there
            were, and a :class:`~torch_secorder.errors.SkippedPassWarning` reports the first of each kind of error. Errors on
            entry or in forward, and invalid arguments, are raised in either case.
            A weight penalty in the loss is refused in every pass that has it. Where its factor is 0 in the first passes, they
            are counted, and so are further ones until a pass whose sums are checked. Their trace is right, since a penalty
            belongs to no sample; it only enters their ``grad_sq_norm``.
        repeated_calls: what it means that one backward pass reaches two calls of the model: "same" if row n of both is
            one sample (siamese networks, a state that goes from call to call), "new" if they are different samples, all of which
            a "mean" loss averages: add up means of k equal batches and divide by k, or say ``loss_scale=k``. An error by default.
        every: with ``every=k``, only the first of each k calls of the model is watched, and the other steps cost about what plain
            steps cost. If code that torch.compile compiled is called inside the block, the first of each k backward passes is
            watched instead, with all calls of the model since the pass before it, and the other steps run compiled.
        fisher: whose labels your losses use. This is recorded in ``report().attrs`` for functions that read it, and changes no
            number. "empirical" is for the data's labels, "sampled" for labels that were drawn from the model's own prediction,
            "observed" for log-likelihoods of the data's labels.
        max_memory: the most bytes that the computation for one parameter may take at once, above the layer's own input and output
            gradient and what is kept of the result. By default a few MiB, or one sample's gradient where it is larger;
            smaller budgets cost time. A convolution takes one sample at least, and so does an operation without a rule.

    Attributes:
        results: what was accumulated; the monitor's own ``report``, ``trace``, ``merge``, ``save`` and so on call those of
            ``results``.

    Raises:
        ArgumentError: for an invalid argument, or a model with no trainable parameter.
        UnsupportedError: naming all frozen layers without a rule, where ``parameters`` asks for them.

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

    @called_as(
        "with FisherMonitor(model) as monitor: and in the block your own loop, loss_fn(model(inputs), targets).backward(); all "
        "arguments but model and reduction go by name",
        **dict.fromkeys(("loss_fn", "loss", "data"), TAKES_NO_LOSS),
    )
    def __init__(
        self,
        model: nn.Module,
        reduction: Reduction = "mean",
        *,
        loss_scale: float | Tensor | Callable[[], float | Tensor] = 1.0,
        parameters: Selection = "trainable",
        diagonal: DiagonalLayout = False,
        per_sample: bool = False,
        activations: bool = False,
        on_output: OnOutput | None = None,
        batch_axis: BatchAxis = None,
        n_samples: NSamples = None,
        sample_of: SampleOf = None,
        nonfinite: OnError = "raise",
        on_refusal: OnError = "raise",
        repeated_calls: RepeatedCalls | None = None,
        every: int = 1,
        fisher: MonitorFisher = "empirical",
        max_memory: int | None = None,
    ):
        if not isinstance(reduction, str):
            raise ArgumentError(
                f"reduction, the second argument, must be 'mean' or 'sum', not {described(reduction)}: {TAKES_NO_LOSS}"
            )
        keeps = {"diagonal": diagonal, "per_sample": per_sample, "activations": activations, "on_output": on_output}
        options = MonitorOptions(
            *(reduction, loss_scale, parameters, batch_axis, n_samples, sample_of, nonfinite, on_refusal),
            *(repeated_calls, every, fisher, max_memory, keeps),
        )
        watched = WatchedModel.of(model, options)
        if (wanted := kept(keeps, watched.model, watched.table)) != keeps:
            options = replace(options, keeps=wanted)
        self._set_up(options, watched, Results(watched.table.rows, reduction, fisher, **options.keeps))

    def _set_up(self, options: MonitorOptions, watched: WatchedModel | None, results: Results) -> None:
        self._options, self._watched, self.results = options, watched, results
        self._history = History("model" if watched is None else type(watched.model).__name__)
        results.why_empty = self._history.why_empty
        self._counter = PassCounter(options, watched, results.statistics, self._history)
        self._place: Hashable = None  # where in the user's program the block begins

    # ------------------------------------------------------------------------------------------------ the block

    def __enter__(self) -> Self:
        if self._recorder is not None:
            raise LifecycleError("this monitor is active already; leave its block first, or use a second monitor")
        if self._watched is None:
            raise LifecycleError("this monitor was loaded without its model: pass it, FisherMonitor.load(path, model)")
        if self.results.fisher == "exact":
            raise LifecycleError(
                "this monitor was loaded from results of the exact Fisher, to which backward passes of a training loop can't be "
                "added; report it, or merge it with other exact results"
            )
        # A monitor does not see the loss. Blocks that begin at the same place of the program are assumed to have the same loss.
        self._place = users_place()
        return super().__enter__()

    def _attach(self) -> None:
        with without_modes():
            self._attach_hooks()

    def _attach_hooks(self) -> None:
        assert self._watched is not None
        options, table = self._options, self._watched.table
        table.gather(self._watched.model)
        self.results.ranks.counts_samples = table.ranks.counts_samples
        passes = options.of_passes
        plan = planned(self._watched.model, table, self._watched.words, passes.quantities)
        self._counter.checks = self._watched.knowledge.sum_checks((self._place, passes.kind, plan.state()))
        self._recorder = UserRecorder(
            *(table, plan, self._watched.knowledge, passes),
            history=self._history,
            on_pass=self._counter.on_pass,
            checks_next=self._counter.checks.due,
            every=options.every,
            attach_leaf=options.parameters != "trainable",
        )
        self._recorder.__enter__()

    def _refuse(self, error: Exception) -> None:
        self._counter.refuse(error)

    def verify(self, loss: Tensor) -> None:
        """Check the next backward pass, which must be that of ``loss``, for the first, the last and one random sample.

        Their gradients are taken by plain autograd, through the outputs of the model inside the block that the loss depends on,
        which must still be there; at the end of the backward pass the hooks must have found the same. This costs three more
        backward passes. It finds wrong rules, samples that were looked for in the wrong place, and losses whose graph compares
        samples with each other. It calls no hooks of yours, so that a hook which changes a gradient fails it. It cannot check
        ``reduction=`` and ``loss_scale=``, for which it would need the loss function. :func:`fisher_report`, which has that
        function and runs each sample alone, finds more.

        Args:
            loss: computed from the model's outputs inside this monitor's block, not yet differentiated. It may depend on several
                calls of the model if ``repeated_calls="same"``.

        Raises:
            VerificationError: at the end of the backward pass, naming the parameters that differ; at once for a loss that
                compares samples.
            LifecycleError: outside of the block, after the loss's backward pass, or if outputs that the loss depends on are gone
                or belong to several calls, or the loss depends on none.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(3, 2)
            >>> with FisherMonitor(model) as monitor:
            ...     outputs = model(torch.randn(8, 3))
            ...     loss = outputs.square().mean()
            ...     monitor.verify(loss)
            ...     loss.backward()
        """
        if self._recorder is None:
            raise LifecycleError(
                "verify: outside of the monitor's block nothing is watched: write it inside, between the loss and its backward()"
            )
        if self._recorder.forwards.latest.n == 0:
            return  # An empty batch has no sample to look at.
        with without_modes():
            n, outputs = self._recorder.outputs_to_verify(loss)
            self._counter.expected = expected_norms(loss, outputs, n, self._recorder.table)

    # ------------------------------------------------------------------------------------------------ its results

    def reset(self) -> None:
        """Forget every sample."""
        self.results.reset()
        self._history.forget_passes()

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Self:
        """A monitor with the statistics that :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: the model that was analyzed, for a monitor that can go on. Without it the monitor reports and merges, and
                can't be entered.

        Raises:
            ArgumentError: if the file is torn, foreign, of another version, or of other parameters than the model's.
            ImportError: without safetensors (``pip install 'torch-secorder[save]'``).
        """
        results = Results.load(path, model)
        which: Selection = "trainable"
        fisher = "empirical" if results.fisher == "exact" else results.fisher
        if model is not None:
            trainable = [plain_name(name) for name, p in unwrapped(model).named_parameters() if p.requires_grad]
            which = "trainable" if trainable == results.statistics.names else results.statistics.names
        options = MonitorOptions(results.reduction, parameters=which, fisher=fisher, keeps=results.statistics.keeps)
        monitor = cls.__new__(cls)
        monitor._set_up(options, None if model is None else WatchedModel.of(model, options), results)
        return monitor

    def __reduce__(self) -> str:
        raise TypeError(
            "a monitor belongs to its model and is not copied: take its report(), its state_dict(), or save(path)"
        )

    def __repr__(self) -> str:
        model = "no model" if self._watched is None else type(self._watched.model).__name__
        state = "active" if self._recorder is not None else "idle"
        counts = f"{len(self.results.rows)} parameters, reduction={self.results.reduction!r}, {self.n_samples} samples"
        return f"FisherMonitor({model}, {counts}, {state})"
