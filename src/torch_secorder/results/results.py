"""What was accumulated over samples, and how it is shown, merged, shared between ranks and saved."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_secorder.arguments import By, Fisher, Reduction
from torch_secorder.errors import ArgumentError, LifecycleError
from torch_secorder.model.parameters import Parameter
from torch_secorder.recording.quantities import Diagonal
from torch_secorder.results.across_ranks import RankedStatistics
from torch_secorder.results.report import Report
from torch_secorder.results.saved_parameters import require_parameters_of, saved_parameters
from torch_secorder.results.saving import load, save, save_tensors
from torch_secorder.results.statistics import Statistics
from torch_secorder.results.text import as_html, summary
from torch_secorder.version import VERSION

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self


class Results:
    """What was measured on the samples that a monitor or :func:`~torch_secorder.fisher_results` saw.

    Args:
        rows: the analyzed parameters.
        reduction: "mean" or "sum".
        fisher: which Fisher was measured.
        keeps: name of a quantity ("diagonal", "per_sample", "activations") -> whether it is kept, or which part of it is kept.

    Attributes:
        statistics: what this rank has accumulated since an all_reduce.
        precision: for ``attrs``, which standard error was asked for and reached; empty if none was asked for.
        ranks: these statistics, beside those that all ranks have in common.
        why_empty: a function that says why there is no sample; None if that is not known.
    """

    def __init__(self, rows: Iterable[Parameter], reduction: Reduction, fisher: Fisher = "empirical", **keeps: Any):
        self.rows, self.reduction, self.fisher = list(rows), reduction, fisher
        self.statistics = Statistics([row.name for row in self.rows], [row.shape for row in self.rows], **keeps)
        self.ranks = RankedStatistics(self.statistics)
        self.precision: dict[str, Any] = {}
        self.why_empty: Callable[[], str] | None = None

    def __repr__(self) -> str:
        return (
            f"Results({len(self.rows)} parameters, reduction={self.reduction!r}, fisher={self.fisher!r}, "
            f"{self.n_samples} samples)"
        )

    # ------------------------------------------------------------------------------------------------ shown

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self.ranks.whole().n

    @property
    def trace(self) -> Tensor:
        """The total over all analyzed parameters, a 0-dim float64 tensor."""
        return torch.tensor(self._report().trace, dtype=torch.float64, device="cpu")

    def report(self, by: By = None, *, sync: bool = False) -> pd.DataFrame:
        """The table: a row for each parameter, or for each group of them.

        Args:
            by: None, "module", "type", or a function from a parameter's name to a group.
            sync: whether the table is of the samples of all ranks of the default process group, which then all have to call this;
                what this rank has accumulated stays its own.

        Returns:
            A DataFrame with the columns ``module``, ``module_type``, ``shape``, ``numel`` (by group: ``n_parameters``,
            ``numel``), then ``fisher_trace``, ``fisher_trace_stderr``, ``fisher_trace_share``, ``fisher_mean``,
            ``grad_sq_norm`` and ``rule``. Its ``attrs`` say ``reduction``, ``fisher``, ``n_samples``, ``n_passes``,
            ``skipped_passes`` (backward passes that were left out because they were refused), ``total_stderr`` (the standard
            error of the total) and, where ``nonfinite="skip"`` left out samples, ``n_skipped``.

        Raises:
            LifecycleError: if no sample was seen.
        """
        table = self._report(sync).table(by)
        table.attrs.update({} if sync else self.precision)
        return table

    def summary(self, by: By = None, *, width: int | None = None, sync: bool = False) -> str:
        """The report as text: the numbers that decide, shares as bars, and the total with its standard error.

        Args:
            by: None, "module", "type", or a function from a parameter's name to a group.
            width: the width of the text in characters; by default that of the terminal. See
                :func:`torch_secorder.results.text.summary`.
            sync: whether the text is of the samples of all ranks, as in :meth:`report`.

        Raises:
            LifecycleError: if no sample was seen.
        """
        return summary(self.report(by, sync=sync), width)

    def _repr_html_(self) -> str:
        return as_html(self.report()) if self.n_samples else html.escape(repr(self))

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """The Fisher diagonal ``c sum_n g_n ** 2``, a dict of tensors of the parameters' shapes that sum to their traces.

        Where ``diagonal=`` asked for "rows" or "columns" of a parameter, its tensor has the sum for each output or input channel.
        """
        statistics = self._seen("diagonal")
        quantity = statistics.quantities["diagonal"]
        assert isinstance(quantity, Diagonal)
        return quantity.scaled(1 / statistics.n if self.reduction == "mean" else 1.0)

    @property
    def per_sample(self) -> pd.DataFrame:
        """Every unscaled t_{n,p}, a row for each sample in the order of backward passes and a column for each parameter.

        Rows are numbered, or have the ids that :func:`~torch_secorder.fisher_results` was told to find in the batches.
        """
        self._seen("per_sample")
        return self._report().per_sample()

    @property
    def activations(self) -> pd.DataFrame:
        """A row for each module that returns a tensor: ``module_type``, ``activation_trace`` and moments of the output.

        The activation trace is ``c sum_n ||gradient of l_n in the module's output||^2``; ``numel`` output elements were
        seen, with these ``mean``, ``std``, ``min`` and ``max``.
        """
        self._seen("activations")
        return self._report().activations()

    def _report(self, sync: bool = False) -> Report:
        return Report(self.rows, self._seen(sync=sync), self.reduction, self.fisher)

    def _seen(self, quantity: str | None = None, *, sync: bool = False) -> Statistics:
        if quantity is not None and not self.statistics.keeps[quantity]:
            raise LifecycleError(
                f"{quantity} was not asked for: pass {quantity}=True to FisherMonitor or fisher_results"
            )
        statistics = self.ranks.reduced() if sync else self.ranks.whole()
        if not statistics.n:
            raise LifecycleError(f"no sample was seen yet: {self._why_empty(statistics)}")
        return statistics

    def _why_empty(self, statistics: Statistics) -> str:
        if statistics.n_skipped:
            return (
                f'nonfinite="skip" left out all {statistics.n_skipped} samples, whose gradients are infinite or NaN: lower the '
                "learning rate or the loss scale, or look at the batch"
            )
        if self.why_empty is not None:
            return self.why_empty()
        return "these results are empty; merge() into them what has samples"

    # ------------------------------------------------------------------------------------------------ added to

    def reset(self) -> None:
        """Forget every sample."""
        self.ranks.clear()
        self.precision = {}

    def merge(self, other: Any) -> Self:
        """Add the samples of other results, or of another monitor, of a model with the same parameters; returns self.

        Raises:
            ArgumentError: if names, shapes, the reduction, the Fisher or what is kept differ, or if both have samples in
                common: a monitor and itself, or two states of one run.
        """
        other = results_of(other)
        if not isinstance(other, Results):
            raise ArgumentError(f"only monitors and what was loaded of them can be merged, not {type(other).__name__}")
        if self.reduction != other.reduction:
            raise ArgumentError(f"cannot merge reduction={other.reduction!r} into reduction={self.reduction!r}")
        if self.fisher != other.fisher:
            raise ArgumentError(f"cannot merge fisher={other.fisher!r} into fisher={self.fisher!r}")
        self.ranks.merge(other.ranks.whole())
        self.precision = {}
        return self

    # ------------------------------------------------------------------------------------------------ ranks

    def all_reduce(self, group: Any = None) -> Self:
        """Add the samples of all ranks of a process group, each once however often this is called; returns self.

        All ranks have to call it, even those that saw no sample. Afterwards every rank has the same table, as if one
        process had run all ranks' passes in the order of the ranks.

        Args:
            group: a process group of :mod:`torch.distributed`; the default one by default.

        Raises:
            LifecycleError: if no process group was initialized.
            ArgumentError: if the ranks analyze different parameters, or keep different things.
        """
        self.ranks.all_reduce(group)
        self.precision = {}
        return self

    # ------------------------------------------------------------------------------------------------ saved

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated, as tensors, numbers and strings."""
        about = {"reduction": self.reduction, "fisher": self.fisher}
        return about | {"module_types": [row.module_type for row in self.rows]} | self.ranks.whole().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was accumulated by what another :meth:`state_dict` holds.

        Raises:
            ArgumentError: if it is of other parameters, another reduction or another kind, or of another version.
        """
        if not isinstance(state, Mapping) or "reduction" not in state:
            raise ArgumentError(
                f"a state is a mapping as a monitor's state_dict() returns it, not this {type(state).__name__}"
            )
        if state["reduction"] != self.reduction:
            raise ArgumentError(f"the state has reduction={state['reduction']!r}, this monitor {self.reduction!r}")
        if state.get("fisher", self.fisher) != self.fisher:
            raise ArgumentError(f"the state has fisher={state['fisher']!r}, this monitor {self.fisher!r}")
        self.ranks.load_state_dict(state)
        self.precision = {}

    def save(self, path: str | Path) -> None:
        """Write what was accumulated to a file, whole or not at all (safetensors; ``pip install 'torch-secorder[save]'``).

        Raises:
            ArgumentError: if there is no such folder.
            ImportError: without safetensors.
        """
        save(self.state_dict(), Path(path))

    def save_diagonal(self, path: str | Path) -> None:
        """Write :attr:`diagonal` to a safetensors file that other programs read (``pip install 'torch-secorder[save]'``).

        ``safetensors.torch.load_file(path)`` gives each parameter's name and a contiguous tensor of its shape. The file's
        metadata are strings that say ``reduction``, ``fisher``, ``n_samples`` and ``version``, the release of this library that
        wrote it. Where sums over channels were kept, ``channels`` is JSON: parameter name -> the axis that they are counted on,
        and the groups of a convolution.

        Raises:
            ArgumentError: if there is no such folder.
            ImportError: without safetensors.
            LifecycleError: if no diagonal was asked for, or no sample was seen.

        Example:
            >>> import os, tempfile, torch
            >>> from safetensors.torch import load_file
            >>> from torch_secorder import fisher_results
            >>> model = torch.nn.Linear(3, 2)
            >>> data = torch.randn(8, 3), torch.randint(2, (8,))
            >>> loss_fn = torch.nn.CrossEntropyLoss()
            >>> results = fisher_results(model, loss_fn, data, diagonal=True, progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     results.save_diagonal(os.path.join(folder, "fisher.safetensors"))
            ...     load_file(os.path.join(folder, "fisher.safetensors"))["weight"].shape
            torch.Size([2, 3])
        """
        held = {name: value.detach().cpu().contiguous() for name, value in self.diagonal.items()}
        facts = {"reduction": self.reduction, "fisher": self.fisher, "n_samples": str(self.n_samples)}
        if not isinstance(layout := self.statistics.keeps["diagonal"], bool):
            facts["channels"] = json.dumps({name: numbers for name, numbers in layout.items() if numbers})
        save_tensors(held, facts | {"version": VERSION}, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Results:
        """The results that :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: the model that was analyzed, if names and shapes are to be compared with it.

        Raises:
            ArgumentError: if the file is torn, foreign, of another version, or of other parameters than the model's.
            ImportError: without safetensors (``pip install 'torch-secorder[save]'``).
        """
        state = load(Path(path))
        rows = saved_parameters(state, path)
        if model is not None:
            require_parameters_of(model, rows, path)
        results = cls(rows, state["reduction"], state.get("fisher", "empirical"), **state["keeps"])
        results.load_state_dict(state)
        return results


def results_of(source: Any) -> Any:
    """The results of a monitor; anything else is returned as it is."""
    return getattr(source, "results", source)
