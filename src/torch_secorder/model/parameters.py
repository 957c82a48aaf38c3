"""Which parameters are analyzed, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from torch_secorder.arguments import require_model
from torch_secorder.errors import ArgumentError, UnsupportedError
from torch_secorder.model.containers import is_continuous
from torch_secorder.model.names import any_from_wrappers, plain_name
from torch_secorder.model.numpy_of_frozen import NumpyOfFrozen
from torch_secorder.model.packed import weight_shape
from torch_secorder.model.ranks import (
    Ranks,
    class_as_written,
    fsdp_modules,
    is_dtensor,
    refuse_fully_sharded,
    unsharded_leaves,
)
from torch_secorder.model.selection import Selection, selected
from torch_secorder.model.tree import Modules, modules_by_path, parameters_by_path

Described = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameter:
    """One analyzed parameter. A tied parameter has the first of its names."""

    name: str
    module: str
    module_type: str
    shape: tuple[int, ...]
    numel: int


class Table:
    """What is analyzed, in a fixed order: parameters, or something else that has per-sample gradients.

    Other code refers to each of them by its position in this table.

    Attributes:
        rows: the description of each one for the report.
        names: the name of each one.
        tensors: the parameters themselves; empty for a table of other things.
        leaves: the tensors that stand for them in the autograd graph; empty for a table of other things.
        others: the model's parameters that are not analyzed; empty for a table of other things.
        sharded: the model's modules that FSDP2 shards.
        ranks: the ranks that hold the model together with this one.
    """

    def __init__(self, rows: Iterable[Parameter], tensors: Sequence[Tensor] = ()):
        self.rows = list(rows)
        self.names = [row.name for row in self.rows]
        self.tensors = self.leaves = list(tensors)
        self.others: list[Tensor] = []
        self.sharded: list[nn.Module] = []
        self.ranks = Ranks()

    def __len__(self) -> int:
        return len(self.rows)


class ParameterTable(Table):
    """The analyzed parameters of a model, in the order of ``named_parameters()``.

    The leaves are the parameters themselves, or the tensors into which FSDP2 gathers them.

    Attributes:
        paths: the name of each parameter in the model with its wrappers.
        frozen: the parameters that required no gradient when the table was made.
        quantized: the positions of quantized weights. They hold codes, for which autograd gives no gradient.

    Args:
        model: the model.
        selection: which of its parameters; see :func:`~torch_secorder.model.selection.selected`.
        modules: all of its modules, if the caller has just listed them.
    """

    def __init__(self, model: nn.Module, selection: Selection = "trainable", modules: Modules | None = None):
        modules = modules_by_path(model) if modules is None else modules
        refuse_fully_sharded(modules)
        every_one = parameters_by_path(model, modules)
        if not (named := selected(model, every_one, selection)):
            frozen = any(True for _ in model.parameters())
            remedy = 'pass parameters="all" to analyze frozen ones' if frozen else "it has none at all"
            raise ArgumentError(f"{type(model).__name__} has no trainable parameter: {remedy}")
        self.tensors = [p for _, p in named]
        of_each_kind = {(type(p), p.dtype): p for p in self.tensors}
        if any(map(nn.parameter.is_lazy, of_each_kind.values())):
            lazy = [name for name, p in named if nn.parameter.is_lazy(p)]
            raise UnsupportedError(f"{', '.join(lazy)}: not initialized yet; run the model once before analyzing it")
        if bare := [name for name, p in named if p.is_meta]:
            raise UnsupportedError(
                f"{', '.join(bare[:3])}: on the meta device, without numbers; load the weights first"
            )
        super().__init__(_rows(model, modules, named), self.tensors)
        self.frozen = [p for p in self.tensors if not p.requires_grad]
        self.paths = [name for name, _ in named]
        kinds = {kind for kind, p in of_each_kind.items() if _is_quantized(p)}
        self.quantized = {position for position, p in enumerate(self.tensors) if kinds and (type(p), p.dtype) in kinds}
        if trained := [self.names[position] for position in self.quantized if self.tensors[position].requires_grad]:
            raise UnsupportedError(
                f"{', '.join(trained)}: a {type(self.tensors[min(self.quantized)]).__name__} that requires a gradient; what is "
                "quantized can be analyzed frozen (requires_grad_(False)), from its layer's inputs and output gradients"
            )
        self._positions = {id(p): position for position, p in enumerate(self.tensors)}
        self.others = [p for _, p in every_one if id(p) not in self._positions]

    def gather(self, model: nn.Module) -> None:
        """Find the tensors that stand for the parameters in the graph. Ranks that share a model have to call this together."""
        self.leaves, self.sharded = unsharded_leaves(model, self.tensors), fsdp_modules(model)
        self.ranks = Ranks(self.tensors, self.leaves)
        vars(self).pop("differentiable", None)
        if self.sharded:
            self._positions |= {id(p): position for position, p in enumerate(self.leaves)}

    @cached_property
    def differentiable(self) -> list[Tensor]:
        """The parameters and the leaves that stand for them, each once, without quantized weights."""
        codes = {id(self.tensors[position]) for position in self.quantized}
        return list({id(p): p for p in (*self.tensors, *self.leaves) if id(p) not in codes}.values())

    def position(self, tensor: Tensor | None) -> int | None:
        """The position of a parameter; None for a tensor that is not analyzed."""
        return self._positions.get(id(tensor))

    def is_present(self, position: int, model: nn.Module) -> bool:
        """Whether the model still has a parameter where it was."""
        *way, local = self.paths[position].split(".")
        module: nn.Module | None = model
        for name in way:
            module = None if module is None else module._modules.get(name)
        found = None if module is None else module._parameters.get(local)
        return found is self.tensors[position] or found is self.leaves[position]

    def owned(self, module: nn.Module) -> dict[str, int]:
        """The module's own analyzed parameters: local name -> position."""
        found: dict[str, int] = {}
        for local, p in module._parameters.items():
            position = self._positions.get(id(p))
            if position is not None:
                found[local] = position
        return found


def numpy_of_frozen(table: ParameterTable) -> AbstractContextManager[object]:
    """The mode for calls of a model whose frozen parameters temporarily require a gradient; no mode if there are none."""
    return NumpyOfFrozen(table.frozen) if table.frozen else nullcontext()


def _is_quantized(p: Tensor) -> bool:
    # Tensors that wrap other tensors have this method.
    return not is_dtensor(p) and (not is_continuous(p) or hasattr(p, "__tensor_flatten__"))


def refuse_inference_mode() -> None:
    """Raise ArgumentError where torch forbids gradients."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError("torch.inference_mode() forbids gradients: call this outside of it")


def refuse_complex(model: nn.Module, what: str) -> None:
    """Refuse a model with complex parameters for something that is defined only for real ones.

    Raises:
        UnsupportedError: if a parameter is complex, naming it.
    """
    if name := next((name for name, p in model.named_parameters() if p.is_complex()), None):
        raise UnsupportedError(
            f"{what} takes real parameters, and '{name}' is complex: keep its real and its imaginary part as one real parameter, "
            "and put them together in the forward (torch.view_as_complex)"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model inside DistributedDataParallel and torch.compile."""
    require_model(model)
    if isinstance(model, DataParallel):
        raise UnsupportedError(
            "DataParallel runs copies of the model, whose parameters are not the model's own: "
            "use the bare model, or DistributedDataParallel"
        )
    if isinstance(model, DistributedDataParallel):
        return unwrapped(model.module)
    # torch.compile's wrapper is recognized by its attribute, since the module with its class takes seconds to import.
    return unwrapped(model._orig_mod) if "_orig_mod" in model._modules else model  # type: ignore[arg-type]  # a module, there


def named_modules(model: nn.Module, modules: Modules | None = None) -> Modules:
    """Every module once, under its plain name.

    Args:
        model: the model.
        modules: all of its modules with their paths, if the caller has just listed them.
    """
    found = modules_by_path(model) if modules is None else modules
    if any_from_wrappers([path for path, _ in found]):
        return [(plain_name(path), module) for path, module in found]
    return found


# What describes each parameter of a model, and the rows that were made of it for the model's latest table.
_latest_rows: WeakKeyDictionary[nn.Module, tuple[list[Described], list[Parameter]]] = WeakKeyDictionary()


def _rows(model: nn.Module, modules: Modules, named: Sequence[tuple[str, Tensor]]) -> list[Parameter]:
    """The rows of a model's parameters. They are values: those of an earlier table serve again if they would be equal."""
    described = _described(model, modules, named)
    before = _latest_rows.get(model)
    if before is None or before[0] != described:
        before = _latest_rows[model] = described, [_row(*one) for one in described]
    return before[1]


def _described(model: nn.Module, modules: Modules, named: Sequence[tuple[str, Tensor]]) -> list[Described]:
    """The path, the name of the owner's class and the shape of each parameter."""
    owners, classes = dict(modules), dict[type[nn.Module], str]()
    if type(model).named_parameters is not nn.Module.named_parameters:
        owners |= dict(model.named_modules(remove_duplicate=False))
    found: list[Described] = []
    for path, p in named:
        owner, _, local = path.rpartition(".")
        module = owners[owner]
        kind = classes.get(type(module)) or classes.setdefault(type(module), class_as_written(module).__name__)
        found.append((path, kind, weight_shape(module, local, p)))
    return found


def _row(path: str, kind: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(plain_name(path), plain_name(path.rpartition(".")[0]), kind, shape, math.prod(shape))
