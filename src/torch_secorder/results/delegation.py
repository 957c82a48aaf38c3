"""The methods of an object that holds results: it offers their tables, files and sums as its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_secorder.arguments import By
from torch_secorder.results.results import Results

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self


class WithResults:
    """Passes every call on to its results.

    Attributes:
        results: what was accumulated.
    """

    results: Results

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self.results.n_samples

    @property
    def trace(self) -> Tensor:
        """The total over all analyzed parameters, a 0-dim float64 tensor."""
        return self.results.trace

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """The Fisher diagonal ``c sum_n g_n ** 2``, a dict of tensors that sum to the traces; see :attr:`Results.diagonal`."""
        return self.results.diagonal

    @property
    def per_sample(self) -> pd.DataFrame:
        """Every unscaled t_{n,p}, a row for each sample in the order of backward passes and a column for each parameter."""
        return self.results.per_sample

    @property
    def activations(self) -> pd.DataFrame:
        """A row for each module that returns a tensor; see :attr:`Results.activations`."""
        return self.results.activations

    def report(self, by: By = None, *, sync: bool = False) -> pd.DataFrame:
        """The table: a row for each parameter, or for each group of them; see :meth:`Results.report`.

        Args:
            by: None, "module", "type", or a function from a parameter's name to a group.
            sync: whether the table is of the samples of all ranks of the default process group, which then all have to call this;
                what this rank has accumulated stays its own.

        Raises:
            LifecycleError: if no sample was seen.
        """
        return self.results.report(by, sync=sync)

    def summary(self, by: By = None, *, width: int | None = None, sync: bool = False) -> str:
        """The report as text, with bars and the total; see :meth:`Results.summary`.

        Args:
            by: None, "module", "type", or a function from a parameter's name to a group.
            width: the width of the text in characters; by default that of the terminal.
            sync: whether the text is of the samples of all ranks, as in :meth:`report`.

        Raises:
            LifecycleError: if no sample was seen.
        """
        return self.results.summary(by, width=width, sync=sync)

    def _repr_html_(self) -> str:
        return self.results._repr_html_()

    def merge(self, other: WithResults | Results) -> Self:
        """Add the samples of another monitor or of results, of a model with the same parameters; returns self.

        Raises:
            ArgumentError: if names, shapes, the reduction, the Fisher or what is kept differ.
        """
        self.results.merge(other)
        return self

    def all_reduce(self, group: Any = None) -> Self:
        """Add the samples of all ranks of a process group, each once however often this is called; returns self.

        All ranks have to call it, even those that saw no sample; see :meth:`Results.all_reduce`.

        Raises:
            LifecycleError: if no process group was initialized.
            ArgumentError: if the ranks analyze different parameters, or keep different things.
        """
        self.results.all_reduce(group)
        return self

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated, as tensors, numbers and strings."""
        return self.results.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was accumulated by another monitor's :meth:`state_dict`.

        Raises:
            ArgumentError: if it is of other parameters, another reduction or another kind, or of another version.
        """
        self.results.load_state_dict(state)

    def save(self, path: str | Path) -> None:
        """Write what was accumulated to a file, whole or not at all (safetensors; ``pip install 'torch-secorder[save]'``).

        Raises:
            ImportError: without safetensors.
            ArgumentError: if there is no such folder.
        """
        self.results.save(path)

    def save_diagonal(self, path: str | Path) -> None:
        """Write the diagonal to a safetensors file that other programs read; see :meth:`Results.save_diagonal`.

        Raises:
            ImportError: without safetensors.
            ArgumentError: if there is no such folder.
            LifecycleError: if no diagonal was asked for, or no sample was seen.
        """
        self.results.save_diagonal(path)
