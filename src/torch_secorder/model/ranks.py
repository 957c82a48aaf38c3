"""Models that several ranks hold together: with FSDP2, which gathers parameters for each call, or as DTensors, which stay apart.

Ranks that hold a model together must run each forward and backward pass together, since these contain collective operations that
wait for the other ranks. The passes that the library adds contain them, too. So all ranks decide in common whether to make such a
pass, through :class:`Ranks`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torch_secorder.errors import CoverageError, UnsupportedError
from torch_secorder.model.tree import Modules, modules_by_path

# The number that a rank which has refused its batch sends instead of its values.
REFUSED = 2**48

# How many numbers each exchange has: always the same, since a refusal may coincide with any exchange.
WIDTH = 8

# Most tensors are of these very classes, and none of them is a DTensor.
_PLAIN = {Tensor, nn.Parameter}


def is_dtensor(x: Any) -> bool:
    """Whether a tensor is a DTensor, of which this rank holds a part."""
    return type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "full_tensor")


def full_tensor(x: Any) -> Any:
    """The whole value of a DTensor, for which all ranks must call this together; anything else is returned as it is."""
    return x.full_tensor() if is_dtensor(x) else x


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """The modules inside of a model to which ``fully_shard`` was applied."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    # It makes a class of its own of each class that it shards. Before, no module has to be looked at.
    if fsdp is None or not fsdp.FSDPModule.__subclasses__():
        return []
    return [module for _, module in modules_by_path(model) if is_fsdp(module)]


def class_as_written(module: nn.Module) -> type[nn.Module]:
    """The class that the user wrote, from which ``fully_shard`` derives another one."""
    kind = type(module)
    return kind.__bases__[1] if is_fsdp(module) and len(kind.__bases__) == 2 else kind


def unsharded_leaves(model: nn.Module, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The tensor that stands for each parameter in the autograd graph; for a sharded one, the tensor that FSDP2 gathers it into.

    All ranks gather the modules one after the other. FSDP2 keeps these tensors and only frees their memory.
    """
    wanted = {id(p): p for p in parameters}
    found = dict(wanted)
    for module in fsdp_modules(model):
        inner = [(m, local, p) for m in module.modules() for local, p in m._parameters.items() if id(p) in wanted]
        module.unshard()  # type: ignore[operator]  # a method that FSDP2's class adds
        for owner, local, sharded in inner:
            now = owner._parameters[local]
            if now is not None and now is not sharded:
                found[id(sharded)] = now
        module.reshard()  # type: ignore[operator]  # another one
    return [found[key] for key in wanted]


def refuse_dtensors(model: nn.Module, what: str) -> None:
    """Refuse a sharded model for something that needs whole parameters.

    Raises:
        UnsupportedError: if a parameter is a DTensor, naming it.
    """
    if name := next((name for name, p in model.named_parameters() if is_dtensor(p)), None):
        raise UnsupportedError(
            f"{what} needs whole parameters, and this rank has a part of '{name}' only: use a copy of the model that is not "
            "sharded (a report of the sharded one fits it)"
        )


def refuse_fully_sharded(modules: Modules) -> None:
    """Refuse a model with such modules if its parameters were flattened into one, so that they have no shape of their own.

    Raises:
        UnsupportedError: for FullyShardedDataParallel.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(m, fsdp.FullyShardedDataParallel) for _, m in modules):
        raise UnsupportedError(
            "FullyShardedDataParallel flattens parameters into one: shard the model with torch.distributed.fsdp.fully_shard"
        )


def _dtensors(tensors: Iterable[Tensor]) -> list[Any]:
    """The DTensors among tensors. Every block of a monitor asks for them, and most models have none."""
    tensors = list(tensors)
    return [] if _PLAIN.issuperset(map(type, tensors)) else list(filter(is_dtensor, tensors))


class Ranks:
    """The ranks that hold a model together, and what they decide in common. A rank that holds the whole model is on its own.

    Args:
        parameters: the model's parameters.
        leaves: the tensor that the graph has for each of them.

    Attributes:
        distributed: whether there are other ranks.
        counts_samples: whether this rank counts its samples; among ranks that compute the same samples together, only one does.
    """

    def __init__(self, parameters: Iterable[Tensor] = (), leaves: Iterable[Tensor] = ()):
        meshes: dict[Any, None] = {p.device_mesh: None for p in _dtensors(parameters)}
        self._groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        self._device = next((mesh.device_type for mesh in meshes), "cpu")
        self.distributed = any(dist.get_world_size(group) > 1 for group in self._groups)
        spread: dict[Any, None] = {p.device_mesh: None for p in _dtensors(leaves)}
        self._replicas = [group for mesh in spread for group in mesh.get_all_groups()]
        self.counts_samples = not any(any(mesh.get_coordinate() or ()) for mesh in spread)

    def max_over_ranks(self, value: int) -> int:
        """The largest value of any rank.

        Raises:
            CoverageError: if another rank has refused the batch.
        """
        return self.max_each_over_ranks([value])[0]

    def max_each_over_ranks(self, values: Sequence[int]) -> list[int]:
        """The maximum over all ranks of each of several values; all ranks have to give the same number of values."""
        if not self.distributed:
            return list(values)
        found: list[int] = []
        for start in range(0, len(values), WIDTH):
            found += self._exchanged(values[start : start + WIDTH])
        return found[: len(values)]

    def _exchanged(self, values: Sequence[int]) -> list[int]:
        numbers = torch.tensor([*map(int, values), *[0] * (WIDTH - len(values))], device=self._device)
        for group in self._groups:
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group)
        if REFUSED in numbers:
            raise _Elsewhere(
                "another rank, which holds a part of this model, has refused its batch; its own error says why"
            )
        return numbers.tolist()

    def require_same(self, what: object, remedy: str) -> None:
        """Raise on all ranks unless all of them are about to do the same.

        Args:
            what: an object whose ``repr`` says what this rank is about to do.
            remedy: what the user can do if the ranks differ.

        Raises:
            CoverageError: if it differs.
        """
        value = zlib.crc32(repr(what).encode())
        if self.distributed and self.max_over_ranks(value) != -self.max_over_ranks(-value):
            raise _Elsewhere(f"the ranks that hold this model together would have to do different things: {remedy}")

    def common_generator(self, generator: torch.Generator) -> torch.Generator:
        """A generator with one seed on all ranks that compute the same samples together."""
        if not self._replicas:
            return generator
        seed = torch.randint(2**31, (), generator=generator, device=generator.device).to(self._device)
        for group in self._replicas:
            dist.all_reduce(seed, dist.ReduceOp.MAX, group)
        return torch.Generator(generator.device).manual_seed(int(seed))

    def require_same_norms(self, squared_norms: Tensor, names: Sequence[str]) -> None:
        """Raise unless all ranks that compute the same samples together found the same squared norms, ``[parameters, n]``.

        Raises:
            CoverageError: naming the parameters that differ.
        """
        if not self._replicas:
            return
        # NaN would spoil a maximum. Ranks that all find something infinite agree, and refuse the batch for that.
        values = squared_norms.sum(1).detach().nan_to_num(nan=torch.inf, posinf=torch.inf)
        bounds = torch.stack([values, -values])
        for group in self._replicas:
            dist.all_reduce(bounds, dist.ReduceOp.MAX, group)
        most, least = bounds[0], -bounds[1]
        # The ranks add up the same products in another order.
        near = most - least <= 1e-3 * least + 1e-6 * least[least.isfinite()].sum()
        if different := (~(near | (most == least))).nonzero().flatten().tolist():
            raise CoverageError(
                f"{', '.join(names[i] for i in different)}: the ranks that hold this model together find different gradients: "
                "either they were given different samples, or a module that is not parallelized gets only a part of its "
                "input on each (use torch.distributed.tensor.parallel.SequenceParallel for it)"
            )

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """A block that all ranks run at the same time, and that fails on all of them if it fails on one."""
        try:
            yield
        except Exception as error:
            if self.distributed and not isinstance(error, _Elsewhere):
                refusal = torch.full((WIDTH,), REFUSED, device=self._device)
                for group in self._groups:
                    dist.all_reduce(refusal, dist.ReduceOp.MAX, group)
            raise
        self.max_over_ranks(0)


class _Elsewhere(CoverageError):
    """A refusal that all ranks raise at the same time, so that none has to tell the others."""
