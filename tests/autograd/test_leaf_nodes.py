"""The nodes of leaves: which they are, who sees that they are asked for, and that no thread waits for them for ever."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from processes import fresh
from torch_secorder import FisherMonitor
from torch_secorder.autograd.leaf_nodes import LeafNodes, accumulators


class Seen(TorchDispatchMode):
    """A mode of the user's that may see no operation."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(function)


class Wrapper(torch.Tensor):
    """A tensor without numbers of its own, whose class may see nothing but its own making."""

    watched = False

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not cls.watched, function
        return cls(torch.empty(2))


@pytest.mark.parametrize("around", [nullcontext, torch.no_grad, torch.inference_mode, Seen])
@pytest.mark.parametrize(
    "of", [torch.randn, lambda n: torch.randn(n, dtype=torch.complex64), lambda n: torch.eye(n).to_sparse()]
)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_leaves(around: Callable[[], AbstractContextManager[object]], of: Callable[[int], Tensor], count: int) -> None:
    leaves = [of(2).requires_grad_() for _ in range(count)]
    with around():
        nodes, _ = accumulators(leaves)
    assert_theirs(nodes, leaves)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_under_a_transform(transform: Callable[[Any], Any]) -> None:
    leaves, found = [nn.Parameter(torch.randn(2))], list[Any]()

    def function(x: Tensor) -> Tensor:
        found.extend(accumulators(leaves)[0])
        return x

    transform(function)(torch.randn(3))
    assert_theirs(found, leaves)


def test_a_class_that_answers_for_its_operations_sees_none() -> None:
    leaves = [nn.Parameter(Wrapper(torch.empty(2))), nn.Parameter(torch.randn(2))]
    Wrapper.watched = True
    try:
        nodes, _ = accumulators(leaves)
    finally:
        Wrapper.watched = False
    assert_theirs(nodes, leaves)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_leaves() -> None:
    leaves = [
        torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)], layout=torch.jagged, requires_grad=True)
    ]
    nodes, _ = accumulators(leaves)
    assert_theirs(nodes, leaves)


def assert_theirs(nodes: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    """Each node is the one that takes the gradient of its leaf."""
    assert [node.name() for node in nodes] == ["torch::autograd::AccumulateGrad"] * len(leaves)
    assert all(node.variable is leaf for node, leaf in zip(nodes, leaves, strict=True))


def test_nodes_live_as_long_as_they_are_wanted() -> None:
    """As long as one lives, a parameter can't get data of another shape; what keeps it for torch keeps nothing else."""
    leaf = nn.Parameter(torch.randn(2))
    nodes = LeafNodes({7: leaf})
    (found,) = accumulators([leaf])[0]
    assert nodes == {found: 7}
    others = LeafNodes({8: nn.Parameter(torch.randn(2))})
    nodes.take(others)
    assert nodes == others
    assert list(nodes.values()) == [8]
    del found
    leaf.data = torch.randn(3)
    leaf.square().sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (3,)


class Own(torch.autograd.Function):
    """Makes a node with many leaves at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *grads, *[None] * (len(ctx.needs_input_grad) - 1)


def monitor_of(model: nn.Module, weights: list[Tensor]) -> Any:
    return FisherMonitor(model)


def monitor_of_one(model: nn.Module, weights: list[Tensor]) -> Any:
    return FisherMonitor(model, parameters=["0.weight"])  # The library keeps what takes the others' gradients, too.


def python_alone(model: nn.Module, weights: list[Tensor]) -> Any:
    return nullcontext(accumulators(weights)[0])


def in_three_threads(block: Callable[..., Any], of_the_library: bool) -> None:
    """Ask for the nodes of leaves for two seconds, and end this process if that takes a minute."""
    faulthandler.dump_traceback_later(60, exit=True)
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(20)))
    weights, x, y = list(model.parameters()), torch.randn(3, 4), torch.randint(4, (3,))

    def operations() -> None:
        while time.monotonic() < end:
            for weight in weights:
                F.linear(x, weight)

    def functions() -> None:
        while time.monotonic() < end:
            Own.apply(x, *weights)

    def library() -> None:
        while time.monotonic() < end:
            accumulators(weights)

    with block(model, weights):
        F.cross_entropy(model(x), y).backward()
        end = time.monotonic() + 2
        work = library if of_the_library else functions
        threads = [threading.Thread(target=each) for each in (work, operations, operations)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "of_the_library"),
    [(monitor_of, False), (monitor_of_one, False), (python_alone, True)],
    ids=["all", "one", "library"],
)
def test_no_thread_waits_for_ever(block: Callable[..., Any], of_the_library: bool) -> None:
    """Each in a process of its own, which is ended if it hangs."""
    process = fresh().Process(target=in_three_threads, args=(block, of_the_library))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
