"""Leaving the user's model as it was: buffers, attributes, modes and flags are put back, whatever happens inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from torch_secorder.model.hooks import restoring
from torch_secorder.model.tree import Modules, modules_by_path

_turns: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> RLock:
    """The lock that serializes temporary changes to a model, such as ``requires_grad`` flags, with the code that reads them."""
    return _turns.setdefault(model, RLock())


# Buffers with up to so many numbers are kept and compared together, since an operation takes longer than so few numbers do.
FEW = 4096

_Buffer = tuple[Any, str, Tensor]  # the table that has it, its name there, and itself


def restorer_of_buffers(model: nn.Module, modules: Modules | None = None) -> Callable[[], None]:
    """A function that gives buffers, and tables that ``max_norm`` rewrites, the values again that they have now.

    Args:
        model: the model.
        modules: all of its modules, if the caller has just listed them.
    """
    listed = modules_by_path(model) if modules is None else modules
    before = [(several, _copied(several)) for several in _kept_together(_changeable(listed))]

    @torch.no_grad()
    def restore() -> None:
        for several, (values, shapes) in before:
            # A buffer that was not changed is not written to, since an earlier graph may have saved it for its backward.
            if not torch.equal(_numbers(several), values):
                own = values.split([shape.numel() for shape in shapes]) if len(several) > 1 else [values]
                for (_, _, tensor), value, shape in zip(several, own, shapes, strict=True):
                    if tensor.shape != shape:  # Observers give their buffers a size in their first call.
                        tensor.resize_(shape)
                    if not torch.equal(tensor, value.view(shape)):
                        tensor.copy_(value.view(shape))
            for owner, name, tensor in several:
                owner[name] = tensor

    return restore


def restorer_of_attributes(model: nn.Module) -> Callable[[], None]:
    """A function that assigns to the modules' attributes what they are now: for a forward that comes after one like it.

    A forward may leave a loss in one, or a state for the next forward. What is changed inside of one, such as a list, stays so. A
    lazy module becomes another one in its first forward, a scripted one has no attributes here, and those of modules that
    several ranks hold together change with the parameters that are gathered.
    """
    modules = [m for _, m in modules_by_path(model)]
    kinds: set[type[nn.Module]] = {type(m) for m in modules}
    plain = {kind for kind in kinds if not issubclass(kind, (LazyModuleMixin, torch.jit.ScriptModule))}
    if any(kind.__module__.startswith("torch.distributed.") for kind in kinds):
        plain = set()
    own_tables = (vars(m) for m in modules if type(m) in plain)
    before = [(own, own.copy(), [*map(id, own.values())]) for own in own_tables]

    def restore() -> None:
        for own, values, numbers in before:
            if own.keys() == values.keys() and [*map(id, own.values())] == numbers:
                continue  # Every call does this for each module.
            for name in own.keys() - values.keys():
                del own[name]
            for name, value in values.items():
                if own.get(name, own) is not value:
                    own[name] = value

    return restore


def _changeable(modules: Modules) -> list[_Buffer]:
    """The tensors of the modules whose numbers a forward may change."""
    found: list[_Buffer] = []
    for _, m in modules:
        if m._buffers:
            found += [(m._buffers, name, b) for name, b in m._buffers.items() if b is not None]
        if m._parameters and vars(m).get("max_norm", getattr(type(m), "max_norm", None)) is not None:
            found += [(m._parameters, name, p) for name, p in m._parameters.items() if p is not None]
    return found


def _kept_together(buffers: Iterable[_Buffer]) -> list[list[_Buffer]]:
    """Small ones of one dtype and device together, and each other one on its own."""
    alone: list[list[_Buffer]] = []
    small: dict[object, list[_Buffer]] = {}
    for one in buffers:
        x = one[2]
        if type(x) is Tensor and x.layout is torch.strided and x.numel() <= FEW and not (x.is_meta or x.is_quantized):
            small.setdefault((x.dtype, x.device), []).append(one)
        else:
            alone.append([one])
    return [*alone, *small.values()]


def _numbers(several: Sequence[_Buffer]) -> Tensor:
    """The numbers of several buffers in one row; those of a single one as they are."""
    if len(several) == 1:
        return several[0][2].detach()
    return torch.cat([tensor.detach().flatten() for _, _, tensor in several])


def _copied(several: Sequence[_Buffer]) -> tuple[Tensor, list[torch.Size]]:
    """A copy of the numbers of several buffers, and the buffers' shapes."""
    numbers = _numbers(several)
    return numbers.clone() if len(several) == 1 else numbers, [tensor.shape for _, _, tensor in several]


@contextmanager
def restoring_buffers(model: nn.Module, modules: Modules | None = None) -> Iterator[None]:
    """A block after which buffers, and tables that ``max_norm`` rewrites, have the values again that a forward changed."""
    with restoring(restorer_of_buffers(model, modules)):
        yield


@contextmanager
def restoring_state(model: nn.Module) -> Iterator[None]:
    """A block after which nothing is left of a forward that comes after one like it, neither in buffers nor in attributes."""
    with restoring_buffers(model), restoring(restorer_of_attributes(model)):
        yield


@contextmanager
def keeping_graphs(model: nn.Module) -> Iterator[None]:
    """A block for a model's forward, after which attributes with a tensor of a graph have that of the user's graph again.

    All else that a forward leaves in attributes stays, since what it makes in its first call, such as a layer or a table, is
    there for all later ones.
    """
    before = [
        (own, name, x)
        for own in (vars(m) for _, m in modules_by_path(model))
        for name, x in own.items()
        if isinstance(x, Tensor) and x.grad_fn is not None
    ]

    def restore() -> None:
        for own, name, x in before:
            if isinstance(own.get(name), Tensor):
                own[name] = x

    with restoring(restore):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A block in which the model is in eval mode, and after which each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode

    with restoring(restore):
        model.eval()
        yield


@contextmanager
def requiring_grad(parameters: Iterable[Tensor], others: Iterable[Tensor] = ()) -> Iterator[None]:
    """A block in which these parameters require a gradient and the others do not; afterwards the flags are as before."""
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in others if p.requires_grad]

    def require(wanted: bool) -> None:
        for p in frozen:
            p.requires_grad_(wanted)
        for p in trained:
            p.requires_grad_(not wanted)

    with restoring(partial(require, False)):
        require(True)
        yield
