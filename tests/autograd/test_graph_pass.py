"""The pass that calls nodes one by one brings what the engine brings, and nobody notices it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from torch_secorder.autograd import route
from torch_secorder.autograd.graph_pass import GraphPass
from torch_secorder.autograd.opaque import Gradients, runs_others_code

Graph = tuple[list[Tensor], list[Tensor]]  # where a pass begins, and where gradients are wanted
GRAPHS: dict[str, Callable[[], Graph]] = {}


def graph(make: Callable[[], Graph]) -> Callable[[], Graph]:
    GRAPHS[make.__name__] = make
    return make


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def passed(
    roots: list[Tensor], seeds: list[Tensor], wanted: list[Tensor], **options: Any
) -> tuple[list[Tensor | None], GraphPass]:
    edges = [get_gradient_edge(x) for x in wanted]
    found: dict[tuple[Node, int], Tensor | None] = {}

    def arrive(node: Node, grads: Gradients) -> None:
        found.update({(node, nr): grad for nr, grad in enumerate(grads)})

    passes = GraphPass(roots, {edge.node for edge in edges}, **options)
    passes.run(lambda: [seed.clone() for seed in seeds], arrive)
    return [found.get((edge.node, edge.output_nr)) for edge in edges], passes


@graph
def layers() -> Graph:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    x = leaf(5, 4)
    return [model(x)], [x, *model.parameters()]


@graph
def an_lstm() -> Graph:
    model, x = nn.LSTM(3, 4, 2), leaf(5, 2, 3)
    outputs, (_, cells) = model(x)
    return [outputs, cells], [x, *model.parameters()]


@graph
def views_changed_in_place() -> Graph:
    x = leaf(4, 3)
    y = x * 2
    y[0].mul_(3)
    y[1:].add_(x[1:])
    return [y.sum(0)], [x]


@graph
def parts() -> Graph:
    x = leaf(6, 3)
    first, _, last = x.split(2)
    rows = torch.unbind(x)
    return [first * last, rows[3] * rows[1]], [x]


@graph
def singular_values() -> Graph:
    x = leaf(4, 3)
    return [torch.linalg.svd(x, full_matrices=False)[1]], [x]


@graph
def connectionist_temporal_classification() -> Graph:
    x = leaf(10, 2, 5)
    lengths = torch.tensor([10, 9]), torch.tensor([3, 2])
    return [F.ctc_loss(x.log_softmax(-1), torch.randint(1, 5, (2, 3)), *lengths)], [x]


@graph
def real_and_complex_numbers() -> Graph:
    x, w = leaf(4, 8), torch.randn(4, 5, dtype=torch.complex64, requires_grad=True)
    return [torch.fft.irfft(torch.fft.rfft(x) * w)], [x, w]


@graph
def autocast() -> Graph:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)), leaf(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [model(x)], [x, *model.parameters()]


class Several(torch.autograd.Function):
    """Takes what is no tensor too, and counts on a gradient for each of its outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, w)
        return x * w, x + shift

    @staticmethod
    def backward(ctx: Any, product: Tensor, total: Tensor) -> tuple[Tensor, None, Tensor]:
        x, w = ctx.saved_tensors
        return product * w + total, None, product * x


@graph
def a_function_one_of_whose_outputs_is_unused() -> Graph:
    x, w = leaf(3), leaf(3)
    return [Several.apply(x, 2.0, w)[0]], [x, w]


@graph
def a_function_one_of_whose_inputs_has_no_gradient() -> Graph:
    x, w = torch.randn(3), leaf(3)
    return list(Several.apply(x, 2.0, w)), [w]


@graph
def sparse_gradients() -> Graph:
    table = nn.Embedding(5, 3, sparse=True)
    return [table(torch.randint(5, (4,)))], [table.weight]


@graph
def a_checkpoint() -> Graph:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)), leaf(3, 4)
    return [checkpoint(model, x, use_reentrant=False)], [x, *model.parameters()]


@graph
def a_second_derivative() -> Graph:
    x, w = leaf(3), leaf(3)
    (slope,) = torch.autograd.grad((x**3 * w).sum(), x, create_graph=True)
    return [slope.square()], [x, w]


@graph
def compiled_code() -> Graph:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), leaf(3, 4)
    return [torch.compile(model, backend="aot_eager")(x)], [x, *model.parameters()]


@graph
def shapes_and_dtypes_that_are_broadcast() -> Graph:
    x, b = leaf(3, 1), leaf(1)
    return [x + torch.randn(3, 4).double() + b], [x, b]


@graph
def a_leaf_and_the_same_root_twice() -> Graph:
    x = leaf(3)
    y = x * 2
    return [x, y, y], [x]


@graph
def vmapped_code() -> Graph:
    x, w = leaf(3, 4), leaf(4)
    return [torch.func.vmap(lambda row: torch.sin(row * w))(x)], [x, w]


@graph
def nested_tensors() -> Graph:
    a, b = leaf(2, 3), leaf(4, 3)
    return [(torch.nested.as_nested_tensor([a, b], layout=torch.jagged) * 2).values()], [a, b]


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # the compiler's, of Python 3.13.0
@pytest.mark.parametrize("name", GRAPHS)
def test_the_gradients_are_the_engines(name: str) -> None:
    roots, wanted = GRAPHS[name]()
    seeds = [torch.randn_like(root) for root in roots]
    found, _ = passed(roots, seeds, wanted)
    expected = torch.autograd.grad(roots, wanted, seeds, allow_unused=True)
    for x, y in zip(found, expected, strict=True):
        if y is None:
            assert x is None or not x.any()
        else:
            assert x is not None
            assert (x.dtype, x.layout, x.shape) == (y.dtype, y.layout, y.shape)
            torch.testing.assert_close(x.to_dense(), y.to_dense())


def test_the_gradients_can_be_differentiated() -> None:
    x, w = leaf(4), leaf(4)
    y = (x.sin() * w).tanh()
    ((slope,), _) = passed([y], [torch.ones(4)], [x], create_graph=True)
    assert slope is not None
    (expected,) = torch.autograd.grad(y, x, torch.ones(4), create_graph=True)
    curved, wanted = (torch.autograd.grad(g.sum(), (x, w), retain_graph=True) for g in (slope, expected))
    for found, right in zip(curved, wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_no_hook_runs_and_nothing_is_kept() -> None:
    model, x, seen = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), leaf(5, 4), []
    model[1].register_full_backward_hook(lambda *_: seen.append("module"))
    model[0].weight.register_hook(lambda grad: seen.append("parameter"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    h = model[0](x)
    h.register_hook(lambda grad: seen.append("tensor"))
    h.grad_fn.register_prehook(lambda grads: seen.append("node"))
    h.retain_grad()
    outputs = model[2](model[1](h))
    passed([outputs], [torch.ones(5, 3)], [x, h, *model.parameters()])
    assert not seen
    assert all(value.grad is None for value in (x, h, *model.parameters()))
    outputs.sum().backward()
    assert sorted(seen) == ["accumulated", "module", "node", "parameter", "tensor"]


def test_gradients_of_weights_that_nobody_wants_are_not_computed() -> None:
    model, x = nn.Linear(4, 3), leaf(5, 4)
    h = x * 2
    outputs = model(h)
    node, answers = outputs.grad_fn, list[Any]()
    note = answers.append  # a function with the list itself would be opaque, since it may change it

    class Watched(Several):
        """Notes what the node before it passes on."""

        @staticmethod
        def backward(ctx: Any, product: Tensor, total: Tensor) -> tuple[Tensor, None, Tensor]:
            note(node(torch.ones(5, 3)))
            return Several.backward(ctx, product, total)

    first, _ = Watched.apply(outputs, 0.0, torch.ones(3))
    passed([first], [torch.ones(5, 3)], [h])
    ((bias, inputs, weight),) = answers
    assert inputs is not None
    assert (bias, weight) == (None, None)


def test_a_checkpoint_runs_once_for_each_pass() -> None:
    calls, layers = [], nn.ModuleList(nn.Linear(4, 4) for _ in range(16))

    def through(x: Tensor) -> Tensor:
        calls.append(len(calls))
        for layer in layers:
            x = layer(x).tanh()
        return x

    x = leaf(3, 4)
    outputs = checkpoint(through, x * 2, use_reentrant=False)
    passes = GraphPass([outputs], [get_gradient_edge(x).node])
    for _ in range(3):
        passes.run(lambda: [torch.ones(3, 4)], lambda node, grads: None)
    assert len(calls) == 1 + 3


def test_random_numbers_that_a_pass_draws_are_not_the_users() -> None:
    x = leaf(3, 4)
    outputs = checkpoint(nn.Dropout(0.5), x * 2, use_reentrant=False, preserve_rng_state=False)
    before = torch.get_rng_state()
    passed([outputs], [torch.ones(3, 4)], [x])
    assert torch.equal(torch.get_rng_state(), before)


class Recomputes(torch.autograd.Function):
    """Runs a module again in its backward, and starts a pass of its own through that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.x, ctx.module = x.detach(), module
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            torch.autograd.backward(ctx.module(x), grad)
        return x.grad, None


class StartsAPass(Recomputes):
    """Calls no module, so that the start of a pass is what tells."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            (found,) = torch.autograd.grad(x.tanh(), x, grad)
        return found, None


@pytest.mark.parametrize("function", [Recomputes, StartsAPass], ids=lambda function: function.__name__)
def test_a_node_that_starts_a_pass_is_opaque(function: type[Recomputes]) -> None:
    module, x, seen = nn.Linear(4, 4), leaf(3, 4), []
    module.register_forward_hook(lambda *_: seen.append("called"))
    h = x * 2
    outputs = function.apply(h, module) * 3
    seen.clear()
    state = torch.get_rng_state()
    (of_outputs, of_h), passes = passed([outputs], [torch.ones(3, 4)], [outputs, h])
    assert of_outputs is not None
    assert of_h is None
    assert get_gradient_edge(h).node in passes.hidden
    assert not seen
    assert module.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    outputs.sum().backward()
    assert x.grad is not None


def test_what_another_way_leads_to_is_hidden_too() -> None:
    """A part of its gradient is not all of it."""
    x = leaf(3, 4)
    h = x * 2
    (found,), passes = passed([StartsAPass.apply(h, nn.Identity()) + h], [torch.ones(3, 4)], [h])
    assert found is None
    assert get_gradient_edge(h).node in passes.hidden


def test_a_function_is_tried_without_running_others_code() -> None:
    module, seen = nn.Linear(4, 4), []
    outputs = Recomputes.apply(leaf(3, 4), module)
    module.register_forward_hook(lambda *_: seen.append("called"))
    assert runs_others_code(outputs.grad_fn)
    assert not seen
    assert not runs_others_code(Several.apply(leaf(3), 2.0, leaf(3))[0].grad_fn)


def test_a_checkpoint_with_hooks_of_the_users_is_opaque() -> None:
    module, x, seen = nn.Linear(4, 4), leaf(3, 4), []
    module.register_forward_hook(lambda *_: seen.append("called"))
    h = x * 2
    outputs = checkpoint(module, h, use_reentrant=False)
    (found,), passes = passed([outputs], [torch.ones(3, 4)], [h])
    assert found is None
    assert passes.hidden
    assert seen == ["called"]


def test_what_a_node_raises_is_raised() -> None:
    x = leaf(3)
    y = x.exp()
    root = y * 2
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        passed([root], [torch.ones(3)], [x])


def test_starts_of_passes_are_torchs_own_again_afterwards() -> None:
    before = torch.autograd.graph._engine_run_backward
    passed([leaf(3) * 2], [torch.ones(3)], [leaf(3)])
    x = leaf(3)
    passed([x * 2], [torch.ones(3)], [x])
    assert torch.autograd.graph._engine_run_backward is before
    assert torch.autograd._engine_run_backward is before


def test_shapes_are_read_before_any_gradient_flows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of a node stays. Between large gradients it would keep the heap from joining the places that they leave."""
    x = leaf(3)
    read, called = [], []
    outputs_of, call = route.outputs_of, GraphPass._called

    def reading(node: Node) -> Any:
        assert not called
        read.append(node)
        return outputs_of(node)

    def calling(self: GraphPass, node: Node, grads: Gradients) -> list[Tensor | None]:
        called.append(node)
        return call(self, node, grads)

    monkeypatch.setattr(route, "outputs_of", reading)
    monkeypatch.setattr(GraphPass, "_called", calling)
    passed([x.exp().sin().cos()], [torch.ones(3)], [x])
    assert len(called) == 3
    assert read[:3] == called
