"""`create_graph=True` against central differences of the float64 loop over samples; and its graph goes when it is let go."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from garbage import uncollected
from oracles import assert_equal, double, exact_fisher, per_sample_squared_norms, total, trace
from problems._base import Forward, randomized
from problems.sharing import TiedHead
from torch_secorder import empirical_fisher_trace, generalized_fisher_trace
from torch_secorder.errors import CurvatureError

STEP = 1e-4  # of a central difference of fourth order: its own error is about 1e-16 / STEP + STEP^4
CLASSES = 3


class Attention(nn.Module):
    """nn.MultiheadAttention on itself, averaged over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class DotProduct(nn.Module):
    """The same by hand, causal, with F.scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.head = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.packed(x).chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(seen.transpose(1, 2).flatten(2).mean(1))


class TiedClassifier(TiedHead):
    """A language model whose head shares the embedding's weight; what it says of the next word, averaged."""

    def __init__(self) -> None:
        super().__init__(words=CLASSES, bias=True)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).mean(1)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def convolution() -> nn.Module:
    first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2), nn.Flatten(), nn.Linear(8, CLASSES))


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES), nn.LayerNorm(CLASSES))


def embedding() -> nn.Module:
    words, head = nn.Embedding(5, 4), nn.Linear(4, CLASSES)
    return Forward(lambda m, ids: m.head(m.words(ids).tanh().mean(1)), words=words, head=head)


def ids(vocabulary: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, (3, 6))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (linear, lambda: torch.randn(4, 4)),
    "convolution": (convolution, lambda: torch.randn(3, 2, 5, 5)),
    "layer_norm": (layer_norm, lambda: torch.randn(4, 4)),
    "embedding": (embedding, ids(5)),
    "tied": (TiedClassifier, ids(CLASSES)),
    "multihead_attention": (Attention, lambda: torch.randn(3, 4, 4)),
    "scaled_dot_product_attention": (DotProduct, lambda: torch.randn(3, 4, 4)),
}
ATTENTION = [name for name in MODELS if "attention" in name]
every_model = pytest.mark.parametrize("name", MODELS)


def setting(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, inputs = MODELS[name]
    model, x = randomized(build()).double(), double(inputs())
    return model, x, torch.arange(len(x)) % CLASSES


def assert_gradient(model: nn.Module, value: Tensor, oracle: Callable[[], Tensor]) -> None:
    """The gradient of `value` is that of `oracle`: in every parameter along a random direction, by differences."""
    parameters = list(model.parameters())
    expected = oracle()
    assert_equal(value, expected, expected)
    slopes = torch.autograd.grad(value, parameters, allow_unused=True)
    slopes = [torch.zeros_like(p) if slope is None else slope for slope, p in zip(slopes, parameters, strict=True)]
    scale = math.sqrt(sum(float(slope.square().sum()) for slope in slopes))
    assert scale > 0
    for (name, p), slope in zip(model.named_parameters(), slopes, strict=True):
        direction = F.normalize(torch.randn_like(p).flatten(), dim=0).view_as(p)
        right, found = difference(p, direction, oracle), float((slope * direction).sum())
        assert abs(found - right) <= 1e-7 * abs(right) + 1e-9 * scale, f"{name}: {found} for {right}"


def difference(p: Tensor, direction: Tensor, oracle: Callable[[], Tensor]) -> float:
    """d oracle / dp along `direction`, by four values of it."""
    start, found = p.detach().clone(), []
    for steps in (-2, -1, 1, 2):
        with torch.no_grad():
            p.copy_(start + steps * STEP * direction)
        found.append(float(oracle()))
    with torch.no_grad():
        p.copy_(start)
    far_below, below, above, far_above = found
    return (8 * (above - below) - (far_above - far_below)) / (12 * STEP)


@every_model
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_the_gradient_of_the_empirical_trace(name: str, loss_fn: nn.CrossEntropyLoss) -> None:
    model, x, y = setting(name)

    def oracle() -> Tensor:
        return total(trace(per_sample_squared_norms(model, loss_fn, x, y), loss_fn.reduction))

    assert_gradient(model, empirical_fisher_trace(model, loss_fn, x, y, create_graph=True), oracle)


@every_model
@pytest.mark.parametrize("loss_type", ["nll", "bce", "mse", "poisson"])
def test_the_gradient_of_the_generalized_trace(name: str, loss_type: str) -> None:
    model, x, _ = setting(name)

    def oracle() -> Tensor:
        return total(trace(exact_fisher(model, x, None, loss_type)))

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no second derivative
        outputs = model(x)
    assert_gradient(model, generalized_fisher_trace(model, outputs, None, loss_type, create_graph=True), oracle)


@pytest.mark.parametrize("name", ATTENTION)
def test_the_gradient_through_fused_attention(name: str) -> None:
    """The kernel that torch chooses on a CPU has no second derivative."""
    model, x, _ = setting(name)
    with pytest.raises(
        CurvatureError, match=r"ScaledDotProductFlash\w* at \w+\.\w+ has no second derivative.*SDPBackend\.MATH"
    ):
        generalized_fisher_trace(model, model(x), None, create_graph=True)


class ChoosesFlash(DotProduct):
    """Asks for fused attention itself, so that nothing around the model can change it."""

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().forward(x)


@pytest.mark.parametrize("function", ["empirical", "generalized"])
def test_what_has_no_second_derivative_is_refused_in_words(function: str) -> None:
    model, x, y = ChoosesFlash(), torch.randn(3, 4, 4), torch.arange(3)
    said = r"ScaledDotProductFlash\w* at packed\.(weight|bias) has no second derivative; compute it under .*SDPBackend\.MATH"
    with pytest.raises(CurvatureError, match=said):
        if function == "empirical":
            empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
        else:
            generalized_fisher_trace(model, model(x), None, create_graph=True)


class Recurrent(nn.Module):
    """An LSTM in float32, which is one fused node for each layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.body, self.head = (
            nn.Linear(3, 4),
            nn.LSTM(4, 4, layers, batch_first=True),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.words(x))[0].mean(1))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("function", ["empirical", "generalized"])
def test_the_gradient_through_a_fused_lstm_is_that_of_the_plain_one(function: str, layers: int) -> None:
    model, x, y = Recurrent(layers), torch.randn(5, 6, 3), torch.arange(5) % CLASSES
    slopes = []
    for one, inputs in ((model, x), (copy.deepcopy(model).double(), x.double())):
        if function == "empirical":
            value = empirical_fisher_trace(one, nn.CrossEntropyLoss(), inputs, y, create_graph=True)
        else:
            value = generalized_fisher_trace(one, one(inputs), None, create_graph=True)
        slopes.append(torch.autograd.grad(value, list(one.parameters())))
    for (name, _), found, expected in zip(model.named_parameters(), *slopes, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5, msg=name)


@every_model
def test_the_gradient_with_observed_labels(name: str) -> None:
    """The empirical Fisher by the other function."""
    model, x, y = setting(name)

    def oracle() -> Tensor:
        return total(trace(per_sample_squared_norms(model, nn.CrossEntropyLoss(), x, y)))

    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
    assert_gradient(model, generalized_fisher_trace(model, outputs, y, labels="observed", create_graph=True), oracle)


@pytest.mark.parametrize("loss_type", ["nll", "bce", "mse", "poisson"])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_the_gradient_of_the_sampled_trace_is_right_on_average(loss_type: str, num_samples: int) -> None:
    """The mean of the draws' gradients is the exact one: how a draw was made must not be differentiated with it.

    In each of 60 calls every sample stands twenty times. The largest of 60 deviations stays below five standard errors, which
    are themselves estimated from 60 values, in 9,997 of 10,000 cases.
    """
    model, x = (
        randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6))).double(),
        double(torch.randn(4, 4)).repeat(20, 1),
    )
    generator = torch.Generator().manual_seed(0)

    def gradient(k: int | None) -> Tensor:
        value = generalized_fisher_trace(*(model, model(x), None, loss_type, k), create_graph=True, generator=generator)
        slopes = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
        return torch.cat([slope.flatten() for slope in slopes])

    draws = torch.stack([gradient(num_samples) for _ in range(60)])
    expected, spread = gradient(None), draws.std(0)
    away = (draws.mean(0) - expected).abs()
    assert (away <= 5 * spread / math.sqrt(len(draws)) + 1e-9 * float(expected.abs().max())).all()


# What the graph holds


class Watch:
    """Every input and output of every layer, and the gradients of outputs, for as long as something holds them."""

    def __init__(self, model: nn.Module):
        self._seen: list[weakref.ref[Tensor]] = []
        for module in model.modules():
            if module is not model:
                module.register_forward_hook(self._called)

    def _called(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        for tensor in (*args, *outputs):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._seen.append(weakref.ref(tensor))
                tensor.register_hook(lambda grad: self._seen.append(weakref.ref(grad)))

    def alive(self) -> int:
        return sum(reference() is not None for reference in self._seen)


def empirical(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)


def generalized(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(x)
    return generalized_fisher_trace(model, outputs, y, create_graph=True)


both = pytest.mark.parametrize("function", [empirical, generalized], ids=["empirical", "generalized"])


@pytest.mark.slow
@every_model
@both
def test_memory_goes_with_the_value(name: str, function: Callable[..., Tensor]) -> None:
    model, x, y = setting(name)
    watch = Watch(model)
    with uncollected():
        value = function(model, x, y)
        assert watch.alive() > 0
        del value
        assert watch.alive() == 0


@pytest.mark.slow
@every_model
@both
def test_memory_goes_with_a_backward_pass(name: str, function: Callable[..., Tensor]) -> None:
    model, x, y = setting(name)
    watch = Watch(model)
    with uncollected():
        value = function(model, x, y)
        value.backward()
        assert watch.alive() == 0
        assert math.isfinite(float(value.detach()))


@pytest.mark.slow
@both
def test_nothing_is_left_behind_by_many_steps(function: Callable[..., Tensor]) -> None:
    model, x, y = setting("convolution")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch, left = Watch(model), []
    with uncollected():
        for _ in range(4):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + 0.1 * function(model, x, y)).backward()
            optimizer.step()
            left.append(watch.alive())
    assert left == [0] * 4


@pytest.mark.parametrize("reentrant", [False, True], ids=["usual", "reentrant"])
def test_the_gradient_through_a_checkpoint_is_that_without_it(reentrant: bool) -> None:
    """Its forward would run again when the library's hooks are gone."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(checkpoint(lambda h: m.layer(h).tanh(), m.first(x), use_reentrant=reentrant))

    own = {"first": nn.Linear(4, 4), "layer": nn.Linear(4, 4), "head": nn.Linear(4, CLASSES)}
    model, plain = Forward(forward, **own), Forward(lambda m, x: m.head(m.layer(m.first(x)).tanh()), **own)
    x, y = torch.randn(5, 4), torch.randint(CLASSES, (5,))
    found = []
    for one in (model, plain):
        value = empirical_fisher_trace(one, nn.CrossEntropyLoss(), x, y, create_graph=True)
        found.append((value.detach(), *torch.autograd.grad(value, list(one.parameters()))))
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without)
    assert torch.utils.checkpoint._checkpoint_without_reentrant_generator.__module__ == "torch.utils.checkpoint"


def test_a_reentrant_checkpoint_of_inputs_without_a_gradient_has_none_if_the_trace_is_differentiated() -> None:
    """Training gives nothing to what is inside, which torch warns of."""
    model = Forward(
        lambda m, x: m.head(checkpoint(m.layer, x, use_reentrant=True)),
        layer=nn.Linear(4, 4),
        head=nn.Linear(4, CLASSES),
    )
    x, y = torch.randn(5, 4), torch.randint(CLASSES, (5,))
    value = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    torch.testing.assert_close(value.detach(), empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y))
    first, *_ = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    assert first is None


class BatchesOfFour(nn.Module):
    """Takes batches of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().view(4, -1))


class WithState(nn.Module):
    """Keeps its samples' states for the next batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, CLASSES)
        self.register_buffer("state", torch.ones(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.state = self.cell(x, self.state)
        return self.head(self.state)


@pytest.mark.parametrize("model", [BatchesOfFour(), WithState()], ids=lambda model: type(model).__name__)
def test_what_takes_whole_batches_only_is_differentiated_unverified(model: nn.Module) -> None:
    """None of its samples runs alone, which is refused; what the refusal says is right, and so is its derivative."""
    model, x, y, loss_fn = model.double(), torch.randn(4, 3).double(), torch.arange(4) % CLASSES, nn.CrossEntropyLoss()
    with pytest.raises(CurvatureError, match="verify=False returns the numbers unchecked"):
        empirical_fisher_trace(model, loss_fn, x, y, create_graph=True)
    found = empirical_fisher_trace(model, loss_fn, x, y, create_graph=True, verify=False)
    named = list(model.parameters())
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, named, create_graph=True) for loss in losses]
    expected = torch.stack([g.square().sum() for row in rows for g in row]).sum() / 4
    assert_equal(found, expected, expected)
    for ours, theirs in zip(torch.autograd.grad(found, named), torch.autograd.grad(expected, named), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_batch_norm_in_bfloat16() -> None:
    """Its statistics are in half precision, too, beside inputs that are widened."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))
    model(torch.randn(64, 3))
    model, x, y = model.eval().bfloat16(), torch.randn(4, 3).bfloat16(), torch.arange(4) % CLASSES
    found = empirical_fisher_trace(model, nn.CrossEntropyLoss(), x, y, create_graph=True)
    slopes = torch.autograd.grad(found, list(model.parameters()))
    wide, named = model.double(), list(model.parameters())
    losses = nn.functional.cross_entropy(wide(x.double()), y, reduction="none")
    rows = [torch.autograd.grad(loss, named, create_graph=True) for loss in losses]
    expected = torch.stack([g.square().sum() for row in rows for g in row]).sum() / 4
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(slopes, torch.autograd.grad(expected, named), strict=True):
        assert (ours.double() - theirs).norm() < 0.05 * theirs.norm()  # of numbers with eight bits
