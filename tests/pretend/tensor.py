"""Tensors of the pretend device, and what happens when an operation is called with one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_map_only

from pretend import copies, memory
from pretend.counting import launched, waited
from pretend.operations import (
    INDEXED,
    LENGTHS_ON_THE_HOST,
    TAKE_NUMBERS,
    Operation,
    asks_the_device,
    changes_view,
    is_pointwise,
    kernels,
    names,
)

NAME = "pretend"
CPU = torch.device("cpu")
WIDE = (torch.float64, torch.complex128)
_has_float64 = [True]


class Pretend(Tensor):
    """A tensor of the device; its numbers are a tensor of the CPU that nobody else has.

    To torch's C++ code all devices are the first one, since its engine has a thread for only one; ``device`` tells the truth.
    """

    __slots__ = ("index", "numbers")  # apart from the attributes that a program may put on a tensor
    numbers: Tensor
    index: int

    @staticmethod
    def __new__(cls, numbers: Tensor, index: int = 0, requires_grad: bool = False) -> Pretend:
        if numbers.dtype in WIDE and not _has_float64[0]:
            raise TypeError(
                f"Cannot convert a {NAME} Tensor to float64 dtype as the {NAME} framework doesn't support float64."
            )
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )
        made.numbers, made.index = numbers, index
        memory.held(numbers, index)
        return made.requires_grad_(requires_grad) if requires_grad else made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing but what C++ code would do, which takes a tensor that another is brought to for one of the first device."""
        if func is torch.Tensor.to:
            args = (args[0], *_parsable(args[1:]))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Operation, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return torch.device(NAME, self.index)

    @property
    def data(self) -> Tensor:
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, other: Pretend) -> None:
        torch._C.TensorBase.data.__set__(self, other)
        self.numbers, self.index = other.numbers, other.index

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def get_device(self) -> int:
        return self.index

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        apart = kwargs.get("copy", False)
        asked = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*_parsable(args), **asked)
        if device is None or (self.index == 0 and device.type != NAME):
            return super().to(*args, **kwargs)
        converted = self if dtype is None else super().to(dtype)
        if (device.type, device.index or 0) == (NAME, self.index):
            return converted.clone() if apart else converted
        return BetweenDevices.apply(converted, device, non_blocking)

    def cpu(self, **kwargs: Any) -> Tensor:
        return self.to("cpu", **kwargs)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device} | options)

    def __repr__(self, **_: Any) -> str:
        waited("repr")
        return f"{self.numbers!r} on {self.device}"

    def __format__(self, specification: str) -> str:
        return format(self.item() if not self.dim() else repr(self), specification)

    def tolist(self) -> Any:
        waited("tolist")
        return self.numbers.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError(
                    "Only Tensors created explicitly by the user support the deepcopy protocol at the moment."
                )
            new = Pretend(self.numbers.clone(), self.index)
            memo[id(self)] = _of_kind(self, new)
            if not isinstance(self, nn.Parameter):  # of which torch copies no gradient
                memo[id(self)].grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        waited("pickle")
        return _loaded, (self.numbers.detach(), self.index, self.requires_grad, isinstance(self, nn.Parameter))


class BetweenDevices(torch.autograd.Function):
    """A copy from one device to another, or from another than the first to the host; C++ code would take it for the first."""

    @staticmethod
    def forward(ctx: Any, x: Pretend, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.device = x.device
        return _copied_to(x, {"device": device, "non_blocking": non_blocking})

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.device), None, None


def _parsable(args: Sequence[Any]) -> list[Any]:
    """The arguments of ``to``, with a tensor's device and dtype in its place."""
    if args and isinstance(args[0], Tensor):
        return [args[0].device, args[0].dtype, *args[1:]]
    return list(args)


def _of_kind(old: Tensor, new: Pretend) -> Tensor:
    """A parameter if the old tensor is one."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, old.requires_grad)
    return new.requires_grad_(old.requires_grad)


def _loaded(numbers: Tensor, index: int, requires_grad: bool, is_parameter: bool) -> Tensor:
    new = Pretend(numbers.clone(), index)
    return nn.Parameter(new, requires_grad) if is_parameter else new.requires_grad_(requires_grad)


# ------------------------------------------------------------------------------------------------ operations


def run(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call an operation of which something is, or is to be, on the device.

    Tests call it about a million times, so that what it does for each argument calls few functions.
    """
    flat = _each_of([*args, *kwargs.values()])
    name, _ = names(operation)
    tensors = [x for x in flat if type(x) is Pretend]
    if name.startswith("_foreach_") and len({x.index for x in tensors}) > 1:
        return _foreach(operation, args, kwargs)
    if name in ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"):
        return _copied(operation, args, kwargs)
    index = _one_device(operation, name, flat, kwargs)
    if why := asks_the_device(operation, args):
        waited(why)
    launched(name, kernels(operation, args, kwargs))
    inner_args = _numbers_of(args)
    inner_kwargs = dict(zip(kwargs, _numbers_of(kwargs.values()), strict=True))
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = CPU
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    out = operation(*inner_args, **inner_kwargs)
    if name == "_pack_padded_sequence":
        return Pretend(out[0], index), out[1]
    if operation is torch.ops.aten.set_.source_Tensor:
        args[0].data = args[1]
        return args[0]
    if tensors and changes_view(operation):
        with no_dispatch():
            operation(*args, **kwargs)
        return args[0]
    # An operation in place gives back what it was given.
    known = {id(x.numbers): x for x in tensors}
    if not isinstance(out, (list, tuple)):
        return _on_device(out, known, index)
    # By numbers, since compiled code has no name for the iterator over a tuple.
    return type(out)([_on_device(out[place], known, index) for place in range(len(out))])


def _on_device(out: Any, known: Mapping[int, Pretend], index: int) -> Any:
    """What an operation returned, if it is a tensor, as one of the device; one whose numbers are known is that one again."""
    if not isinstance(out, Tensor):
        return out
    return known[id(out)] if id(out) in known else Pretend(out, index)


def _each_of(values: Sequence[Any]) -> list[Any]:
    """The values, those in lists one by one; torch's operations take no lists of lists."""
    found = []
    for value in values:
        if type(value) in (list, tuple):
            found.extend(value)
        else:
            found.append(value)
    return found


def _numbers_of(values: Iterable[Any]) -> list[Any]:
    """The values, also those in lists, with the numbers of what is on the device."""
    found = []
    for value in values:
        if type(value) is Pretend:
            value = value.numbers
        elif type(value) in (list, tuple):
            value = [x.numbers if type(x) is Pretend else x for x in value]
        found.append(value)
    return found


def _foreach(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call on lists whose tensors are on several devices, which is one call for each position."""
    count = len(args[0])
    calls = [_at(args, i, count) for i in range(count)]
    outs = [operation(*one, **kwargs) for one in calls]
    return None if outs[0] is None else [out[0] for out in outs]


def _at(args: Sequence[Any], position: int, count: int) -> list[Any]:
    """The arguments, with lists of tensors or numbers cut down to one position."""
    return [[x[position]] if isinstance(x, (list, tuple)) and len(x) == count else x for x in args]


def _one_device(operation: Operation, name: str, flat: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The number of the device that all tensors are on, or that was asked for.

    Raises:
        RuntimeError: if tensors of several devices meet, or a generator of another.
    """
    target = kwargs.get("device")
    found = [x for x in flat if isinstance(x, Tensor)]
    found = found[:1] if name in LENGTHS_ON_THE_HOST else found
    devices = dict.fromkeys(x.device for x in found if not _is_a_number(x, operation, name))
    # Whatever was a list of numbers, C++ code has brought to the first device by now.
    if len(devices) > 1 and not (name in INDEXED and isinstance(found[0], Pretend)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(map(str, devices))}! (when checking {operation})"
        )
    generators = [x for x in flat if isinstance(x, torch.Generator)]
    if generators:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generators[0].device.type}'")
    # C++ code that makes a tensor like another asks for the first device.
    if target is not None and ((index := torch.device(target).index) or not devices):
        return index or 0
    return next(device.index for device in devices if device.type == NAME)


def _is_a_number(x: Tensor, operation: Operation, name: str) -> bool:
    """Whether it is a 0-dim tensor of the host where such ones are taken for numbers."""
    return x.dim() == 0 and x.device == CPU and (is_pointwise(operation) or name in TAKE_NUMBERS or name in INDEXED)


def _copied(operation: Operation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A copy between devices, or on one; what goes between a device and the host blocks unless it says that it does not."""
    if operation is torch.ops.aten._to_copy.default:
        return _copied_to(args[0], dict(kwargs))
    target, source = (args[0], args[1]) if operation is torch.ops.aten.copy_.default else (args[1], args[0])
    blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    of_target, of_source = (x.numbers if isinstance(x, Pretend) else x for x in (target, source))
    launched("copy_")
    if isinstance(target, Pretend):
        if not isinstance(source, Pretend) and blocks and source.dim():
            waited("copy to the device")
        of_target.copy_(of_source)
    elif blocks:
        waited("copy to the host")
        of_target.copy_(of_source)
    else:
        copies.start(of_target, of_source.expand_as(of_target).to(of_target.dtype))
    return target


def _copied_to(source: Tensor, options: dict[str, Any]) -> Tensor:
    device = options.pop("device", None)
    device = source.device if device is None else torch.device(device)
    blocks = not options.pop("non_blocking", False)
    options.pop("pin_memory", None)
    numbers = source.numbers if isinstance(source, Pretend) else source
    made = torch.ops.aten._to_copy.default(numbers, **options)
    launched("_to_copy")
    if device.type == NAME:
        if not isinstance(source, Pretend) and blocks:
            waited("copy to the device")
        return Pretend(made, device.index or 0)
    if blocks:
        waited("copy to the host")
    else:
        copies.start(made, made)
    return made


# ------------------------------------------------------------------------------------------------ for tests


def moved(value: Any, index: int = 0) -> Any:
    """Tensors, and tensors anywhere in containers, on the device; modules are moved in place, and what is tied stays tied.

    ``module.to("pretend")`` would make two parameters of one that is tied, since it can't put a tensor of another kind in the
    place of its data as it does between real devices.
    """
    if not isinstance(value, nn.Module):
        return tree_map_only(Tensor, lambda x: _of_kind(x, Pretend(x.detach().clone(), index)), value)
    made: dict[int, Tensor] = {}
    for module in value.modules():
        for store in (module._parameters, module._buffers):
            for name, x in store.items():
                if x is not None:
                    store[name] = made.setdefault(id(x), _of_kind(x, Pretend(x.detach().clone(), index)))
    return value


@contextmanager
def without_float64() -> Iterator[None]:
    """The device has no float64, as Apple's GPUs."""
    _has_float64[0] = False
    try:
        yield
    finally:
        _has_float64[0] = True


def factory(operation: Operation) -> Callable[..., Any]:
    """An operation that makes a tensor on the device of nothing but numbers."""
    return lambda *args, **kwargs: run(operation, args, kwargs)
