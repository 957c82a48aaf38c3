"""The flow of all samples at once: each gets what it gets alone, and whatever does not go at once goes one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode

from graph.chains import CHAINS
from torch_secorder.autograd import vmapped
from torch_secorder.autograd.route import Route
from torch_secorder.graph import chain_flow
from torch_secorder.graph.chain_flow import ChainFlow
from torch_secorder.per_sample.budget import memory_limit

N = 5


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain_flow, "_AGREES", {})


@pytest.fixture
def no_fallback() -> Iterator[None]:
    """Torch raises where it has no rule for an operation, instead of taking the samples in turn with a warning."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples each flow took."""
    found: list[int] = []
    at_once, of_one = ChainFlow._at_once, ChainFlow._of_one
    monkeypatch.setattr(ChainFlow, "_at_once", lambda self, g, to: (found.append(len(g)), at_once(self, g, to))[1])
    monkeypatch.setattr(ChainFlow, "_of_one", lambda self, g, to: (found.append(1), of_one(self, g, to))[1])
    return found


def drawn(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64) -> tuple[ChainFlow, Tensor, Tensor]:
    """A flow, the gradients of its value for N samples, and those of the parameter, by autograd for one after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weight = torch.randn(4, 3, dtype=dtype, requires_grad=True)
        value = function(weight)
        grads = torch.randn(N, *value.shape, dtype=value.dtype)
    each = [torch.autograd.grad(value, weight, grad, retain_graph=True)[0] for grad in grads]
    edge, start = get_gradient_edge(value), get_gradient_edge(weight).node
    route = Route([edge.node], [start])
    return ChainFlow(route, (edge.node, edge.output_nr), [(start, (4, 3))], permutes=False), grads, torch.stack(each)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("name", CHAINS)
def test_all_samples_at_once_get_what_each_gets_alone(name: str, taken: list[int]) -> None:
    flow, grads, expected = drawn(CHAINS[name])
    with torch.no_grad():
        (found,) = flow(grads)
        assert taken == [1, 1, 2, N]
        flow(grads)
    assert taken[4:] == [N]  # A chain of a kind that was tried is not tried again.
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.slow
def test_every_kind_is_met() -> None:
    met: set[str] = set()
    for function in CHAINS.values():
        flow, _, _ = drawn(function)
        met.update(node.name() for node in flow._nodes)
    kinds = vmapped.AT_ONCE | vmapped._FORMULAS.keys()
    there = {kind for kind in kinds if hasattr(torch._C._functions, kind)}
    assert not there - met, sorted(there - met)


class Doubled(torch.autograd.Function):
    """Somebody's function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert not vmapped._functorch.is_batchedtensor(grad)
        return 2 * grad


ONE_BY_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "somebody's function": lambda w: -Doubled.apply(w.exp()),  # whose node torch 2.8 forgets with its output
    "a kind of which torch makes something else": lambda w: torch.cdist(w, w.exp()),
    "a kind without a rule": lambda w: torch.nn.functional.mish(w),
    "complex numbers": lambda w: torch.fft.rfft(w).abs(),
}


@pytest.mark.parametrize("name", [*ONE_BY_ONE, "the modulus of complex numbers"])
def test_what_does_not_go_at_once_goes_one_by_one(name: str, taken: list[int]) -> None:
    flow, grads, expected = drawn(ONE_BY_ONE[name]) if name in ONE_BY_ONE else drawn(torch.abs, torch.complex128)
    with torch.no_grad():
        (found,) = flow(grads)
    assert taken == [1] * N
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_that_are_differentiated_again_go_one_by_one(taken: list[int]) -> None:
    flow, grads, expected = drawn(CHAINS["normalize"])
    (found,) = flow(grads)
    assert taken == [1] * N
    assert found.requires_grad
    torch.testing.assert_close(found.detach(), expected)


class Counted(TorchDispatchMode):
    """A mode that sees every operation."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_a_mode_of_the_users_sees_no_vmap(taken: list[int]) -> None:
    flow, grads, expected = drawn(CHAINS["normalize"])
    with torch.no_grad(), Counted():
        (found,) = flow(grads)
    assert taken == [1] * N
    torch.testing.assert_close(found, expected)


def wrong(many: Tensor) -> Tensor:
    return many * 1.001


def failing(many: Tensor) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("answer", [wrong, failing])
def test_a_kind_that_is_found_to_differ_goes_one_by_one(
    answer: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, taken: list[int]
) -> None:
    apart = vmapped._apart
    monkeypatch.setattr(vmapped, "_apart", lambda level, n, one: answer(apart(level, n, one)))
    flow, grads, expected = drawn(CHAINS["normalize"])
    with torch.no_grad():
        (found,) = flow(grads)
        assert taken == [1, 1, 2] + [1] * N
        flow(grads)
    assert taken[8:] == [1] * N
    torch.testing.assert_close(found, expected)


def test_no_more_samples_go_at_once_than_memory_allows(taken: list[int]) -> None:
    flow, grads, expected = drawn(lambda w: w.exp().repeat(8, 1).sum(0))  # 96 numbers in between, of 8 bytes each
    with torch.no_grad():
        with memory_limit(2 * 2 * 96 * 8):
            (found,) = flow(grads)
        assert taken == [1, 1, 2, 2, 2, 1]
        torch.testing.assert_close(found, expected)
        with memory_limit(1):
            (found,) = flow(grads)
    assert taken[6:] == [1] * N
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtypes_of_gradients_are_those_that_each_has_alone(dtype: torch.dtype, taken: list[int]) -> None:
    flow, grads, expected = drawn(CHAINS["normalize"], dtype)
    with torch.no_grad():
        (found,) = flow(grads.float())
        (alone,) = flow(grads.float()[:1])
    assert N in taken
    assert found.dtype == alone.dtype == torch.float32
    close = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected.float(), rtol=close, atol=close)


def test_a_start_that_nothing_arrives_at_gets_zeros(taken: list[int]) -> None:
    flow, grads, _ = drawn(CHAINS["normalize"])
    other = get_gradient_edge(torch.zeros(2, requires_grad=True)).node
    starts: list[tuple[Node, tuple[int, ...]]] = [*flow._starts, (other, (2,))]
    both = ChainFlow(flow._route, flow._value, starts, permutes=False)
    with torch.no_grad():
        found = both(grads)
        alone = both(grads[:0])
    assert N in taken
    assert torch.equal(found[1], torch.zeros(N, 2, dtype=torch.float64))
    assert [one.shape for one in alone] == [(0, 4, 3), (0, 2)]
