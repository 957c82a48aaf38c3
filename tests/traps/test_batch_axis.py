"""Traps 4, 5 and 17: parameters without a batch axis, batches on another axis than the first, time steps taken for samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems._base import Forward, randomized
from torch_secorder import FisherMonitor, empirical_fisher_trace, fisher_report
from torch_secorder.batch_axis.evidence import Finding, Open, Unplaced, evidence
from torch_secorder.batch_axis.marks import sample_marks
from torch_secorder.batch_axis.silence import loud_samples
from torch_secorder.batch_axis.sketch import Sketch
from torch_secorder.errors import CurvatureError, ShapeError
from traps.exactness import Square, assert_exact, drawn, numbers

# As many samples as positions and features


@pytest.mark.parametrize(("n", "t"), [(4, 4), (5, 5), (8, 8), (1, 4), (3, 5)])
def test_traps_04_and_05_as_many_samples_as_positions_and_features(n: int, t: int) -> None:
    assert_exact(*drawn(Square(t), n, t))


@pytest.mark.parametrize("n", [4, 5])
def test_trap_04_a_class_token_after_dropout_and_a_second_use(n: int) -> None:
    """With as many samples as rows of each, these rows might be samples, of which two are made of the token alone."""

    def forward(m: Any, x: Tensor) -> Tensor:
        token = F.dropout(m.token.weight, 0.0).expand(len(x), -1, -1)
        return m.layer(torch.cat([token, x], 1)) * m.token.weight.sum(0)[:3]

    words = {"batch_axis": {"outputs": 0}} if n == 5 else {}
    assert_exact(*drawn(Forward(forward, token=nn.Embedding(2, 4), layer=nn.Linear(4, 3)), n, 3, 4), **words)


@pytest.mark.parametrize("move", ["clone", "t", "contiguous", "mul"])
def test_trap_04_a_module_without_a_batch_axis_whose_output_is_moved(move: str) -> None:
    moves: dict[str, Callable[[Tensor], Tensor]] = {
        "clone": lambda b: b.clone().t(),
        "t": lambda b: b.t(),
        "contiguous": lambda b: b.t().contiguous(),
        "mul": lambda b: b.t() * 2,
    }
    model = Forward(
        lambda m, x: m.layer(x).transpose(1, 2) + moves[move](m.places(torch.arange(x.shape[1]))),
        layer=nn.Linear(4, 4),
        places=nn.Embedding(3, 4),
    )
    assert_exact(*drawn(model, 5, 3, 4))


def test_trap_05_windows_and_heads_folded_into_the_batch() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, d = x.shape
        windows = m.one(x.unflatten(1, (2, t // 2)).transpose(1, 2).reshape(n * t // 2, 2, d))
        heads = windows.reshape(n, t, 2, d // 2).transpose(1, 2).reshape(n * 2, t, d // 2)
        return m.two(m.norm(heads)).reshape(n, 2, t, -1).mean(1)

    model = Forward(forward, one=nn.Linear(4, 4), norm=nn.LayerNorm(2), two=nn.Linear(2, 3))
    assert_exact(*drawn(model, 3, 6, 4))
    assert_exact(*drawn(model, 6, 6, 4))


class Placed(nn.Module):
    """A table of positions, read by ids that each sample has of its own or that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.features = nn.Parameter(torch.randn(9, 6)), nn.Parameter(torch.randn(6, 2))
        self.tokens, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        angles = torch.stack([positions.double().sin(), positions.double().cos()], -1)
        places = F.embedding(positions, self.table) + F.linear(angles, self.features)
        return self.head(torch.tanh(self.tokens(ids) + places).mean(1))


@pytest.mark.parametrize("n", [2, 4, 5])
@pytest.mark.parametrize("order", ["own, one, shared", "one, own, shared", "own, shared, one"])
def test_trap_04_ids_that_are_shared_in_some_batches(order: str, n: int) -> None:
    """What was found out in one batch must not be believed of another kind, whatever coincides."""
    positions = {"own": (n, 4), "one": (1, 4), "shared": (4,)}
    torch.manual_seed(17)
    model, ids, y = Placed().double(), torch.randint(9, (n, 4)), torch.randn(n, 3).double()
    for kind in order.split(", ") * 2:
        read = torch.randint(9, positions[kind])
        with FisherMonitor(model, per_sample=True) as monitor:
            numbers(model(ids, read), y).backward()
        for name, parameter in model.named_parameters():
            own = [read[i : i + 1] if kind == "own" else read for i in range(n)]
            losses = [numbers(model(ids[i : i + 1], own[i]), y[i : i + 1]) for i in range(n)]
            t = torch.stack([torch.autograd.grad(loss, parameter)[0].square().sum() for loss in losses])
            torch.testing.assert_close(torch.tensor(monitor.per_sample[name].to_numpy()), t)


def test_trap_04_what_samples_share_does_not_look_like_one_samples_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    open_to_doubt = 0
    for _ in range(300):
        parts = torch.randn(5, 1, 4, 6, generator=generator)
        found = {}
        for silent, factors in ((False, sample_marks(5)), (True, loud_samples(5))):
            sums = [(factor.view(5, 1, 1, 1) * parts).sum(0) for factor in factors]
            found[silent] = evidence([Sketch.of(x, 5) for x in sums], 5, by_silence=silent)
        assert found[True] == Finding(Unplaced.SHARED_BY_SAMPLES)
        open_to_doubt += found[False] is Open.ROUNDING
        assert found[False] in (found[True], Open.ROUNDING)
    assert (
        open_to_doubt < 60
    )  # A sum in one row is near the power of one of its terms now and then, which costs another look.


# Shapes that show no doubt, or that lie


def test_trap_05_features_on_the_first_axis_as_many_as_samples() -> None:
    """No tensor has as many indices on another axis, so that the shapes show no doubt."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.permute(2, 0, 1).reshape(4, -1, 1)).tanh().sum(0).view(-1, 6)

    assert_exact(*drawn(Forward(forward, layer=nn.Linear(1, 1)), 4, 6, 4))


def test_trap_05_parts_called_one_by_one_are_refused_or_told() -> None:
    model, x, y = drawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), 5, 4)
    with FisherMonitor(model), pytest.raises(ShapeError, match=r"batch_axis=0"):
        model[1](model[0](x))
    with FisherMonitor(model, batch_axis=0) as monitor:
        numbers(model[1](model[0](x)), y).backward()
    expected = float(monitor.trace)
    with FisherMonitor(model) as monitor:
        numbers(model(x), y).backward()
    assert float(monitor.trace) == pytest.approx(expected, rel=1e-12)


def test_trap_05_a_model_that_changes_its_batch_axis() -> None:
    """What was found out in earlier batches must not be believed of another graph."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x.transpose(0, 1)).transpose(0, 1) if m.flipped else m.layer(x)

    model = Forward(forward, layer=nn.Linear(4, 3))
    model.flipped = False
    model, x, y = drawn(model, 5, 5, 4)
    monitor, traces = FisherMonitor(model), []
    for model.flipped in (False, True, False):
        monitor.reset()
        with monitor:
            numbers(model(x).tanh(), y).backward()
        traces.append(float(monitor.trace))
    assert traces == pytest.approx([traces[0]] * 3, rel=1e-12)


class Opposite(nn.Module):
    """Two equal and opposite halves of a large output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        z = (self.first(x) * self.scale).repeat(1, 2**16)
        return torch.cat([z, -z], 1)


@pytest.mark.slow
def test_large_outputs_of_two_opposite_halves_show_their_samples() -> None:
    assert_exact(*drawn(Opposite(), 5, 6))


class WithNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x) * self.scale
        return h, h[:, :0]


@pytest.mark.parametrize("n", [5, 9])
def test_an_output_without_elements_beside_another(n: int) -> None:
    model, x, y = randomized(WithNothing()).double(), torch.randn(n, 6).double(), torch.randn(n, 4).double()
    assert_exact(model, x, y, lambda outputs, targets: numbers(outputs[0], targets))


# 17. Causal coupling: time steps taken for samples


class SequenceFirst(nn.Module):
    """A layer that has its samples on the second axis, in a model that has them there too."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.LSTM(4, 4),
        lambda: nn.GRU(4, 4),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
    ],
    ids=["lstm", "gru", "attention", "encoder layer"],
)
@pytest.mark.parametrize("driver", ["report", "function"])
def test_trap_17_time_steps_taken_for_samples_are_refused(driver: str, layer: Callable[[], nn.Module]) -> None:
    """The first step of a causal layer is right alone, and all others are wrong."""
    model, x, y = drawn(SequenceFirst(layer()), 5, 3, 4)
    with pytest.raises(CurvatureError, match=r"alone|batch_axis|batch_first"):
        if driver == "report":
            fisher_report(model, numbers, (x, y), progress=False)
        else:
            empirical_fisher_trace(model, numbers, x, y)


class Conditional(nn.Module):
    """Each sample has a mixture of kernels and of gains of its own; samples are folded into the channels of one image."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.router, self.last = way, nn.Linear(2, 3), nn.Linear(4, 2)
        self.kernels, self.biases = nn.Parameter(torch.randn(3, 4, 2, 3, 3)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, mixture = len(x), self.router(x.mean((2, 3))).sigmoid()
        kernels, biases = torch.einsum("nk,k...->n...", mixture, self.kernels), (mixture @ self.biases).flatten()
        image = x.reshape(1, 2 * n, *x.shape[2:])
        if self.way == "transposed":
            h = F.conv_transpose2d(image, kernels.transpose(1, 2).flatten(0, 1), biases, groups=n)
        elif self.way == "normed":
            h = F.group_norm(image, n) * mixture[:, :2].reshape(1, -1, 1, 1)
            h = F.conv2d(h, kernels.flatten(0, 1), biases, groups=n)
        else:
            h = F.conv2d(image, kernels.flatten(0, 1), biases, groups=n)
        return self.last(h.view(n, 4, *h.shape[2:]).relu().amax((2, 3)))


@pytest.mark.parametrize("way", ["", "transposed", "normed"])
@pytest.mark.parametrize("n", [2, 3])
def test_trap_05_samples_folded_into_channels_as_many_as_classes(n: int, way: str) -> None:
    """With two samples and two classes, it matters that groups of channels do not mix."""
    model, x = Conditional(way).double(), torch.randn(n, 2, 5, 5).double()
    assert_exact(model, x, torch.randn(n, 2).double())
