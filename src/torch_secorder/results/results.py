"""What a monitor has accumulated: the results, and how they are merged, shared and saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_secorder.errors import ArgumentError, LifecycleError
from torch_secorder.model.parameters import Parameter, ParameterTable, plain_name
from torch_secorder.results.report import By, Report
from torch_secorder.results.saving import load, save
from torch_secorder.results.statistics import Statistics

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Self

    from torch_secorder.recording.sample_norms import Samples


class Named:
    """The rows of a parameter table whose model is elsewhere."""

    def __init__(self, rows: Iterable[Parameter]):
        self.rows = list(rows)
        self.names = [row.name for row in self.rows]


class Results:
    """What :class:`~torch_secorder.FisherMonitor` offers of the samples it saw.

    Args:
        table: the analysed parameters.
        reduction: "mean" or "sum".
        fisher: which Fisher the samples are of.
        keeps: what else than squared norms is kept; see :class:`~torch_secorder.results.statistics.Statistics`.
    """

    def __init__(self, table: ParameterTable | Named, reduction: str, fisher: str = "empirical", **keeps: bool):
        self._rows, self._reduction, self._fisher = table.rows, reduction, fisher
        self._statistics = Statistics(table.names, [row.shape for row in table.rows], **keeps)
        self._common = self._like()  # what all ranks were given by all_reduce

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self._rows)} parameters, reduction={self._reduction!r}, fisher={self._fisher!r}, "
            f"{self.n_samples} samples)"
        )

    @property
    def n_samples(self) -> int:
        """How many samples were seen."""
        return self._together().n

    @property
    def trace(self) -> Tensor:
        """The total over all analysed parameters, a 0-dim float64 tensor."""
        return torch.tensor(self._report().trace, dtype=torch.float64)

    def report(self, by: By = None, *, sync: bool = False) -> pd.DataFrame:
        """The table: a row for each parameter, or for each group of them.

        Args:
            by: None, "module", "type", or a function from a parameter's name to a group.
            sync: of the samples of all ranks of the default process group, which all have to ask; what this rank has
                accumulated stays its own.

        Returns:
            A DataFrame with the columns ``module``, ``module_type``, ``shape``, ``numel`` (by group: ``n_parameters``,
            ``numel``), then ``fisher_trace``, ``fisher_trace_stderr``, ``fisher_trace_share``, ``fisher_mean``,
            ``grad_sq_norm`` and ``rule``. Its ``attrs`` say ``reduction``, ``fisher``, ``n_samples``, ``n_passes``
            and, where ``nonfinite="skip"`` left out samples, ``n_skipped``.

        Raises:
            LifecycleError: if no sample was seen.
        """
        return self._report(sync).table(by)

    @property
    def diagonal(self) -> dict[str, Tensor]:
        """The Fisher diagonal ``c sum_n g_n ** 2``, a dict of tensors of the parameters' shapes that sum to their traces."""
        self._require(self._statistics.keeps["diagonal"], "diagonal")
        statistics = self._seen()
        c = 1 / statistics.n if self._reduction == "mean" else 1.0
        parameters = zip(statistics.names, statistics.squares, statistics.shapes, strict=True)
        return {name: (c * squares).expand(shape) for name, squares, shape in parameters}

    @property
    def per_sample(self) -> pd.DataFrame:
        """Every unscaled t_{n,p}, a row for each sample in the order of backward passes and a column for each parameter."""
        self._require(self._statistics.keeps["per_sample"], "per_sample")
        return self._report().per_sample()

    @property
    def activations(self) -> pd.DataFrame:
        """A row for each module that returns a tensor: ``module_type``, ``activation_trace`` and moments of the output.

        The activation trace is ``c sum_n ||gradient of l_n in the module's output||^2``; ``numel`` output elements were
        seen, with these ``mean``, ``std``, ``min`` and ``max``.
        """
        self._require(self._statistics.keeps["activations"], "activations")
        return self._report().activations()

    def reset(self) -> None:
        """Forget every sample."""
        self._statistics.clear()
        self._common.clear()

    def merge(self, other: Results) -> Self:
        """Add the samples of another monitor of a model with the same parameters, and return self.

        Raises:
            ArgumentError: if names, shapes, reduction, which Fisher it is or what is kept differ.
        """
        if not isinstance(other, Results):
            raise ArgumentError(f"only monitors and what was loaded of them can be merged, not {type(other).__name__}")
        if self._reduction != other._reduction:
            raise ArgumentError(f"cannot merge reduction={other._reduction!r} into reduction={self._reduction!r}")
        if self._fisher != other._fisher:
            raise ArgumentError(f"cannot merge fisher={other._fisher!r} into fisher={self._fisher!r}")
        self._statistics.merge(other._together())
        return self

    def all_reduce(self, group: Any = None) -> Self:
        """Add the samples of all ranks of a process group, each once however often this is called; returns self.

        All ranks have to call it, also those that saw no sample. Afterwards every rank has the same table, as if one
        process had run all ranks' passes in the order of the ranks.

        Args:
            group: a process group of :mod:`torch.distributed`; the default one by default.

        Raises:
            LifecycleError: if no process group was initialised.
            ArgumentError: if the ranks analyse different parameters, or keep different things.
        """
        self._common = self._reduced(group)
        self._statistics.clear()
        return self

    def state_dict(self) -> dict[str, Any]:
        """What was accumulated, as tensors, numbers and strings."""
        about = {"reduction": self._reduction, "fisher": self._fisher}
        return about | {"module_types": [row.module_type for row in self._rows]} | self._together().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was accumulated by another monitor's :meth:`state_dict`.

        Raises:
            ArgumentError: if it is of other parameters, another reduction or another kind.
        """
        if not isinstance(state, Mapping) or "reduction" not in state:
            raise ArgumentError(
                f"a state is a mapping as a monitor's state_dict() returns it, not this {type(state).__name__}"
            )
        if state["reduction"] != self._reduction:
            raise ArgumentError(f"the state has reduction={state['reduction']!r}, this monitor {self._reduction!r}")
        if state.get("fisher", self._fisher) != self._fisher:
            raise ArgumentError(f"the state has fisher={state['fisher']!r}, this monitor {self._fisher!r}")
        self._statistics.load_state_dict(state)
        self._common.clear()

    def save(self, path: str | Path) -> None:
        """Write what was accumulated to a file, whole or not at all (safetensors; ``pip install 'torch-secorder[save]'``).

        Raises:
            ArgumentError: if safetensors is not installed, or there is no such folder.
        """
        save(self.state_dict(), Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Results:
        """What :meth:`save` wrote. Nothing in the file is executed.

        Args:
            path: the file.
            model: the model that was analysed, for a monitor that can go on; without it, only the results.

        Raises:
            ArgumentError: if the file is torn, foreign, or of other parameters than the model's.
        """
        state = load(Path(path))
        if any(key not in state for key in ("names", "shapes", "keeps", "reduction", "module_types")):
            raise ArgumentError(f"{path} was not written by FisherMonitor.save")
        if model is None:
            table = Named(
                Parameter(name, name.rpartition(".")[0], kind, tuple(shape), math.prod(shape))
                for name, kind, shape in zip(state["names"], state["module_types"], state["shapes"], strict=True)
            )
            results = Results(table, state["reduction"], state.get("fisher", "empirical"), **state["keeps"])
        else:
            trainable = [plain_name(name) for name, p in model.named_parameters() if p.requires_grad]
            which = "trainable" if trainable == state["names"] else "all"
            options = {"parameters": which, "fisher": state.get("fisher", "empirical")} | state["keeps"]
            results = cls(model, state["reduction"], **options)  # type: ignore[arg-type]  # a monitor's arguments
        results.load_state_dict(state)
        return results

    def _count_in(self, samples: Samples, types: Mapping[str, str]) -> None:
        """A batch whose squares are those of l_n, and the types of the modules whose outputs were watched."""
        outputs = samples.output_sums(types)
        self._statistics.update(samples.norms, samples.squares, samples.rules, samples.reached, {}, 0, outputs)

    def _report(self, sync: bool = False) -> Report:
        return Report(self._rows, self._seen(sync), self._reduction, self._fisher)

    def _seen(self, sync: bool = False) -> Statistics:
        statistics = self._reduced(None) if sync else self._together()
        if not statistics.n:
            raise LifecycleError(
                "no sample was seen yet: run the model's forward and its loss's backward inside the monitor's block"
            )
        return statistics

    def _together(self) -> Statistics:
        """What all ranks have in common, and what this one saw since."""
        if not self._common.n:
            return self._statistics
        return self._like(self._common, self._statistics)

    def _reduced(self, group: Any) -> Statistics:
        """What all ranks have in common, and what any of them saw since."""
        if not (dist.is_available() and dist.is_initialized()):
            raise LifecycleError(
                "no process group: call torch.distributed.init_process_group first, or run under torchrun"
            )
        states: list[Any] = [None] * dist.get_world_size(group)
        own = self._statistics if self._counts else self._like()
        dist.all_gather_object(states, own.state_dict(), group)
        others = [self._like() for _ in states]
        for other, state in zip(others, states, strict=True):
            other.load_state_dict(state)
        return self._like(self._common, *others)

    @property
    def _counts(self) -> bool:
        """Whether the samples are this rank's to count, and not another's that computes the same ones."""
        return True

    def _like(self, *parts: Statistics) -> Statistics:
        whole = Statistics(self._statistics.names, self._statistics.shapes, **self._statistics.keeps)
        for part in parts:
            whole.merge(part)
        return whole

    def _require(self, kept: bool, what: str) -> None:
        if not kept:
            raise LifecycleError(f"{what} was not asked for: pass {what}=True to FisherMonitor or fisher_results")
